"""The contracts: what a method, an objective, a precision, a place, a feed and a task are to one another.

Nothing of ours but the errors is imported here. Shapes, used as suffixes everywhere: B rows, T tokens, S examples, D hidden width,
V vocabulary, N scored positions, P prompt positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from .errors import Incompatible as Incompatible
from .errors import LuthierError as LuthierError

T = TypeVar("T")
U = TypeVar("U")
IGNORE = -100  # a target that is not trained, as in torch.nn.functional.cross_entropy


# --- examples and batches -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One rendered example, before it is batched.

    ``train[i]`` says whether token ``i`` is something the model should learn to produce; the collator shifts. ``where`` names the
    place it came from ("train.jsonl:12"), for messages.
    """

    ids: np.ndarray  # (length,) int32
    train: np.ndarray  # (length,) bool
    where: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)
    visit: tuple[int, ...] = ()  # (seed, epoch, row) of a training step: what chance in collating depends on; empty elsewhere
    task: str = ""  # the part of a multitask objective that learns it

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Segments:
    """Where S examples lie in one (B, T) stream; padding belongs to none. CPU tensors, so planning a kernel never syncs."""

    row: Tensor  # (S,)
    start: Tensor  # (S,)
    length: Tensor  # (S,)

    def __len__(self) -> int:
        return len(self.row)

    def example(self, shape: tuple[int, int]) -> Tensor:
        """(B, T): the number of the example each position belongs to, -1 on padding."""
        out_BT = torch.full(shape, -1, dtype=torch.long)
        for s, (b, t, n) in enumerate(zip(self.row.tolist(), self.start.tolist(), self.length.tolist(), strict=True)):
            out_BT[b, t : t + n] = s
        return out_BT

    def positions(self, shape: tuple[int, int]) -> Tensor:
        """(B, T): positions that restart at 0 in every example; 0 on padding."""
        out_BT = torch.zeros(shape, dtype=torch.long)
        for b, t, n in zip(self.row.tolist(), self.start.tolist(), self.length.tolist(), strict=True):
            out_BT[b, t : t + n] = torch.arange(n)
        return out_BT

    def first(self, width: int) -> Tensor:
        """(S,) flat index into (B * T) of each example's first token."""
        return self.row * width + self.start

    def last(self, width: int) -> Tensor:
        """(S,) flat index into (B * T) of each example's last token."""
        return self.first(width) + self.length - 1

    @property
    def plain(self) -> bool:
        """True when every stream row holds one example that starts at its left edge (no packing)."""
        return not bool(self.start.any()) and len(self.row.unique()) == len(self.row)


@dataclass(kw_only=True)
class Stream:
    """Token ids with the examples that lie in them."""

    ids: Tensor  # (B, T)
    segments: Segments
    inputs: dict[str, Tensor] = field(default_factory=dict)  # other model inputs aligned with ids (token_type_ids)

    @property
    def shape(self) -> tuple[int, int]:
        return self.ids.shape[0], self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """How many positions hold a token of an example."""
        return int(self.segments.length.sum())


@dataclass(kw_only=True)
class Batch(Stream):
    """One micro-batch. Its own fields are the scored side: the decoder's, or the only one."""

    source: Stream | None = None  # the encoder's side; example s reads source example s
    targets: Tensor | None = None  # (B, T), shifted by the collator; IGNORE where nothing is trained
    extras: dict[str, Tensor] = field(default_factory=dict)  # (S,) per example, (B, T) per token or (N,) per target, in the order of `scored`
    units: dict[str, int] = field(default_factory=dict)  # {"tokens": 812}: how many loss terms of each kind
    route: tuple[str | None, ...] | None = None  # the delta of each example; None inside: the base
    where: tuple[str, ...] = ()  # the source of each example, for messages
    beside: Batch | None = None  # examples that are only read, without gradients (KTO's answers to other prompts)
    parts: dict[str, Batch] = field(default_factory=dict)  # of several tasks in one stream: each task's own batch, in the order in which they lie there
    idle: bool = False  # of a rank that has nothing to train in a step, and reads something because the others do

    @property
    def tokens(self) -> int:
        """How many positions hold a token of an example, the encoder's side and what is only read included."""
        if self.idle:
            return 0
        return int(self.segments.length.sum()) + sum(s.tokens for s in (self.source, self.beside) if s is not None)

    def to(self, device: torch.device) -> Batch:
        """Move the tensors that a forward reads; segments stay on the CPU."""
        move = lambda ts: {k: t.to(device, non_blocking=True) for k, t in ts.items()}  # noqa: E731
        self.ids, self.inputs, self.extras = self.ids.to(device, non_blocking=True), move(self.inputs), move(self.extras)
        if self.targets is not None:
            self.targets = self.targets.to(device, non_blocking=True)
        if self.source is not None:
            self.source.ids, self.source.inputs = self.source.ids.to(device), move(self.source.inputs)
        for other in (*([] if self.beside is None else [self.beside]), *self.parts.values()):
            other.to(device)
        return self


