"""Learning from preferences: which pairs a ranking holds, and what each pair or judged answer costs. Nothing here knows a model.

Shapes: S examples (answers), P pairs of them, R resamples. Rewards are in nats; log-probabilities are of whole answers unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LN2 = 0.6931471805599453
SURE = -1e-6  # the largest mean log-probability whose odds are still taken: at probability 1 they are infinite


def pairs_of(ranks: Sequence[int]) -> list[tuple[int, int, bool]]:
    """(better, worse, tied) of all K(K-1)/2 pairs of a ranking, by places in ``ranks``, where 0 is best and equal numbers are tied."""
    out = []
    for i, j in combinations(range(len(ranks)), 2):
        better, worse = (i, j) if ranks[i] <= ranks[j] else (j, i)
        out.append((better, worse, ranks[i] == ranks[j]))
    return out


def all_pairs(rankings: Sequence[Sequence[int]], counted: Sequence[bool], *, ties: bool) -> tuple[dict[str, Tensor], int]:
    """The pairs of several rankings whose answers stand one behind the other, and how many rankings have any.

    better, worse: (P,) numbers of answers. tied: (P,) bool. ranking: (P,) whose pair it is. weight: (P,) one over the number of pairs of its ranking, so
    that each ranking counts once, as it would if its K(K-1)/2 pairs were averaged (Ouyang et al., 2022, arXiv 2203.02155, equation 1).
    ``counted`` False: a ranking of which nothing is learned. ``ties`` False: pairs that are tied are left out.
    """
    rows: list[tuple[int, int, bool, int, float]] = []
    first, n = 0, 0
    for number, (ranks, counts) in enumerate(zip(rankings, counted, strict=True)):
        pairs = [p for p in pairs_of(ranks) if ties or not p[2]] if counts else []
        rows += [(first + i, first + j, tied, number, 1 / len(pairs)) for i, j, tied in pairs]
        first += len(ranks)
        n += bool(pairs)
    better, worse, tied, ranking, weight = zip(*rows, strict=True) if rows else ((),) * 5
    integers = {"better": better, "worse": worse, "ranking": ranking}
    out = {k: torch.tensor(v, dtype=torch.long) for k, v in integers.items()}
    return out | {"tied": torch.tensor(tied, dtype=torch.bool), "weight": torch.tensor(weight, dtype=torch.float32)}, n


# --- losses ----------------------------------------------------------------------------------------------------------


def bradley_terry(gap_P: Tensor, *, tied_P: Tensor | None = None, margin_P: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """(P,) -log P(better > worse) where P = sigmoid(gap), gap = reward of the better less that of the worse (Bradley & Terry, 1952).

    tied: the target is one half (Christiano et al., 2017, arXiv 1706.03741, section 2.2.3). margin: P = sigmoid(gap - margin), so that clearer
    preferences are pushed further apart (Touvron et al., 2023, arXiv 2307.09288, equation 2); a tie has none. smoothing: the share of pairs that are
    taken to be swapped (label smoothing; of DPO, Mitchell, 2023, "conservative DPO").
    """
    if margin_P is not None:
        gap_P = gap_P - (margin_P if tied_P is None else torch.where(tied_P, 0.0, margin_P))
    swapped_P: Tensor | float = smoothing if tied_P is None else smoothing + (0.5 - smoothing) * tied_P.to(gap_P.dtype)
    return -(1 - swapped_P) * logsigmoid(gap_P) - swapped_P * logsigmoid(-gap_P)


def centring(reward_S: Tensor, better_P: Tensor, worse_P: Tensor) -> Tensor:
    """(P,) (r(better) + r(worse))^2: pairs say nothing of where zero lies, and this puts it in their middle (Eisenstein et al., 2023, arXiv 2312.09244)."""
    return (reward_S.index_select(0, better_P) + reward_S.index_select(0, worse_P)).square()


def ipo(gap_P: Tensor, beta: float) -> Tensor:
    """(P,) (gap - 1 / (2 beta))^2, gap = the better answer's log-ratio to the reference less the worse one's.

    Azar et al., 2023, arXiv 2310.12036, equation 17.
    """
    return (gap_P - 1 / (2 * beta)).square()


def kto(ratio_S: Tensor, good_S: Tensor, kl: Tensor, *, beta: float, desirable: float, undesirable: float) -> Tensor:
    """(S,) lambda (1 - sigmoid(beta (r - kl))) of good answers, lambda (1 - sigmoid(beta (kl - r))) of bad ones, r = log-ratio to the reference.

    That is lambda_y - v(x, y) of Ethayarajh et al., 2024, arXiv 2402.01306, section 4.1. ``kl``: their z_0, a number that is not learned.
    """
    off_S = beta * (ratio_S - kl)
    return torch.where(good_S, desirable * torch.sigmoid(-off_S), undesirable * torch.sigmoid(off_S))


def log_odds(logp_S: Tensor) -> Tensor:
    """(S,) log p / (1 - p) from log p (Hong et al., 2024, arXiv 2403.07691, equation 4). log p above -1e-6 is taken as that."""
    logp_S = logp_S.clamp(max=SURE)
    # log(1 - e^x) loses its digits by one way near 0 and by the other far from it (Maechler, 2012)
    near_S = torch.log(-torch.expm1(logp_S.clamp(min=-LN2)))
    far_S = torch.log1p(-torch.exp(logp_S.clamp(max=-LN2)))
    return logp_S - torch.where(logp_S > -LN2, near_S, far_S)


# --- how good a reward is --------------------------------------------------------------------------------------------


def right(gap_P: Tensor) -> Tensor:
    """(P,) 1 where the better answer has the higher reward, one half where both have the same, as a coin would have it."""
    return (gap_P > 0).float() + 0.5 * (gap_P == 0).float()


def calibration_error(confidence_P: np.ndarray, right_P: np.ndarray, weight_RP: np.ndarray, *, bins: int = 10) -> np.ndarray:
    """(R,) expected calibration error: the mean distance of confidence and share of right answers, over bins of equal width from 1/2 to 1.

    Guo et al., 2017, arXiv 1706.04599, equation 3. ``confidence``: the probability of the answer that is held to be better; ``weight``: how often each
    pair is counted, for R resamples. nan where nothing is counted. It is never negative, so few pairs make even a perfect model seem off.
    """
    place_P = np.minimum((2 * bins * (confidence_P - 0.5)).astype(int), bins - 1)
    bin_PB = (place_P[:, None] == np.arange(bins)).astype(np.float64)
    miss_RB = (weight_RP * (right_P - confidence_P)) @ bin_PB
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.abs(miss_RB).sum(1) / weight_RP.sum(1)
