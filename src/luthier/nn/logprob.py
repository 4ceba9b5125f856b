"""Log-probabilities of tokens from hidden states, without ever holding N x V logits.

Only scored positions come in. Rows are taken in chunks; each chunk's logits live as fp32 for the softmax and are dropped. Two cases:

1. The head is frozen (LoRA and all other deltas): log p is linear in its upstream gradient g_n, d log p_n / d h_n = (e_token - softmax)' W,
   so this row is computed in forward, while the logits are there, and backward only scales it. 4 N D V flops, nothing kept but (N, D).
2. The head is trained: backward needs g before it can form dW. softmax - e_token, (N, V), is kept in the head's dtype where it fits
   KEEP_BYTES, else logits are computed again in backward.

Products run in the head's dtype with fp32 accumulation; log-sum-exp, log p and dW sums are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 8 << 20  # fp32 logits of one chunk: about what stays in cache
CHUNK_ROWS = 128  # fewer rows make poor matrix products
ROWS_MULTIPLE = 64  # rows are padded up: every new shape costs generated code that stays in memory
KEEP_BYTES = 512 << 20  # residuals kept for a trained head


class Kernel(Protocol):
    """The softmax of a chunk of logits in place."""

    room: int  # bytes of logits of one chunk: nothing is kept beside them, and more rows make better matrix products

    def __call__(self, raw: Tensor, token_n: Tensor, scale: float, write: bool) -> Tensor | None:
        """Log p (n,) fp32; with ``write`` the logits (n, V) become the derivative of -log p. None: not for these."""


def chunks(n: int, vocabulary: int, kernel: Kernel | None = None, itemsize: int = 4) -> Iterator[slice]:
    """Row slices whose fp32 logits take about CHUNK_BYTES, or whose logits of ``itemsize`` bytes take the room of a kernel that works on them in place."""
    size = max(CHUNK_ROWS, CHUNK_BYTES // (4 * vocabulary))
    if kernel is not None:
        size = max(CHUNK_ROWS, kernel.room // (itemsize * vocabulary) // ROWS_MULTIPLE * ROWS_MULTIPLE)
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def shape_logits(raw: Tensor, scale: float, cap: float | None) -> Tensor:
    """fp32 logits after a family's multiplier and tanh soft cap (Gemma 2): cap * tanh(scale * raw / cap)."""
    logits = raw.float()
    if scale != 1.0:
        logits = logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _miss(raw: Tensor, token_n: Tensor, scale: float, cap: float | None, kernel: Kernel | None) -> tuple[Tensor, Tensor]:
    """log p (n,), and the derivative of -log p by the raw logits (n, V): softmax - e_token, through scale and cap; fp32, by a kernel in the logits' dtype."""
    if kernel is not None and cap is None and (found := kernel(raw, token_n, scale, True)) is not None:
        return found, raw
    if scale == 1.0 and cap is None:
        slope, logp_nV = None, raw.log_softmax(-1, dtype=torch.float32)
    else:
        logits = shape_logits(raw, scale, cap)
        slope = scale if cap is None else scale * (1 - (logits / cap).square())
        logp_nV = logits.log_softmax(-1)
    logp_n = logp_nV.gather(1, token_n[:, None]).squeeze(1)
    miss_nV = logp_nV.exp_()
    miss_nV.scatter_add_(1, token_n[:, None], miss_nV.new_full((len(token_n), 1), -1.0))
    return logp_n, miss_nV if slope is None else miss_nV * slope


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, token_N: Tensor, scale: float, cap: float | None, kernel: Kernel | None
    ) -> Tensor:
        N, V = len(h_ND), len(weight_VD)
        wants_h, wants_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        keep = wants_w and N * V * h_ND.element_size() <= KEEP_BYTES
        logp_N = torch.empty(N, dtype=torch.float32, device=h_ND.device)
        rows_ND = torch.empty_like(h_ND) if wants_h and not wants_w else None
        kept_NV = torch.empty(N, V, dtype=h_ND.dtype, device=h_ND.device) if keep else None
        for c in chunks(N, V, kernel, h_ND.element_size()):
            raw = torch.nn.functional.linear(h_ND[c], weight_VD, bias_V)
            if rows_ND is None and kept_NV is None:
                if kernel is not None and cap is None and (found := kernel(raw, token_N[c], scale, False)) is not None:
                    logp_N[c] = found
                    continue
                logits = shape_logits(raw, scale, cap)
                logp_N[c] = logits.gather(1, token_N[c, None]).squeeze(1) - torch.logsumexp(logits, -1)
                continue
            logp_N[c], miss = _miss(raw, token_N[c], scale, cap, kernel)
            if kept_NV is not None:
                kept_NV[c] = miss
            elif rows_ND is not None:
                rows_ND[c] = miss.to(h_ND.dtype) @ weight_VD
        ctx.scale, ctx.cap, ctx.kernel = scale, cap, kernel
        if rows_ND is not None:
            ctx.save_for_backward(rows_ND)
        elif wants_w:
            ctx.save_for_backward(h_ND, weight_VD, bias_V, token_N, kept_NV)
        return logp_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Every row of the (N, V) derivative is scaled by its own -g: applied to the D-wide side, so no pass over V is spent on it.
        minus_g_N1 = -grads[0][:, None]
        if len(ctx.saved_tensors) == 1:
            return (ctx.saved_tensors[0] * minus_g_N1.to(ctx.saved_tensors[0].dtype), None, None, None, None, None, None)
        h_ND, weight_VD, bias_V, token_N, kept_NV = ctx.saved_tensors
        scaled_ND = h_ND * minus_g_N1.to(h_ND.dtype)
        dh_ND = torch.empty_like(h_ND)
        dw_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=h_ND.device)
        db_V = torch.zeros(len(weight_VD), dtype=torch.float32, device=h_ND.device) if bias_V is not None else None
        for c in chunks(len(h_ND), len(weight_VD), ctx.kernel, h_ND.element_size()) if kept_NV is None else [slice(0, len(h_ND))]:
            if kept_NV is None:
                raw = torch.nn.functional.linear(h_ND[c], weight_VD, bias_V)
                miss = _miss(raw, token_N[c], ctx.scale, ctx.cap, ctx.kernel)[1].to(h_ND.dtype)
            else:
                miss = kept_NV
            dh_ND[c] = (miss @ weight_VD) * minus_g_N1[c].to(h_ND.dtype)
            dw_VD += miss.t() @ scaled_ND[c]
            if db_V is not None:
                db_V += minus_g_N1[c].squeeze(1) @ miss.float()
        return dh_ND, dw_VD.to(weight_VD.dtype), None if db_V is None else db_V.to(weight_VD.dtype), None, None, None, None


def linear_logp(
    h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, token_N: Tensor, *, scale: float = 1.0, cap: float | None = None, kernel: Kernel | None = None
) -> Tensor:
    """log softmax(cap(scale * (h W' + b)))[token], fp32 (N,), chunked.

    ``h_ND`` and ``weight_VD`` share a floating dtype; ``token_N`` is int64. Differentiable in h, W and b.
    ``kernel``: the softmax of a chunk in one pass, where there is one.
    """
    n = len(h_ND)
    if n == 0:  # keeps the graph alive, so that a micro-batch without scored positions still backpropagates zeros
        return h_ND.sum(-1).float()
    more = -n % ROWS_MULTIPLE
    h_ND, token_N = torch.nn.functional.pad(h_ND, (0, 0, 0, more)), torch.nn.functional.pad(token_N, (0, more))
    return _LinearLogp.apply(h_ND, weight_VD, bias_V, token_N, scale, cap, kernel)[:n]
