"""Attention of a rank that keeps some positions of a stream: its own queries, and the keys and values of all ranks of its group (context.py says why these are
gathered).

An example that lies within a piece is attended to as on one device. Of one that is cut, this rank has parts; the queries of a part see, besides themselves,
what stands before them in their example. These are two calls of the flash kernel, one of a full rectangle and one of a causal square, merged by their log-
sum-exps: no mask is made, however long the example is. Flash attention's backward needs only the merged output and log-sum-exp (Dao et al., 2022, arXiv
2205.14135, appendix B.2, where P is recomputed from them), so each call's backward given these is its part of the gradient. Sliding windows, soft caps and
dropout, which that kernel has not, take a mask a block of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..core import Segments
from .context import Portion, gather, pieces_of
from .site import Frame

aten = torch.ops.aten
BLOCK = 1024  # queries of a masked call at most, or as many as the window is long


class Ours(NamedTuple):
    """What attention.py does on one device."""

    rows: Callable[..., Tensor]
    capped: Callable[..., Tensor]
    prefix_of: Callable[..., Any]
    plan: Callable[..., Any]


@dataclass(frozen=True)
class Part:
    """Queries of one example that is not whole here, in one row of the stream."""

    example: int
    row: int
    here: int  # place of the first query among the kept positions
    at: int  # and in the whole stream
    n: int
    first: int  # the example's first position in the whole stream
    end: int  # behind its last

    def blocks(self, size: int) -> list[Part]:
        """In blocks of at most so many queries."""
        return [Part(self.example, self.row, self.here + i, self.at + i, min(size, self.n - i), self.first, self.end) for i in range(0, self.n, size)]


@dataclass(frozen=True)
class Layout:
    """A rank's share of the work."""

    buckets: list[Any]  # examples that are whole here, see attention.plan
    parts: list[Part]
    back: Tensor  # (B * L,) where each kept position's result lies
    gathers: bool  # some rank of the group has parts


def layout_of(portion: Portion, rows: int, width: int, device: torch.device, routes: Any, plan: Callable[..., Any]) -> Layout:
    """``rows`` x ``width``: the kept positions."""
    inside: list[tuple[int, int, int, int]] = []  # example, row, start, length
    parts: list[Part] = []
    whole, offset = portion.whole, 0
    for a, b in portion.pieces:
        for s, (row, start, n) in enumerate(zip(whole.row.tolist(), whole.start.tolist(), whole.length.tolist(), strict=True)):
            first, end = max(a, start), min(b, start + n)
            if first >= end:
                continue
            if end - first == n:
                inside.append((s, row, offset + start - a, n))
            else:
                parts.append(Part(s, row, offset + first - a, first, end - first, start, start + n))
        offset += b - a
    buckets, back = [], torch.zeros(rows * width, dtype=torch.long)
    if inside:
        _, row_S, start_S, length_S = torch.tensor(inside).unbind(1)
        buckets, back = plan(
            Segments(row_S, start_S, length_S), rows * width, width, torch.device("cpu"), tuple(routes[i[0]] for i in inside) if routes else None
        )
    base = sum(b.index.numel() for b in buckets)
    for p in parts:
        back[p.row * width + p.here : p.row * width + p.here + p.n] = base + torch.arange(p.n)
        base += p.n
    moved = [type(b)(b.index.to(device), b.lengths.to(device), b.route) for b in buckets]
    return Layout(moved, parts, back.to(device), _is_cut(portion))


def _is_cut(portion: Portion) -> bool:
    """Whether any rank of the group holds a part of an example only: all ranks find the same, so all gather or none."""
    size, width = portion.group.size, portion.shape[1]
    ends = torch.tensor(sorted({end for rank in range(size) for _, end in pieces_of(rank, size, width)}))
    first, last = portion.whole.start, portion.whole.start + portion.whole.length - 1
    return not torch.equal(torch.bucketize(first, ends, right=True), torch.bucketize(last, ends, right=True))


