"""A SwiGLU feed-forward as one step of autograd: y = (silu(x Wg') * (x Wu')) Wd', each product with its low-rank term where it has one.

Kept for the backward: x, gate and up, and the narrow products; x only where it has a low-rank term. The activation and the input of the last product, each as
large as gate, are made again from them, which takes as long as reading them would. Where a weight trains, or an edit is more than a low-rank term, the linears
are called as they are, and the activation between them is one row kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modelling.anatomy import features
from ..modelling.site import Frame, Site, current, using
from .compiled import RowKernels
from .form import Form
from .linears import Frozen, Group, Term, factors, scales
from .lora import PLAIN, term_of
from .rows import Swiglu, swiglu, swiglu_back
from .selftest import at_hand, differs, evaluating

PARTS = ("gate_proj", "up_proj", "down_proj")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linears: tuple[Frozen, ...], scales: tuple[float, ...], run: RowKernels | None, *factors: Tensor | None) -> Tensor:
        x_Tk = x.reshape(-1, x.shape[-1])
        ranks = [None if a is None else len(a) for a in factors[::2]]
        inner, outer = Group(linears[:2], scales[:2], ranks[:2]), Group(linears[2:], scales[2:], ranks[2:])
        first, last = inner.work(x.dtype, factors[:4]), outer.work(x.dtype, factors[4:])
        low = inner.low(x_Tk, first)
        gate, up = inner.forward(x_Tk, low, first)
        h = swiglu(gate, up, run)
        narrow = outer.low(h, last)
        (y,) = outer.forward(h, narrow, last)
        ctx.groups, ctx.run, ctx.split = (inner, outer), run, len(first)
        ctx.save_for_backward(x if first else None, gate, up, low, narrow, *first, *last)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, gate, up, low, narrow, *work = ctx.saved_tensors
        first, last = work[: ctx.split], work[ctx.split :]
        wants_x, _, _, _, *wants = ctx.needs_input_grad
        inner, outer = ctx.groups
        dh, p, given = outer.backward(narrow, last, [grads[0].reshape(-1, grads[0].shape[-1])], True, wants[4:])
        dgate, dup, h = swiglu_back(dh, gate, up, ctx.run)
        outer.of_a(p, h, given, wants[4:])
        del dh, h
        dx, p, inside = inner.backward(low, first, [dgate, dup], wants_x, wants[:4])
        if x is not None:
            inner.of_a(p, x.reshape(-1, x.shape[-1]), inside, wants[:4])
        return (None if dx is None else dx.view(ctx.shape), None, None, None, *inside, *given)


class Gated(Form):
    """Stands in for a feed-forward's forward. Where one of its linears cannot be fused now: its own."""

    def __init__(self, module: Any, run: RowKernels | None):
        super().__init__(module)
        self.run = run
        parts = [getattr(module, n) for n in PARTS]
        self.sites = [p if isinstance(p, Site) else None for p in parts]
        self.linears = tuple(Frozen(p.base if isinstance(p, Site) else p) for p in parts)

    def faster(self, x: Tensor) -> Tensor | None:
        frame = current()
        if frame is None or isinstance(frame.route, tuple) or "+" in (frame.route or ""):
            return None
        terms = [None if s is None or frame.route is None else term_of(s, frame.route) for s in self.sites]
        if any(t is PLAIN for t in terms) or not all(f.usable(x.dtype) for f in self.linears):
            return self.apart(x)
        known: list[Term | None] = terms  # type: ignore[assignment]
        return _Gated.apply(x, self.linears, scales(known), self.run, *factors(known))  # type: ignore[no-any-return]

    def apart(self, x: Tensor) -> Tensor | None:
        """The linears as they are."""
        m, run = self.module, self.run
        if run is None:
            return None
        gate, up = m.gate_proj(x), m.up_proj(x)
        return m.down_proj(Swiglu.apply(gate, up, run) if run.fits(gate, up) else m.act_fn(gate) * up)  # type: ignore[no-any-return]


def usual(module: nn.Module) -> bool:
    """gate, up and down by their usual names and SiLU between them, nothing else inside."""
    children = dict(module.named_children())
    if set(children) != {*PARTS, "act_fn"} or "forward" in module.__dict__ or type(children["act_fn"]).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    return all(Frozen.reads(c.base if isinstance(c, Site) else c) for n, c in children.items() if n in PARTS)


def install(policy: Any, run: RowKernels | None) -> int:
    """Give every usual feed-forward the fused form, where it is found equal. Returns how many."""
    put, tested = 0, {}
    for module in list(policy.lm.modules()):
        if not usual(module):
            continue
        form = Gated(module, run)
        edits = [None if s is None or policy.name not in s.edits else type(s.edits[policy.name]) for s in form.sites]
        kind = tuple((type(f.module), f.usable(policy.lm.dtype), edit) for f, edit in zip(form.linears, edits, strict=True))
        if kind not in tested:
            tested[kind] = _equals(policy, form)
        if tested[kind]:
            form.put()
            put += 1
    return put


def _equals(policy: Any, form: Gated) -> bool:
    if policy.device.type == "meta":
        return True

    def plain(x: Tensor) -> list[Tensor]:
        with using(Frame(policy.name)):
            return [form.kind.forward(form.module, x)]

    def fused(x: Tensor) -> list[Tensor]:
        with using(Frame(policy.name)):
            y = form.faster(x)
        if y is None:
            raise RuntimeError("the fused form declines")  # without kernels, where an edit is more than a low-rank term
        return [y]

    with at_hand([form.module]), evaluating([s.edits[policy.name] for s in form.sites if s is not None and policy.name in s.edits]) as edits:
        return not differs(plain, fused, edits, features(form.linears[0].module)[0], policy.lm.dtype, policy.device)
