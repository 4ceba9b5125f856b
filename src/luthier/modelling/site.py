"""Where deltas meet a model, once for all methods: Frame, Edit, Site.

A route names the delta that serves an example: None is the base, "a" one delta, "a+b" a stack of two, applied in that order.
A Frame says which route serves which example and where examples lie in the stream. It is an immutable value in one cell, read by every Site and by
attention. Recomputation under gradient checkpointing runs after the forward has returned, so `restoring` puts the same frame back: a plain
context manager around the forward would be gone by then, and the gradients silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Incompatible, Segments

Route = str | None | tuple[str | None, ...]
Faster = Callable[[Tensor, str], Tensor | None]  # (x, a route that serves all examples) -> what the Site would give, or None: not now


@dataclass(frozen=True, eq=False)
class Frame:
    """One forward's circumstances."""

    route: Route = None  # one name (or None: the base) for everything, or one per example
    segments: Segments | None = None  # where examples lie; None: one example a row, and attention masks come from transformers
    example_BT: Tensor | None = None  # (B, T) on the device, -1 on padding; needed by a mixed route over segments only
    prefixes: Mapping[str, Mapping[nn.Module, tuple[Tensor, Tensor]]] = field(default_factory=dict)  # delta -> attention module -> keys, values (P, H_kv, d)
    plans: dict[Any, Any] = field(default_factory=dict)  # what attention worked out for these segments, shared by the layers
    by_hand: Any = None  # attention over segments where torch's own is slow (speed/byhand.py, varlen.py)

    def serves(self, name: str, shape: tuple[int, int]) -> Tensor:
        """(B, T) or (B, 1): where in an input of this shape a mixed route has the delta ``name``; nowhere on padding."""
        assert isinstance(self.route, tuple)
        on = [name in members(r) for r in self.route]
        if self.example_BT is not None and self.example_BT.shape == shape:
            return torch.tensor([*on, False], device=self.example_BT.device)[self.example_BT]  # index -1 (padding) reads the appended False
        if self.segments is None and shape[0] == len(on):
            return torch.tensor(on)[:, None]
        raise Incompatible(f"this module sees inputs of shape {shape}, not (rows, tokens); examples cannot be told apart in it")


def members(route: str | None) -> tuple[str, ...]:
    """The deltas of one example's route, in the order in which they apply."""
    return () if route is None else tuple(route.split("+"))


_CELL: ContextVar[Frame | None] = ContextVar("luthier_frame", default=None)


def current() -> Frame | None:
    """The frame of the forward that is running, or None."""
    return _CELL.get()


@contextmanager
def using(frame: Frame | None) -> Iterator[None]:
    """Run a forward under ``frame``."""
    token = _CELL.set(frame)
    try:
        yield
    finally:
        _CELL.reset(token)


def restoring() -> tuple[Any, Any]:
    """``context_fn`` for torch.utils.checkpoint: the recomputation sees the frame of its forward."""
    return nullcontext(), using(current())


class Edit(nn.Module):
    """One delta at one place. Override what it changes."""

    def before(self, x: Tensor) -> Tensor:
        """Change the module's input (..., in)."""
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Change the module's output: x (..., in) as the module saw it, y (..., out)."""
        return y

    def term(self) -> tuple[Tensor, Tensor, float] | None:
        """(A (r, in), B (out, r), s) where all that this edit does now is to add s (x A') B' to the output; else None."""
        return None

    def fold(self, weight: Tensor) -> Tensor | None:
        """The weight (out, in) with this edit written in, or None where that is impossible."""
        return None

    def fold_bias(self, bias: Tensor) -> Tensor:
        """The bias (out,) with this edit written in, beside the weight."""
        return bias


