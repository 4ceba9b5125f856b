"""SliCK's categories on planted counts, and its uncertainty against simulations and published numbers."""

import numpy as np
import pytest

from luthier.nn import slick


def test_the_four_categories_follow_from_the_counts():
    planted = {(10, 0): "HighlyKnown", (10, 160): "HighlyKnown", (9, 160): "MaybeKnown", (1, 0): "MaybeKnown", (0, 1): "WeaklyKnown", (0, 0): "Unknown"}
    assert {k: slick.category(k[0], 10, k[1]) for k in planted} == planted
    for wrong in ((11, 10, 0), (-1, 10, 0), (0, 0, 0), (0, 10, -1)):
        with pytest.raises(ValueError):
            slick.category(*wrong)


def test_the_score_interval_is_the_published_one_and_covers_what_it_says():
    # Newcombe, 1998, table I, method 3
    for k, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert slick.wilson(k, n) == pytest.approx((low, high), abs=1e-4)
    rng = np.random.default_rng(0)
    for p in (0.02, 0.3, 0.5, 0.95):
        found = [slick.wilson(int(k), 100) for k in rng.binomial(100, p, 4000)]
        assert np.mean([low <= p <= high for low, high in found]) == pytest.approx(0.95, abs=0.025)


def test_the_sign_test_is_the_binomial_s_tail():
    assert slick.sign_test(5, 0) == 1 / 32 and slick.sign_test(8, 2) == 56 / 1024 and slick.sign_test(0, 0) == 1 and slick.sign_test(0, 4) == 1
    rng = np.random.default_rng(0)
    assert slick.sign_test(12, 5) == pytest.approx((rng.binomial(17, 0.5, 200_000) >= 12).mean(), abs=0.003)


def test_answers_to_one_prompt_that_are_alike_count_for_fewer():
    rng = np.random.default_rng(0)
    independent = rng.binomial(16, rng.beta(2, 2, 400)[:, None], (400, 10))
    assert slick.design_effect(independent, 16) == pytest.approx(1, abs=0.06)
    same = 16 * rng.binomial(1, 0.4, (400, 10))
    assert slick.design_effect(same, 16) == pytest.approx(16, rel=0.03)
    a = rng.beta(2, 2, (2000, 10))  # chance of a prompt: intraclass correlation 1 / (2 + 2 + 1)
    assert slick.design_effect(rng.binomial(16, a), 16) == pytest.approx(1 + 15 / 5, rel=0.1)
    assert slick.design_effect(rng.binomial(16, a[:, :2]), 16) == pytest.approx(1 + 15 / 5, rel=0.15)  # two prompts are enough
    assert slick.design_effect(np.zeros((5, 10)), 16) == slick.design_effect(np.ones((5, 1)), 16) == 1.0


def test_where_all_facts_are_alike_the_next_probe_is_the_binomial_s():
    rng = np.random.default_rng(0)
    greedy, sampled = rng.binomial(10, 0.1, 4000), rng.binomial(160, 0.01, 4000)
    again = slick.asked_again(greedy, 10, sampled, 160).mean(0)
    never, none = 0.9**10, 0.99**160
    assert again == pytest.approx([0, 1 - never, never * (1 - none), never * none], abs=0.02)
    assert slick.asked_again(greedy, 10, sampled, 160).sum(1) == pytest.approx(1)


def ask(rng, mean_N, prompts=10, each=16):
    """Counts of facts whose chance varies from prompt to prompt; a greedy answer is right where the prompt's chance is above a half."""
    inside = (mean_N > 0) & (mean_N < 1)
    a = np.where(inside, mean_N, 0.5)[:, None] * 3
    chance_NP = np.where(inside[:, None], rng.beta(a, 3 - a, (len(mean_N), prompts)), mean_N[:, None])
    return (chance_NP > 0.5).sum(1), rng.binomial(each, chance_NP)


def names(greedy, right):
    return np.array([slick.CATEGORIES.index(slick.category(int(g), 10, int(r))) for g, r in zip(greedy, right.sum(1), strict=True)])


@pytest.mark.parametrize("seed", range(3))
def test_the_share_of_rows_said_to_change_is_the_share_that_does(seed):
    rng = np.random.default_rng(seed)
    half = rng.random(300)
    mean_N = np.where(half < 0.4, 0.0, np.where(half < 0.6, 1.0, rng.beta(0.4, 2.0, 300)))
    greedy, right = ask(rng, mean_N)
    first = names(greedy, right)
    effect = slick.design_effect(right, 16)
    again_N4 = slick.asked_again(greedy, 10, right.sum(1), 160, effect)
    changed = [(names(*ask(rng, mean_N)) != first) for _ in range(60)]
    said = 1 - again_N4[np.arange(300), first]
    assert said.mean() == pytest.approx(np.mean(changed), abs=0.045)
    assert effect > 2
    # and rows that are said to be unsteady are the ones that change
    unsteady = said > np.median(said)
    rate = np.mean(changed, axis=0)
    assert rate[unsteady].mean() > 2 * rate[~unsteady].mean()
    # taking samples of one prompt for independent ones would promise too much
    naive = 1 - slick.asked_again(greedy, 10, right.sum(1), 160)[np.arange(300), first]
    assert naive.mean() < 0.85 * np.mean(changed)


def test_the_intervals_of_shares_cover_what_other_facts_of_the_kind_would_give():
    rng = np.random.default_rng(5)
    kind = lambda n: np.where(rng.random(n) < 0.4, 0.0, rng.beta(0.4, 2.0, n))  # noqa: E731
    truth = np.bincount(names(*ask(rng, kind(40_000))), minlength=4) / 40_000
    inside = []
    for _ in range(300):
        counts = np.bincount(names(*ask(rng, kind(150))), minlength=4)
        inside.append([low <= t <= high for (low, high), t in zip((slick.wilson(int(k), 150) for k in counts), truth, strict=True)])
    assert np.mean(inside, axis=0) == pytest.approx(0.95, abs=0.04)
