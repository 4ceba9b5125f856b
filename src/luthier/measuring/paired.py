"""Two models on the same rows: how much better one is, with its interval, and how likely so much would be if they were alike.

The interval is the bootstrap of the difference, both models' rows drawn together (Koehn, 2004, "Statistical significance tests for machine translation
evaluation"). The p-value is of approximate randomization (Noreen, 1989; for scores of a corpus Riezler & Maxwell, 2005, "On some pitfalls in automatic
evaluation and significance testing for MT"): the two models' answers are swapped on a random half of the rows, 10,000 times, and p is the share of those in
which the difference is at least as large, either way. It is exact for models that are alike row by row, so the two may differ a little near the border.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..core import LuthierError
from ..nn import intervals
from .marks import Mark, Score, digits_of, score_of


@dataclass(frozen=True)
class Difference:
    """A score of one model less that of another on the same rows."""

    value: float
    low: float
    high: float
    n: int
    p: float
    lower_is_better: bool | None = False

    @property
    def is_clear(self) -> bool:
        """The interval excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """In a word: better or worse (more or less, of what has no better), or that it may be chance."""
        if not self.is_clear:
            return "alike" if self.value == self.low == self.high == 0 else "may be chance"
        if self.lower_is_better is None:
            return "more" if self.value > 0 else "less"
        return "worse" if (self.value > 0) == self.lower_is_better else "better"

    def numbers(self, measure: str) -> str:
        """With its sign and its interval."""
        return Score(self.value, self.low, self.high, self.n).numbers("+", digits_of(measure))


def difference(a: Mark, b: Mark, *, seed: int = 0) -> Score:
    """``b`` less ``a`` on the rows that both are of."""
    a, b = _common(a, b)
    if a.stats_NK is not None and b.stats_NK is not None:
        return score_of(intervals.paired(a.stats_NK[a.places], b.stats_NK[b.places], b.statistic, seed=seed))
    return score_of(intervals.recounted(a.rows, lambda counts_RP: b.at(counts_RP) - a.at(counts_RP), seed=seed))


def chance(a: Mark, b: Mark, *, seed: int = 0, times: int = 10_000) -> float:
    """The p-value of that difference, by approximate randomization."""
    a, b = _common(a, b)
    both = a.beside(b)

    def swapped(swap_RP: np.ndarray) -> np.ndarray:
        stays, goes = np.concatenate([1 - swap_RP, swap_RP], 1), np.concatenate([swap_RP, 1 - swap_RP], 1)
        return both.at(goes) - both.at(stays)

    return intervals.permuted(a.rows, swapped, seed=seed, times=times)


def differences(a: Mapping[str, Mark], b: Mapping[str, Mark], *, seed: int = 0) -> dict[str, Difference]:
    """Every number that both have: ``b`` less ``a``."""
    out = {}
    for name in a:
        if name in b and len(np.intersect1d(a[name].places, b[name].places)):
            found = difference(a[name], b[name], seed=seed)
            out[name] = Difference(found.value, found.low, found.high, found.n, chance(a[name], b[name], seed=seed), a[name].lower_is_better)
    return out


def _common(a: Mark, b: Mark) -> tuple[Mark, Mark]:
    """Both on the rows that both are of. Raises LuthierError for marks over other rows."""
    if a.n != b.n:
        raise LuthierError(f"{a.name}: {a.n} rows and {b.n} rows cannot be paired; score both models on the same rows")
    return a.of(b.places), b.of(a.places)
