"""Sequences longer than one device holds: a stream split by position over the ranks of a context group, and what these say to one another.

Every rank of a group gets the same batch and keeps some of its positions (`split`): it embeds them, runs the blocks on them and scores them. Only two
things look beyond a rank's own positions, and both are collectives that autograd knows (`gather`, `total`):

1. Attention. Keys and values of all ranks are gathered in every block, queries stay (across.py). Llama 3 was trained so (Dubey et al., 2024, arXiv 2407.21783,
   section 3.3.2), for the reason that holds here: segments, prefixes, sliding windows and any mask work as on one device, because every query sees plain keys
   and values, and under grouped-query attention these are small (an eighth of the hidden states in Llama 3 70B). A ring (Liu et al., 2023, arXiv 2310.01889),
   which is what torch's own context_parallel runs on causal attention, hides the transfer behind the products but knows one causal sequence, no more.
2. Whatever an objective sums over an example's or a batch's tokens (`Segments.together`), and the vector that a head reads of an example (`Segments.pick`).
   So every rank of a group has the whole batch's sums, and its counts, which the collator made before the split: objectives stay as they are.

Why gradients come out right: let W ranks have the sums s_kr and the counts u_kr of each term k. The loop divides by the mean count and averages gradients, so
it descends J = 1/W sum_r sum_k w_k s_kr / (1/W sum_q u_kq) = sum_k w_k (sum_r s_kr) / (sum_r u_kr). A group of C ranks brings C times the sums of its batch
and C times its counts: J is what it is without the group. And the gradient of J by a parameter that all ranks share is the sum over ranks of what each finds
on its own path, provided that collectives carry gradients back as what they are, linear maps: the transpose of gathering is to sum each rank's slice over all
of them (reduce-scatter), that of a total is a total.

Positions are dealt in zigzag: the stream is cut into 2C pieces, rank r keeps pieces r and 2C - 1 - r (as Llama 3's), so that of one long causal sequence every
rank computes as many scores.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import IGNORE, Batch, Incompatible, Segments, round_up
from ..settings.plugins import kind_of

KEYS, SUMS = "keys and values", "sums over a sequence"
PIECE, PADDED_PIECE = 32, 8  # pieces have a multiple of so many positions, for the same reason as streams: shapes repeat


@dataclass
class Group:
    """The ranks that share a sequence. Without a process group nothing is sent, and what would arrive is memory without values: for planning on meta."""

    rank: int
    size: int
    handle: Any = None  # a torch.distributed.ProcessGroup
    traffic: Counter[str] = field(default_factory=Counter)  # bytes that this rank has handed to collectives, by what for
    doing: Callable[[str], AbstractContextManager[Any]] = nullcontext  # an operation in which others are waited for

    def gather(self, x: Tensor, what: str) -> Tensor:
        """(...) of every rank -> (C, ...)."""
        out = x.new_empty(self.size, *x.shape)
        self._run(lambda: _gather_single(out.view(-1), x.contiguous().view(-1), group=self.handle), x, what)
        return out

    def scatter(self, x: Tensor, what: str) -> Tensor:
        """(C, ...) -> the sum over ranks of this one's slice."""
        out = x.new_empty(x.shape[1:])
        self._run(lambda: _scatter_single(out.view(-1), x.contiguous().view(-1), group=self.handle), x, what)
        return out

    def sum(self, x: Tensor, what: str) -> Tensor:
        """Over ranks."""
        out = x.clone(memory_format=torch.contiguous_format)
        self._run(lambda: dist.all_reduce(out, group=self.handle), x, what)
        return out

    def _run(self, collective: Callable[[], Any], x: Tensor, what: str) -> None:
        self.traffic[what] += x.nbytes
        if self.handle is not None:
            with self.doing(what):
                collective()


_JOINED: dict[int, Group] = {}  # by the ranks that share a sequence


