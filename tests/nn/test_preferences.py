"""The formulas of preferences against plain loops and finite differences, in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from luthier.nn import preferences as p

F64 = torch.float64


def numbers(n, seed=0, scale=3.0):
    return (torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(seed)) - 0.5) * 2 * scale


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_a_ranking_gives_all_its_pairs_better_first():
    assert p.pairs_of((0, 1)) == [(0, 1, False)]
    assert p.pairs_of((1, 0)) == [(1, 0, False)]
    assert p.pairs_of((0, 1, 1)) == [(0, 1, False), (0, 2, False), (1, 2, True)]
    assert len(p.pairs_of(tuple(range(9)))) == 36 and p.pairs_of((0,)) == []


def test_pairs_of_several_rankings_share_each_rankings_weight():
    pairs, n = p.all_pairs([(0, 1), (0, 1, 2), (0, 0), (0, 1)], [True, True, True, False], ties=True)
    assert n == 3 and pairs["better"].tolist() == [0, 2, 2, 3, 5] and pairs["worse"].tolist() == [1, 3, 4, 4, 6]
    assert pairs["ranking"].tolist() == [0, 1, 1, 1, 2] and pairs["tied"].tolist() == [False] * 4 + [True]
    assert torch.bincount(pairs["ranking"], weights=pairs["weight"]).tolist() == pytest.approx([1, 1, 1])
    pairs, n = p.all_pairs([(0, 0), (0, 0, 1)], [True, True], ties=False)
    assert n == 1 and pairs["weight"].tolist() == [0.5, 0.5]
    pairs, n = p.all_pairs([(0, 1)], [False], ties=True)
    assert n == 0 and len(pairs["better"]) == 0 and pairs["better"].dtype == torch.long


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bradley_terry_is_the_cross_entropy_of_who_wins(smoothing):
    gap, tied, margin = numbers(12), torch.arange(12) % 3 == 0, numbers(12, 1).abs()
    got = p.bradley_terry(gap, tied_P=tied, margin_P=margin, smoothing=smoothing)
    for g, t, m, loss in zip(gap.tolist(), tied.tolist(), margin.tolist(), got.tolist(), strict=True):
        lost = 0.5 if t else smoothing
        g = g if t else g - m
        assert loss == pytest.approx(-(1 - lost) * math.log(sigmoid(g)) - lost * math.log(sigmoid(-g)), rel=1e-12)


def test_swapped_answers_cost_more_where_the_order_was_right():
    gap = torch.tensor([2.0], dtype=F64)
    assert float(p.bradley_terry(gap)) == pytest.approx(math.log(1 + math.exp(-2))) and float(p.bradley_terry(-gap)) == pytest.approx(math.log(1 + math.exp(2)))


def test_the_odds_keep_their_digits_from_never_to_almost_surely():
    logp = torch.tensor([-60.0, -5.0, -1.0, -0.7, -0.6931471805599453, -0.69, -0.1, -1e-5], dtype=F64)
    want = [x - math.log(-math.expm1(x)) for x in logp.tolist()]
    assert p.log_odds(logp).tolist() == pytest.approx(want, rel=1e-9)
    sure = torch.tensor([0.0], requires_grad=True)
    p.log_odds(sure).sum().backward()
    assert math.isfinite(float(p.log_odds(sure.detach()))) and math.isfinite(float(sure.grad))


def test_a_judged_answer_costs_what_the_value_function_says():
    ratio, good, kl = numbers(8), torch.arange(8) % 2 == 0, torch.tensor(0.4, dtype=F64)
    got = p.kto(ratio, good, kl, beta=0.5, desirable=1.5, undesirable=0.7)
    for r, g, loss in zip(ratio.tolist(), good.tolist(), got.tolist(), strict=True):
        value = 1.5 * sigmoid(0.5 * (r - 0.4)) if g else 0.7 * sigmoid(0.5 * (0.4 - r))
        assert loss == pytest.approx((1.5 if g else 0.7) - value, rel=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: p.bradley_terry(x, smoothing=0.1),
        lambda x: p.bradley_terry(x, tied_P=torch.arange(6) % 2 == 0, margin_P=torch.ones(6, dtype=F64)),
        lambda x: p.ipo(x, 0.3),
        lambda x: p.kto(x, torch.arange(6) % 2 == 0, torch.tensor(0.2, dtype=F64), beta=0.3, desirable=1.2, undesirable=0.8),
        lambda x: p.log_odds(-x.abs() - 0.01),
        lambda x: p.centring(x, torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])),
    ],
    ids=["bradley_terry", "margins_and_ties", "ipo", "kto", "odds", "centring"],
)
def test_gradients_are_finite_differences(loss):
    torch.autograd.gradcheck(loss, (numbers(6).requires_grad_(),))


def test_ipo_is_least_at_half_of_one_over_beta():
    assert float(p.ipo(torch.tensor(2.5, dtype=F64), 0.2)) == pytest.approx(0) and float(p.ipo(torch.tensor(0.5, dtype=F64), 0.2)) == pytest.approx(4)


def test_equal_rewards_are_right_as_often_as_a_coin():
    assert p.right(torch.tensor([1.0, 0.0, -1.0])).tolist() == [1, 0.5, 0]


def test_calibration_is_the_mean_distance_of_confidence_and_truth_over_bins():
    rng = np.random.default_rng(0)
    confidence, right, weight = rng.uniform(0.5, 1, 200), rng.integers(0, 2, 200).astype(float), rng.integers(0, 3, (4, 200)).astype(float)
    for w, got in zip(weight, p.calibration_error(confidence, right, weight), strict=True):
        total = 0.0
        for b in range(10):
            inside = [i for i in range(200) if 0.5 + b / 20 <= confidence[i] < 0.5 + (b + 1) / 20]
            n = sum(w[i] for i in inside)
            if n:
                total += n / w.sum() * abs(sum(w[i] * right[i] for i in inside) / n - sum(w[i] * confidence[i] for i in inside) / n)
        assert got == pytest.approx(total, rel=1e-9)
    assert p.calibration_error(np.array([1.0, 1.0]), np.array([1.0, 0.0]), np.ones((1, 2)))[0] == pytest.approx(0.5)
