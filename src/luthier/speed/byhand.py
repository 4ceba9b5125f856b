"""Attention over packed examples by hand, on the CPU: in one pass (attention.cpp), where the processor has products of bfloat16, else by a few products of
torch's, and row kernels between them.

Examples are cut into pieces of up to QUERIES queries, each with the keys that it sees: those of a prefix, those of what its example goes on from, those of its
example before it, its own. Every vector is gathered once, straight into the layout of the products; nothing that is later is computed or read, except within
a piece; the softmax writes where the scores were; on the way back what a key got from several pieces is added up in fp32 and rounded once. Query heads that
share a key head stand above one another in one product, so keys are never repeated. q, k and v are kept, and, by products, the probabilities of narrow pieces;
those of wide ones are computed again, so that memory does not grow with the square of the length.

torch's own kernel for 16 bits on the CPU takes two to five times as long (docs/log.md). It serves bfloat16 and float32, causal or both ways, with or without a
window, without soft cap; what it does not serve goes through attention.attend.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..core import Segments, round_up
from ..modelling import attention
from ..modelling.attention import How, prefix_of
from ..modelling.site import Frame
from . import compiled
from .compiled import NAMES, Kernels, Places
from .selftest import attends

log = logging.getLogger("luthier.speed")

QUERIES = 256  # of one piece
# Tokens of an example: of longer ones torch's own kernel is as fast as products are, or needs less memory than one pass.
MOST, MOST_WHOLE = {torch.float32: 1024, torch.bfloat16: 4096}, 16384
KEPT = 256  # keys: the probabilities of wider pieces are computed again in the backward
STEP = 32  # numbers of queries and keys are rounded up to powers of two, or multiples, of it, so that products have few shapes


@dataclass(frozen=True)
class Pieces:
    """Pieces of like size, filled up to n queries and m keys each."""

    count: int
    n: int
    m: int
    query: Places  # (count * n,) positions in the stream
    key: Places  # (count * m,); past the stream: the prefix
    spans: Places  # (count, 4): the first real key, the key that the first query is itself, the end of the real keys, real queries


@dataclass(frozen=True)
class Back:
    """Where what belongs to each position lies in the pieces: see `spread` in rows.cpp."""

    first: Places
    start: Places
    stride: Places


@dataclass(frozen=True)
class Layout:
    """The pieces of a stream, and the ways back."""

    pieces: tuple[Pieces, ...]
    query: Back
    key: Back


@dataclass
class _Piece:
    """One piece, unpadded: positions of its queries and keys, and where among its keys its own begin."""

    query: Tensor
    key: Tensor
    own: int
    example: int


def layout(segments: Segments, shape: tuple[int, int], heads: int, key_heads: int, prefix: int, causal: bool) -> Layout:
    """``prefix``: keys that every example sees before its own; they lie behind the stream."""
    total = shape[0] * shape[1]
    sized: dict[tuple[int, int, int], list[_Piece]] = {}
    for piece in _cut(segments, total, shape[1], prefix, causal):
        n, before = _size(len(piece.query)), piece.own if causal else 0
        room = _size(before) if before else 0  # what stands before its own is filled up to its left
        sized.setdefault((n, (room + n) if causal else _size(len(piece.key)), room), []).append(piece)
    found, shares = [], ([[], [], []], [[], [], []])  # type: ignore[var-annotated]  # of queries and keys: positions, starts, strides
    at = [0, 0]
    for (n, m, room), pieces in sized.items():
        query, key, spans = torch.zeros(len(pieces), n, dtype=torch.long), torch.zeros(len(pieces), m, dtype=torch.long), []
        for i, piece in enumerate(pieces):
            begin, queries = (room - piece.own if causal else 0), len(piece.query)
            query[i, :queries], key[i, begin : begin + len(piece.key)] = piece.query, piece.key
            spans.append([begin, begin + piece.own, begin + len(piece.key), queries])
            for which, (rows, h, width, first) in enumerate(((piece.query, heads, n, 0), (piece.key, key_heads, m, begin))):
                start = at[which] + i * h * width + first
                for kept, new in zip(shares[which], (rows, torch.arange(start, start + len(rows)), torch.full_like(rows, width)), strict=True):
                    kept.append(new)
        at = [at[0] + len(pieces) * heads * n, at[1] + len(pieces) * key_heads * m]
        found.append(Pieces(len(pieces), n, m, Places(query), Places(key), Places(torch.tensor(spans))))
    return Layout(tuple(found), _back(shares[0], total), _back(shares[1], total + prefix))


def _cut(segments: Segments, total: int, width: int, prefix: int, causal: bool) -> list[_Piece]:
    firsts, befores = segments.first(width).tolist(), segments.before().tolist()
    parents = [-1] * len(firsts) if segments.parent is None else segments.parent.tolist()
    shared, out = torch.arange(total, total + prefix), []
    for s, (first, length, before, parent) in enumerate(zip(firsts, segments.length.tolist(), befores, parents, strict=True)):
        earlier = torch.cat([shared, torch.arange(firsts[parent], firsts[parent] + before)]) if before else shared
        for at in range(0, length, QUERIES):
            end = min(length, at + QUERIES)
            key = torch.cat([earlier, torch.arange(first, first + (end if causal else length))])
            out.append(_Piece(torch.arange(first + at, first + end), key, len(earlier) + at, s))
    return out


@dataclass(frozen=True)
class Table:
    """The pieces of a stream for attention.cpp, unpadded."""

    pieces: Places  # (count, 5): position of the first query, queries, where the places of the keys begin, keys, the key that the first query is itself
    count: int
    families: Places  # pieces that share keys stand together: where each family begins, and the end
    together: int  # families
    places: Places


def table(segments: Segments, shape: tuple[int, int], prefix: int, causal: bool) -> Table:
    """The same pieces as `layout`'s; those that share keys one after another."""
    root = list(range(len(segments))) if segments.parent is None else [s if p < 0 else p for s, p in enumerate(segments.parent.tolist())]
    families: dict[int, list[_Piece]] = {}
    for piece in _cut(segments, shape[0] * shape[1], shape[1], prefix, causal):
        families.setdefault(0 if prefix else root[piece.example], []).append(piece)  # a prefix is everyone's
    pieces = [p for family in families.values() for p in family]
    begins = [0, *accumulate(len(p.key) for p in pieces)]
    rows = [[int(p.query[0]), len(p.query), at, len(p.key), p.own] for p, at in zip(pieces, begins, strict=False)]
    ends = torch.tensor([0, *accumulate(len(family) for family in families.values())])
    return Table(Places(torch.tensor(rows)), len(rows), Places(ends), len(families), Places(torch.cat([p.key for p in pieces])))


