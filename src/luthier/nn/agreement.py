"""How well predicted labels or numbers agree with the given ones, each as a function of how often every row is counted: (R, N) -> (R,).

Counts of ones give the usual number; counts of a resample give its bootstrap copies, exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, 0 where the bottom is 0."""
    return np.divide(top, bottom, out=np.zeros_like(top, dtype=np.float64), where=bottom != 0)


def macro_f1(given_NK: np.ndarray, said_NK: np.ndarray) -> Statistic:
    """The mean over labels of 2 tp / (given + said), (N, K) being 0 or 1; a label that is neither given nor said is left out."""
    both_NK = given_NK * said_NK

    def of(counts_RN: np.ndarray) -> np.ndarray:
        tp_RK, all_RK = counts_RN @ both_NK, counts_RN @ (given_NK + said_NK)
        return _ratio(_ratio(2 * tp_RK, all_RK).sum(-1), (all_RK > 0).sum(-1).astype(np.float64))

    return of


def micro_f1(given_NK: np.ndarray, said_NK: np.ndarray) -> Statistic:
    """2 tp / (given + said), summed over labels."""
    tp_N, all_N = (given_NK * said_NK).sum(-1), (given_NK + said_NK).sum(-1)
    return lambda counts_RN: _ratio(2.0 * (counts_RN @ tp_N), counts_RN @ all_N)


def matthews(given_NK: np.ndarray, said_NK: np.ndarray) -> Statistic:
    """The correlation of two labellings, one label a row: Matthews, 1975, for any number of labels (Gorodkin, 2004, equation 8).

    0 where one side never varies.
    """
    right_N = (given_NK * said_NK).sum(-1)

    def of(counts_RN: np.ndarray) -> np.ndarray:
        n_R = counts_RN.sum(-1)
        given_RK, said_RK = counts_RN @ given_NK, counts_RN @ said_NK
        top_R = (counts_RN @ right_N) * n_R - (given_RK * said_RK).sum(-1)
        return _ratio(top_R, np.sqrt((n_R**2 - (said_RK**2).sum(-1)) * (n_R**2 - (given_RK**2).sum(-1))))

    return of


def _pearson(x_RU: np.ndarray, y_RU: np.ndarray, counts_RN: np.ndarray) -> np.ndarray:
    n_R1 = counts_RN.sum(-1, keepdims=True)
    x_RU = x_RU - (counts_RN * x_RU).sum(-1, keepdims=True) / n_R1
    y_RU = y_RU - (counts_RN * y_RU).sum(-1, keepdims=True) / n_R1
    xy, xx, yy = ((counts_RN * a * b).sum(-1) for a, b in ((x_RU, y_RU), (x_RU, x_RU), (y_RU, y_RU)))
    tiny = 1e-12 * max(float(xx.max(initial=0)), float(yy.max(initial=0)), 1e-300)
    return np.where((xx > tiny) & (yy > tiny), _ratio(xy, np.sqrt(xx * yy)), 0.0)


def pearson(given_N: np.ndarray, said_N: np.ndarray) -> Statistic:
    """The linear correlation; 0 where one side never varies."""
    return lambda counts_RN: _pearson(given_N[None], said_N[None], counts_RN)


def spearman(given_N: np.ndarray, said_N: np.ndarray) -> Statistic:
    """Pearson's correlation of the ranks among the counted rows, equal values sharing their mean rank (Spearman, 1904)."""
    return lambda counts_RN: _pearson(_ranks(given_N, counts_RN), _ranks(said_N, counts_RN), counts_RN)


def _ranks(x_N: np.ndarray, counts_RN: np.ndarray) -> np.ndarray:
    """(R, N) mean rank of each row's value when row i is there counts[i] times."""
    _, group_N = np.unique(x_N, return_inverse=True)
    size_RU = np.zeros((len(counts_RN), int(group_N.max()) + 1))
    np.add.at(size_RU.T, group_N, counts_RN.T)
    return (size_RU.cumsum(-1) - (size_RU - 1) / 2)[:, group_N]
