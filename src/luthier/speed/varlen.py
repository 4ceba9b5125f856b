"""Attention over packed examples on CUDA: one call of torch's flash kernel for sequences of any lengths, over the stream as it lies.

The common form (attention.py) sorts examples into padded batches and copies them there and back. Here the kernel is told where each example begins: queries
are neither copied nor padded. Padding between and behind examples becomes pieces of its own, which see themselves, so that every position has an owner and
gradients of every one are written.

Causal attention of n queries against more keys than that ends with the last key (FlashAttention-2: Dao, 2023, arXiv 2307.08691; the library does so since its
release 2.1). So what an example goes on from (`Segments.parent`) and the keys of a prefix are put before its own, one call does the rest, and no results have
to be merged. What a beginning or a prefix hears from all that see it is added up in float32.

It takes 16 bits, causal or both ways, sliding windows. Soft caps, dropout, a prefix beside a window, ranks that share a stream, and rows of one causal example
each, which torch's ordinary flash kernel serves: those go on through attention.attend.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import Segments
from ..modelling import attention
from ..modelling.across import flash
from ..modelling.anatomy import attentions
from ..modelling.attention import KV, How
from ..modelling.site import Frame
from .selftest import attends

log = logging.getLogger("luthier.speed")

GAP = 64  # positions of padding that see one another at most
Shape = tuple[int, int, int, torch.dtype]  # query heads, key heads, width of a head


@dataclass(frozen=True)
class Plan:
    """Where the pieces of a stream lie, and the keys that each of them sees."""

    ends: Tensor  # (N + 1,) int32: piece i is from ends[i] to ends[i + 1]
    longest: int
    key_ends: Tensor  # the same of the keys
    longest_key: int
    keys: Tensor | None  # (keys,) which row of the stream, or of the prefixes that stand behind it, each one is; None: the stream itself


def plan(segments: Segments, shape: tuple[int, int], device: torch.device, prefixes: tuple[tuple[int, int], ...] = ()) -> Plan:
    """Pieces of a stream (B, T). ``prefixes``: for each example the first row of its prefix behind the stream, and how many rows that has."""
    total, width = shape[0] * shape[1], shape[1]
    first, length = segments.first(width).tolist(), segments.length.tolist()
    parent = [-1] * len(segments) if segments.parent is None else segments.parent.tolist()
    pieces: list[tuple[int, int, int]] = []  # first, length, example
    at = 0
    for here, n, s in sorted(zip(first, length, range(len(first)), strict=True)):
        pieces += [(i, min(GAP, here - i), -1) for i in range(at, here, GAP)]
        pieces += [(here, n, s)] if n else []
        at = here + n
    pieces += [(i, min(GAP, total - i), -1) for i in range(at, total, GAP)]
    seen = []
    for here, n, s in pieces:
        before = [] if s < 0 or not prefixes else [prefixes[s]]
        before += [] if s < 0 or parent[s] < 0 else [(first[parent[s]], length[parent[s]])]
        seen.append([*before, (here, n)])
    lengths = torch.tensor([n for _, n, _ in pieces])
    key_lengths = torch.tensor([sum(n for _, n in runs) for runs in seen])
    own = torch.equal(lengths, key_lengths)
    ends = _ends(lengths, device)
    return Plan(
        ends,
        int(lengths.max()),
        ends if own else _ends(key_lengths, device),
        int(key_lengths.max()),
        None if own else torch.cat([torch.arange(here, here + n) for runs in seen for here, n in runs]).to(device),
    )


def _ends(lengths: Tensor, device: torch.device) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device, torch.int32)


class Gathered(torch.autograd.Function):
    """Rows of x (n, H, d), some of them several times. Their gradients are added up in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        dx = torch.zeros(ctx.rows, *grads[0].shape[1:], dtype=torch.float32, device=grads[0].device)
        return dx.index_add_(0, index, grads[0].float()).to(grads[0].dtype), None


