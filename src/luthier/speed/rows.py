"""What lies between matrix products, as autograd functions over the row kernels that keep little: RMSNorm (Zhang & Sennrich, 2019, arXiv 1910.07467), the
gated activation of a SwiGLU feed-forward (Shazeer, 2020, arXiv 2002.05202) and rotary positions (Su et al., 2021, arXiv 2104.09864).

How they differ from the plain forms: sums and what lies between are fp32 and rounded once, where transformers rounds to 16 bits after every operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .compiled import RowKernels


class Rms(torch.autograd.Function):
    """w * x / rms(x) over the last axis, or (1 + w) * x / rms(x). Keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_d: Tensor, eps: float, plus_one: bool, run: RowKernels) -> Tensor:
        d = x.shape[-1]
        y, inverse = torch.empty_like(x), torch.empty(x.numel() // d, dtype=torch.float32, device=x.device)
        run("rms", x.dtype, x, weight_d, y, inverse, len(inverse), d, eps, int(plus_one))
        # On meta a copy, of the same size: what stands for several equal blocks (saved.py) must keep what was made inside of it.
        ctx.save_for_backward(x.clone() if x.is_meta else x, weight_d, inverse)
        ctx.how = (plus_one, run)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight_d, inverse = ctx.saved_tensors
        plus_one, run = ctx.how
        up, dx, dw, many = grads[0].contiguous(), torch.empty_like(x), None, (len(inverse), x.shape[-1], int(plus_one))
        run("rms_back", x.dtype, up, x, weight_d, inverse, dx, *many)
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(weight_d, dtype=torch.float32)
            run("rms_weight", x.dtype, up, x, inverse, dw, *many)
            dw = dw.to(weight_d.dtype)
        return dx, dw, None, None, None


class Rotate(torch.autograd.Function):
    """Rotary positions: x (..., H, d) with cos and sin (..., d). Keeps nothing but these."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor, run: RowKernels) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        ctx.run = run
        return _turned(x, cosine, sine, 1.0, run)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        cosine, sine = ctx.saved_tensors
        return _turned(grads[0].contiguous(), cosine, sine, -1.0, ctx.run), None, None, None


def _turned(x: Tensor, cosine: Tensor, sine: Tensor, sign: float, run: RowKernels) -> Tensor:
    y, (heads, d) = torch.empty_like(x), x.shape[-2:]
    run("rotate", x.dtype, x, cosine, sine, y, x.numel() // (heads * d), heads, d, sign)
    return y


def swiglu(gate: Tensor, up: Tensor, run: RowKernels | None) -> Tensor:
    """silu(gate) * up; outside of autograd."""
    if run is not None and run.fits(gate, up):
        h = torch.empty_like(gate)
        run("swiglu", gate.dtype, gate, up, h, gate.numel())
        return h
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_back(dh: Tensor, gate: Tensor, up: Tensor, run: RowKernels | None) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of h = silu(gate) * up: those of gate and of up, and h again."""
    if run is not None and run.fits(dh, gate, up):
        dgate, dup, h = (torch.empty_like(gate) for _ in range(3))
        run("swiglu_back", gate.dtype, dh, gate, up, dgate, dup, h, gate.numel())
        return dgate, dup, h
    h = torch.nn.functional.silu(gate)
    dup = dh * h
    dgate = torch.ops.aten.silu_backward(dh * up, gate)
    return dgate, dup, h.mul_(up)


class Swiglu(torch.autograd.Function):
    """silu(gate) * up. Keeps these two and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, run: RowKernels) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.run = run
        return swiglu(gate, up, run)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup, _ = swiglu_back(grads[0].contiguous(), gate, up, ctx.run)
        return dgate, dup, None


class Miss:
    """The softmax of the log-probability head (nn/logprob.py) in place: each logit is read from the chunk that its product left in cache, and written once."""

    def __init__(self, run: RowKernels):
        self.run, self.room = run, run.room

    def __call__(self, raw: Tensor, token_n: Tensor, scale: float, write: bool) -> Tensor | None:
        if not self.run.fits(raw) or not token_n.is_contiguous():
            return None
        logp = torch.empty(len(raw), dtype=torch.float32, device=raw.device)
        self.run("miss", raw.dtype, raw, token_n, logp, len(raw), raw.shape[1], scale, int(write))
        return logp