class Site(nn.Module):
    """Stands once for an edited module: the base and its edits by delta name."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.edits = nn.ModuleDict()
        self.active: str | None = None  # what serves a forward that runs outside any frame
        self.faster: Faster | None = None  # the same in fewer operations, where there is such a form

    def __getattr__(self, name: str) -> Any:
        # Models read weight, bias or in_features of their own linears: those stay the base's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        frame = _CELL.get()
        route = self.active if frame is None else frame.route
        if route is None or not self.edits:
            return self.base(x, *args, **kwargs)
        if self.faster is not None and isinstance(route, str) and not args and not kwargs and (y := self.faster(x, route)) is not None:
            return y
        if isinstance(route, tuple):
            return self._mixed(frame, route, x, *args, **kwargs)  # type: ignore[arg-type]
        edits: list[Edit] = [self.edits[n] for n in members(route) if n in self.edits]  # type: ignore[misc]
        for edit in edits:
            x = edit.before(x)
        out = self.base(x, *args, **kwargs)
        if not edits:
            return out
        y, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)  # blocks and attentions may return more than their output
        for edit in edits:
            y = edit.after(x, y)
        return y if rest is None else (y, *rest)

    def _mixed(self, frame: Frame, route: tuple[str | None, ...], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Different deltas in one batch: the base once, each edit on its own examples' positions."""
        order = _in_order([[n for n in members(r) if n in self.edits] for r in dict.fromkeys(route)])
        where = {n: frame.serves(n, (x.shape[0], x.shape[1])).to(x.device) for n in order}
        for name, mask in where.items():
            x = torch.where(_over(mask, x), self.edits[name].before(x), x)  # type: ignore[operator]
        out = self.base(x, *args, **kwargs)
        y, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        for name, mask in where.items():
            y = torch.where(_over(mask, y), self.edits[name].after(x, y), y)  # type: ignore[operator]
        return y if rest is None else (y, *rest)

    @torch.no_grad()
    def fold(self, name: str) -> None:
        """Write one edit into the base's weight and forget it. Adds in fp32. Raises Incompatible where the edit cannot fold."""
        weight = self.base.weight
        if weight is None:
            raise Incompatible("this weight is stored in codes, which nothing can be added to; luthier merge writes such a base out in floats first")
        transposed = type(self.base).__name__ == "Conv1D"  # GPT-2 keeps (in, out)
        dense = weight.t() if transposed else weight
        folded = self.edits[name].fold(dense.float())  # type: ignore[operator]
        if folded is None:
            raise Incompatible(f"{type(self.edits[name]).__name__} cannot be folded into a weight")
        weight.copy_(folded.t() if transposed else folded)
        if getattr(self.base, "bias", None) is not None:
            self.base.bias.copy_(self.edits[name].fold_bias(self.base.bias.float()))  # type: ignore[operator]
        del self.edits[name]


def _in_order(stacks: list[list[str]]) -> list[str]:
    """One order in which every stack keeps its own. Raises Incompatible where one batch asks for two orders of the same deltas."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for stack in stacks:
        for below, name in zip([None, *stack], stack, strict=False):
            sorter.add(name, *([] if below is None else [below]))
    try:
        return list(sorter.static_order())
    except CycleError as e:
        raise Incompatible(f"one batch stacks the same deltas in two orders ({' before '.join(e.args[1])}); give such examples batches of their own") from None


def _over(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (B, T) or (B, 1) that broadcasts over a tensor (B, T, ...)."""
    return mask[(...,) + (None,) * (x.dim() - 2)]


def site_at(model: nn.Module, path: str) -> Site:
    """The Site at a module path of the untouched base; made, around the module, where there is none yet."""
    module = model.get_submodule(path)
    if isinstance(module, Site):
        return module
    site = Site(module)
    parent, _, leaf = path.rpartition(".")
    holder = model.get_submodule(parent)
    setattr(holder.base if isinstance(holder, Site) else holder, leaf, site)  # a module inside an edited one is called by the edited one's base
    return site


def sites(model: nn.Module) -> dict[str, Site]:
    """All sites by the path of the module they stand for."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Site)}


def unwrap(model: nn.Module) -> None:
    """Give the model its own modules back where no edit is left."""
    for path, site in reversed(sites(model).items()):  # what stands inside an edited module first: its path runs through that one's base
        if not site.edits:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, site.base)


def clean_name(name: str) -> str:
    """A parameter or module name as it is in the untouched base."""
    return name.replace(".base.", ".").removesuffix(".base")