# Widths are rounded up to these. On CPU every new shape of a bf16 product costs megabytes of generated code that is never given back
# (12 MB a shape on a 4-layer model), and batches of real text never repeat a width by themselves.
PACKED_MULTIPLE, PADDED_MULTIPLE = 64, 16


def lay_out(rows: Sequence[Row], pad: int, packed: bool) -> tuple[Tensor, Tensor, Segments]:
    """Put examples into a stream: ids (B, T), shifted targets (B, T), segments.

    ``packed``: all examples in one row, end to end, padding only behind the last. Otherwise one example a row, padded on the right.
    The target at a position is the next token of the same example where that token is trained, else IGNORE.
    """
    lengths = [len(r) for r in rows]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if packed else np.zeros(len(rows), dtype=np.int64)
    which = np.zeros(len(rows), dtype=np.int64) if packed else np.arange(len(rows))
    shape = (1, round_up(sum(lengths), PACKED_MULTIPLE)) if packed else (len(rows), round_up(max(lengths), PADDED_MULTIPLE))
    ids_BT, targets_BT = np.full(shape, pad, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    for r, b, t in zip(rows, which, starts, strict=True):
        ids_BT[b, t : t + len(r)] = r.ids
        targets_BT[b, t : t + len(r) - 1] = np.where(r.train[1:], r.ids[1:], IGNORE)
    segments = Segments(torch.from_numpy(which.copy()), torch.from_numpy(np.asarray(starts, dtype=np.int64)), torch.tensor(lengths))
    return torch.from_numpy(ids_BT), torch.from_numpy(targets_BT), segments


@dataclass
class Loss:
    """What an objective returns: fp32 SUMS by named term. The loop divides each by its own count, once."""

    sums: dict[str, Tensor]
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (sum, count)


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below n."""
    return -(-n // multiple) * multiple


def source_of(rows: Sequence[Row], pad: int) -> Stream | None:
    """What an encoder-decoder's encoder reads: the rows' ``extras["source"]`` (ids, a numpy array), one a row; None for rows without."""
    sources = [r.extras.get("source") for r in rows]
    if not isinstance(sources[0], np.ndarray):  # a record may have a column of that name, which is text
        return None
    ids_BT, _, segments = lay_out([Row(s, np.zeros(len(s), dtype=bool)) for s in sources if s is not None], pad, packed=False)
    return Stream(ids=ids_BT, segments=segments)


def join(rows: Sequence[Row], **extras: Any) -> Row:
    """Several examples as one row, so that they stay together wherever rows go: the answers to one prompt. `examples_of` takes them apart again."""
    out: dict[str, Any] = {"lengths": np.array([len(r) for r in rows], dtype=np.int64), **extras}
    if isinstance(rows[0].extras.get("source"), np.ndarray):
        out["source"] = np.concatenate([r.extras["source"] for r in rows])
        out["source_lengths"] = np.array([len(r.extras["source"]) for r in rows], dtype=np.int64)
    if names := dict.fromkeys(k for r in rows for k in r.extras.get("inputs", ())):
        empty = [np.zeros(len(r), dtype=np.int32) for r in rows]
        out["inputs"] = {k: np.concatenate([r.extras.get("inputs", {}).get(k, e) for r, e in zip(rows, empty, strict=True)]) for k in names}
    return Row(np.concatenate([r.ids for r in rows]), np.concatenate([r.train for r in rows]), rows[0].where, out)


def examples_of(row: Row) -> list[Row]:
    """The examples of a row that `join` made, each with its own source and other inputs; any other row is one example, itself."""
    lengths = row.extras.get("lengths")
    if not isinstance(lengths, np.ndarray):
        return [row]
    cuts = np.cumsum(lengths)[:-1]
    extras: list[dict[str, Any]] = [{} for _ in lengths]
    if "source_lengths" in row.extras:
        for e, source in zip(extras, np.split(row.extras["source"], np.cumsum(row.extras["source_lengths"])[:-1]), strict=True):
            e["source"] = source
    for name, values in row.extras.get("inputs", {}).items():
        for e, part in zip(extras, np.split(values, cuts), strict=True):
            e.setdefault("inputs", {})[name] = part
    parts = zip(np.split(row.ids, cuts), np.split(row.train, cuts), extras, strict=True)
    return [Row(ids, train, row.where, e) for ids, train, e in parts]


def inputs_of(rows: Sequence[Row], ids_BT: Tensor, segments: Segments) -> dict[str, Tensor]:
    """What rows bring beside their ids (``extras["inputs"]``: token types), each laid out as the ids are; 0 where a row brings none."""
    out: dict[str, Tensor] = {}
    for name in dict.fromkeys(k for r in rows for k in r.extras.get("inputs", ())):
        out[name] = torch.zeros_like(ids_BT)
        for r, b, t in zip(rows, segments.row.tolist(), segments.start.tolist(), strict=True):
            if name in r.extras.get("inputs", ()):
                out[name][b, t : t + len(r)] = torch.from_numpy(r.extras["inputs"][name].astype(np.int64))
    return out


def joined_batch(rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
    """All examples of rows that `join` made, as one batch whose units the objective counts. ``extras["row"]``: the row of each example; "reference" where
    the rows bring the reference's log-probability of each."""
    several = [examples_of(r) for r in rows]
    examples = [e for some in several for e in some]
    ids_BT, targets_BT, segments = lay_out(examples, pad, packed)
    inputs = inputs_of(examples, ids_BT, segments)
    extras = {"row": torch.tensor([i for i, some in enumerate(several) for _ in some])}
    if all("reference" in r.extras for r in rows):
        extras["reference"] = torch.from_numpy(np.concatenate([r.extras["reference"] for r in rows]).astype(np.float32))
    where = tuple(e.where for e in examples)
    return Batch(ids=ids_BT, segments=segments, inputs=inputs, source=source_of(examples, pad), targets=targets_BT, extras=extras, where=where)


def next_token_batch(rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
    """The collator of objectives whose loss is next-token cross-entropy; its unit is the trained token."""
    ids_BT, targets_BT, segments = lay_out(rows, pad, packed)
    units = {"tokens": int((targets_BT != IGNORE).sum())}
    where = tuple(r.where for r in rows)
    return Batch(ids=ids_BT, segments=segments, source=source_of(rows, pad), targets=targets_BT, units=units, where=where)


def scored(batch: Batch, hidden_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, D) hidden states of the positions that have a target, (N,) their targets, (N,) the example of each."""
    assert batch.targets is not None
    target_M = batch.targets.flatten()
    place_N = (target_M != IGNORE).nonzero().squeeze(1)
    example_N = batch.segments.example(batch.shape).flatten().to(place_N.device).index_select(0, place_N)
    return hidden_BTD.flatten(0, 1).index_select(0, place_N), target_M.index_select(0, place_N), example_N


def next_token_loss(policy: Policy, batch: Batch) -> Loss:
    """Sum of -log p(target) over the trained positions of a batch."""
    hidden_ND, target_N, _ = scored(batch, policy.hidden(batch))
    return Loss({"tokens": -policy.score(hidden_ND, target_N)["logp"].sum()})


def next_token_losses(policy: Policy, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """The same by example: (S,) the sum of each, and (S,) how many tokens it is of."""
    logp_S, count_S = example_logps(policy, batch)
    return {"tokens": (-logp_S, count_S)}


def token_values(policy: Policy, batch: Batch, hidden_BTD: Tensor | None = None) -> Tensor:
    """(N,) fp32 what the value voice expects of each scored position. ``hidden_BTD``: read from these, which do not learn; else it reads by itself."""
    voice = policy.voices["value"]
    hidden_ND, _, _ = scored(batch, voice.hidden(batch) if hidden_BTD is None else hidden_BTD.detach())
    head = voice.heads["value"]
    return head(hidden_ND.to(head.weight.dtype)).squeeze(-1).float()


def example_logps(policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
    """(S,) fp32 log p of the trained tokens of each example together, and (S,) how many they are."""
    hidden_ND, target_N, example_N = scored(batch, policy.hidden(batch))
    logp_N = policy.score(hidden_ND, target_N)["logp"]
    zeros_S = torch.zeros(len(batch.segments), device=logp_N.device)
    return zeros_S.index_add(0, example_N, logp_N), zeros_S.index_add(0, example_N, torch.ones_like(logp_N))


def reference_logps(policy: Policy, batch: Batch) -> Tensor:
    """(S,) fp32 what `example_logps` gives for the reference: what the rows brought, else of the base with the delta off, without gradients.

    Raises Incompatible where they brought none and the base itself was trained.
    """
    if "reference" in batch.extras:
        return batch.extras["reference"]
    with policy.reference():
        return example_logps(policy, batch)[0]


@dataclass
class Rollout:
    """Generated answers, ragged: the samples of the first prompt, those of the second, and so on."""

    ids: list[list[int]]  # new tokens only, the stopping token included
    logps: list[list[float]]  # log p of each in the model's own distribution: temperature 1, nothing cut
    stopped: list[str]  # "stop" (a stop token came) or "length"
    # log p of each at the temperature that was sampled with, top_k and top_p not counted: what PPO's ratio starts from where it learns at that temperature;
    # 0 at temperature 0
    tempered: list[list[float]] = field(default_factory=list)


@dataclass
class Answer:
    """What the model answered to one prompt, and what is known of it: what objectives with "rollouts" learn from."""

    prompt: Row  # its ids are what was generated from; extras["task"] is what rewards are shown
    ids: list[int]  # new tokens, the stopping token included
    logps: list[float]  # of each, as they were sampled
    stopped: str  # "stop" or "length"
    text: str
    scores: dict[str, float] = field(default_factory=dict)  # by source of reward
    score: float = 0.0  # their weighted sum
    tokens: dict[str, np.ndarray] = field(default_factory=dict)  # (len(ids),) fp32 each: logp, entropy, reference, value

    def row(self, start: int | None = None, **tokens: np.ndarray) -> Row:
        """Prompt and answer as one row of which the answer is trained; ``tokens``: (len(ids),) fp32 each, for `answered_batch`.

        ``start``: the token that an encoder-decoder's answer begins with; its prompt is the source.
        """
        extras: dict[str, Any] = {"tokens": {k: np.asarray(v, dtype=np.float32) for k, v in tokens.items()}}
        before = self.prompt.ids if start is None else np.array([start], dtype=np.int32)
        if start is not None:
            extras["source"] = self.prompt.ids
        ids = np.concatenate([before, np.array(self.ids, dtype=np.int32)]).astype(np.int32)
        return Row(ids, np.arange(len(ids)) >= len(before), self.prompt.where, extras)


def answered_batch(rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
    """The collator of rows that `Answer.row` made: (N,) extras in the order of `scored`; "answers" and "tokens" are counted."""
    batch = next_token_batch(rows, pad=pad, packed=packed)
    trained = [r for r in rows if r.train.any()]
    for name in rows[0].extras["tokens"]:  # of nothing where a rank has nothing to train
        batch.extras[name] = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.float32), *(r.extras["tokens"][name] for r in trained)]))
    batch.units = {"answers": len(trained), "tokens": batch.units["tokens"]}
    return batch


# --- the base and its precision -------------------------------------------------------------------------------------


class Precision(Protocol):
    """How the frozen weights are stored.

    One that packs also has ``linear(in, out, bias, *, transposed)``, which makes an empty packed linear (packed.py) with ``to_file`` and ``from_file`` in the
    field's layout; ``file_config()`` and ``from_file_config(config)``, what config.json says of it; and ``resident``: "auto", "yes" or "no".
    """

    packed: ClassVar[bool]
    dtype: torch.dtype  # of what is not packed, and of the activations


@dataclass
class Base:
    """A pretrained model as methods and objectives see it."""

    model: nn.Module
    tokenizer: Any
    anatomy: Any  # anatomy.Anatomy
    hash: str  # of the weights and the configuration
    packs: bool  # several examples may share a row (probed, not assumed)
    source: str = ""  # what the user called it: a folder, a Hub id, fiddle
    revision: str | None = None
    max_positions: int = 1024
    probes: dict[str, Any] = field(default_factory=dict)  # results, printed once
    tokens: tuple[str, ...] = ()  # added to the vocabulary, after the pretrained ones
    precision: Any = None  # how its weights are stored, where this program opened it
    storage: str = ""  # the same in a sentence, for packed weights

    @property
    def width(self) -> int:
        config = self.model.config.get_text_config()
        return getattr(config, "hidden_size", None) or config.d_model


# --- methods --------------------------------------------------------------------------------------------------------


@dataclass
class Delta:
    """What a method added: the only thing trained, saved, switched, routed."""

    params: dict[str, nn.Parameter]  # key: "<path in the untouched base>:<leaf>"
    buffers: dict[str, Tensor] = field(default_factory=dict)  # saved, not trained
    optim: dict[str, dict[str, float]] = field(default_factory=dict)  # key pattern -> {"lr": 16.0 (a factor) or "rate": 0.1 (a peak), "decay": 0}
    prompt: Callable[[], Tensor] | None = None  # (P, D) vectors put before every example, stripped from the hidden states
    prefix: Callable[[], Mapping[nn.Module, tuple[Tensor, Tensor]]] | None = None  # attention module -> keys and values (P, H_kv, d) that every example sees
    shift: int = 0  # positions the text moves: the length of the prompt or prefix; counts against the model's maximum
    penalty: Callable[[], Tensor] | None = None  # once per optimizer step
    on_step: Callable[[int, int], None] | None = None  # (step, total): a pure function of seed and step
    fold: Callable[[], None] | None = None  # write the delta into the weights; None where that is impossible
    export: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]] | None = None  # config and tensors in the field's layout
    pack: Callable[[], dict[str, Tensor]] | None = None  # what is saved instead of params and buffers, where that is smaller
    unpack: Callable[[Mapping[str, Tensor]], None] | None = None  # take the saved form: params and buffers get the keys and shapes of these tensors
    pending: Callable[[], bool] | None = None  # what stands is not yet of the form that is saved: no best is kept of it
    resting: Callable[[], frozenset[str]] | None = None  # params that do not learn at this step

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.params.values())


class Method(Protocol):
    """What is added and what trains. A frozen dataclass of hyper-parameters."""

    edits: ClassVar[Literal["outputs", "weights", "sequence"]]

    def attach(self, base: Base, name: str) -> Delta: ...


# --- objectives -----------------------------------------------------------------------------------------------------


# How data/ turns records into rows. ranked: answers to one prompt, best first, which are read; pairs: the same, which are written; judged: one answer,
# and whether it is good; prompts: what the model itself is to answer; mixed: as the part of a multitask objective that the source belongs to wants it.
Renders = Literal["text", "chat", "label", "masked", "ranked", "pairs", "judged", "prompts", "mixed"]


class Objective(Protocol):
    """What the loss is. Reads hidden states, returns sums."""

    terms: ClassVar[Mapping[str, float]]  # unit name -> weight
    needs: ClassVar[frozenset[str]]  # of {"reference", "rollouts"}
    couples: ClassVar[bool]  # the loss depends on batch-mates: it is a Coupled
    renders: ClassVar[Renders]

    def heads(self, base: Base) -> dict[str, nn.Module]: ...
    def collate(self, rows: Sequence[Row], *, pad: int, packed: bool) -> Batch: ...
    def loss(self, policy: Policy, batch: Batch) -> Loss: ...


class Separable(Objective, Protocol):
    """An objective whose loss is of each row by itself and can say so for a whole batch: (rows,) the sum and (rows,) the units of each, by term."""

    def losses(self, policy: Policy, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]: ...


class Coupled(Objective, Protocol):
    """An objective with ``couples``: a step's batches are shown to it together, before the first of them."""

    def couple(self, policy: Policy, batches: Sequence[Batch], mean: Callable[[float], float] = float) -> None: ...  # mean: over ranks


class Rewarded(Objective, Protocol):
    """An objective with "rollouts" among its needs: it learns from what the model answers, once that is scored."""

    prompts: int  # of a rollout
    samples: int  # answers to each
    max_new: int
    temperature: float
    epochs: int  # passes over a rollout
    minibatches: int  # optimizer steps in each pass
    reads: frozenset[str]  # of {"reference", "value"}: what is asked of every answer before it is learned from

    def rows(self, answers: Sequence[Answer], state: dict[str, Any], *, start: int | None) -> tuple[list[Row], dict[str, float]]: ...  # and facts for the log
    def parts(self, batch: Batch, rollout: int, *, shared: bool) -> list[Batch]: ...  # what of a micro-batch is learned, each part in a forward of its own
    def collapsed(self, facts: Mapping[str, float], first: Mapping[str, float]) -> str: ...  # why to stop, "" to go on


class Policy(Protocol):
    """The model every objective trains; the class is in policy.py."""

    base: Base
    heads: nn.ModuleDict

    voices: dict[str, Any]  # other roles on the same base, each with hidden(batch) and heads of its own

    def hidden(self, batch: Batch) -> Tensor: ...  # (B, T, D), aligned with batch.ids
    def score(self, hidden_ND: Tensor, token_N: Tensor, *, temperature: float = 1.0, want: Sequence[str] = ("logp",)) -> dict[str, Tensor]: ...
    def generate(self, source: Sequence[Sequence[int]], **how: Any) -> Rollout: ...
    def reference(self) -> AbstractContextManager[None]: ...


# --- running --------------------------------------------------------------------------------------------------------


class Feed(Protocol):
    """The micro-batches of one optimizer step at a time; the same number on every rank."""

    @property
    def steps(self) -> int | None: ...

    def __iter__(self) -> Iterator[list[Batch]]: ...
    def __next__(self) -> list[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...  # as of the last step consumed
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Place(Protocol):
    """Where tensors live and how ranks agree. What ranks agree on is called by all of them, in the same order; ``what`` names it in messages and `traffic`."""

    device: torch.device

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def leads(self) -> bool: ...  # writes and speaks: rank 0
    @property
    def traffic(self) -> Mapping[str, int]: ...  # bytes handed to collectives so far, by what
    def start(self) -> None: ...
    def put(self, policy: nn.Module) -> None: ...
    def mean(self, x: float) -> float: ...  # over ranks
    def sums(self, named: Mapping[str, float], what: str = ...) -> dict[str, float]: ...  # several in one collective; names may differ by rank
    def average(self, tensors: Sequence[Tensor], what: str = ...) -> None: ...  # in place
    def gather(self, own: T, what: str = ...) -> list[T]: ...  # small things of every rank
    def share(self, own: T, what: str = ...) -> T: ...  # what rank 0 has
    def wait(self, what: str = ...) -> None: ...
    def wait_for_first(self, what: str = ...) -> None: ...  # it may work as long as it lives: reading data
    def doing(self, what: str) -> AbstractContextManager[None]: ...  # an operation in which others are waited for


def spread(policy: Any, items: Sequence[T], work: Callable[[Sequence[T]], Sequence[U]], what: str) -> list[U]:
    """``work`` on all items, each rank that the policy is on taking its share of them; every rank gets the results of all, in the order of the items.

    ``work`` must not itself agree on anything with other ranks. A voice (voices.py) is on this rank alone.
    """
    place: Place | None = getattr(policy, "place", None)
    if place is None or place.size == 1:
        return list(work(items))
    mine = items[place.rank :: place.size]
    parts = place.gather(list(work(mine)) if len(mine) else [], what)
    return [parts[i % place.size][i // place.size] for i in range(len(items))]


def spread_answers(policy: Any, prompts: Sequence[Sequence[int]], **how: Any) -> Rollout:
    """`Policy.generate`, the prompts spread over the ranks that the policy is on."""
    place: Place | None = getattr(policy, "place", None)
    if place is None or place.size == 1:
        return cast(Rollout, policy.generate(prompts, **how))
    samples, numbers = how.get("samples", 1), how.pop("numbers", None) or range(len(prompts))
    if (tick := how.get("on_answers")) is not None:
        how["on_answers"] = lambda done: tick(min(done * place.size, len(prompts) * samples))

    def work(some: Sequence[tuple[int, Sequence[int]]]) -> list[list[tuple[Any, ...]]]:
        got = policy.generate([ids for _, ids in some], numbers=[n for n, _ in some], **how)
        each = list(zip(got.ids, got.logps, got.stopped, got.tempered, strict=True))
        return [each[i * samples : (i + 1) * samples] for i in range(len(some))]

    parts = [a for some in spread(policy, list(zip(numbers, prompts, strict=True)), work, "answers") for a in some]
    return Rollout(*([p[i] for p in parts] for i in range(4)))


class Task(Protocol):
    """A benchmark: the same object scores in eval and rewards in PPO and GRPO."""

    def rows(self, split: str) -> list[dict[str, Any]]: ...  # each with "prompt" (str or messages) and what score needs
    def score(self, row: Mapping[str, Any], answer: str) -> Mapping[str, float]: ...