def joined(place: Any) -> Group | None:
    """This process's group, of neighbouring ranks, so that it lies within a machine where it fits; made at the first call, by all ranks of the launch.

    None where a rank has a sequence to itself.
    """
    size = place.context
    if size == 1:
        return None
    if size not in _JOINED:
        with place.doing("joining those who share a sequence"):
            handle, _ = dist.new_subgroups(group_size=size, timeout=timedelta(seconds=place.timeout + 60))
        _JOINED[size] = Group(place.rank % size, size, handle, place.group.traffic, place.doing)
    return _JOINED[size]


_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name is on its way out
_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.gather(x, KEYS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.scatter(grads[0], KEYS), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.sum(x, SUMS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.sum(grads[0], SUMS), None


def gather(x: Tensor, group: Group) -> Tensor:
    """What every rank has, (...) -> (C, ...), in the order of ranks; its gradient is the sum over ranks of each one's slice."""
    return _Gather.apply(x, group)


def total(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks, on all of them; its gradient is the sum of theirs."""
    return _Sum.apply(x, group)


NO_SOURCE = (
    "place.context: an encoder-decoder has two streams that look at each other, and only one stream is split over ranks; set place.context=1, or use a decoder"
)
MIXED = "place.context: objective multitask puts several tasks into one stream, which is not split over ranks; set place.context=1"
LONGER = "place.context: {} lengthens the stream, which has been split by then; use prefix, p_tuning_v2 or lora, or set place.context=1"
LENGTHENING = ("prompt", "p_tuning", "crafted_prompt")


# --- which positions a rank keeps -----------------------------------------------------------------------------------


def pieces_of(rank: int, size: int, width: int) -> list[tuple[int, int]]:
    """(first, end) of what a rank keeps of ``width`` positions, which 2 x ``size`` divides. The two pieces of the last rank are one."""
    piece = width // (2 * size)
    low, high = (rank * piece, (rank + 1) * piece), ((2 * size - 1 - rank) * piece, (2 * size - rank) * piece)
    return [(low[0], high[1])] if low[1] == high[0] else [low, high]


@dataclass(frozen=True, kw_only=True)
class Portion(Segments):
    """Where the examples of a whole stream lie, for a rank that keeps some of its positions.

    ``row``, ``start`` and ``length`` are of the kept positions: how many of each example are here (0: none), and where the first of them stands.
    """

    whole: Segments
    shape: tuple[int, int]  # (B, T) of the whole stream, whose width 2C divides
    group: Group

    @classmethod
    def of(cls, whole: Segments, shape: tuple[int, int], group: Group) -> Portion:
        """This rank's part of a stream."""
        kept = torch.cat([torch.arange(a, b) for a, b in pieces_of(group.rank, group.size, shape[1])])
        inside = (kept >= whole.start[:, None]) & (kept < (whole.start + whole.length)[:, None])  # (S, L)
        return cls(whole.row, inside.int().argmax(1), inside.sum(1), whole=whole, shape=shape, group=group)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """(first, end) of what is kept of each row."""
        return pieces_of(self.group.rank, self.group.size, self.shape[1])

    def own(self, x_BT: Tensor) -> Tensor:
        """The kept positions of a whole tensor (B, T, ...)."""
        return torch.cat([x_BT[:, a:b] for a, b in self.pieces], 1)

    def example(self, shape: tuple[int, int]) -> Tensor:
        """(B, L): the number of the example each kept position belongs to, -1 on padding."""
        return self.own(self.whole.example(self.shape))

    def positions(self, shape: tuple[int, int]) -> Tensor:
        """(B, L): the place of each kept position in its example."""
        return self.own(self.whole.positions(self.shape))

    def together(self, x: Tensor) -> Tensor:
        """A sum over the kept tokens as the sum over all."""
        return total(x, self.group)

    def pick(self, hidden_BLD: Tensor, end: str) -> Tensor:
        """(S, D) hidden states of each example's first or last token, on every rank, from the one that keeps it."""
        B, L, _ = hidden_BLD.shape
        wanted = self.whole.first(self.shape[1]) if end == "first" else self.whole.last(self.shape[1])
        here = torch.full((B * self.shape[1],), -1, dtype=torch.long)
        here[self.own(torch.arange(B * self.shape[1]).view(self.shape)).flatten()] = torch.arange(B * L)
        place_S = here[wanted].to(hidden_BLD.device)
        mine_SD = hidden_BLD.flatten(0, 1).index_select(0, place_S.clamp(min=0))
        return self.together(torch.where((place_S >= 0)[:, None], mine_SD, torch.zeros_like(mine_SD)))

    @property
    def plain(self) -> bool:
        """Rows are not whole examples here."""
        return False


def split(batch: Batch, group: Group) -> Batch:
    """This rank's part of a batch, which all ranks of the group have; its counts stay those of the whole."""
    (B, T), whole = batch.shape, batch.segments
    packed = not whole.plain
    width = round_up(T, 2 * group.size * (PIECE if packed else PADDED_PIECE))
    portion = Portion.of(whole, (B, width), group)

    def own(x_BT: Tensor, fill: int = 0) -> Tensor:
        return portion.own(torch.nn.functional.pad(x_BT, (0, 0) * (x_BT.dim() - 2) + (0, width - T), value=fill)).contiguous()

    if batch.source is not None:
        raise Incompatible(NO_SOURCE)
    if batch.parts:
        raise Incompatible(MIXED)
    return Batch(
        ids=own(batch.ids),
        segments=portion,
        inputs={k: own(v) for k, v in batch.inputs.items()},
        targets=None if batch.targets is None else own(batch.targets, IGNORE),
        extras=batch.extras,
        units=batch.units,
        route=batch.route,
        where=batch.where,
        beside=None if batch.beside is None else split(batch.beside, group),
    )


Collate = Callable[..., Batch]  # (rows, *, pad, packed)


def splitting(collate: Collate, group: Group | None) -> Collate:
    """A collator that gives this rank's part of each batch."""
    if group is None:
        return collate
    return lambda rows, *, pad, packed: split(collate(rows, pad=pad, packed=packed), group)


def sharing(objective: Any, group: Group | None) -> Any:
    """The same objective with that collator."""
    if group is None:
        return objective
    out = copy.copy(objective)
    object.__setattr__(out, "collate", splitting(objective.collate, group))  # frozen: its settings stay as they are
    return out


# --- what cannot be split -------------------------------------------------------------------------------------------


def check(run: Any) -> None:
    """Raise Incompatible for a run whose sequences cannot be split over ranks; nothing has been loaded yet."""
    if run.place.context == 1:
        return
    method, objective = f"method {kind_of(run.method)}", f"objective {kind_of(run.objective)}"
    if "rollouts" in run.objective.needs:
        raise Incompatible(
            f"place.context: {objective} weighs every token of its answers by itself, and such weights are not split over ranks; set place.context=1"
        )
    if run.objective.renders == "mixed":
        raise Incompatible(MIXED)
    if kind_of(run.method) in LENGTHENING:
        raise Incompatible(LONGER.format(method))


def check_base(base: Any, attention: str) -> None:
    """Raise Incompatible for a model whose sequences cannot be split over ranks. ``attention``: the name of ours."""
    if base.anatomy.kind == "encoder_decoder":
        raise Incompatible(NO_SOURCE)
    if base.model.config._attn_implementation != attention or not base.packs:
        raise Incompatible(
            f"place.context: positions of {base.anatomy.family} see one another in other ways than by our attention, so its sequences are not split "
            "over ranks; set place.context=1"
        )


def check_delta(delta: Any) -> None:
    """Raise Incompatible for a delta that puts vectors before examples."""
    if delta.prompt is not None:
        raise Incompatible(LONGER.format("this method"))
