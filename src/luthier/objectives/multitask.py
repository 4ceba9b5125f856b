"""Several objectives in one run: every row is learned by the part that its source of the mixture belongs to.

A batch holds rows of several tasks in one stream, is read by one forward, and each part computes its own loss from its own examples' hidden states. A part's
terms are called PART.TERM, and each is divided by its own count over the step, so the gradient is

    sum over parts p, terms k of  weights[p] * w_pk * (sum of the losses of p's units of k) / (how many they are in this step),

whatever the sizes of the tasks: two hundred tokens of text do not drown one label. (Raffel et al., 2020, arXiv 1910.10683, section 3.5.2, and Wei et al.,
2021, arXiv 2109.01652, mix tasks of one kind, sequences to write, in one mean over tokens: that is `objective: sft` with `data.mix`. Sums of losses of unlike
kinds with a weight each are as in Caruana, 1997, Machine Learning 28.)

1. A part with no row in a step adds nothing to that step: how often a task is drawn sets how often it pulls, its weight how hard.
2. Heads are called PART/HEAD; parts share the delta and nothing else.
3. What learns from its own answers (ppo, grpo) or from batch-mates (kto) cannot be a part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import IGNORE, PACKED_MULTIPLE, PADDED_MULTIPLE, Base, Batch, Incompatible, Loss, LuthierError, Policy, Renders, Row, Segments, Stream, round_up
from ..errors import ConfigError
from ..settings.plugins import Plug, Range, kind_of, kinds, plugin, within_ranges

APART = "/"  # between a part's name and its head's


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Rows of several tasks, each learned by an objective of its own."""

    couples: ClassVar[bool] = False
    renders: ClassVar[Renders] = "mixed"

    parts: dict[str, Annotated[Any, Plug("objectives", "Objective")]] = field(default_factory=dict)
    """Name -> objective, for example {write: sft, mood: classify}; a source of data.mix says which of them its rows are for. Default: what the sources name."""
    weights: Annotated[dict[str, float], Range(0, low_open=True)] = field(default_factory=dict)
    """Weight of a part's loss beside the others', by its name, for example {mood: 0.5}. Default: 1 each."""

    def __post_init__(self) -> None:
        made = {name: plugin("objectives", part)() if isinstance(part, str) else part for name, part in self.parts.items()}
        object.__setattr__(self, "parts", made)
        within_ranges(self)
        for name, part in made.items():
            if not re.fullmatch(r"[\w-]+", name):
                raise LuthierError(f"parts: {name!r}: a part's name takes letters, digits, _ and -")
            if why := cannot_mix(part):
                raise LuthierError(f"parts: {name}: {why}")
        if unknown := sorted(set(self.weights) - set(made)) if made else []:
            raise LuthierError(f"weights: there is no part called {unknown[0]!r}; there are {', '.join(made)}")

    def joined(self, asked: Mapping[str, str | None]) -> Objective:
        """With a part for every source. ``asked``: what each source names, a part or a kind; None: the part that is called as the source.

        A kind that is no part's name makes one: classify one for each source, whose labels are its own, any other one for all that name it.
        """
        parts = dict(self.parts)
        for source in asked:
            name = self.part_of(source, asked[source])
            if name not in parts:
                kind = asked[source]
                if kind is None:
                    raise ConfigError(
                        f"data.mix.sources.{source}: no part of objective multitask is called {source!r}; say which learns its rows, for example "
                        f"data.mix.sources.{source}.objective={next(iter(parts), 'sft')}"
                    )
                if kind not in kinds("objectives"):
                    there = f"the parts {', '.join(parts)}, and " if parts else ""
                    raise ConfigError(f"data.mix.sources.{source}.objective: found {kind!r}, accepted are {there}the kinds {', '.join(kinds('objectives'))}")
                parts[name] = plugin("objectives", kind)()
        used = {self.part_of(s, a) for s, a in asked.items()}
        if idle := sorted(set(parts) - used):
            raise ConfigError(
                f"objective.parts: no source of data.mix is for the part {idle[0]!r}; name it in a source (objective: {idle[0]}), or leave it out"
            )
        return replace(self, parts=parts)

    def part_of(self, source: str, asked: str | None) -> str:
        """The name of the part that learns the rows of a source."""
        if asked in self.parts or (asked is None and source in self.parts):
            return asked or source
        return source if asked in (None, "classify") else str(asked)

    # --- what the parts are together ------------------------------------------------------------------------------------

    @property
    def terms(self) -> Mapping[str, float]:
        """PART.TERM -> weight."""
        return {f"{name}.{k}": w * self.weights.get(name, 1.0) for name, part in self.parts.items() for k, w in part.terms.items()}

    @property
    def needs(self) -> frozenset[str]:
        """What any of the parts needs."""
        return frozenset().union(*(part.needs for part in self.parts.values()))

    def serves(self, kind: str) -> None:
        """Raise Incompatible for a kind of model that one of the parts does not serve."""
        for name, part in self._known().items():
            try:
                getattr(part, "serves", lambda _: None)(kind)
            except Incompatible as e:
                raise Incompatible(f"objective multitask, part {name}: {e}") from None

    def heads(self, base: Base) -> dict[str, nn.Module]:
        """The heads of all parts, PART/HEAD. Raises Incompatible where a part does not serve this model."""
        self.serves(base.anatomy.kind)
        return {f"{name}{APART}{head}": module for name, part in self.parts.items() for head, module in part.heads(base).items()}

    @property
    def reads_head(self) -> bool:
        """Whether a part reads the model's own language-model head."""
        return any(part.renders in ("text", "chat", "masked", "pairs") for part in self.parts.values())

    def fitted(self, facts: Mapping[str, Any]) -> Objective:
        """With what each part learned from its data: the names of the labels. ``facts["parts"]``: of each part."""
        told = facts["parts"]
        return replace(self, parts={n: p.fitted(told[n]) if n in told and hasattr(p, "fitted") else p for n, p in self.parts.items()})

    def part(self, name: str) -> Part:
        """A part as an objective by itself. Raises LuthierError where there is none of that name."""
        if name not in self.parts:
            raise LuthierError(f"there is no part called {name!r}; there are {', '.join(self.parts)}")
        return Part(name, self.parts[name])

    def _known(self) -> Mapping[str, Any]:
        if not self.parts:
            raise LuthierError("objective multitask: it has no parts; name them (objective.parts={write: sft, mood: classify}) or the sources of data.mix")
        return self.parts

    # --- batches and losses ---------------------------------------------------------------------------------------------

    def collate(self, rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
        """Each task's rows as its part collates them, laid into one stream. Raises LuthierError for a row of no part."""
        by_task: dict[str, list[Row]] = {name: [] for name in self._known()}
        for row in rows:
            if row.task not in by_task:
                raise LuthierError(f"{row.where}: this row is for the task {row.task!r}, and objective multitask has the parts {', '.join(by_task)}")
            by_task[row.task].append(row)
        return together({n: self.parts[n].collate(some, pad=pad, packed=packed) for n, some in by_task.items() if some}, pad=pad, packed=packed)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """The sums of all parts, PART.TERM; so are the metrics called."""
        hidden_BTD = policy.hidden(batch)
        out = Loss({}, {})
        for name, own, where in slices(batch):
            loss = self.parts[name].loss(As(policy, name, own, hidden_BTD[where]), own)  # type: ignore[arg-type]
            out.sums |= {f"{name}.{k}": v for k, v in loss.sums.items()}
            out.metrics |= {f"{name}.{k}": v for k, v in loss.metrics.items()}
        return out


def cannot_mix(part: Any) -> str:
    """Why an objective cannot be a part, "" where it can."""
    kind = kind_of(part)
    if part.renders == "mixed":
        return "a mixture within a mixture; name the inner parts beside the others"
    if "rollouts" in part.needs:
        return f"objective {kind} learns from the model's own answers, which it has to write first; train with it in a stage of its own"
    return f"objective {kind} learns from a whole step's batches together; use dpo or orpo, or a stage of its own" if part.couples else ""


# --- one stream of several batches ------------------------------------------------------------------------------------


def together(parts: Mapping[str, Batch], *, pad: int, packed: bool) -> Batch:
    """Several batches as one, with them in its ``parts``. Packed: end to end; otherwise one below the other, each as wide as the widest."""
    if packed:
        for own in parts.values():
            _trim(own)
    ids_BT, segments = _laid(parts, pad, packed)
    inputs: dict[str, Tensor] = {}
    for key in dict.fromkeys(k for b in parts.values() for k in b.inputs):
        inputs[key] = _tensors([b.inputs.get(key, torch.zeros_like(b.ids)) for b in parts.values()], 0, packed)
    targets = [torch.full_like(b.ids, IGNORE) if b.targets is None else b.targets for b in parts.values()]
    return Batch(
        ids=ids_BT,
        segments=segments,
        inputs=inputs,
        source=_sources(parts, pad),
        targets=_tensors(targets, IGNORE, packed),
        units={f"{n}.{k}": count for n, b in parts.items() for k, count in b.units.items()},
        where=tuple(w for b in parts.values() for w in b.where),
        parts=dict(parts),
    )


def _sources(parts: Mapping[str, Batch], pad: int) -> Stream | None:
    given = {n: b.source for n, b in parts.items() if b.source is not None}
    if not given:
        return None
    ids_BT, segments = _laid(given, pad, packed=False)
    return Stream(ids=ids_BT, segments=segments)


def _trim(batch: Batch) -> None:
    """Take the padding off the end of a packed stream, so that none lies between two tasks."""
    n = int(batch.segments.length.sum())
    batch.ids, batch.inputs = batch.ids[:, :n], {k: v[:, :n] for k, v in batch.inputs.items()}
    batch.targets = None if batch.targets is None else batch.targets[:, :n]


def _laid(streams: Mapping[str, Stream], pad: int, packed: bool) -> tuple[Tensor, Segments]:
    rows, starts, down, along = [], [], 0, 0
    alike, n = [], 0
    for s in streams.values():
        alike += [a._replace(first=a.first + n) for a in s.segments.alike] if packed else []
        n += len(s.segments)
        rows.append(s.segments.row + (0 if packed else down))
        starts.append(s.segments.start + (along if packed else 0))
        down, along = down + s.shape[0], along + s.shape[1]
    segments = Segments(torch.cat(rows), torch.cat(starts), torch.cat([s.segments.length for s in streams.values()]), tuple(alike))
    return _tensors([s.ids for s in streams.values()], pad, packed), segments


def _tensors(parts: Sequence[Tensor], fill: int, packed: bool) -> Tensor:
    if packed:
        whole_BT = torch.cat(list(parts), 1)
        return nn.functional.pad(whole_BT, (0, round_up(whole_BT.shape[1], PACKED_MULTIPLE) - whole_BT.shape[1]), value=fill)
    width = round_up(max(p.shape[1] for p in parts), PADDED_MULTIPLE)
    return torch.cat([nn.functional.pad(p, (0, width - p.shape[1]), value=fill) for p in parts])


def slices(batch: Batch) -> Iterator[tuple[str, Batch, tuple[slice, slice]]]:
    """(part, its batch, where that lies in the stream)."""
    packed = len(batch.parts) > 0 and batch.shape[0] == 1 and all(b.shape[0] == 1 for b in batch.parts.values())
    down, along = 0, 0
    for name, own in batch.parts.items():
        rows, width = own.shape
        yield name, own, (slice(0, 1), slice(along, along + width)) if packed else (slice(down, down + rows), slice(0, width))
        down, along = down + rows, along + width


# --- a part and its view of the policy --------------------------------------------------------------------------------


class As:
    """A policy as one part sees it: with its own heads by their own names, and what the common forward gave for its batch."""

    def __init__(self, policy: Any, part: str, batch: Batch | None = None, hidden_BTD: Tensor | None = None):
        self._policy, self._batch, self._hidden = policy, batch, hidden_BTD
        self.heads = {name.removeprefix(part + APART): head for name, head in policy.heads.items() if name.startswith(part + APART)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def hidden(self, batch: Batch, **how: Any) -> Tensor:
        """What the common forward gave, where that is asked for; a forward of its own for anything else."""
        return self._hidden if self._hidden is not None and batch is self._batch and not how else self._policy.hidden(batch, **how)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The policy's reference, which the common forward was not read by."""
        kept, self._hidden = self._hidden, None
        try:
            with self._policy.reference():
                yield
        finally:
            self._hidden = kept


@dataclass(frozen=True)
class Part:
    """One part by itself, on a policy that has the heads of all: for its own held-out rows, and for what it predicts."""

    name: str
    inner: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def loss(self, policy: Any, batch: Batch) -> Loss:
        """Its loss."""
        return self.inner.loss(As(policy, self.name), batch)

    def predict(self, policy: Any, batch: Batch) -> list[dict[str, Any]]:
        """What its head says."""
        return self.inner.predict(As(policy, self.name), batch)
