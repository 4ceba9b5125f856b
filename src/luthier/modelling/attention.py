"""The one attention function registered with transformers: examples that lie in one row never see one another, no S x S mask is built, and the
keys and values of a prefix are seen by every token of the examples it serves.

Under a frame with segments (training, scoring) it attends inside each segment, causally or both ways as the module says, and a segment that goes on from
another (`Segments.parent`) sees all of that too: as keys and values before its own. Without (generation,
encoder-decoders, a plain call of the model) it is transformers' own sdpa path with transformers' own masks. Registered under the name in `NAME`; a
family whose results differ under it is found by the probe and keeps its own attention.

A prefix stands outside the text: it is never inside a sliding window, never masked, and has no relative position (T5 adds 0 to its scores).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..core import PACKED_MULTIPLE, Incompatible, Segments, round_up
from . import across
from .context import Portion
from .site import Frame, current, members, using

NAME = "luthier"
MERGE_BELOW = 256  # shorter segments share a padded batch with others up to this length
SHORT = 256  # up to this length plain products beat torch's flash kernel for bf16 on CPU: 9 ms against 47 at 128, 32 against 79 at 250

KV = tuple[Tensor, Tensor]  # (P, H_kv, d) each, as attention sees them: positions already in the keys
ASKED = "asked"  # a frame that has a dict under this plan collects what each module asks for: its How, and the names of what else it gives
RECORD = "recorded"  # a frame that has a dict under this plan collects the keys and values of its first row


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
    if frame is not None and RECORD in frame.plans:
        frame.plans[RECORD][module] = (key[0].transpose(0, 1), value[0].transpose(0, 1))
    if frame is None or frame.segments is None:
        return _masked(frame, module, query, key, value, attention_mask, dropout, scaling, softcap, **kwargs), None
    how = How(dropout, scaling, sliding_window, softcap, causal=bool(getattr(module, "is_causal", True)))
    if ASKED in frame.plans:
        frame.plans[ASKED][module] = how, {name for name, value in kwargs.items() if value is not None}
    if frame.by_hand is not None:
        done = frame.by_hand(frame, module, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), how)
        if done is not None:
            return done, None
    mixed = isinstance(frame.route, tuple) and bool(frame.prefixes)
    if isinstance(frame.segments, Portion):  # ranks share the stream
        return across.attend(frame, module, query, key, value, how, across.Ours(_rows, _capped, prefix_of, plan)), None
    if frame.segments.plain and how.causal and not mixed:  # padding stands to the right of every token, so a causal row never sees it
        return _rows(query, key, value, how, prefix=prefix_of(frame, frame.route, module)).transpose(1, 2), None
    B, H, T, d = query.shape
    if ("plan", T, query.device) not in frame.plans:
        frame.plans["plan", T, query.device] = plan(frame.segments, B * T, T, query.device, frame.route if mixed else None)  # type: ignore[arg-type]
    buckets, back = frame.plans["plan", T, query.device]
    flat = [x.transpose(1, 2).reshape(B * T, x.shape[1], d) for x in (query, key, value)]
    parts = []
    for bucket in buckets:
        index = bucket.index  # (s, l) flat positions
        q, k, v = (x.index_select(0, index.flatten()).view(*index.shape, x.shape[1], d).transpose(1, 2) for x in flat)
        route = bucket.route if mixed else frame.route
        parent = None if bucket.parent is None else _gathered(flat[1:], bucket.parent, bucket.before)
        out = _rows(q, k, v, how, prefix=prefix_of(frame, route, module), lengths=bucket.lengths, parent=parent)
        parts.append(out.transpose(1, 2).reshape(-1, H, d))
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out.index_select(0, back).view(B, T, H, d), None


# --- rows of one example each ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class How:
    """What a module asks of its attention."""

    dropout: float
    scaling: float | None
    window: int | None  # a token sees those less than so many positions away
    softcap: float | None
    causal: bool


def prefix_of(frame: Frame | None, route: Any, module: Any) -> KV | None:
    """Keys and values (P, H_kv, d) that a route puts before this module's own, or None."""
    if frame is None or not frame.prefixes:
        return None
    found = [frame.prefixes[n][module] for n in members(route) if module in frame.prefixes.get(n, {})]
    if len(found) < 2:
        return found[0] if found else None
    return torch.cat([k for k, _ in found]), torch.cat([v for _, v in found])


