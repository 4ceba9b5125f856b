"""Intervals by resampling rows: means, ratios of sums, corpus BLEU and paired differences; and tests of such a difference.

Percentile bootstrap (Efron, 1979): rows are drawn with replacement, the number computed anew, and the middle of its distribution reported. That middle is
too narrow where rows are few; it is widened as Hesterberg does (2015, arXiv 1411.5279, section 4.4, "expanded percentile"), so that the interval of a mean of
normal values is Student's. Everything here is a function of sums over rows, so a resample is a row of counts and 1,000 of them are one matrix product.

A share of rows that are right or wrong has Wilson's interval instead (1927): resampling rows that are all right gives an interval of no width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

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
    low, high = percentiles(statistic(resampled_sums(stats_NK, seed=seed, times=times)), level, len(stats_NK))
    return Interval(value, low, high, len(stats_NK))


def recounted(n: int, statistic: Statistic, *, seed: int = 0, times: int = 1000, level: float = 0.95) -> Interval:
    """A statistic of how often each of n rows is there (R, N), for what is no function of sums over rows: a rank correlation, an F1 of many classes."""
    if n < 1:
        raise ValueError("an interval needs at least one row")
    value = float(statistic(np.ones((1, n)))[0])
    low, high = percentiles(copies(n, statistic, seed=seed, times=times), level, n)
    return Interval(value, low, high, n)


def copies(n: int, statistic: Statistic, *, seed: int, times: int) -> np.ndarray:
    """(times,) a statistic of how often each of n rows is there, for as many resamples."""
    return np.concatenate([statistic(counts_rN) for counts_rN in _counts(np.random.default_rng(seed), n, times)])


def mean(values_N: np.ndarray, *, seed: int = 0, times: int = 1000, level: float = 0.95) -> Interval:
    """The mean of rows; Wilson's interval where every row is 0 or 1."""
    values_N = np.asarray(values_N, dtype=np.float64)
    if len(values_N) and np.isin(values_N, (0.0, 1.0)).all():
        return share(int(values_N.sum()), len(values_N), level=level)
    return bootstrap(np.stack([values_N, np.ones_like(values_N)], 1), ratio_of_sums, seed=seed, times=times, level=level)


def share(right: int, n: int, *, level: float = 0.95) -> Interval:
    """A share of n rows with its score interval (Wilson, 1927): those shares that a test of the normal approximation would not reject."""
    p, z = right / n, NormalDist().inv_cdf(0.5 + level / 2)
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return Interval(p, 0.0 if right == 0 else low, 1.0 if right == n else high, n)


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


def permuted(n: int, difference: Callable[[np.ndarray], np.ndarray], *, seed: int = 0, times: int = 10_000) -> float:
    """How often chance alone gives a difference between two systems at least as large, either way: approximate randomization (Noreen, 1989).

    If the systems are alike, it does not matter which of them gave which answer to a row; so the two are swapped on a random half of the rows, ``times``
    over. ``difference``: (R, N) 1 where the two are swapped -> (R,). The share is (1 + as large) / (1 + times), which is never 0 (Phipson & Smyth, 2010).
    """
    seen = abs(float(difference(np.zeros((1, n)))[0]))
    if math.isnan(seen):
        return math.nan
    rng, reached, at_once = np.random.default_rng(seed), 0, max(1, CELLS // n)
    for done in range(0, times, at_once):
        swap_rN = rng.integers(0, 2, size=(min(at_once, times - done), n)).astype(np.float64)
        reached += int((np.abs(difference(swap_rN)) >= seen * (1 - 1e-9) - 1e-12).sum())  # sums of the same numbers in another order are equal
    return (1 + reached) / (1 + times)


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


def chrf(sums_RK: np.ndarray, beta: float = 2.0) -> np.ndarray:
    """Corpus chrF (Popović, 2015), 0 to 100, from summed statistics: for each order the n-grams of the answer, of the reference, and of both.

    As sacrebleu: precisions and recalls are averaged over the orders that both sides are long enough for, then F with ``beta``.
    """
    said_RO, wanted_RO, shared_RO = np.asarray(sums_RK, dtype=np.float64).reshape(len(sums_RK), -1, 3).transpose(2, 0, 1)
    counted_RO = (said_RO > 0) & (wanted_RO > 0)
    orders_R = np.maximum(counted_RO.sum(1), 1)
    zeros = np.zeros_like(said_RO)
    precision_R = np.divide(shared_RO, said_RO, out=zeros.copy(), where=counted_RO).sum(1) / orders_R
    recall_R = np.divide(shared_RO, wanted_RO, out=zeros.copy(), where=counted_RO).sum(1) / orders_R
    bottom_R = beta**2 * precision_R + recall_R
    return 100 * np.divide((1 + beta**2) * precision_R * recall_R, bottom_R, out=np.zeros(len(sums_RK)), where=bottom_R > 0)


def _matrix(stats_NK: np.ndarray) -> np.ndarray:
    stats_NK = np.asarray(stats_NK, dtype=np.float64)
    if stats_NK.ndim != 2 or not len(stats_NK):
        raise ValueError(f"an interval needs at least one row of statistics, not shape {stats_NK.shape}")
    return stats_NK


def percentiles(values_R: np.ndarray, level: float, n: int) -> tuple[float, float]:
    """The middle of a resampled distribution of n rows."""
    tail = 100 * _tail(level, n)
    low, high = np.nanpercentile(values_R, [tail, 100 - tail])
    return float(low), float(high)


@cache
def _tail(level: float, n: int) -> float:
    """The share left out on each side: what the normal distribution has beyond Student's quantile, in standard deviations of a resample."""
    return NormalDist().cdf(-student(level, n - 1) * math.sqrt(n / (n - 1))) if n > 1 else 0.0


def student(level: float, freedom: int) -> float:
    """t with P(|T| < t) = level: by bisection over Abramowitz & Stegun, 1964, 26.7.3 and 26.7.4; beyond 1,000 degrees by the first term of 26.7.5."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    if freedom > 1000:
        return z + (z**3 + z) / (4 * freedom)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < level else (low, angle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|T| < t) with angle = arctan(t / sqrt(freedom))."""
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for k in range(freedom // 2):
        total += term
        term *= square * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
