"""A faster form beside the plain one, on random input with random factors: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..shards import gathered

TOKENS = 24
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
