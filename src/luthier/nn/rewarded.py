"""Learning from rewards: advantages, the clipped losses of policy and value, and divergences from a reference. Nothing here knows a model.

Shapes: S answers, T their tokens (padded on the right), N tokens of all answers one behind the other. Log-probabilities and divergences are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def gae(reward_ST: Tensor, value_ST: Tensor, mask_ST: Tensor, *, discount: float, trace: float) -> tuple[Tensor, Tensor]:
    """(S, T) advantages and (S, T) returns by generalised advantage estimation (Schulman et al., 2015, arXiv 1506.02438, equation 16).

    delta_t = r_t + discount V_{t+1} - V_t; A_t = delta_t + discount trace A_{t+1}; the return is A_t + V_t. ``mask``: True on an answer's tokens; what
    follows its last token is worth nothing. Zeros off the mask.
    """
    mask = mask_ST.to(reward_ST.dtype)
    advantage_ST = torch.zeros_like(reward_ST)
    carried_S = torch.zeros_like(reward_ST[:, 0]) if reward_ST.shape[1] else reward_ST.sum(1)
    next_S = torch.zeros_like(carried_S)
    for t in reversed(range(reward_ST.shape[1])):
        delta_S = reward_ST[:, t] + discount * next_S - value_ST[:, t]
        carried_S = (delta_S + discount * trace * carried_S) * mask[:, t]
        advantage_ST[:, t] = carried_S
        next_S = value_ST[:, t] * mask[:, t]
    return advantage_ST, (advantage_ST + value_ST) * mask


def whiten(x_ST: Tensor, mask_ST: Tensor) -> Tensor:
    """(S, T) with mean 0 and variance 1 over the mask; zeros off it. A single value becomes 0."""
    x_N = x_ST[mask_ST].double()
    mean, std = x_N.mean(), x_N.std(correction=0)
    return torch.where(mask_ST, ((x_ST.double() - mean) / (std + 1e-8)).to(x_ST.dtype), 0.0)


def grouped(score_GK: Tensor, *, baseline: str, scale: bool) -> Tensor:
    """(G, K) advantage of each of K answers to one prompt.

    baseline "mean": score less the group's mean, divided by its standard deviation where ``scale`` (Shao et al., 2024, arXiv 2402.03300, section 4.1.2);
    "leave_one_out": less the mean of the others (Ahmadian et al., 2024, arXiv 2402.14740, equation 8). A group of equal scores gives zeros.
    """
    n = score_GK.shape[1]
    gap_GK = score_GK - score_GK.mean(1, keepdim=True)
    if baseline == "leave_one_out":
        gap_GK = gap_GK * n / max(1, n - 1)
    return gap_GK / (score_GK.std(1, keepdim=True, correction=0) + 1e-6) if scale else gap_GK


def divergence(logp_N: Tensor, reference_N: Tensor, kind: str) -> Tensor:
    """(N,) estimates of KL(policy || reference) at tokens that the policy sampled (Schulman, 2020, "Approximating KL divergence").

    k1: log(p / q), unbiased, below zero where the reference likes a token better. k3: q / p - 1 - log(q / p), unbiased, never below zero.

    Unbiased in value, not in gradient: inside a reward only k1 pulls towards the reference (there k3's expected gradient is that of KL(p || q) - KL(q || p));
    as a loss of its own only k3 does (that of KL(q || p); k1's is 0).
    """
    gap_N = reference_N - logp_N
    return -gap_N if kind == "k1" else torch.expm1(gap_N) - gap_N


def clipped_policy(logp_N: Tensor, old_N: Tensor, advantage_N: Tensor, *, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(N,) -min(ratio A, clip(ratio, 1 - low, 1 + high) A), and (N,) where the clip holds the gradient back.

    Schulman et al., 2017, arXiv 1707.06347, equation 7; ``high`` of its own: Yu et al., 2025, arXiv 2503.14476, equation 10.
    """
    ratio_N = torch.exp(logp_N - old_N)
    free_N, held_N = -ratio_N * advantage_N, -ratio_N.clamp(1 - low, 1 + high) * advantage_N
    return torch.maximum(free_N, held_N), held_N > free_N


def clipped_value(value_N: Tensor, old_N: Tensor, return_N: Tensor, *, clip: float) -> Tensor:
    """(N,) half the larger of (V - R)^2 and (clip(V, old - clip, old + clip) - R)^2; ``clip`` 0: the first alone.

    Schulman et al., 2015, arXiv 1506.02438, section 5, in the form of OpenAI's baselines (2017).
    """
    free_N = (value_N - return_N).square()
    if clip == 0:
        return 0.5 * free_N
    held_N = (old_N + (value_N - old_N).clamp(-clip, clip) - return_N).square()
    return 0.5 * torch.maximum(free_N, held_N)


def explained(value_N: Tensor, return_N: Tensor) -> float:
    """The share of the returns' variance that values account for: 1 - Var(R - V) / Var(R); 0 where returns do not vary."""
    whole = float(return_N.double().var(correction=0))
    return 1 - float((return_N - value_N).double().var(correction=0)) / whole if whole > 1e-12 else 0.0


def next_coefficient(now: float, kl: float, *, target: float, answers: int, horizon: int) -> float:
    """The KL coefficient after ``answers`` answers whose mean divergence was ``kl``.

    Ziegler et al., 2019, arXiv 1909.08593, section 2.2: beta (1 + K e), e = clip(kl / target - 1, -0.2, 0.2), K = answers / horizon.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return now * (1 + error * answers / horizon)


def repetition(ids: Sequence[int], size: int = 4) -> float:
    """The share of an answer's runs of ``size`` tokens that it has had before; 0 where it is too short for two."""
    runs = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if len(runs) > 1 else 0.0


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side does not vary."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
