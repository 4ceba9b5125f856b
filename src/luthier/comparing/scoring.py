"""Scores on the test rows as functions of how often each row is counted, so that repetitions are averaged and two rows of the table compared on the same draws.

A score of several seeds is the mean of theirs; its interval is over test rows (percentile bootstrap), the difference of two rows of the table is of the same
resampled rows on both sides (Koehn, 2004), averaged over their seeds. (evaluate.score gives a share of one run Wilson's interval instead, which has no form for
the mean of several.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..measuring import marks
from ..nn import intervals

LOSS = "held-out loss"
LOWER = frozenset({LOSS, "squared_error", "calibration_error"})  # of which less is better
Counted = intervals.Statistic  # (R, N) counts of rows -> (R,)


@dataclass(frozen=True)
class Sheet:
    """What one run came to on the test rows."""

    answers: Sequence[str] = ()  # one a record
    losses: Sequence[Sequence[float]] = ()  # (blocks, 2) of rows in their order: summed loss, units


def counted(task: Any, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, Counted]:
    """Every score of a task as a function of counts of all rows, equal to what evaluate.score gives where each row is counted once."""

    def over_all(mark: marks.Mark) -> Counted:
        return lambda c_RN: mark.at(c_RN[:, mark.places])

    return {name: over_all(mark) for name, mark in marks.of_task(task, rows, answers).items()}


def loss_counted(losses: Sequence[Sequence[float]]) -> Counted:
    """The loss a unit as a function of how often each block of rows is counted."""
    pairs_B2 = np.asarray(losses, dtype=np.float64)
    return lambda c_RB: intervals.ratio_of_sums(c_RB @ pairs_B2)


def averaged(parts: Sequence[Counted]) -> Counted:
    """The mean over seeds."""
    return lambda c_RN: np.mean([p(c_RN) for p in parts], axis=0)


def interval(n: int, statistic: Counted) -> intervals.Interval:
    """A score with its 95 % interval over n rows; its own value alone where there is one row only."""
    return intervals.recounted(n, statistic)


def difference(n: int, a: Counted, b: Counted) -> intervals.Interval:
    """a - b on the same rows."""
    return intervals.recounted(n, lambda c_RN: a(c_RN) - b(c_RN))


def better(name: str, value: float, than: float) -> bool:
    """Whether a score is better than another."""
    return value < than if name in LOWER else value > than


def clearly_worse(name: str, d: intervals.Interval) -> bool:
    """Whether a difference (this one less the best) lies wholly on the worse side of zero."""
    return d.low > 0 if name in LOWER else d.high < 0