def _rows(
    q: Tensor, k: Tensor, v: Tensor, how: How, *, prefix: KV | None = None, lengths: Tensor | None = None, parent: tuple[Tensor, Tensor, Tensor] | None = None
) -> Tensor:
    """Attention over rows of one example each, (b, H, l, d) -> (b, H, l, d). ``lengths`` (b,): where padding begins, which only matters both ways.
    ``parent``: keys and values (b, H_kv, p, d) of what each row goes on from, and (b,) how many of them are real."""
    n = q.shape[2]
    mask = _visible(n, how, None if how.causal else lengths, q.device)
    if parent is not None:
        mask = torch.cat([_of_parent(n, parent, how), _causal_mask(n, how, mask, q.device).expand(len(q), 1, n, n)], 3)  # type: ignore[union-attr]
        k, v = torch.cat([parent[0], k], 2), torch.cat([parent[1], v], 2)
    if prefix is not None:
        P = len(prefix[0])
        k, v = (torch.cat([p.to(x.dtype).transpose(0, 1).expand(len(x), -1, -1, -1), x], 2) for p, x in zip(prefix, (k, v), strict=True))
        if mask is None and how.causal:
            mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        mask = None if mask is None else pad_tensor(mask, (P, 0), value=True)
    if how.softcap is not None:
        return _capped(q, k, v, _causal_mask(n, how, mask, q.device), how.dropout, how.scaling, how.softcap)
    if n <= SHORT and how.causal and how.dropout == 0.0 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return two_products(q, k, v, _causal_mask(n, how, mask, q.device), how.scaling)  # type: ignore[arg-type]
    causal = mask is None and how.causal
    return sdpa(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=how.dropout, scale=how.scaling, enable_gqa=k.shape[1] != q.shape[1])


def _visible(n: int, how: How, lengths: Tensor | None, device: torch.device) -> Tensor | None:
    """What may be seen besides the causal triangle, (n, n) or (b, 1, n, n); None: all, or the triangle alone."""
    mask = None
    if how.window is not None and n > how.window:
        mask = torch.ones(n, n, dtype=torch.bool, device=device).triu(1 - how.window).tril(0 if how.causal else how.window - 1)
    if lengths is not None:
        real = (torch.arange(n, device=device) < lengths[:, None])[:, None, None, :]
        mask = real.expand(-1, -1, n, -1) if mask is None else real & mask
    return mask


def _of_parent(n: int, parent: tuple[Tensor, Tensor, Tensor], how: How) -> Tensor:
    """(b, 1, n, p): what rows of n queries may see of what they go on from."""
    keys, _, before = parent
    j = torch.arange(keys.shape[2], device=keys.device)
    seen = (j < before[:, None])[:, None, None, :].expand(-1, -1, n, -1)
    if how.window is None:
        return seen
    distance = before[:, None, None] + torch.arange(n, device=keys.device)[:, None] - j
    return seen & (distance < how.window)[:, None]


def _causal_mask(n: int, how: How, mask: Tensor | None, device: torch.device) -> Tensor | None:
    """The triangle, where it has not been written out yet."""
    return torch.ones(n, n, dtype=torch.bool, device=device).tril() if mask is None and how.causal else mask


def two_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Attention as two products and a softmax over (l, P + l) scores. ``mask``: of these, or (b, 1, l, P + l)."""
    b, heads, n, d = q.shape
    m = k.shape[2]
    k, v = (repeat_kv(x, heads // k.shape[1]).reshape(b * heads, m, d) for x in (k, v))
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    bias = bias.expand(b * heads, n, m) if bias.dim() == 2 else bias.expand(b, heads, n, m).reshape(b * heads, n, m)
    scores = torch.baddbmm(bias, q.reshape(b * heads, n, d), k.transpose(1, 2), alpha=d**-0.5 if scaling is None else scaling)
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


# --- several examples a row -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bucket:
    """Segments of like length, as a padded batch."""

    index: Tensor  # (s, l) flat positions in the stream
    lengths: Tensor  # (s,)
    route: str | None
    parent: Tensor | None = None  # (s, p) flat positions of what each segment goes on from
    before: Tensor | None = None  # (s,) how many of these are real


def _gathered(keys_and_values: Sequence[Tensor], index: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (s, H_kv, p, d) of parents, out of (B * T, H_kv, d), and their lengths."""
    assert before is not None
    k, v = (x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2) for x in keys_and_values)
    return k, v, before


def plan(segments: Segments, total: int, width: int, device: torch.device, routes: tuple[str | None, ...] | None = None) -> tuple[list[Bucket], Tensor]:
    """Sort segments into padded batches of like lengths (and like routes, and parents of like lengths): their flat positions, and where each position's result
    then lies.

    Padding inside a batch repeats the segment's last position: it stands to the right, no real token sees it, and its result is not read.
    """
    buckets: dict[tuple[int, int, str | None], list[int]] = {}
    before = segments.before()
    for s, (n, p) in enumerate(zip(segments.length.tolist(), before.tolist(), strict=True)):
        buckets.setdefault((_size(n), _size(p) if p else 0, routes[s] if routes else None), []).append(s)
    first = segments.first(width)
    back = torch.zeros(total, dtype=torch.long)  # positions of padding read result 0
    out, base = [], 0
    for (longest, earlier, route), who in buckets.items():  # few distinct widths, so that kernels are generated once
        offset = torch.arange(longest).expand(len(who), longest)
        length = segments.length[who][:, None]
        index = first[who][:, None] + torch.minimum(offset, length - 1)
        here = base + torch.arange(len(who))[:, None] * longest + offset
        real = offset < length
        back[index[real]] = here[real]
        parents: tuple[Tensor, ...] = ()
        if earlier and segments.parent is not None:
            known = before[who][:, None]
            place = first[segments.parent[who]][:, None] + torch.minimum(torch.arange(earlier).expand(len(who), earlier), known - 1)
            parents = place.to(device), known[:, 0].to(device)
        out.append(Bucket(index.to(device), length[:, 0].to(device), route, *parents))
        base += index.numel()
    return out, back.to(device)


