"""Held-out preferences: how often a reward puts answers in the order people put them, and whether its probabilities mean what they say.

accuracy: the share of a row's pairs whose better answer has the higher score (one half where both have the same). probability: the mean of
sigmoid(score of the better - score of the worse), which falls below the accuracy where a reward is unsure and nears it where it is not.
calibration_error: the expected calibration error (Guo et al., 2017, arXiv 1706.04599, equation 3) of ten bins. Ties count in none of them, and an answer
that is no list of numbers is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..core import LuthierError
from ..nn.preferences import calibration_error, pairs_of


@dataclass(frozen=True, kw_only=True)
class Task:
    """Scores of answers (a JSON list of numbers) against the row's "ranks", 0 for the best and equal numbers for ties."""

    lower_is_better: ClassVar[frozenset[str]] = frozenset({"calibration_error"})

    def rows(self, split: str) -> list[dict[str, Any]]:
        """None of its own: it scores the run's data."""
        return []

    def score(self, row: Mapping[str, Any], answer: str) -> dict[str, float]:
        """The means over the row's pairs that are no ties; nothing of a row without."""
        gap_P = gaps(row, answer)
        if not len(gap_P):
            return {}
        return {"accuracy": float(_right(gap_P).mean()), "probability": float(_sigmoid(gap_P).mean())}

    def whole(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """The calibration of all pairs together, those of a row sharing its weight."""
        some = [gaps(r, a) for r, a in zip(rows, answers, strict=True)]
        gap_P = np.concatenate(some)
        row_P = np.repeat(np.arange(len(rows)), [len(g) for g in some])
        weight_P = np.concatenate([np.full(len(g), 1 / max(1, len(g))) for g in some])
        confidence_P = _sigmoid(np.abs(gap_P))
        return {"calibration_error": lambda counts_RN: calibration_error(confidence_P, _right(gap_P), counts_RN[:, row_P] * weight_P)}


def gaps(row: Mapping[str, Any], answer: str) -> np.ndarray:
    """(P,) score of the better answer less that of the worse, of a row's pairs that are no ties; one pair that is wholly wrong of an answer without scores.

    Raises LuthierError where scores and ranks do not match.
    """
    ranks, scores = row.get("ranks") or [], _scores(answer)
    if scores is None:
        return np.array([-np.inf])
    if len(ranks) != len(scores) or len(ranks) < 2:
        raise LuthierError(f"a row to be scored needs the ranks of its {len(scores)} answers; it has {len(ranks)}; name columns chosen and rejected, or ranked")
    return np.array([scores[better] - scores[worse] for better, worse, tied in pairs_of(ranks) if not tied])


def _scores(answer: str) -> list[float] | None:
    try:
        found = json.loads(answer)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, list) and all(isinstance(x, int | float) for x in found) else None


def _right(gap_P: np.ndarray) -> np.ndarray:
    return (gap_P > 0) + 0.5 * (gap_P == 0)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
