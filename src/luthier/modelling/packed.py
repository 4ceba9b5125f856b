"""Linears whose frozen weight is stored in codes: the module and its gradient, once for all precisions that pack.

The weight is decoded in the forward and again in the backward, and never saved between them: a packed linear keeps its codes, and for a moment one decoded
weight. Its output does not depend on whether gradients are wanted, and nothing of it changes in use, so evaluating in the middle of training leaves training
as it was. `keep` holds the decoded weight as well, where memory allows: the same numbers without the decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .shards import cut


class PackedLinear(nn.Module):
    """y = x W^T + b with W (out, in) in codes. A kind of storage says how a weight is written and read; its tensors are buffers, which nothing trains.

    A bias stays a parameter. Floating-point constants beside the codes keep their dtype when the model is cast.
    """

    weight: Tensor | None = None  # there is none; some models (T5) ask before they cast
    resident: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None, *, transposed: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed  # transposed: it was a Conv1D, which keeps (in, out)
        self.bias = bias
        self.cut_from: dict[str, torch.Size] = {}  # stored tensors of which only this rank's part is here, and their whole shapes
        self.register_buffer("resident", None, persistent=False)

    def write(self, weight: Tensor) -> None:
        """Store a weight (out, in); on the meta device, the shapes of what would be stored."""
        raise NotImplementedError

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that is stored, decoded and rounded to ``dtype``."""
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor]:
        """The codes and constants by name: what is written to a file, and what memory holds."""
        held = (*self._buffers.items(), *self._parameters.items())  # parameters where the base is sharded
        return {n: t for n, t in held if t is not None and n not in ("resident", "bias")}

    def cut(self, index: int, count: int) -> None:
        """Keep one of so many parts of what is stored, cut along the first dimension; what has none stays whole."""
        for name, t in self.stored().items():
            if t.dim():
                self.cut_from[name] = t.shape
                self._buffers[name] = cut(t, index, count)

    @property
    def count(self) -> int:
        """Numbers that the weight stands for."""
        return self.in_features * self.out_features

    def keep(self, dtype: torch.dtype | None) -> None:
        """Hold the decoded weight in this dtype beside the codes; None: only the codes."""
        self.resident = None if dtype is None else self.values(dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight, from memory where it is held in this dtype."""
        return self.resident if self.resident is not None and self.resident.dtype == dtype else self.values(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.resident is not None and self.resident.dtype == x.dtype:
            return linear(x, self.resident, bias)
        return _Product.apply(x, bias, self)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        buffers = dict(self._buffers)
        self._buffers.clear()
        super()._apply(fn, recurse)
        for name, b in buffers.items():
            moved = None if b is None else fn(b)
            self._buffers[name] = b.to(moved.device) if b is not None and moved is not None and moved.dtype != b.dtype else moved
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """x W^T + b; only the module is remembered, and its weight is decoded again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: PackedLinear) -> Tensor:
        ctx.module = module
        return linear(x, module.values(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        wants_x, wants_bias, _ = ctx.needs_input_grad
        return (
            grad @ ctx.module.values(grad.dtype) if wants_x else None,
            grad.flatten(0, -2).sum(0) if wants_bias else None,
            None,
        )


def packed(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """(path, module) of all packed linears, sites seen through."""
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield path.replace(".base.", ".").removesuffix(".base"), module


def replace(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put modules at paths, in place of what stands there."""
    for path, module in new.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def dequantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model ordinary linears that hold the stored values, rounded to ``dtype``; edits stay where they are."""
    for path, module in [(p, m) for p, m in model.named_modules() if isinstance(m, PackedLinear)]:
        replace(model, {path: unpacked(module, dtype)})


def unpacked(module: PackedLinear, dtype: torch.dtype) -> nn.Module:
    """The ordinary linear (GPT-2's Conv1D where it was one) that holds the stored weight, rounded to ``dtype``."""
    weight = module.dense(dtype)
    out: Any
    if module.transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            out = Conv1D(module.out_features, module.in_features)
        out.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
    else:
        out = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        out.weight = nn.Parameter(weight.clone() if weight is module.resident else weight, requires_grad=False)
    if module.bias is not None:
        out.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=module.bias.requires_grad)
    elif module.transposed:
        out.bias = nn.Parameter(torch.zeros(module.out_features, dtype=dtype, device=weight.device), requires_grad=False)
    return out
