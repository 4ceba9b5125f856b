"""Products with frozen weights and their low-rank terms, as one step of autograd: y_i = x W_i' + b_i + s_i (x A_i') B_i' for linears that read the same x.

Written out by hand because autograd's own form of LoRA spends more on what is between the products than the products of the low-rank terms take
(docs/log.md has the profile): a second tensor as large as y for each term, a scaled copy of each gradient, a sum of the same size for each contribution to
the gradient of x. Here, with T tokens, k inputs, n outputs, r ranks, and ' for a transpose:

    forward    H' = [A_1; A_2; ...] x'          one skinny product for all; y_i = x W_i' + b_i, then y_i += s_i H_i B_i' in place
    backward   P_i' = s_i B_i' G_i'             dx = G_1 W_1, then += G_2 W_2, ..., and at last += P A for all of them at once
               dB_i = s_i G_i' H_i              dA = P' x, one product for all

Kept for the backward: x once, and H' (ranks, T), in the dtype of the activations. The low-rank factors are rounded to that dtype here, once a forward; their
gradients are given back in their own (fp32). Equal to the plain form up to the order of rounding: fewer roundings in 16 bits, about 1e-6 in float32.
A weight in codes is decoded in the forward and again in the backward, as in packed.py. Hu et al., 2021, arXiv 2106.09685, has the term; the backward is its
derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..modelling.packed import PackedLinear


class Frozen:
    """A linear's frozen weight, however it is stored, for products in one dtype."""

    def __init__(self, module: Any):
        self.module = module
        self.stored_in_codes = isinstance(module, PackedLinear)
        self.transposed = type(module).__name__ == "Conv1D"  # GPT-2 keeps (in, out)

    @staticmethod
    def reads(module: nn.Module) -> bool:
        """Whether this is a linear whose product is known here: of the usual classes, its weight its own."""
        if isinstance(module, PackedLinear):
            return type(module).forward is PackedLinear.forward
        return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and not hasattr(type(module), "weight"))

    def usable(self, dtype: torch.dtype) -> bool:
        """Whether it is frozen, in this dtype, and computed as its class does now (decoding lays weights out for itself)."""
        if "forward" in self.module.__dict__ or (self.module.bias is not None and self.module.bias.requires_grad):
            return False
        return self.stored_in_codes or (self.module.weight.dtype == dtype and not self.module.weight.requires_grad)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in)"""
        if self.stored_in_codes:
            return self.module.dense(dtype)  # type: ignore[no-any-return]
        return self.module.weight.t() if self.transposed else self.module.weight  # type: ignore[no-any-return]

    def product(self, x_Tk: Tensor) -> Tensor:
        """x W' + b, as the module's own forward computes it: bit for bit the base's."""
        bias = self.module.bias
        if self.transposed and not self.stored_in_codes:
            return torch.addmm(bias, x_Tk, self.module.weight)
        return linear(x_Tk, self.weight(x_Tk.dtype), None if bias is None else bias.to(x_Tk.dtype))


Term = tuple[Tensor, Tensor, float]  # A (r, in), B (out, r), s


def products(x: Tensor, linears: Sequence[Frozen], terms: Sequence[Term | None]) -> tuple[Tensor, ...]:
    """The outputs (..., out) of linears that read the same x (..., in), each with its low-rank term where it has one. Differentiable in x, A and B."""
    return _Products.apply(x, tuple(linears), scales(terms), *factors(terms))  # type: ignore[no-any-return]


def scales(terms: Sequence[Term | None]) -> tuple[float, ...]:
    """s of each linear."""
    return tuple(0.0 if t is None else t[2] for t in terms)


