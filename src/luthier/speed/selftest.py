"""A faster form beside the plain one, on random input with random factors: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Segments
from ..modelling import attention
from ..modelling.attention import How
from ..modelling.shards import gathered
from ..modelling.site import Frame, using

TOKENS = 24
PREFIX = 4  # of these, where attention is compared: keys and values that stand before the others
TOLERANCE, HALF_TOLERANCE = 1e-4, 4e-2  # largest difference relative to the largest value, float32 and 16 bits

Form = Callable[[Tensor], Sequence[Tensor]]


def differs(plain: Form, faster: Form, edits: Iterable[nn.Module], width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether two forms of the same differ by more than rounding at x (1, TOKENS, width), in outputs or gradients; what raises differs.

    ``edits``: their parameters are random meanwhile (LoRA's B starts at zero, which would hide much), and their gradients are compared too.
    """
    g = torch.Generator().manual_seed(0)
    with _random(edits, g) as params, torch.enable_grad():
        x = torch.randn(1, TOKENS, width, generator=g).to(device, dtype)
        upstream: list[Tensor] = []
        found = []
        for form in (plain, faster):
            try:
                leaf = x.clone().requires_grad_()
                outs = list(form(leaf))
                if not upstream:
                    upstream = [torch.randn(y.shape, generator=g).to(y) for y in outs]
                gradients = torch.autograd.grad(outs, [leaf, *params], upstream, allow_unused=True)
            except (RuntimeError, TypeError, ValueError, AttributeError):
                return True
            found.append([*outs, *gradients])
    most = TOLERANCE if dtype == torch.float32 else HALF_TOLERANCE
    return len(found[0]) != len(found[1]) or any(_apart(a, b, most) for a, b in zip(*found, strict=True))


def _apart(a: Tensor | None, b: Tensor | None, most: float) -> bool:
    if a is None or b is None:
        return a is not b
    if a.shape != b.shape or a.dtype != b.dtype:
        return True
    a, b = a.detach().float(), b.detach().float()
    return not bool((a - b).abs().max() <= most * a.abs().max().clamp(min=1e-6))


@contextmanager
def _random(edits: Iterable[nn.Module], g: torch.Generator) -> Iterator[list[Tensor]]:
    """Random values in the trainable parameters of edits, which get their own back bit for bit."""
    params = list({id(p): p for e in edits for p in e.parameters() if p.requires_grad}.values())
    kept = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p in params:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
        yield list(params)
    finally:
        with torch.no_grad():
            for p, before in zip(params, kept, strict=True):
                p.copy_(before)


@contextmanager
def evaluating(edits: Sequence[nn.Module]) -> Iterator[Sequence[Any]]:
    """Edits in evaluation mode, where dropout is off."""
    modes = [e.training for e in edits]
    try:
        for e in edits:
            e.eval()
        yield edits
    finally:
        for e, mode in zip(edits, modes, strict=True):
            e.train(mode)


@contextmanager
def at_hand(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While this lasts these modules hold all of their weights, where ranks share a base: outside of a forward each has only its part."""
    with ExitStack() as stack:
        for module in {id(m): m for outer in modules for m in outer.modules()}.values():
            stack.enter_context(gathered(module))
        yield


def attends(by_hand: Any, heads: int, key_heads: int, d: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention over packed examples gives with ``by_hand`` what attention.attend gives without: causal, both ways, in windows, with shared beginnings,
    with prefixes. What it declines is not given."""

    def asked(*given: Any) -> Tensor:
        if (y := by_hand(*given)) is None:
            raise RuntimeError("the faster form declines")
        return y  # type: ignore[no-any-return]

    def form(served: Any) -> Form:
        def run(x: Tensor) -> list[Tensor]:
            parts = x.view(1, TOKENS, -1, d).split([heads, key_heads, key_heads], 2)
            q, k, v = (t[:, :-PREFIX].transpose(1, 2) for t in parts)
            module, out = nn.Module(), []
            for segments, how, prefixed in _cases():
                module.is_causal = how.causal  # type: ignore[assignment]
                prefix = {"a": {module: (parts[1][0, -PREFIX:], parts[2][0, -PREFIX:])}} if prefixed else {}
                with using(Frame("a", segments, prefixes=prefix, by_hand=served)):
                    y = attention.attend(module, q, k, v, None, scaling=how.scaling, sliding_window=how.window)[0]
                out.append(y[segments.example((1, TOKENS - PREFIX)).to(y.device) >= 0])
            return out

        return run

    return not differs(form(None), form(asked), [], (heads + 2 * key_heads) * d, dtype, device)


def _cases() -> list[tuple[Segments, How, bool]]:
    """Two examples and padding; a beginning with two that go on from it: what is asked of them, and whether a prefix is before them."""
    apart = Segments(torch.tensor([0, 0]), torch.tensor([0, 7]), torch.tensor([7, 9]))
    shared = Segments(torch.tensor([0, 0, 0]), torch.tensor([0, 7, 13]), torch.tensor([7, 6, 5]), parent=torch.tensor([-1, 0, 0]))
    ways = [(apart, None, True), (apart, 3, True), (apart, None, False), (apart, 3, False), (shared, None, True), (shared, 5, True)]
    out = [(s, How(0.0, 0.3, window, None, causal), False) for s, window, causal in ways]
    return out + [(s, How(0.0, 0.3, None, None, causal), True) for s, window, causal in ways if window is None]
