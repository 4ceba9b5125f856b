"""Self-attention of the usual kind in training: rotary positions by a row kernel, and the attention over packed examples by hand.

The plain form copies queries, keys and values twice into padded batches, writes a mask, and lets autograd keep the copies; its backward adds gradients of
repeated positions into zeros. Here every head's vectors are gathered once, straight into the layout of the products, the softmax is causal by construction
(what is later is neither computed nor read), gradients are gathered back, and only q, k, v and the probabilities are kept. Query heads that share a key
head stand above one another in one product, so keys are never repeated.

It takes bfloat16 and float32 on the CPU, segments of up to attention.SHORT tokens, causal, without prefix, window, soft cap or dropout; anything else
goes through attention.attend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import attention
from ..anatomy import is_linear
from ..core import Segments
from ..site import Frame, Site, current, using
from .compiled import Kernels, fits
from .form import Form
from .rows import Rotate
from .selftest import TOKENS, at_hand, differs

LINEARS, NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")


@dataclass(frozen=True)
class _Bucket:
    """Segments of like length l: which rows of (T * heads, d) their vectors are, heads before positions."""

    size: int  # segments
    length: int
    query: Tensor  # (s * heads * l,), query heads of one key head one above another
    key: Tensor  # (s * key heads * l,)
    empty: Tensor  # rows of ``query`` that only fill up: nothing reads their result


@dataclass(frozen=True)
class Layout:
    """Where the heads' vectors of a stream lie in padded batches, and the way back; positions of no example read the last row, which is zero."""

    buckets: tuple[_Bucket, ...]
    back_query: Tensor  # (T * heads,)
    back_key: Tensor  # (T * key heads,)