def attend(frame: Frame, module: Any, query: Tensor, key: Tensor, value: Tensor, how: Any, ours: Ours) -> Tensor:
    """(B, H, L, d) queries, (B, H_kv, L, d) keys and values of the kept positions -> (B, L, H, d)."""
    portion = frame.segments
    assert isinstance(portion, Portion)
    B, H, L, _ = query.shape
    mixed = isinstance(frame.route, tuple) and bool(frame.prefixes)
    name = ("across", L, query.device)
    if name not in frame.plans:
        frame.plans[name] = layout_of(portion, B, L, query.device, frame.route if mixed else None, ours.plan)
    layout: Layout = frame.plans[name]
    results: list[Tensor] = []
    if layout.buckets:
        flat = [x.transpose(1, 2).reshape(B * L, x.shape[1], x.shape[3]) for x in (query, key, value)]
        for bucket in layout.buckets:
            q, k, v = (x.index_select(0, bucket.index.flatten()).view(*bucket.index.shape, *x.shape[1:]).transpose(1, 2) for x in flat)
            prefix = ours.prefix_of(frame, bucket.route if mixed else frame.route, module)
            results.append(ours.rows(q, k, v, how, prefix=prefix, lengths=bucket.lengths).transpose(1, 2).reshape(-1, H, v.shape[3]))
    everything = _everyones(key, value, portion) if layout.gathers else None
    for part in layout.parts:
        assert everything is not None
        prefix = ours.prefix_of(frame, frame.route[part.example] if mixed else frame.route, module)  # type: ignore[index]
        size = part.n if _unmasked(how, part) else max(BLOCK, how.window or 0)
        for block in part.blocks(size):
            q = query[block.row : block.row + 1, :, block.here : block.here + block.n]
            k, v = (x[block.row : block.row + 1] for x in everything)
            results.append(_part(block, q, k, v, how, prefix, ours, frame).transpose(1, 2).flatten(0, 1))
    if not results:  # nothing but padding here: zeros, with the gradients that the other ranks have, or these would wait for them
        used = [p for r in dict.fromkeys(frame.route if mixed else (frame.route,)) for p in ours.prefix_of(frame, r, module) or ()]  # type: ignore[union-attr, arg-type]
        nothing = sum(x.sum() for x in (query, key, value, *used)) * 0.0
        results.append(query.new_zeros(B * L, H, value.shape[3]) + nothing.to(query.dtype))
    out = torch.cat(results).index_select(0, layout.back).view(B, L, H, value.shape[3])
    if everything is not None and not layout.parts:
        out = _Tied.apply(out, everything[0])
    return out


def _everyones(key: Tensor, value: Tensor, portion: Portion) -> tuple[Tensor, Tensor]:
    """(B, H_kv, T, d) keys and values of the whole stream, in one transfer."""
    size, width = portion.group.size, portion.shape[1]
    all_CBHLd = gather(torch.cat([key, value], -1), portion.group)
    placed = []
    for rank in range(size):
        offset = 0
        for a, b in pieces_of(rank, size, width):
            placed.append((a, all_CBHLd[rank, :, :, offset : offset + b - a]))
            offset += b - a
    whole_BHTd = torch.cat([x for _, x in sorted(placed, key=lambda p: p[0])], 2)
    k, v = whole_BHTd.split([key.shape[3], value.shape[3]], -1)
    return k, v


