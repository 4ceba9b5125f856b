"""Epochs whose rows are not drawn once each: parts of the data drawn by their own counts.

An epoch of a run without `data.sample` is a permutation of the rows. Here it is as long, and each part of the rows (a label; the hardest) has a count of its
own in it: a part of n rows with count c gives each row c // n times, and c % n rows once more, another choice of them every epoch. All is shuffled together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Parts:
    """Rows by their part, and how often an epoch draws from each."""

    rows: tuple[np.ndarray, ...]  # (n_k,) row numbers
    counts: tuple[int, ...]

    def order(self, chance: np.random.Generator) -> np.ndarray:
        """The rows of an epoch, for feed.Batches."""
        drawn = []
        for rows, count in zip(self.rows, self.counts, strict=True):
            whole, rest = divmod(count, len(rows))
            drawn += [rows] * whole + [chance.permutation(rows)[:rest]]
        return chance.permutation(np.concatenate(drawn))


def shares(weights: Sequence[float], total: int) -> list[int]:
    """``total`` in proportion to the weights, in whole numbers that add up to it (largest remainders; the first of equals)."""
    exact = np.asarray(weights, dtype=float) / sum(weights) * total
    out = np.floor(exact).astype(int)
    for k in np.argsort(-(exact - out), kind="stable")[: total - int(out.sum())]:
        out[k] += 1
    return out.tolist()


def by_label(labels: Sequence[int], balance: float) -> Parts:
    """Labels drawn in proportion to n ** (1 - balance), n the rows of each: 1 draws all equally often, 0 would draw them as they are."""
    found = {k: np.flatnonzero(np.asarray(labels) == k) for k in sorted(set(labels))}
    return Parts(tuple(found.values()), tuple(shares([len(r) ** (1 - balance) for r in found.values()], len(labels))))


# --- difficulty -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difficulty:
    """Rows by the base's own loss on them, in nats per trained token."""

    loss_N: np.ndarray
    trivial_N: np.ndarray  # bool: the base knows them by heart already
    broken_N: np.ndarray  # bool: far out, or worse than chance
    hard_N: np.ndarray  # bool: the hardest of the others
    bounds: Mapping[str, float]  # "trivial", "broken", "hard": from where on

    def parts(self, hard: float) -> Parts:
        """An epoch of as many rows of which the share ``hard`` is drawn from the hardest; where one side is empty, all is drawn from the other."""
        both = [(np.flatnonzero(self.hard_N), hard), (np.flatnonzero(~self.hard_N), 1 - hard)]
        there = [(rows, share) for rows, share in both if len(rows) and share > 0]
        return Parts(tuple(rows for rows, _ in there), tuple(shares([share for _, share in there], len(self.loss_N))))


def difficulty(loss_N: np.ndarray, vocabulary: int, *, hardest: float, trivial: float, broken: float) -> Difficulty:
    """Tell rows apart by their loss.

    trivial: below ``trivial`` nats a token. broken: above the upper quartile by more than ``broken`` interquartile ranges (Tukey, 1977, at 3 "far out"), or
    above log(vocabulary), which a model that knows nothing gives. hard: among the rows that are neither, the share ``hardest`` with the largest loss (rounded
    to whole rows, at least one; of equal losses the first rows).
    """
    low, high = np.quantile(loss_N, [0.25, 0.75])
    limit = min(float(high + broken * (high - low)), float(np.log(vocabulary)))
    trivial_N, broken_N = loss_N < trivial, loss_N > limit
    usual = np.flatnonzero(~(trivial_N | broken_N))
    hard_N = np.zeros(len(loss_N), dtype=bool)
    chosen = usual[np.argsort(-loss_N[usual], kind="stable")[: max(1, round(hardest * len(usual)))]]
    hard_N[chosen] = True
    bounds = {"trivial": trivial, "broken": limit, "hard": float(loss_N[chosen].min()) if len(chosen) else limit}
    return Difficulty(loss_N, trivial_N, broken_N, hard_N, bounds)
