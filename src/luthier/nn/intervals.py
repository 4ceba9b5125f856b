"""Intervals by resampling rows: means, ratios of sums, corpus BLEU and paired differences.

Percentile bootstrap (Efron, 1979): rows are drawn with replacement, the number computed anew, and the middle of its distribution reported.
Everything here is a function of sums over rows, so a resample is a row of counts and 1,000 of them are one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]  # sums (R, K) -> values (R,)
CELLS = 8_000_000  # counts held at a time


@dataclass(frozen=True)
class Interval:
    """A number, and where it would lie on other rows of the same kind."""

    value: float
    low: float
    high: float
    n: int


def resampled_sums(stats_NK: np.ndarray, *, seed: int, times: int) -> np.ndarray:
    """(times, K): the sums over rows of each resample."""
    n = len(stats_NK)
    rng = np.random.default_rng(seed)
    return np.concatenate([counts_rN @ stats_NK for counts_rN in _counts(rng, n, times)])


def _counts(rng: np.random.Generator, n: int, times: int) -> Iterator[np.ndarray]:
    """How often each row is drawn, for some resamples at a time."""
    at_once = max(1, CELLS // n)
    for done in range(0, times, at_once):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(at_once, times - done)).astype(np.float64)


def bootstrap(stats_NK: np.ndarray, statistic: Statistic, *, seed: int = 0, times: int = 1000, level: float = 0.95) -> Interval:
    """The statistic of the summed rows, with its percentile interval. Raises ValueError without rows."""
    stats_NK = _matrix(stats_NK)
    value = float(statistic(stats_NK.sum(0, keepdims=True))[0])
    low, high = _percentiles(statistic(resampled_sums(stats_NK, seed=seed, times=times)), level)
    return Interval(value, low, high, len(stats_NK))


def recounted(n: int, statistic: Statistic, *, seed: int = 0, times: int = 1000, level: float = 0.95) -> Interval:
    """A statistic of how often each of n rows is there (R, N), for what is no function of sums over rows: a rank correlation, an F1 of many classes."""
    if n < 1:
        raise ValueError("an interval needs at least one row")
    value = float(statistic(np.ones((1, n)))[0])
    counts = _counts(np.random.default_rng(seed), n, times)
    low, high = _percentiles(np.concatenate([statistic(counts_rN) for counts_rN in counts]), level)
    return Interval(value, low, high, n)


def mean(values_N: np.ndarray, *, seed: int = 0, times: int = 1000, level: float = 0.95) -> Interval:
    """The mean of rows."""
    values_N = np.asarray(values_N, dtype=np.float64)
    return bootstrap(np.stack([values_N, np.ones_like(values_N)], 1), ratio_of_sums, seed=seed, times=times, level=level)


def ratio(top_N: np.ndarray, bottom_N: np.ndarray, *, seed: int = 0, times: int = 1000, level: float = 0.95) -> Interval:
    """A ratio of sums, such as loss per token where rows differ in length. The rows are what is resampled, not the tokens."""
    return bootstrap(np.stack([np.asarray(top_N, np.float64), np.asarray(bottom_N, np.float64)], 1), ratio_of_sums, seed=seed, times=times, level=level)


def paired(a_NK: np.ndarray, b_NK: np.ndarray, statistic: Statistic, *, seed: int = 0, times: int = 1000, level: float = 0.95) -> Interval:
    """statistic(b) - statistic(a) of two systems on the same rows: both are resampled together (Koehn, 2004)."""
    a_NK, b_NK = _matrix(a_NK), _matrix(b_NK)
    if a_NK.shape != b_NK.shape:
        raise ValueError(f"paired rows must be the same rows: {a_NK.shape} and {b_NK.shape}")
    width = a_NK.shape[1]

    def difference(sums_R2K: np.ndarray) -> np.ndarray:
        return statistic(sums_R2K[:, width:]) - statistic(sums_R2K[:, :width])

    return bootstrap(np.concatenate([a_NK, b_NK], 1), difference, seed=seed, times=times, level=level)


def ratio_of_sums(sums_R2: np.ndarray) -> np.ndarray:
    """The statistic of means and ratios; nan where nothing was counted."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums_R2[:, 0] / sums_R2[:, 1]


def bleu(sums_RK: np.ndarray) -> np.ndarray:
    """Corpus BLEU (Papineni et al., 2002), 0 to 100, from summed statistics: answer length, reference length, matches of 1 to 4 words, totals.

    Smoothed like sacrebleu's default ("exp", Chen & Cherry, 2014, method 3): the k-th order without a match counts 1 / 2^k matches.
    """
    sums_RK = np.asarray(sums_RK, dtype=np.float64)
    length_R, reference_R = sums_RK[:, 0], sums_RK[:, 1]
    match_RO, total_RO = sums_RK[:, 2:6], sums_RK[:, 6:10]
    missed_RO = np.cumsum((match_RO == 0) & (total_RO > 0), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision_RO = np.where(match_RO > 0, match_RO, 0.5**missed_RO) / total_RO
        short_R = np.where(length_R < reference_R, np.exp(1 - reference_R / length_R), 1.0)
        value_R = 100 * short_R * np.exp(np.log(precision_RO).mean(1))
    scored_R = (match_RO.sum(1) > 0) & (total_RO > 0).all(1)
    return np.where(scored_R, value_R, 0.0)


def _matrix(stats_NK: np.ndarray) -> np.ndarray:
    stats_NK = np.asarray(stats_NK, dtype=np.float64)
    if stats_NK.ndim != 2 or not len(stats_NK):
        raise ValueError(f"an interval needs at least one row of statistics, not shape {stats_NK.shape}")
    return stats_NK


def _percentiles(values_R: np.ndarray, level: float) -> tuple[float, float]:
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(values_R, [tail, 100 - tail])
    return float(low), float(high)


def t_975(df: int) -> float:
    """The 97.5 % point of Student's t: to 0.003 at 5 degrees of freedom, to 0.001 from 7 up.

    The expansion of Fisher and Cornish, 1960, to the third order in 1 / df.
    """
    z = 1.959963985
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / df + g2 / df**2 + g3 / df**3