def factors(terms: Sequence[Term | None]) -> list[Tensor | None]:
    """A_1, B_1, A_2, B_2, ...: None for a linear without a term."""
    return [f for t in terms for f in ((None, None) if t is None else t[:2])]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linears: tuple[Frozen, ...], scales: tuple[float, ...], *factors: Tensor | None) -> tuple[Tensor, ...]:
        x_Tk = x.reshape(-1, x.shape[-1])
        ctx.group = group = Group(linears, scales, [None if a is None else len(a) for a in factors[::2]])
        work = group.work(x.dtype, factors)
        h_RT = group.low(x_Tk, work)
        outs = group.forward(x_Tk, h_RT, work)
        ctx.save_for_backward(x, h_RT, *work)
        ctx.set_materialize_grads(False)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, h_RT, *work = ctx.saved_tensors
        wants_x, _, _, *wants = ctx.needs_input_grad
        flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
        if all(g is None for g in flat):
            return (None,) * len(ctx.needs_input_grad)
        wants = [w and flat[i // 2] is not None for i, w in enumerate(wants)]
        dx_Tk, p_RT, given = ctx.group.backward(h_RT, work, flat, wants_x, wants)
        ctx.group.of_a(p_RT, x.reshape(-1, x.shape[-1]), given, wants)
        return (None if dx_Tk is None else dx_Tk.view(x.shape), None, None, *given)


class Group:
    """Linears that read the same x, and the products of a forward and a backward through them. It holds no tensor of a step."""

    def __init__(self, linears: Sequence[Frozen], scales: Sequence[float], ranks: Sequence[int | None]):
        self.linears, self.scales = linears, scales
        self.rows: list[slice | None] = []  # of each linear among the stacked A
        at = 0
        for r in ranks:
            self.rows.append(None if r is None else slice(at, at + r))
            at += r or 0

    def work(self, dtype: torch.dtype, factors: Sequence[Tensor | None]) -> list[Tensor]:
        """The factors rounded to the dtype of a product: all A stacked (R, k), then each B' (r, n); [] where no linear has a term."""
        a, b = ([f.to(dtype) for f in factors[i::2] if f is not None] for i in (0, 1))
        return [torch.cat(a) if len(a) > 1 else a[0], *(f.t().contiguous() for f in b)] if a else []

    def low(self, x_Tk: Tensor, work: Sequence[Tensor]) -> Tensor | None:
        """H' (R, T)"""
        return work[0] @ x_Tk.t() if work else None

    def forward(self, x_Tk: Tensor, h_RT: Tensor | None, work: Sequence[Tensor]) -> list[Tensor]:
        """Each y (T, n)."""
        outs, b_rn = [], iter(work[1:])
        for base, scale, rows in zip(self.linears, self.scales, self.rows, strict=True):
            y_Tn = base.product(x_Tk)
            if rows is not None and h_RT is not None:
                y_Tn.addmm_(h_RT[rows].t(), next(b_rn), alpha=scale)
            outs.append(y_Tn)
        return outs

    def backward(
        self, h_RT: Tensor | None, work: Sequence[Tensor], grads: Sequence[Tensor | None], wants_x: bool, wants: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """The gradient of x (T, k); P' (R, T), from which `of_a` makes those of A; and a list for A_1, B_1, A_2, B_2, ... with those of B in it.
        ``wants`` says which of these are asked for."""
        dx_Tk: Tensor | None = None
        given: list[Tensor | None] = [None] * (2 * len(self.linears))
        p_RT = None if h_RT is None else torch.empty_like(h_RT)
        b_rn = iter(work[1:])
        for i, (base, scale, rows, g_Tn) in enumerate(zip(self.linears, self.scales, self.rows, grads, strict=True)):
            b = next(b_rn) if rows is not None else None
            if g_Tn is None:
                if rows is not None and p_RT is not None:
                    p_RT[rows] = 0.0
                continue
            if wants_x:
                weight = base.weight(g_Tn.dtype)
                dx_Tk = g_Tn @ weight if dx_Tk is None else dx_Tk.addmm_(g_Tn, weight)
            if rows is not None:
                assert b is not None and h_RT is not None and p_RT is not None
                torch.mul(b @ g_Tn.t(), scale, out=p_RT[rows])
                if wants[2 * i + 1]:
                    given[2 * i + 1] = (h_RT[rows] @ g_Tn).t().to(exact(g_Tn)) * scale
        if dx_Tk is not None and p_RT is not None:
            dx_Tk.addmm_(p_RT.t(), work[0])
        return dx_Tk, p_RT, given

    def of_a(self, p_RT: Tensor | None, x_Tk: Tensor, given: list[Tensor | None], wants: Sequence[bool]) -> None:
        """Put the gradients of A into the list."""
        if p_RT is None or not any(wants[::2]):
            return
        da_Rk = (p_RT @ x_Tk).to(exact(x_Tk))
        for i, rows in enumerate(self.rows):
            if rows is not None and wants[2 * i]:
                given[2 * i] = da_Rk[rows]


def exact(x: Tensor) -> torch.dtype:
    """The dtype in which gradients of trained factors are given."""
    return torch.promote_types(x.dtype, torch.float32)