def _size(n: int) -> int:
    """What a number of queries or keys is rounded up to."""
    size = STEP
    while size < n and size < QUERIES:
        size *= 2
    return size if n <= size else round_up(n, 2 * STEP)


def _back(shares: list[list[Tensor]], positions: int) -> Back:
    """What lies of each position, in the order of positions."""
    place, start, stride = (torch.cat(s) for s in shares)
    order = place.argsort(stable=True)
    first = torch.zeros(positions + 1, dtype=torch.long)
    first[1:] = torch.bincount(place, minlength=positions).cumsum(0)
    return Back(Places(first), Places(start[order]), Places(stride[order]))


@dataclass(frozen=True)
class _How:
    causal: bool
    window: int  # 0: none
    scale: float
    dropout: float


class Packed(torch.autograd.Function):
    """q (N, H, d) against k and v (N + P, H_kv, d), whose last P are a prefix -> (N, H, d)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, where: Layout, how: _How, run: Kernels) -> Tensor:
        d, at = q.shape[-1], 0
        kept: list[Tensor | None] = []
        out = q.new_empty(sum(s.count * s.n for s in where.pieces) * q.shape[1], d)
        for s in where.pieces:
            query, key, value = _collected(q, k, v, s, run)
            p = _probabilities(query, key, s, how, run)
            dropped, mask = _dropped(p, how)
            here = out[at : at + s.count * s.n * q.shape[1]]
            torch.bmm(dropped, value, out=here.view(query.shape))
            at += len(here)
            kept += [p if s.m <= KEPT or mask is not None else None, mask]
        ctx.save_for_backward(q, k, v, *kept)
        ctx.how = where, how, run
        return _spread(out, where.query, q, run)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, *kept = ctx.saved_tensors
        where, how, run = ctx.how
        d, up, at = q.shape[-1], grads[0].contiguous(), [0, 0]
        queries, keys = (sum(s.count * width(s) for s in where.pieces) for width in (lambda s: s.n, lambda s: s.m))
        dq, dk, dv = (q.new_empty(n, d) for n in (queries * q.shape[1], keys * k.shape[1], keys * k.shape[1]))
        for s, p, mask in zip(where.pieces, kept[::2], kept[1::2], strict=True):
            query, key, value = _collected(q, k, v, s, run)
            p = _probabilities(query, key, s, how, run) if p is None else p
            g = _gather(up, s.query, s.count, s.n, run).view(query.shape)
            dp = g @ value.transpose(1, 2)
            dropped = p if mask is None else p * mask
            dp = dp if mask is None else dp.mul_(mask)
            run("attend_back", p.dtype, dp, p, s.spans, *_rows(dp, s), int(how.causal), how.window, how.scale)
            own, theirs = slice(at[0], at[0] + s.count * s.n * q.shape[1]), slice(at[1], at[1] + s.count * s.m * k.shape[1])
            torch.bmm(dp, key, out=dq[own].view(query.shape))
            torch.bmm(dp.transpose(1, 2), query, out=dk[theirs].view(key.shape))
            torch.bmm(dropped.transpose(1, 2), g, out=dv[theirs].view(key.shape))
            at = [own.stop, theirs.stop]
        return _spread(dq, where.query, q, run), _spread(dk, where.key, k, run), _spread(dv, where.key, v, run), None, None, None


class Whole(torch.autograd.Function):
    """The same in one pass, in bfloat16: only q, k and v are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, where: Table, how: _How, run: Kernels) -> Tensor:
        out = torch.zeros_like(q)  # positions of no example
        run("attention", q.dtype, q, k, v, out, where.pieces, where.count, where.places, *_shape(q, k, how))
        ctx.save_for_backward(q, k, v)
        ctx.how = where, how, run
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        where, how, run = ctx.how
        dq = torch.zeros_like(q)
        dk, dv = (torch.zeros_like(k, dtype=torch.float32) for _ in range(2))
        gradients = grads[0].contiguous(), dq, dk, dv
        pieces = where.pieces, where.families, where.together, where.places
        run("attention_back", q.dtype, q, k, v, *gradients, *pieces, *_shape(q, k, how))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _shape(q: Tensor, k: Tensor, how: _How) -> tuple[int, int, int, int, int, float]:
    return q.shape[1], k.shape[1], q.shape[2], int(how.causal), how.window, how.scale


