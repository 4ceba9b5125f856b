"""SliCK's four categories of a fact from counts of right answers, and how far these counts can be trusted.

Gekhman et al., 2024, arXiv 2405.05904, section 3: a fact is asked with several few-shot prompts; P(Correct | greedy) is the share of prompts whose likeliest
answer is right, P(Correct | T > 0) the share of right answers among those sampled at a temperature.

The paper takes the counts as they are. How likely another probe would come to another category is added here, by the nonparametric maximum likelihood of
Kiefer and Wolfowitz (1956) and Laird (1978): the distribution of (P greedy, P sampled) over the facts of a set is estimated from all of their counts; given a
fact's own counts it says what the next ones will be. It assumes that answers to different prompts are independent, that greedy and sampled answers are so given
the two chances, and that answers to one prompt, which are alike, count for fewer than they are (`design_effect`).
"""

from __future__ import annotations

import math

import numpy as np

CATEGORIES = ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")
KNOWN = CATEGORIES[:3]
_CHANCES = np.array([0, 1e-3, 3e-3, 0.01, 0.02, 0.04, 0.07, *np.arange(0.1, 0.95, 0.05), 0.96, 0.98, 0.99, 0.997, 0.999, 1])
ROUNDS = 300  # of expectation and maximisation


def category(greedy: int, asked: int, sampled: int) -> str:
    """The category of a fact: ``greedy`` of ``asked`` greedy answers are right, and ``sampled`` of the sampled ones.

    Raises ValueError for counts that cannot be.
    """
    if not (0 <= greedy <= asked and asked > 0 and sampled >= 0):
        raise ValueError(f"{greedy} of {asked} greedy answers and {sampled} sampled ones cannot be right")
    if greedy == asked:
        return "HighlyKnown"
    if greedy > 0:
        return "MaybeKnown"
    return "WeaklyKnown" if sampled > 0 else "Unknown"


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, 1927), which does not shrink to nothing at 0 and 1. Raises ValueError for n = 0."""
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"{k} of {n} is no share")
    middle = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(worse: int, better: int) -> float:
    """One-sided exact p of at least ``worse`` changes for the worse among all changes, were both ways as likely (McNemar's test, exact); 1 without changes."""
    n = worse + better
    return sum(math.comb(n, k) for k in range(worse, n + 1)) / 2**n


def design_effect(right_NP: np.ndarray, each: int) -> float:
    """By how much answers to one prompt are alike: the variance of right answers over a fact's prompts by what independent answers would have.

    ``right_NP``: right ones of ``each`` answers sampled to every prompt of N facts. Between 1 (independent) and ``each`` (all answers to a prompt the same);
    Kish, 1965. ``each`` answers to a prompt count for each / effect.
    """
    right_NP = np.asarray(right_NP, dtype=np.float64)
    N, P = right_NP.shape if right_NP.ndim == 2 else (0, 0)
    if N == 0 or P < 2 or each < 2:
        return 1.0
    p_N = right_NP.mean(1) / each
    expected = (each * p_N * (1 - p_N) * P * each / (P * each - 1)).sum()  # unbiased for independent answers
    return 1.0 if expected == 0 else float(np.clip(right_NP.var(1, ddof=1).sum() / expected, 1.0, each))


def asked_again(greedy_N: np.ndarray, asked: int, sampled_N: np.ndarray, drawn: int, effect: float = 1.0) -> np.ndarray:
    """(N, 4): how likely each fact falls into each of CATEGORIES when it is asked again, with as many new prompts and samples.

    ``sampled_N``: right ones of ``drawn`` sampled answers to each fact; ``effect``: see `design_effect`. Facts inform one another: with a handful of them the
    result says little.
    """
    greedy_N, sampled_N = np.asarray(greedy_N, dtype=np.float64), np.asarray(sampled_N, dtype=np.float64)
    pairs, which = np.unique(np.stack([greedy_N, sampled_N], 1), axis=0, return_inverse=True)
    count_U = np.bincount(which.ravel(), minlength=len(pairs)).astype(np.float64)
    g_UC, s_UC = _likelihood(pairs[:, 0], asked), _likelihood(pairs[:, 1] / effect, drawn / effect)
    joint_UCD = g_UC[:, :, None] * s_UC[:, None, :]
    like_UK = joint_UCD.reshape(len(pairs), -1)
    weight_K = np.full(like_UK.shape[1], 1 / like_UK.shape[1])
    for _ in range(ROUNDS):
        belief_UK = like_UK * weight_K
        belief_UK /= belief_UK.sum(1, keepdims=True)
        weight_K = count_U @ belief_UK / count_U.sum()
    belief_UK = like_UK * weight_K
    belief_UK /= belief_UK.sum(1, keepdims=True)
    p_C = _CHANCES
    always_CD, never_CD = np.broadcast_to(p_C[:, None] ** asked, (len(p_C),) * 2), np.broadcast_to((1 - p_C[:, None]) ** asked, (len(p_C),) * 2)
    none_CD = np.broadcast_to((1 - p_C[None, :]) ** (drawn / effect), never_CD.shape)
    of_KX = np.stack([always_CD, 1 - always_CD - never_CD, never_CD * (1 - none_CD), never_CD * none_CD], -1).reshape(-1, 4)
    return (belief_UK @ of_KX)[which.ravel()]


def _likelihood(right_U: np.ndarray, of: float) -> np.ndarray:
    """(U, C) of the counts under each chance, each row by its largest; counts need not be whole."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_UC = np.where(right_U[:, None] > 0, right_U[:, None] * np.log(_CHANCES), 0.0)
        log_UC = log_UC + np.where((of - right_U)[:, None] > 1e-12, (of - right_U)[:, None] * np.log1p(-_CHANCES), 0.0)
    return np.exp(log_UC - log_UC.max(1, keepdims=True))
