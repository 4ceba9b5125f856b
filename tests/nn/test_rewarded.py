"""Learning from rewards, against slow loops over one answer after another and exact expectations over small distributions."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from luthier.nn.rewarded import (
    clipped_policy,
    clipped_value,
    correlation,
    divergence,
    explained,
    gae,
    grouped,
    next_coefficient,
    repetition,
    whiten,
)

LENGTHS = (1, 4, 7)


def some(seed=0):
    """Rewards, values and the mask of three answers of different lengths; what stands behind them is garbage."""
    g = torch.Generator().manual_seed(seed)
    reward_ST, value_ST = (torch.randn(len(LENGTHS), max(LENGTHS), generator=g) for _ in range(2))
    return reward_ST, value_ST, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


# --- advantages ------------------------------------------------------------------------------------------------------


def slow_gae(rewards, values, discount, trace):
    """Equation 16 as it stands: a sum over all later temporal differences."""
    n = len(rewards)
    deltas = [rewards[t] + discount * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((discount * trace) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.8), (0.5, 1.0), (1.0, 0.0), (0.0, 0.7)])
def test_advantages_are_the_discounted_sum_of_temporal_differences_of_each_answer(discount, trace):
    reward_ST, value_ST, mask_ST = some()
    advantage_ST, return_ST = gae(reward_ST, value_ST, mask_ST, discount=discount, trace=trace)
    for s, n in enumerate(LENGTHS):
        rewards, values = reward_ST[s, :n].tolist(), value_ST[s, :n].tolist()
        slow = slow_gae(rewards, values, discount, trace)
        assert advantage_ST[s, :n].tolist() == pytest.approx(slow, abs=1e-5)
        assert return_ST[s, :n].tolist() == pytest.approx([a + v for a, v in zip(slow, values, strict=True)], abs=1e-5)
        assert not advantage_ST[s, n:].any() and not return_ST[s, n:].any()


def test_a_trace_of_1_gives_what_was_earned_less_the_value_and_of_0_one_step_of_it():
    reward_ST, value_ST, mask_ST = some(1)
    earned_ST, return_ST = gae(reward_ST, value_ST, mask_ST, discount=1.0, trace=1.0)
    for s, n in enumerate(LENGTHS):
        ahead = [float(reward_ST[s, t:n].sum()) for t in range(n)]
        assert return_ST[s, :n].tolist() == pytest.approx(ahead, abs=1e-5)
        assert earned_ST[s, :n].tolist() == pytest.approx([a - float(v) for a, v in zip(ahead, value_ST[s], strict=False)], abs=1e-5)
    step_ST, _ = gae(reward_ST, value_ST, mask_ST, discount=1.0, trace=0.0)
    assert step_ST[2, 2] == pytest.approx(float(reward_ST[2, 2] + value_ST[2, 3] - value_ST[2, 2]), abs=1e-6)
    assert step_ST[2, 6] == pytest.approx(float(reward_ST[2, 6] - value_ST[2, 6]), abs=1e-6)
    alone_ST, _ = gae(reward_ST, value_ST, mask_ST, discount=0.0, trace=0.9)
    assert torch.equal(alone_ST[mask_ST], (reward_ST - value_ST)[mask_ST])


def test_a_value_that_is_right_leaves_no_advantage():
    reward_ST, _, mask_ST = some(2)
    value_ST = torch.stack([torch.stack([reward_ST[s, t : max(t, n)].sum() for t in range(7)]) for s, n in enumerate(LENGTHS)])
    advantage_ST, return_ST = gae(reward_ST, value_ST, mask_ST, discount=1.0, trace=0.95)
    assert advantage_ST.abs().max() < 1e-5 and torch.allclose(return_ST, value_ST * mask_ST, atol=1e-5)


def test_whitening_is_over_the_tokens_of_answers_alone():
    x_ST, _, mask_ST = some(3)
    white_ST = whiten(x_ST, mask_ST)
    told = x_ST[mask_ST].tolist()
    mean, std = statistics.fmean(told), statistics.pstdev(told)
    assert white_ST[mask_ST].tolist() == pytest.approx([(x - mean) / std for x in told], abs=1e-5)
    assert not white_ST[~mask_ST].any()
    assert not whiten(torch.full((1, 2), 3.0), torch.tensor([[True, False]])).any()


def test_a_group_is_judged_by_itself():
    score_GK = torch.tensor([[1.0, 2.0, 6.0, 3.0], [10.0, 20.0, 20.0, -5.0], [4.0, 4.0, 4.0, 4.0]], dtype=torch.float64)
    mean, scaled, others = grouped(score_GK, baseline="mean", scale=False), grouped(score_GK, baseline="mean", scale=True), None
    others = grouped(score_GK, baseline="leave_one_out", scale=False)
    for g, scores in enumerate(score_GK.tolist()):
        for k, s in enumerate(scores):
            rest = scores[:k] + scores[k + 1 :]
            assert float(mean[g, k]) == pytest.approx(s - statistics.fmean(scores), abs=1e-9)
            assert float(others[g, k]) == pytest.approx(s - statistics.fmean(rest), abs=1e-9)
            std = statistics.pstdev(scores)
            assert float(scaled[g, k]) == pytest.approx((s - statistics.fmean(scores)) / std if std else 0.0, abs=1e-5)
    assert scaled[:2].square().mean(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5) and not scaled[2].any()
    assert grouped(torch.tensor([[3.0, 5.0]]), baseline="leave_one_out", scale=False).tolist() == [[-2.0, 2.0]]


# --- divergences -----------------------------------------------------------------------------------------------------


def distributions(far=1.0):
    g = torch.Generator().manual_seed(0)
    q_V = torch.randn(6, generator=g, dtype=torch.float64).log_softmax(0)
    return (q_V + far * torch.randn(6, generator=g, dtype=torch.float64)).log_softmax(0), q_V


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("far", [0.01, 1.0, 3.0])
def test_estimates_of_the_divergence_are_unbiased(kind, far):
    logp_V, q_V = distributions(far)
    p_V = logp_V.exp()
    each_V = divergence(logp_V, q_V, kind)
    assert float((p_V * each_V).sum()) == pytest.approx(float((p_V * (logp_V - q_V)).sum()), rel=1e-9)
    assert bool((each_V >= 0).all()) == (kind == "k3") and not divergence(q_V, q_V, kind).any()


def test_k3_is_exact_where_two_distributions_are_nearly_one():
    close = divergence(torch.tensor([-2.0, -2.0]), torch.tensor([-2.0 - 1e-4, -2.0]), "k3")
    assert float(close[0]) == pytest.approx(0.5e-8, rel=0.1) and float(close[1]) == 0.0


@pytest.mark.parametrize("far", [0.01, 1.0, 3.0])
def test_as_a_reward_k1_leads_back_to_the_reference_and_k3_does_not(far):
    """What a policy gradient makes of a penalty: the expectation of (penalty) x (gradient of log p), here exactly."""
    start_V, q_V = distributions(far)
    theta_V = start_V.clone().requires_grad_()
    logp_V = theta_V.log_softmax(0)
    p_V = logp_V.exp()
    forward, backward = (p_V * (logp_V - q_V)).sum(), (q_V.exp() * (q_V - logp_V)).sum()
    gradient = lambda of: torch.autograd.grad(of, theta_V, retain_graph=True)[0]  # noqa: E731
    of_penalty = {k: gradient((p_V.detach() * divergence(logp_V.detach(), q_V, k) * logp_V).sum()) for k in ("k1", "k3")}
    torch.testing.assert_close(of_penalty["k1"], gradient(forward))
    torch.testing.assert_close(of_penalty["k3"], gradient(forward - backward))
    if far == 0.01:
        assert of_penalty["k3"].norm() < 0.02 * of_penalty["k1"].norm()
    of_loss = {k: gradient((p_V.detach() * divergence(logp_V, q_V, k)).sum()) for k in ("k1", "k3")}
    torch.testing.assert_close(of_loss["k3"], gradient(backward))  # GRPO's term: a loss of its own
    assert of_loss["k1"].abs().max() < 1e-12


# --- losses ----------------------------------------------------------------------------------------------------------


def slow_clipped(logp, old, advantage, low, high):
    ratio = math.exp(logp - old)
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def test_the_policy_loss_is_clipped_where_it_would_go_on_in_the_direction_it_has_gone():
    old = -2.0
    cases = [(math.log(r), a) for r in (0.5, 0.79, 0.85, 1.0, 1.15, 1.25, 1.35, 2.0) for a in (1.5, -0.5)]
    logp_N = torch.tensor([old + x for x, _ in cases], dtype=torch.float64, requires_grad=True)
    advantage_N = torch.tensor([a for _, a in cases], dtype=torch.float64)
    loss_N, held_N = clipped_policy(logp_N, torch.full_like(advantage_N, old), advantage_N, low=0.2, high=0.3)
    assert loss_N.tolist() == pytest.approx([slow_clipped(old + x, old, a, 0.2, 0.3) for x, a in cases])
    loss_N.sum().backward()
    for (x, a), held, slope in zip(cases, held_N.tolist(), logp_N.grad.tolist(), strict=True):
        ratio = math.exp(x)
        assert held == ((ratio > 1.3 and a > 0) or (ratio < 0.8 and a < 0)), (ratio, a)
        assert slope == pytest.approx(0.0 if held else -a * ratio), (ratio, a)


def test_the_value_loss_takes_the_worse_of_moved_and_held():
    value_N = torch.tensor([0.0, 0.1, 0.5, -0.5, 1.0], requires_grad=True)
    old_N, return_N = torch.zeros(5), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.4])
    loss_N = clipped_value(value_N, old_N, return_N, clip=0.2)
    slow = [0.5 * max((v - r) ** 2, (min(max(v, -0.2), 0.2) - r) ** 2) for v, r in zip(value_N.tolist(), return_N.tolist(), strict=True)]
    assert loss_N.tolist() == pytest.approx(slow)
    loss_N.sum().backward()
    assert value_N.grad.tolist() == pytest.approx([-1.0, -0.9, 0.0, -1.5, 0.6])  # 0.5 has moved far enough towards 1; -0.5 has to come back
    assert clipped_value(value_N, old_N, return_N, clip=0).tolist() == pytest.approx((0.5 * (value_N - return_N) ** 2).tolist())


# --- the KL coefficient, and what is watched -------------------------------------------------------------------------


def test_the_coefficient_grows_where_the_divergence_is_too_large():
    assert next_coefficient(0.1, 6.6, target=6.0, answers=100, horizon=1000) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert next_coefficient(0.1, 60.0, target=6.0, answers=100, horizon=1000) == pytest.approx(0.1 * 1.02)  # at most a fifth of the error counts
    assert next_coefficient(0.1, 0.0, target=6.0, answers=100, horizon=1000) == pytest.approx(0.1 * 0.98)
    assert next_coefficient(0.1, 6.0, target=6.0, answers=100, horizon=1000) == 0.1


def test_how_much_values_explain():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained(returns, returns) == 1.0 and explained(torch.zeros(3), returns) == 0.0 and explained(returns + 5, returns) == pytest.approx(1.0)
    assert explained(-returns, returns) == pytest.approx(-3.0) and explained(returns, torch.ones(3)) == 0.0


def test_repetition_is_the_share_of_runs_seen_before():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0 and repetition([1, 2, 3]) == 0.0 and repetition([7, 7, 7, 7]) == 0.0
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3, 4] * 3) == pytest.approx(5 / 9) and repetition([1, 2, 1, 2, 1], size=2) == pytest.approx(0.5)


def test_correlation():
    a = [1.0, 2.0, 4.0, 3.0]
    assert correlation(a, [-2 * x + 1 for x in a]) == pytest.approx(-1.0) and correlation(a, [3.0] * 4) == 0.0 and correlation([1.0], [2.0]) == 0.0
    assert correlation(a, [1.0, 0.0, 2.0, 2.0]) == pytest.approx(float(np.corrcoef(a, [1.0, 0.0, 2.0, 2.0])[0, 1]))