def _gather(x: Tensor, places: Places, count: int, n: int, run: Kernels) -> Tensor:
    """(N, H, d) -> (count, H, n, d)"""
    out = x.new_empty(count, x.shape[1], n, x.shape[2])
    run("collect", x.dtype, x, places, out, count, n, *x.shape[1:])
    return out


def _collected(q: Tensor, k: Tensor, v: Tensor, s: Pieces, run: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    """q (count * H_kv, H / H_kv * n, d), k and v (count * H_kv, m, d)"""
    rows, d = s.count * k.shape[1], q.shape[-1]
    query = _gather(q, s.query, s.count, s.n, run).view(rows, -1, d)
    key, value = (_gather(x, s.key, s.count, s.m, run).view(rows, s.m, d) for x in (k, v))
    return query, key, value


def _rows(p: Tensor, s: Pieces) -> tuple[int, int, int, int]:
    """Rows of scores, those of one piece, queries and keys."""
    rows = p.shape[0] * p.shape[1]
    return rows, rows // s.count, s.n, s.m


def _probabilities(query: Tensor, key: Tensor, s: Pieces, how: _How, run: Kernels) -> Tensor:
    p = query @ key.transpose(1, 2)
    run("attend", p.dtype, p, s.spans, *_rows(p, s), int(how.causal), how.window, how.scale)
    return p


def _dropped(p: Tensor, how: _How) -> tuple[Tensor, Tensor | None]:
    """Probabilities after dropout, and what they were multiplied with."""
    if not how.dropout:
        return p, None
    mask = torch.empty_like(p).bernoulli_(1 - how.dropout).div_(1 - how.dropout)
    return p * mask, mask


def _spread(x: Tensor, back: Back, like: Tensor, run: Kernels) -> Tensor:
    """Out of the pieces: (N, H, d)."""
    out = torch.empty_like(like)
    run("spread", x.dtype, x, back.first, back.start, back.stride, out, *like.shape)
    return out


class ByHand:
    """What attention.attend and the forms of attention modules ask."""

    def __init__(self, run: Kernels, whole: bool = False):
        """``whole``: in one pass where that serves."""
        self.run, self.whole = run, whole

    def __call__(self, frame: Frame, module: Any, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor | None:
        """q (B, T, H, d) against k and v (B, T, H_kv, d) -> (B, T, H, d), or None where it does not serve."""
        segments, (B, T, H, d) = frame.segments, q.shape  # segments of another type: ranks share the stream
        if type(segments) is not Segments or how.softcap is not None or (segments.parent is not None and not how.causal):
            return None
        if isinstance(frame.route, tuple) and frame.prefixes:  # each example its own
            return None
        if "longest" not in frame.plans:
            frame.plans["longest"] = int((segments.length + segments.before()).max())
        longest = frame.plans["longest"]
        whole = self.whole and q.dtype == torch.bfloat16 and d % 32 == 0 and not how.dropout
        if q.dtype not in MOST or longest > (MOST_WHOLE if whole else MOST[q.dtype]):
            return None
        window = how.window if how.window is not None and how.window < longest else 0
        prefix = prefix_of(frame, frame.route, module)
        if prefix is not None and window:  # a prefix stands outside of it
            return None
        flat = [x.contiguous().view(B * T, -1, d) for x in (q, k, v)]
        if not self.run.fits(*flat):
            return None
        if prefix is not None:
            flat[1:] = [torch.cat([x, p.to(x.dtype)]) for x, p in zip(flat[1:], prefix, strict=True)]
        P = 0 if prefix is None else len(prefix[0])
        asked = _How(how.causal, window, d**-0.5 if how.scaling is None else how.scaling, how.dropout)
        key = (whole, B, T, H, k.shape[2], P, how.causal)
        if key not in frame.plans:
            frame.plans[key] = table(segments, (B, T), P, how.causal) if whole else layout(segments, (B, T), H, k.shape[2], P, how.causal)
        return (Whole if whole else Packed).apply(*flat, frame.plans[key], asked, self.run).view(q.shape)  # type: ignore[no-any-return]


def install(policy: Any, run: Kernels) -> ByHand | None:
    """Attention by hand for a policy, in one pass where it can be, where it is found equal to attention.attend in the dtype of its model."""
    dtype = policy.lm.dtype
    if policy.lm.config._attn_implementation != attention.NAME or dtype not in NAMES:
        return None
    for whole in (True, False) if run.whole and dtype == torch.bfloat16 else (False,):
        if policy.device.type == "meta" or equals(dtype, whole):
            return ByHand(run, whole)
        log.warning("speed.kernels: attention by hand%s was found to differ from torch's in %s, and is not used", " in one pass" if whole else "", NAMES[dtype])
    return None


@functools.cache
def equals(dtype: torch.dtype, whole: bool) -> bool:
    """Whether it gives what attention.attend gives, for heads that go in one pass, too."""
    run = compiled.kernels()
    return run is not None and attends(ByHand(run, whole), 4, 2, 32, dtype, torch.device("cpu"))
