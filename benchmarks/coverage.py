"""How often 95 % intervals hold the truth, by simulation, as they are and as the plain percentile bootstrap would have them.

python -m benchmarks.coverage [TRIALS]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np

from luthier.nn import intervals

Draw = Callable[[np.random.Generator, int], np.ndarray]  # rows -> statistics (n, K)


def answers(rng: np.random.Generator, n: int, right: float) -> np.ndarray:
    """BLEU statistics (n, 10) of answers of 8 to 20 words, of which about a share of ``right`` match."""
    length = rng.integers(8, 21, n)
    own = np.clip(rng.beta(20 * right, 20 * (1 - right), n), 0.02, 0.98)
    totals = np.stack([length - k for k in range(4)], 1)
    matches = np.stack([rng.binomial(totals[:, k], own ** (k + 1)) for k in range(4)], 1)
    return np.concatenate([length[:, None], length[:, None] + rng.integers(-1, 3, (n, 1)), matches, totals], 1).astype(float)


def ones(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones(len(values))], 1)


def tokens(rng: np.random.Generator, n: int) -> np.ndarray:
    count = rng.integers(1, 200, n)
    return np.stack([count * (2.5 + rng.normal(0, 0.6, n)), count], 1)


def difference(sums_R2K: np.ndarray) -> np.ndarray:
    return intervals.bleu(sums_R2K[:, 10:]) - intervals.bleu(sums_R2K[:, :10])


def both(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.concatenate([answers(rng, n, 0.6), answers(rng, n, 0.62)], 1)


CASES: dict[str, tuple[Draw, intervals.Statistic]] = {
    "mean, normal": (lambda rng, n: ones(rng.normal(1, 1, n)), intervals.ratio_of_sums),
    "mean, exponential": (lambda rng, n: ones(rng.exponential(1, n)), intervals.ratio_of_sums),
    "share of 0.9": (lambda rng, n: ones((rng.random(n) < 0.9).astype(float)), intervals.ratio_of_sums),
    "loss per token": (tokens, intervals.ratio_of_sums),
    "BLEU": (lambda rng, n: answers(rng, n, 0.6), intervals.bleu),
    "paired BLEU": (both, difference),
}


def covered(draw: Draw, statistic: intervals.Statistic, n: int, trials: int, truth: float, *, share: bool) -> tuple[float, float]:
    """(as it is, plain): the shares of trials whose interval holds the truth."""
    rng, hits = np.random.default_rng(n), np.zeros(2)
    for trial in range(trials):
        stats = draw(rng, n)
        values = statistic(intervals.resampled_sums(stats, seed=trial, times=1000))
        low, high = intervals.percentiles(values, 0.95, n)
        if share:
            found = intervals.mean(stats[:, 0])
            low, high = found.low, found.high
        plain = np.percentile(values, [2.5, 97.5])
        hits += [low <= truth <= high, plain[0] <= truth <= plain[1]]
    return tuple(hits / trials)  # type: ignore[return-value]


def main(trials: int = 2000) -> None:
    print(f"{trials} trials, standard error {100 * math.sqrt(0.95 * 0.05 / trials):.1f} points; each cell: as it is (plain percentile bootstrap)")
    sizes = (5, 10, 20, 50, 200)
    print("| | " + " | ".join(f"n={n}" for n in sizes) + " |\n|---|" + "---|" * len(sizes))
    for name, (draw, statistic) in CASES.items():
        truth = float(statistic(draw(np.random.default_rng(7), 1_000_000).sum(0, keepdims=True))[0])
        truth = {"mean, normal": 1.0, "mean, exponential": 1.0, "share of 0.9": 0.9, "loss per token": 2.5}.get(name, truth)
        cells = [covered(draw, statistic, n, trials, truth, share=name.startswith("share")) for n in sizes]
        print(f"| {name} | " + " | ".join(f"{100 * a:.1f} ({100 * b:.1f})" for a, b in cells) + " |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
