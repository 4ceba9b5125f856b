"""Hard-concrete gates: random numbers in [0, 1] that are exactly 0 or 1 with a chance one can differentiate.

Louizos, Welling & Kingma, 2018, arXiv 1712.01312. For u uniform in (0, 1) and a gate's parameter a (the paper's log alpha):

    s = sigmoid((log u - log(1 - u) + a) / temperature)       equation 10
    z = min(1, max(0, s (high - low) + low))                  equation 11
    P(z > 0) = sigmoid(a - temperature log(-low / high))      equation 12
    at test time z = min(1, max(0, sigmoid(a) (high - low) + low))    equation 13

How it differs from the paper:
1. ``gated`` keeps nothing of a tensor's size between forward and backward but what exists anyway: the gate is computed again in backward, so a gate on
   every weight of a model costs no activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class HardConcrete:
    """The shape of the distribution: stretched to (low, high) and clamped to [0, 1]. low < 0 < 1 < high."""

    low: float = -1.5
    high: float = 1.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        assert self.low < 0 and self.high > 1 and self.temperature > 0, "a hard-concrete gate needs low < 0, high > 1 and a temperature above 0"

    def gate(self, a: Tensor, noise: Tensor | None) -> Tensor:
        """z in the shape of ``a``. ``noise``: log u - log(1 - u) in the same shape; None: the gate at test time."""
        return self._stretched(self._concrete(a, noise)).clamp(0, 1)

    def slope(self, a: Tensor, noise: Tensor | None) -> Tensor:
        """dz / da: zero where the gate is clamped."""
        s = self._concrete(a, noise)
        t = self._stretched(s)
        inside = (t > 0) & (t < 1)
        return torch.where(inside, s * (1 - s) * ((self.high - self.low) / (1.0 if noise is None else self.temperature)), 0.0)

    def open(self, a: Tensor) -> Tensor:
        """P(z > 0), differentiable; its sum over gates is the expected number that are open."""
        return torch.sigmoid(a - self.temperature * math.log(-self.low / self.high))

    def _concrete(self, a: Tensor, noise: Tensor | None) -> Tensor:
        return torch.sigmoid(a) if noise is None else torch.sigmoid((noise + a) / self.temperature)

    def _stretched(self, s: Tensor) -> Tensor:
        return s * (self.high - self.low) + self.low


def logistic_(out: Tensor, generator: torch.Generator) -> Tensor:
    """Fill with log u - log(1 - u), u uniform in (0, 1), in place."""
    return out.uniform_(generator=generator).logit_(eps=1e-6)


def gated(own: Tensor, value: Tensor, a: Tensor, group: Tensor | None, noise: Tensor | None, shape: HardConcrete) -> Tensor:
    """own + z(a) * group * value, summed in fp32 and rounded once to own's dtype.

    own, value, a and noise have one shape; group is a scalar (the gate of the whole tensor) or None. Differentiable in own, value, a and group.
    """
    return _Gated.apply(own, value, a, group, noise, shape)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, value: Tensor, a: Tensor, group: Tensor | None, noise: Tensor | None, shape: HardConcrete) -> Tensor:
        ctx.save_for_backward(value, a, group, noise)
        ctx.shape, ctx.dtype = shape, own.dtype
        change = shape.gate(a, noise).mul_(value)
        if group is not None:
            change.mul_(group)
        return change.add_(own).to(own.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        value, a, group, noise = ctx.saved_tensors
        g_own = grad if ctx.needs_input_grad[0] else None
        grad = grad.to(value.dtype)
        g_gate = grad * value  # by z * group
        z = ctx.shape.gate(a, noise)
        g_group = None if group is None else (g_gate * z).sum().view(group.shape)
        g_value = grad * z
        if group is not None:
            g_value.mul_(group)
            g_gate.mul_(group)
        return g_own, g_value, g_gate.mul_(ctx.shape.slope(a, noise)), g_group, None, None