class Varlen:
    """What attention.attend asks first, as ByHand on the CPU. ``shapes``: for which the kernel was found equal; ``kernel``: torch's varlen_attn."""

    def __init__(self, shapes: frozenset[Shape], kernel: Callable[..., Any]):
        self.shapes, self.kernel = shapes, kernel

    def __call__(self, frame: Frame, module: Any, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor | None:
        """q (B, T, H, d) against k and v (B, T, H_kv, d) -> (B, T, H, d), or None: not these."""
        segments, (B, T, H, d) = frame.segments, q.shape
        if type(segments) is not Segments or flash(q) != "cuda" or how.dropout or how.softcap is not None:
            return None
        if (H, k.shape[2], d, q.dtype) not in self.shapes or k.shape != v.shape or k.dtype != q.dtype:
            return None
        put, which = _prefixes(frame, module, len(segments))
        if (segments.plain and how.causal and not put) or (segments.parent is not None and not how.causal):
            return None
        where = self._plan(frame, [len(k) for k, _ in put], which, (B, T), q.device)
        window = None if how.window is None or how.window >= where.longest_key else how.window
        if window is not None and put:
            return None
        q, k, v = (x.reshape(B * T, -1, d) for x in (q, k, v))
        if where.keys is not None:
            behind = [torch.cat([x, *(kv[i].to(x.dtype) for kv in put)]) if put else x for i, x in enumerate((k, v))]
            k, v = (Gathered.apply(x, where.keys) for x in behind)
        left = -1 if window is None else window - 1
        y = self.kernel(
            q,
            k,
            v,
            where.ends,
            where.key_ends,
            max(2, where.longest),  # with single queries the kernel takes another way, made for decoding
            where.longest_key,
            scale=how.scaling,
            window_size=(left, 0 if how.causal else left),
            enable_gqa=k.shape[1] != H,
        )
        return y.view(B, T, H, d)  # type: ignore[no-any-return]

    def _plan(self, frame: Frame, lengths: list[int], which: list[int], shape: tuple[int, int], device: torch.device) -> Plan:
        """The pieces of a forward, worked out once for all layers whose prefixes are as long."""
        begin = shape[0] * shape[1] + torch.tensor([0, *lengths]).cumsum(0)
        prefixes = tuple((0, 0) if i < 0 else (int(begin[i]), lengths[i]) for i in which)
        name = (Plan, shape, device, prefixes)
        if name not in frame.plans:
            frame.plans[name] = plan(frame.segments, shape, device, prefixes)  # type: ignore[arg-type]
        return frame.plans[name]  # type: ignore[no-any-return]


def _prefixes(frame: Frame, module: Any, examples: int) -> tuple[list[KV], list[int]]:
    """The prefixes of a module, and which of them stands before each example, -1: none."""
    if not frame.prefixes:
        return [], []
    routes = frame.route if isinstance(frame.route, tuple) else (frame.route,) * examples
    found = {r: attention.prefix_of(frame, r, module) for r in dict.fromkeys(routes)}
    put = {r: kv for r, kv in found.items() if kv is not None}
    place = {r: i for i, r in enumerate(put)}
    return list(put.values()), [place.get(r, -1) for r in routes] if put else []


# --- putting it ---------------------------------------------------------------------------------------------------------


def install(policy: Any, device: str) -> Varlen | None:
    """The attention of a policy over packed examples, where it is found equal on this device for its heads."""
    lm, anatomy = policy.lm, policy.base.anatomy
    if device != "cuda" or lm.dtype not in (torch.bfloat16, torch.float16) or not torch.cuda.is_available():
        return None
    if lm.config._attn_implementation != attention.NAME or anatomy.kind == "encoder_decoder":  # which is never packed
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        log.info("packed attention in one call is not used: this torch has no torch.nn.attention.varlen (2.10 and newer have)")
        return None
    return found(lm, varlen_attn, torch.device(device))


def found(lm: Any, kernel: Callable[..., Any], device: torch.device) -> Varlen | None:
    """With a kernel of varlen_attn's form, for those heads of a model for which it is equal; None where there are none."""
    asked: dict[Shape, None] = {}
    for a in attentions(lm):
        config = getattr(a.module, "config", None) or lm.config.get_text_config()
        asked[getattr(config, "num_attention_heads", 0), a.heads, a.dim, lm.dtype] = None
    shapes = frozenset(s for s in asked if equals(s, kernel, device))
    if missing := [f"{heads} / {key_heads} x {d}" for heads, key_heads, d, _ in asked if (heads, key_heads, d, lm.dtype) not in shapes]:
        log.warning("packed attention in one call is not used for heads of %s: it cannot be run on this device, or differs", ", ".join(missing))
    return Varlen(shapes, kernel) if shapes else None


def equals(shape: Shape, kernel: Callable[..., Any], device: torch.device) -> bool:
    """Whether the kernel gives what attention.attend gives for heads of this shape."""
    heads, key_heads, d, dtype = shape
    return attends(Varlen(frozenset([shape]), kernel), heads, key_heads, d, dtype, device)
