"""Labels one by one: how many of what is called by a label are of it (precision), how many of those of it are found (recall), and what is taken for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..nn import intervals
from .marks import Score, score_of


@dataclass(frozen=True)
class Label:
    """One label. A number without rows to be of is None: precision where it was never said, recall where it was never given."""

    name: str
    given: int
    said: int
    precision: Score | None
    recall: Score | None
    f1: Score | None


@dataclass(frozen=True)
class Report:
    """All labels, and the mistakes that are made most often: (given, said, how often)."""

    labels: list[Label]
    confusions: list[tuple[str, str, int]]
    rows: int

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        labels = [{k: vars(v) if isinstance(v, Score) else v for k, v in vars(label).items()} for label in self.labels]
        return {"rows": self.rows, "labels": labels, "confusions": [{"given": g, "said": s, "n": n} for g, s, n in self.confusions]}


def report(task: Any, rows: Sequence[Mapping[str, Any]], answers: Sequence[str], *, seed: int = 0) -> Report:
    """Of answers to rows, by what the task (classification, single or multiple) reads as labels in either.

    Precision and recall have Wilson's interval, F1 one by resampling rows. With several labels a row, there are no confusions: what is missed stands in for
    nothing.
    """
    pairs = [task.pair(row, answer) for row, answer in zip(rows, answers, strict=True)]
    names = sorted(set().union(*(given | said for given, said in pairs)))
    labels = [_label(name, pairs, seed) for name in names]
    single = task.problem == "single"
    wrong = Counter((next(iter(given)), next(iter(said))) for given, said in pairs if given != said) if single else Counter[tuple[str, str]]()
    confusions = sorted(((g, s, n) for (g, s), n in wrong.items()), key=lambda c: (-c[2], c[0], c[1]))
    return Report(sorted(labels, key=lambda x: (-x.given, x.name)), confusions, len(pairs))


def _label(name: str, pairs: Sequence[tuple[Collection[str], Collection[str]]], seed: int) -> Label:
    given_N, said_N = (np.array([name in pair[side] for pair in pairs], dtype=np.float64) for side in (0, 1))
    both, given, said = int((given_N * said_N).sum()), int(given_N.sum()), int(said_N.sum())
    precision, recall = (score_of(intervals.share(both, n)) if n else None for n in (said, given))
    f1 = score_of(intervals.ratio(2 * given_N * said_N, given_N + said_N, seed=seed)) if recall is not None else None
    if recall is not None and not both:  # a resample of rows that are all wrong is never right: what recall may be bounds it
        f1 = Score(0.0, 0.0, 2 * recall.high * given / (given + said), given + said)
    return Label(name, given, said, precision, recall, f1)
