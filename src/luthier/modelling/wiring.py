"""How a block's residual stream runs, measured: where the stream enters the feed-forward sublayer, and what normalises the sum behind it.

Both differ between families of the same module names (BART normalises the sum, mBART the input), so two tokens are sent through the model and the
very tensors that pass are compared; nothing is assumed from names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Base
from .anatomy import Block


@dataclass(frozen=True)
class Wiring:
    """One block's residual stream around its feed-forward."""

    stream: str  # path of the module whose INPUT is the residual stream the feed-forward's output is added to
    closing: str | None  # path of the normalisation of that sum, where there is one (BERT's); its output is the block's


def wirings(base: Base, own: Sequence[Block]) -> dict[str, Wiring]:
    """Wiring by block path. On the meta device, where nothing passes, every model is taken for one that normalises the input of its feed-forward."""
    if next(base.model.parameters()).device.type == "meta":
        return {b.path: Wiring(b.norms[-1] if b.norms else b.mlp_in, None) for b in own}
    seen = _pass_two_tokens(base, {p for b in own for p in (b.path, b.mlp_in, *b.norms)})
    out = {}
    for b in own:
        entering, leaving = seen[b.mlp_in][0], seen[b.path][1]
        passed = [n for n in b.norms if n in seen]  # a block may hold a norm it does not use
        before = next((n for n in passed if seen[n][1] is entering), None)
        closing = next((n for n in passed if seen[n][1] is leaving), None)
        # Where the sum is normalised the feed-forward reads the stream itself, as that norm's output.
        out[b.path] = Wiring(b.mlp_in if before is None or closing is not None else before, closing)
    return out


def _pass_two_tokens(base: Base, paths: set[str]) -> dict[str, tuple[Any, Any]]:
    """(input, output) of modules in a forward of two tokens."""
    model: Any = base.model
    ids = torch.ones(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if base.anatomy.kind == "encoder_decoder" else {})
    with torch.no_grad(), _evaluating(model), _watching(model, paths) as seen:
        model(**inputs)
    return seen


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _watching(model: nn.Module, paths: set[str]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Collect what passes through modules; a tuple's first element counts."""
    seen: dict[str, tuple[Any, Any]] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            seen[path] = (given, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [model.get_submodule(p).register_forward_hook(watch(p), with_kwargs=True) for p in sorted(paths)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
