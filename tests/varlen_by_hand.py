"""What torch.nn.attention.varlen.varlen_attn computes, written out: that needs a GPU, this does not."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux=None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(T, H, d) against (T_k, H_kv, d), a sequence after the other; the last query stands at the last key. What is asked of the caller is asserted."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and seqused_k is block_table is num_splits is None
    ends, key_ends = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert len(ends) == len(key_ends) and (ends[0], key_ends[0], ends[-1], key_ends[-1]) == (0, 0, len(query), len(key))
    assert enable_gqa or query.shape[1] == key.shape[1]
    k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    left, right = window_size
    out, lse = [], []
    for (a, b), (c, d) in zip(pairwise(ends), pairwise(key_ends), strict=True):
        n, m = b - a, d - c
        assert 0 < n <= max_q and 0 < m <= max_k and max_q > 1
        away = torch.arange(n)[:, None] + (m - n) - torch.arange(m)  # how far before a query a key stands
        seen = (away <= left if left >= 0 else torch.ones_like(away, dtype=torch.bool)) & (away >= -right if right >= 0 else True)
        assert seen.any(1).all()
        scores = torch.einsum("qhd,khd->hqk", query[a:b], k[c:d]) * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill(~seen, float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:d]))
        lse.append(scores.logsumexp(-1).t())
    y = torch.cat(out)
    return (y, torch.cat(lse)) if return_aux is not None and return_aux.lse else y
