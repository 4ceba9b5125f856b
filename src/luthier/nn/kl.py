"""The divergence of two next-token distributions from the hidden states of both, without ever holding N x V logits.

KL(q || p) = sum_v q_v (log q_v - log p_v), q the fixed one. Its derivative by p's logits is p - q, so where the head is frozen the row (p - q) W is computed in
forward, while the logits are there, and backward only scales it, as in logprob.py. Otherwise logits are computed again in backward, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .logprob import ROWS_MULTIPLE, chunks, shape_logits

TINY = 1e-7  # a mass that a sum of fp32 probabilities cannot tell from none
Head = Callable[[Tensor], Tensor]  # (n, D) -> (n, V) raw logits


def divergence(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """(N,) KL(q || p) of whole distributions, given their logarithms; differentiable in p."""
    return (logq_NV.exp() * (logq_NV - logp_NV)).sum(-1)


class _FrozenHeadKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, r_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, reference: Head, scale: float, cap: float | None) -> Tensor:
        kl_N = torch.empty(len(h_ND), dtype=torch.float32, device=h_ND.device)
        rows_ND = torch.empty_like(h_ND)
        for c in chunks(len(h_ND), len(weight_VD)):
            logits = shape_logits(torch.nn.functional.linear(h_ND[c], weight_VD, bias_V), scale, cap)
            logp_nV = logits.log_softmax(-1)
            logq_nV = shape_logits(reference(r_ND[c]), scale, cap).log_softmax(-1)
            kl_N[c] = divergence(logp_nV, logq_nV)
            slope = scale if cap is None else scale * (1 - (logits / cap).square())
            rows_ND[c] = ((logp_nV.exp_() - logq_nV.exp_()) * slope).to(h_ND.dtype) @ weight_VD
        ctx.save_for_backward(rows_ND)
        return kl_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows_ND,) = ctx.saved_tensors
        return rows_ND * grads[0][:, None].to(rows_ND.dtype), None, None, None, None, None, None


def hidden_kl(
    h_ND: Tensor,
    r_ND: Tensor,
    head: Head,
    reference: Head,
    *,
    vocabulary: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """(N,) fp32 KL(q || p), p = softmax of ``head`` on h, q = softmax of ``reference`` on r, both after a family's multiplier and soft cap; chunked.

    ``weight`` and ``bias``: of ``head`` where it is one frozen linear, which is the fast way. Differentiable in h and in what ``head`` trains; r and
    ``reference`` are constants.
    """
    n = len(h_ND)
    if n == 0:  # keeps the graph alive, as linear_logp does
        return h_ND.sum(-1).float()
    h_ND, r_ND = (torch.nn.functional.pad(x, (0, 0, 0, -n % ROWS_MULTIPLE)) for x in (h_ND, r_ND))
    quiet = torch.no_grad()(reference)
    if weight is not None and not weight.requires_grad and (bias is None or not bias.requires_grad):
        return _FrozenHeadKL.apply(h_ND, r_ND, weight, bias, quiet, scale, cap)[:n]

    def some(h_nD: Tensor, r_nD: Tensor) -> Tensor:
        return divergence(shape_logits(head(h_nD), scale, cap).log_softmax(-1), shape_logits(quiet(r_nD), scale, cap).log_softmax(-1))

    return torch.cat([checkpoint(some, h_ND[c], r_ND[c], use_reentrant=False) for c in chunks(len(h_ND), vocabulary)])[:n]


def coarse(logq_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """((N, k) log-probabilities, (N, k) int32 tokens) of the likeliest ``k``: what is kept of a distribution where all of it would be too large."""
    top_Nk, token_Nk = logq_NV.topk(min(k, logq_NV.shape[-1]), dim=-1)
    return top_Nk, token_Nk.to(torch.int32)


def coarse_divergence(logp_NV: Tensor, logq_Nk: Tensor, token_Nk: Tensor) -> Tensor:
    """(N,) KL(q || p) where of q the likeliest k tokens are known, all others as one event: never more than the whole KL, and equal to it at k = V.

    Merging events cannot raise a divergence (the log sum inequality; Cover & Thomas, 2006, theorem 2.7.1).
    """
    logq_Nk, p_Nk = logq_Nk.float(), logp_NV.float().gather(1, token_Nk.long())
    known_N = (logq_Nk.exp() * (logq_Nk - p_Nk)).sum(-1)
    if token_Nk.shape[1] == logp_NV.shape[1]:
        return known_N
    rest_q_N, rest_p_N = (1 - x.exp().sum(-1) for x in (logq_Nk, p_Nk))
    rest_q_N, rest_p_N = rest_q_N.clamp(min=0), rest_p_N.clamp(min=TINY)
    return known_N + torch.where(rest_q_N > TINY, rest_q_N * (rest_q_N.clamp(min=TINY).log() - rest_p_N.log()), 0.0)