def layout(segments: Segments, shape: tuple[int, int], heads: int, key_heads: int, device: torch.device) -> Layout | None:
    """None where a segment is longer than what plain products are good for."""
    total = shape[0] * shape[1]
    found, back = attention.plan(segments, total, shape[1], torch.device("cpu"))
    if any(b.index.shape[1] > attention.SHORT for b in found):
        return None
    real = segments.example(shape).flatten() >= 0
    buckets, back_rows, at, slots = [], [torch.full((total, h), -1, dtype=torch.long) for h in (heads, key_heads)], [0, 0], 0
    for b in found:
        s, n = b.index.shape
        own = (back >= slots) & (back < slots + s * n) & real
        slots += s * n
        rows = []
        for which, h in enumerate((heads, key_heads)):
            rows.append((b.index[:, None, :] * h + torch.arange(h)[None, :, None]).flatten())  # (s, h, n)
            place = back[own] - (slots - s * n)
            back_rows[which][own] = at[which] + ((place // n)[:, None] * h + torch.arange(h)) * n + (place % n)[:, None]
            at[which] += s * h * n
        fill = (torch.arange(n) >= b.lengths[:, None])[:, None, :].expand(s, heads, n).flatten().nonzero().flatten()
        buckets.append(_Bucket(s, n, rows[0].to(device), rows[1].to(device), fill.to(device)))
    for which in (0, 1):
        back_rows[which][back_rows[which] < 0] = at[which]
    return Layout(tuple(buckets), back_rows[0].flatten().to(device), back_rows[1].flatten().to(device))


class Packed(torch.autograd.Function):
    """Causal attention inside each segment: q (B, T, H, d), k and v (B, T, H_kv, d) -> (B, T, H, d)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, where: Layout, scale: float, run: Kernels) -> Tensor:
        d, kept = q.shape[-1], []
        flat = [x.view(-1, d) for x in (q, k, v)]
        out, at = _buffer(where, d, q, "query"), 0
        for b in where.buckets:
            query, key, value = _gathered(flat, b, k.shape[2])
            p = query @ key.transpose(1, 2)
            run("attend", p.dtype, p, p.shape[0] * p.shape[1], b.length, scale)
            here = out[at : at + len(b.query)]
            torch.bmm(p, value, out=here.view(query.shape))
            at += len(here)
            kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.how = where, scale, run
        return out.index_select(0, where.back_query).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, *kept = ctx.saved_tensors
        where, scale, run = ctx.how
        d = q.shape[-1]
        flat, up = [x.view(-1, d) for x in (q, k, v)], grads[0].reshape(-1, d)
        dq, dk, dv = (_buffer(where, d, q, which) for which in ("query", "key", "key"))
        at, at_key = 0, 0
        for b, p in zip(where.buckets, kept, strict=True):
            query, key, value = _gathered(flat, b, k.shape[2])
            g = up.index_select(0, b.query).index_fill_(0, b.empty, 0.0).view(query.shape)
            dp = g @ value.transpose(1, 2)
            run("attend_back", p.dtype, dp, p, p.shape[0] * p.shape[1], b.length, scale)
            own, theirs = slice(at, at + len(b.query)), slice(at_key, at_key + len(b.key))
            torch.bmm(dp, key, out=dq[own].view(query.shape))
            torch.bmm(dp.transpose(1, 2), query, out=dk[theirs].view(key.shape))
            torch.bmm(p.transpose(1, 2), g, out=dv[theirs].view(key.shape))
            at, at_key = own.stop, theirs.stop
        back = [x.index_select(0, rows) for x, rows in ((dq, where.back_query), (dk, where.back_key), (dv, where.back_key))]
        return back[0].view(q.shape), back[1].view(k.shape), back[2].view(v.shape), None, None, None


def _buffer(where: Layout, d: int, like: Tensor, which: str) -> Tensor:
    """Room for the rows of all buckets, and one of zeros behind them."""
    out = like.new_empty(sum(len(getattr(b, which)) for b in where.buckets) + 1, d)
    out[-1] = 0.0
    return out


def _gathered(flat: list[Tensor], b: _Bucket, key_heads: int) -> list[Tensor]:
    """q (s * H_kv, group * l, d), k and v (s * H_kv, l, d)"""
    q, k, v = (x.index_select(0, rows) for x, rows in zip(flat, (b.query, b.key, b.key), strict=True))
    n = b.size * key_heads
    return [x.view(n, -1, x.shape[-1]) for x in (q, k, v)]


class Attending(Form):
    """Stands in for the forward of a self-attention that is built as Llama's is."""

    def __init__(self, module: Any, how: attention.How, run: Kernels):
        super().__init__(module)
        self.how, self.run = how, run

    def faster(
        self, hidden_states: Tensor, *args: Any, position_embeddings: Any = None, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        m, frame, x_BTD = self.module, current(), hidden_states
        if args or frame is None or frame.segments is None or attention.RECORD in frame.plans or past_key_values is not None or position_embeddings is None:
            return None
        cosine, sine = position_embeddings
        shape = (*x_BTD.shape[:-1], -1, m.head_dim)
        if tuple(cosine.shape) != (*x_BTD.shape[:-1], m.head_dim) or not fits(x_BTD, cosine, sine) or m.config._attn_implementation != attention.NAME:
            return None
        q, k, v = (getattr(m, n)(x_BTD).view(shape) for n in LINEARS[:3])
        if "q_norm" in m._modules:
            q, k = m.q_norm(q), m.k_norm(k)
        q, k = (Rotate.apply(x.contiguous(), cosine, sine, self.run) for x in (q, k))
        dropout = m.attention_dropout if m.training else 0.0
        y = self._packed(frame, q, k, v, dropout)
        if y is None:
            how: dict[str, Any] = {"dropout": dropout, "scaling": self.how.scaling, "sliding_window": self.how.window, "softcap": self.how.softcap}
            y = attention.attend(m, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attention_mask, **how, **kwargs)[0]
        return m.o_proj(y.reshape(*x_BTD.shape[:-1], -1)), None

    def _packed(self, frame: Frame, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor | None:
        segments, window = frame.segments, self.how.window
        assert segments is not None
        if type(segments) is not Segments or segments.parent is not None:  # ranks share the stream, or examples go on from a shared beginning
            return None
        if segments.plain or frame.prefixes or dropout or self.how.softcap is not None or not self.how.causal:
            return None
        key = (Layout, q.shape[:3], k.shape[2], q.device)
        if key not in frame.plans:
            frame.plans[key] = layout(segments, (q.shape[0], q.shape[1]), q.shape[2], k.shape[2], q.device)
        where = frame.plans[key]
        if where is None or (window is not None and window < max(b.length for b in where.buckets)):
            return None
        return Packed.apply(q, k, v.contiguous(), where, self.how.scaling, self.run)  # type: ignore[no-any-return]


def usual(module: Any) -> bool:
    """q, k, v, o by their usual names, norms of q and k or none, nothing else inside."""
    children = dict(module.named_children())
    if not set(LINEARS) <= set(children) <= {*LINEARS, *NORMS} or len(set(children) & set(NORMS)) == 1 or "forward" in module.__dict__:
        return False
    if not all(hasattr(module, n) for n in ("head_dim", "attention_dropout", "config", "layer_idx")) or module._parameters:
        return False
    return all(is_linear(c.base if isinstance(c, Site) else c) for n, c in children.items() if n in LINEARS)


def install(policy: Any, run: Kernels) -> int:
    """Give every usual self-attention the faster form, where it is found equal. Returns how many."""
    put, tested = 0, {}
    if policy.lm.config._attn_implementation != attention.NAME:
        return 0
    for module in list(policy.lm.modules()):
        if not usual(module) or (how := _asked(policy, module)) is None:
            continue
        form = Attending(module, how, run)
        if (kind := (type(module), how)) not in tested:
            tested[kind] = _equals(policy, form)
        if tested[kind]:
            form.put()
            put += 1
    return put


def _rotation(policy: Any, module: Any) -> tuple[Tensor, Tensor]:
    """cos and sin (1, TOKENS, d) of some positions."""
    angle = torch.rand(1, TOKENS, module.head_dim // 2, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2) * 6
    return angle.cos().to(policy.device, policy.lm.dtype), angle.sin().to(policy.device, policy.lm.dtype)


def _two() -> Segments:
    first = TOKENS // 2 + 1
    return Segments(torch.tensor([0, 0]), torch.tensor([0, first]), torch.tensor([first, TOKENS - first]))


@torch.no_grad()
def _asked(policy: Any, module: Any) -> attention.How | None:
    """What a module asks of its attention, as its own forward says it; None where it says something that is not known here."""
    x = torch.zeros(1, TOKENS, policy.lm.config.get_text_config().hidden_size, dtype=policy.lm.dtype, device=policy.device)
    said: dict[Any, Any] = {}
    mode = module.training
    module.eval()
    try:
        with at_hand([module]), using(Frame(None, _two(), plans={attention.ASKED: said})):
            type(module).forward(module, hidden_states=x, position_embeddings=_rotation(policy, module), attention_mask=None)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    finally:
        module.train(mode)
    how, more = said.get(module, (None, ()))
    return None if more or how is None or how.scaling is None else how


def _equals(policy: Any, form: Attending) -> bool:
    m, lm = form.module, policy.lm
    if policy.device.type == "meta":
        return True
    where = _rotation(policy, m)

    def plain(x: Tensor) -> list[Tensor]:
        with using(Frame(None, _two())):
            return [form.kind.forward(m, hidden_states=x, position_embeddings=where, attention_mask=None)[0]]

    def faster(x: Tensor) -> list[Tensor]:
        with using(Frame(None, _two())):
            done = form.faster(x, position_embeddings=where)
        if done is None:
            raise RuntimeError("the faster form declines")
        return [done[0]]

    mode = m.training
    m.eval()
    try:
        with at_hand([m]):
            return not differs(plain, faster, [], lm.config.get_text_config().hidden_size, lm.dtype, policy.device)
    finally:
        m.train(mode)
