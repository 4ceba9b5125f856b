"""The largest micro-batch that a run's settings allow, made without data: what memory has to be there for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..core import IGNORE, Batch, Row, join
from ..nn.corruption import Hiding
from ..reading import form_of
from ..settings.run import Run

COMPARING = ("pairs", "ranked", "judged")  # objectives that render two answers for each row
MAX_TOKENS = 2048  # data.max_tokens where it is not given


@dataclass(frozen=True)
class Shape:
    """A micro-batch: the tokens of its examples; two texts of that length in each where the model has two sides, twice as many where
    the objective compares answers."""

    lengths: tuple[int, ...]
    texts: int
    packed: bool

    def __str__(self) -> str:
        n, longest = len(self.lengths), max(self.lengths)
        each = f"{longest:,}" if set(self.lengths) == {longest} else f"up to {longest:,}"
        twice = {1: "", 2: "twice ", 4: "four times "}[self.texts]
        return f"{self.tokens:,} tokens, {n} example{'s' if n > 1 else ''} of {twice}{each}, {'packed' if self.packed else 'padded'}"

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(self.lengths) * self.texts


def shape_of(run: Run, base: Any) -> Shape:
    """The largest micro-batch that the settings allow."""
    positions = min(base.max_positions, getattr(base.tokenizer, "model_max_length", base.max_positions)) - getattr(run.method, "shift", 0)
    longest = max(8, min(run.data.max_tokens or MAX_TOKENS, positions))
    renders = {part.renders for part in parts_of(run.objective).values()}
    sides = 2 if base.anatomy.kind == "encoder_decoder" and renders != {"masked"} else 1  # masked: both sides are made from one text
    texts = sides * (2 if renders & set(COMPARING) else 1)
    o, width = run.optim, longest * texts
    step = o.batch_tokens if o.batch_examples is None else o.batch_examples * width
    budget = max(width, min(o.micro_tokens, step))
    packed = base.packs and run.data.pack != "no"
    rest = budget % width // texts if packed else 0
    return Shape((longest,) * (budget // width) + ((rest,) if rest >= 8 else ()), texts, packed)


def made_up(shape: Shape, base: Any, objective: Any) -> Batch:
    """The micro-batch, of any tokens, all trained."""
    parts = list(parts_of(objective).items())  # of several, each gets a row in turn
    rows = [replace(_row(n, i, base, parts[i % len(parts)][1]), task=parts[i % len(parts)][0]) for i, n in enumerate(shape.lengths)]
    return objective.collate(rows, pad=0, packed=shape.packed)


def batch_of(shape: Shape, base: Any, objective: Any) -> tuple[Batch, int]:
    """The micro-batch on meta, and how many of its positions are scored."""
    return on_meta(made_up(shape, base, objective))


def on_meta(batch: Batch) -> tuple[Batch, int]:
    """A batch without its values, and how many of its positions are scored."""
    n = 0 if batch.targets is None else int((batch.targets != IGNORE).sum())
    return batch.to(torch.device("meta")), n


def _row(length: int, i: int, base: Any, objective: Any) -> Row:
    """A row as data/ renders it for this objective, of any tokens."""
    vocabulary, two_sides = base.model.config.get_text_config().vocab_size, base.anatomy.kind == "encoder_decoder"
    ids = (np.arange(length, dtype=np.int32) + 2 * i) % vocabulary  # no two texts begin alike: the largest micro-batch is one that shares nothing
    extras: dict[str, Any] = {}
    if objective.renders == "masked":
        extras["hiding"] = Hiding(usual=ids, mask=None if two_sides else 0, sentinels=tuple(range(min(100, vocabulary // 2))) if two_sides else ())
    elif two_sides:
        extras["source"] = ids
    if objective.renders == "label":
        extras["label"] = {"single": i % 2, "multiple": [0.0] * len(objective.labels), "regression": 0.0}[objective.problem]
    if objective.renders in ("label", *COMPARING) and form_of(base).token_types:
        extras["inputs"] = {"token_type_ids": np.zeros(length, dtype=np.int32)}
    if objective.renders == "prompts":  # an answer as long as may be, sampled and judged
        extras["tokens"] = dict.fromkeys(("old", "reference", "advantage", "returns", "value", "share"), np.zeros(length - 1, dtype=np.float32))
    row = Row(ids, np.arange(length) > 0, f"made:{i + 1}", extras)
    if objective.renders not in COMPARING:
        return row
    cached = {"reference": np.zeros(2)} if getattr(objective, "reference", "") == "cached" else {}
    return join([row, replace(row, ids=(row.ids + 1) % vocabulary)], ranks=(0, 1), margin=0.0, good=bool(i % 2), **cached)


def parts_of(objective: Any) -> dict[str, Any]:
    """The parts of a multitask objective; any other is one of no name."""
    return objective.parts if objective.renders == "mixed" else {"": objective}


def lacks_labels(objective: Any) -> bool:
    """Whether something is to be labelled, by names that only the data tells."""
    parts = [p for p in parts_of(objective).values() if p.renders == "label"]
    return any(p.problem == "auto" or (p.problem != "regression" and not p.labels) for p in parts)


def with_labels(objective: Any) -> Any:
    """Two labels, where reading the data would tell them: a head's size hardly depends on it."""
    if objective.renders == "mixed":
        return replace(objective, parts={n: with_labels(p) for n, p in objective.parts.items()})
    if objective.renders != "label":
        return objective
    problem = "single" if objective.problem == "auto" else objective.problem
    return replace(objective, problem=problem, labels=() if problem == "regression" else objective.labels or ("a", "b"))