class _Tied(torch.autograd.Function):
    """What was gathered is not used on this rank, but its gradient is asked for by the others: a rank that did not answer would stop them all."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, gathered: Tensor) -> Tensor:
        ctx.like = gathered.new_empty(0), gathered.shape
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        like, shape = ctx.like
        return grads[0], like.new_zeros(()).expand(shape)


# --- one part -------------------------------------------------------------------------------------------------------


def _unmasked(how: Any, part: Part) -> bool:
    """Whether everything before and after a query that may be seen is seen, and the kernel can do what is asked."""
    reach = part.at + part.n - part.first if how.causal else part.end - part.first
    return how.softcap is None and how.dropout == 0.0 and (how.window is None or how.window >= reach)


def _part(part: Part, q: Tensor, k: Tensor, v: Tensor, how: Any, prefix: Any, ours: Ours, frame: Frame) -> Tensor:
    """(1, H, n, d) of a part's queries; k and v (1, H_kv, T, d) are of its row."""
    past = part.at + part.n
    far = 0 if how.window is None else how.window - 1
    first = part.first if how.window is None else max(part.first, part.at - far)
    end = past if how.causal else part.end if how.window is None else min(part.end, past + far)
    P = 0 if prefix is None else len(prefix[0])

    def seen(start: int, stop: int) -> list[Tensor]:
        """Keys and values behind the prefix."""
        own = [x[:, :, start:stop] for x in (k, v)]
        return own if prefix is None else [torch.cat([p.to(x.dtype).transpose(0, 1)[None], x], 2) for p, x in zip(prefix, own, strict=True)]

    if _unmasked(how, part):
        if not how.causal:
            keys, values = seen(first, end)
            return sdpa(q, keys, values, scale=how.scaling, enable_gqa=k.shape[1] != q.shape[1])
        own_k, own_v = (x[:, :, part.at : past] for x in (k, v))
        if first == part.at and prefix is None:
            return sdpa(q, own_k, own_v, is_causal=True, scale=how.scaling, enable_gqa=k.shape[1] != q.shape[1])
        kernel = flash(q)
        if kernel is not None:
            return _Merged.apply(q, *seen(first, part.at), own_k, own_v, how.scaling, kernel)
    name = ("mask", part, how.window, how.causal, P, q.device)
    if name not in frame.plans:
        frame.plans[name] = _mask(part, first, end, how, P, q.device)
    keys, values = seen(first, end)
    if how.softcap is not None:
        return ours.capped(q, keys, values, frame.plans[name], how.dropout, how.scaling, how.softcap)
    return sdpa(q, keys, values, attn_mask=frame.plans[name], dropout_p=how.dropout, scale=how.scaling, enable_gqa=k.shape[1] != q.shape[1])


def _mask(part: Part, first: int, end: int, how: Any, prefix: int, device: torch.device) -> Tensor:
    """(n, P + keys): what each query may see; a prefix is always seen."""
    away = torch.arange(part.at, part.at + part.n, device=device)[:, None] - torch.arange(first, end, device=device)
    mask = away >= 0 if how.causal else torch.ones_like(away, dtype=torch.bool)
    if how.window is not None:
        mask = mask & (away.abs() < how.window)
    return torch.nn.functional.pad(mask, (prefix, 0), value=True)


# --- two calls as one ------------------------------------------------------------------------------------------------


def flash(q: Tensor) -> str | None:
    """The flash kernel that serves these queries, or None: then a mask is made."""
    device = MEANT.get() if q.is_meta else q.device.type
    if device == "cpu":
        return "cpu"
    half = q.dtype in (torch.float16, torch.bfloat16)
    return "cuda" if device == "cuda" and half and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0 else None


MEANT: ContextVar[str] = ContextVar("luthier_meant", default="cpu")  # the kind of device that the meta device stands for (kernels.py)


def _forward(kernel: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """(output, log-sum-exp (B, H, n), what the backward wants besides)."""
    if kernel == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse, ()
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse, (cum_q, cum_k, max_q, max_k, seed, offset)


def _backward(kernel: str, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float | None, more: Any) -> Any:
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    cum_q, cum_k, max_q, max_k, seed, offset = more
    return aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset, scale=scale)


class _Merged(torch.autograd.Function):
    """Attention over a rectangle of keys that all queries see, and a causal square of their own."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, scale: float | None, kernel: str) -> Tensor:
        out1, lse1, more1 = _forward(kernel, q, k1, v1, False, scale)
        out2, lse2, more2 = _forward(kernel, q, k2, v2, True, scale)
        lse = torch.logaddexp(lse1, lse2)
        out = (out1 * (lse1 - lse).exp()[..., None] + out2 * (lse2 - lse).exp()[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k1, v1, k2, v2, out, lse)
        ctx.how = scale, kernel, more1, more2
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k1, v1, k2, v2, out, lse = ctx.saved_tensors
        scale, kernel, more1, more2 = ctx.how
        q1, *kv1 = _backward(kernel, grads[0], q, k1, v1, out, lse, False, scale, more1)
        q2, *kv2 = _backward(kernel, grads[0], q, k2, v2, out, lse, True, scale, more2)
        return q1 + q2, *kv1, *kv2, None, None