def _size(n: int) -> int:
    """What a length is padded to: one of few."""
    size = 32
    while size < n and size < MERGE_BELOW:
        size *= 2
    return size if n <= size else round_up(n, PACKED_MULTIPLE)


# --- under transformers' own masks ----------------------------------------------------------------------------------


def _masked(
    frame: Frame | None,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One example a row, padding and causality in transformers' mask. (B, T, H, d)."""
    n, m = query.shape[2], key.shape[2]
    prefix, seen = _prefix_rows(frame, module, len(query))
    asked = kwargs.pop("is_causal", None)
    causal = bool(getattr(module, "is_causal", True) if asked is None else asked)
    if mask is None and causal and n > 1 and (prefix is not None or softcap is not None):
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
    if prefix is not None:
        P = prefix[0].shape[2]
        key, value = (torch.cat([p.to(x.dtype).expand(len(x), -1, -1, -1), x], 2) for p, x in zip(prefix, (key, value), strict=True))
        position_bias = None if position_bias is None else pad_tensor(position_bias, (P, 0))
        if mask is None and seen is not None:
            mask = torch.ones(1, 1, n, m, dtype=torch.bool, device=query.device)
        if mask is not None:
            mask = pad_tensor(mask, (P, 0), value=True if mask.dtype == torch.bool else 0.0)
        if seen is not None:  # rows of another route do not see it
            hidden = pad_tensor(~seen[:, None, None, :], (0, m), value=False)
            assert mask is not None
            mask = mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    if softcap is not None:
        return _capped(query, key, value, mask, dropout, scaling, softcap).transpose(1, 2).contiguous()
    causal = causal and prefix is None
    return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal=causal, position_bias=position_bias, **kwargs)[0]


def _prefix_rows(frame: Frame | None, module: Any, rows: int) -> tuple[KV | None, Tensor | None]:
    """Keys and values (1 or B, H_kv, P, d) put before a batch of one example a row, and (B, P) which of them each row sees; None: all."""
    if frame is None or not frame.prefixes:
        return None, None
    routes = frame.route if isinstance(frame.route, tuple) else (frame.route,)
    found = {r: prefix_of(frame, r, module) for r in dict.fromkeys(routes)}
    lengths = {r: 0 if kv is None else len(kv[0]) for r, kv in found.items()}
    longest = max(lengths.values())
    if longest == 0:
        return None, None
    like = next(kv for kv in found.values() if kv is not None)[0]
    ready = {
        r: tuple(
            like.new_zeros(like.shape[1], longest, like.shape[2]) if kv is None else pad_tensor(x.transpose(0, 1), (0, 0, longest - len(x), 0))
            for x in (kv or (like, like))
        )
        for r, kv in found.items()
    }
    kv = torch.stack([ready[r][0] for r in routes]), torch.stack([ready[r][1] for r in routes])
    if len(routes) == 1:
        return kv, None
    assert len(routes) == rows
    at = torch.arange(longest, device=like.device)
    return kv, torch.stack([at >= longest - lengths[r] for r in routes])


@torch.no_grad()
def keys_and_values(lm: Any, ids: Tensor, positions: Tensor) -> dict[Any, KV]:
    """Keys and values that every attention of a model computes for a text, ids (P,): what a prefix may start from.

    An encoder-decoder reads the text on both sides. Raises Incompatible where the model's attention does not go through `attend`.
    """
    found: dict[Any, KV] = {}
    with using(Frame(plans={RECORD: found})):
        if lm.config.is_encoder_decoder:
            encoded = lm.get_encoder()(input_ids=ids[None]).last_hidden_state
            lm.get_decoder()(input_ids=ids[None], encoder_hidden_states=encoded, use_cache=False)
        else:
            lm.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    if not found:
        raise Incompatible("the attention of this model is its own, so no prefix can enter it; use a method that edits outputs")
    return found


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers asks for a mask once a forward: none under segments, its own otherwise."""
    frame = current()
    return None if frame is not None and frame.segments is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
