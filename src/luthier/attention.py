"""The one attention function registered with transformers: examples that lie in one row never see one another, and no S x S mask is built.

Under a frame with segments (training, scoring) it attends causally inside each segment. Without (generation, a plain call of the model) it is
transformers' own sdpa path with transformers' own masks. Registered under the name in `NAME`; a family whose results differ under it is
found by the probe in build.py and keeps its own attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .core import PACKED_MULTIPLE, Segments, round_up
from .site import current

NAME = "luthier"
MERGE_BELOW = 256  # shorter segments share a padded batch with others up to this length
SHORT = 256  # up to this length plain products beat torch's flash kernel for bf16 on CPU: 9 ms against 47 at 128, 32 against 79 at 250


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(B, H, T, d) queries against (B, H_kv, S, d) keys and values -> (B, T, H, d)."""
    frame = current()
    if frame is None or frame.segments is None:
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        if attention_mask is None and query.shape[2] > 1:
            attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - query.shape[2])
        return _capped(query, key, value, attention_mask, dropout, scaling, softcap).transpose(1, 2).contiguous(), None
    how: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "window": sliding_window, "softcap": softcap}
    if frame.segments.plain:  # padding stands to the right of every token, so a causal row never sees it
        return _causal(query, key, value, **how).transpose(1, 2), None
    B, H, T, d = query.shape
    if ("plan", T, query.device) not in frame.plans:
        frame.plans["plan", T, query.device] = plan(frame.segments, B * T, T, query.device)
    buckets, back = frame.plans["plan", T, query.device]
    flat = [x.transpose(1, 2).reshape(B * T, x.shape[1], d) for x in (query, key, value)]
    parts = []
    for index in buckets:  # (s, l) flat positions
        q, k, v = (x.index_select(0, index.flatten()).view(*index.shape, x.shape[1], d).transpose(1, 2) for x in flat)
        parts.append(_causal(q, k, v, **how).transpose(1, 2).reshape(-1, H, d))
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out.index_select(0, back).view(B, T, H, d), None


def plan(segments: Segments, total: int, width: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Sort segments into padded batches of like lengths: their flat positions, and where each position's result then lies.

    Padding inside a batch repeats the segment's last position: it stands to the right, no real token sees it, and its result is not read.
    """
    buckets: dict[int, list[int]] = {}
    lengths = segments.length.tolist()
    for s, n in enumerate(lengths):
        size = 32
        while size < n and size < MERGE_BELOW:
            size *= 2
        buckets.setdefault(size if n <= size else round_up(n, PACKED_MULTIPLE), []).append(s)
    first = segments.first(width)
    back = torch.zeros(total, dtype=torch.long)  # positions of padding read result 0
    out, base = [], 0
    for longest, members in buckets.items():  # few distinct widths, so that kernels are generated once
        offset = torch.arange(longest).expand(len(members), longest)
        length = segments.length[members][:, None]
        index = first[members][:, None] + torch.minimum(offset, length - 1)
        here = base + torch.arange(len(members))[:, None] * longest + offset
        real = offset < length
        back[index[real]] = here[real]
        out.append(index.to(device))
        base += index.numel()
    return out, back.to(device)


def _causal(q: Tensor, k: Tensor, v: Tensor, *, dropout: float, scaling: float | None, window: int | None, softcap: float | None) -> Tensor:
    """Causal attention over whole rows, (b, H, l, d) -> (b, H, l, d)."""
    n = q.shape[2]
    mask = None
    if (window is not None and n > window) or softcap is not None:
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        if window is not None:
            mask = mask.triu(1 - window)
    if softcap is not None:
        return _capped(q, k, v, mask, dropout, scaling, softcap)
    if n <= SHORT and dropout == 0.0 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return _short(q, k, v, mask, scaling)
    return sdpa(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling, enable_gqa=k.shape[1] != q.shape[1])


def _short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Causal attention as two products and a softmax over (l, l) scores."""
    b, heads, n, d = q.shape
    k, v = (repeat_kv(x, heads // k.shape[1]).reshape(b * heads, n, d) for x in (k, v))
    if mask is None:
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros(n, n, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    scores = torch.baddbmm(bias.expand(b * heads, n, n), q.reshape(b * heads, n, d), k.transpose(1, 2), alpha=d**-0.5 if scaling is None else scaling)
    return torch.bmm(scores.softmax(-1), v).view(b, heads, n, d)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None, cap: float) -> Tensor:
    """Attention with Gemma 2's tanh soft cap on the scores, which no fused kernel of torch has."""
    groups = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    scores = cap * torch.tanh((q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling) / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(-1).to(q.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ v


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers asks for a mask once a forward: none under segments, its own otherwise."""
    frame = current()
    return None if frame is not None and frame.segments is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
