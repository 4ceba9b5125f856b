"""A number over rows, in the one form that intervals, slices and paired tests need: a function of how often every row is counted.

A mean, a ratio of sums (loss per token) and corpus BLEU are functions of sums over rows; macro-F1 and a rank correlation are of all rows together. Either can
be computed on a resample, on some of the rows, or on rows of which some have been answered by another model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..core import Task
from ..nn import intervals

Row = Mapping[str, Any]


@runtime_checkable
class Pooled(Task, Protocol):
    """A task whose score over many rows is that of their summed statistics."""

    def statistics(self, row: Row, answer: str) -> np.ndarray: ...  # (K,)
    def corpus(self, sums_RK: np.ndarray) -> Mapping[str, np.ndarray]: ...  # name -> (R,), for R resamples


@runtime_checkable
class Whole(Task, Protocol):
    """A task some of whose scores are of all rows together: each a function of how often every row is counted, (R, N) -> (R,)."""

    def whole(self, rows: Sequence[Row], answers: Sequence[str]) -> Mapping[str, intervals.Statistic]: ...


@dataclass(frozen=True)
class Score:
    """A score over n rows with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """For people: 45.9 [44.8, 47.0] n=630; shares get three digits."""
        return f"{self.numbers()} n={self.n}"

    def numbers(self, sign: str = "", digits: int | None = None) -> str:
        """The value and its interval, where it has one; ``sign``: "+" writes it before what is not negative."""
        if digits is None:
            digits = 1 if max(abs(self.value), abs(self.high)) > 1.5 else 3
        if self.low != self.low or (self.n == 1 and self.low == self.high):  # there is none
            return f"{self.value:{sign}.{digits}f}"
        return f"{self.value:{sign}.{digits}f} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


def digits_of(measure: str) -> int | None:
    """How many digits a measure is shown with; None: as its size asks."""
    return 4 if measure.startswith(("loss per ", "bits per ")) or measure.endswith("bits_per_byte") else 2 if measure == "perplexity" else None


def score_of(found: intervals.Interval) -> Score:
    """An interval as a score."""
    return Score(found.value, found.low, found.high, found.n)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One number over ``n`` rows, of which it says something of ``places``."""

    name: str
    n: int
    statistic: intervals.Statistic  # of sums (R, K) where there are ``stats_NK``, else of counts (R, n)
    stats_NK: np.ndarray | None = None
    places: np.ndarray  # sorted
    is_mean: bool = False  # of the first column of ``stats_NK``: the second is 1
    lower_is_better: bool | None = False  # None: neither way is better
    made_of: tuple[Whole, Sequence[Row], Sequence[str]] | None = field(default=None, repr=False, compare=False)  # where there are no ``stats_NK``

    @property
    def rows(self) -> int:
        """How many rows it is of."""
        return len(self.places)

    def of(self, places: np.ndarray) -> Mark:
        """The same number over some of the rows."""
        return replace(self, places=np.intersect1d(self.places, places))

    def at(self, counts_RP: np.ndarray) -> np.ndarray:
        """(R,) its value where the rows at ``places`` are counted so often."""
        if self.stats_NK is not None:
            return self.statistic(counts_RP @ self.stats_NK[self.places])
        counts_RN = np.zeros((len(counts_RP), self.n))
        counts_RN[:, self.places] = counts_RP
        return self.statistic(counts_RN)

    @property
    def value(self) -> float:
        """Its value over its rows."""
        return float(self.at(np.ones((1, self.rows)))[0])

    def interval(self, *, seed: int = 0, level: float = 0.95, times: int = 1000) -> intervals.Interval:
        """Its value with its interval. Raises ValueError where it is of no row."""
        how: dict[str, Any] = {"seed": seed, "level": level, "times": times}
        if self.stats_NK is None:
            return intervals.recounted(self.rows, self.at, **how)
        own_NK = self.stats_NK[self.places]
        return intervals.mean(own_NK[:, 0], **how) if self.is_mean else intervals.bootstrap(own_NK, self.statistic, **how)

    def score(self, *, seed: int = 0) -> Score:
        """The same at 95 %."""
        return score_of(self.interval(seed=seed))

    def beside(self, other: Mark) -> Mark:
        """One mark over the rows of both, of which this one's come first: what it would be were some rows answered by one and some by the other."""
        places = np.concatenate([self.places, other.places + self.n])
        if self.stats_NK is not None and other.stats_NK is not None:
            return replace(self, n=self.n + other.n, stats_NK=np.concatenate([self.stats_NK, other.stats_NK]), places=places)
        assert self.made_of is not None and other.made_of is not None
        task, rows, answers = self.made_of
        statistic = task.whole([*rows, *other.made_of[1]], [*answers, *other.made_of[2]])[self.name]
        return replace(self, n=self.n + other.n, statistic=statistic, places=places)


def mean(name: str, values_N: Sequence[float | None], *, lower_is_better: bool | None = False) -> Mark:
    """The mean of the rows that have a value."""
    places = np.array([i for i, v in enumerate(values_N) if v is not None], dtype=np.int64)
    stats_NK = np.array([[0.0, 0.0] if v is None else [float(v), 1.0] for v in values_N]).reshape(-1, 2)
    how: dict[str, Any] = {"statistic": intervals.ratio_of_sums, "is_mean": True, "lower_is_better": lower_is_better}
    return Mark(name=name, n=len(values_N), stats_NK=stats_NK, places=places, **how)


def pooled(name: str, stats_NK: np.ndarray, statistic: intervals.Statistic, *, lower_is_better: bool = False) -> Mark:
    """A function of sums over rows."""
    return Mark(name=name, n=len(stats_NK), statistic=statistic, stats_NK=stats_NK, places=np.arange(len(stats_NK)), lower_is_better=lower_is_better)


def of_task(task: Task, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Mark]:
    """What a task says of answers to rows: the means of its scores, or, where it says how, numbers over all of them.

    Names in the task's ``lower_is_better`` are better the lower they are.
    """
    down: frozenset[str] = getattr(task, "lower_is_better", frozenset())
    each = [task.score(row, answer) for row, answer in zip(rows, answers, strict=True)]
    names = dict.fromkeys(k for said in each for k in said)
    out = {k: mean(k, [said.get(k) for said in each], lower_is_better=k in down) for k in names}
    if isinstance(task, Pooled) and rows:
        stats_NK = np.stack([task.statistics(row, answer) for row, answer in zip(rows, answers, strict=True)])
        out |= {k: pooled(k, stats_NK, _named(task, k), lower_is_better=k in down) for k in task.corpus(stats_NK.sum(0, keepdims=True))}
    if isinstance(task, Whole) and rows:
        how: dict[str, Any] = {"n": len(rows), "places": np.arange(len(rows)), "made_of": (task, rows, answers)}
        out |= {k: Mark(name=k, statistic=s, lower_is_better=k in down, **how) for k, s in task.whole(rows, answers).items()}
    return out


def _named(task: Pooled, name: str) -> intervals.Statistic:
    return lambda sums_RK: task.corpus(sums_RK)[name]
