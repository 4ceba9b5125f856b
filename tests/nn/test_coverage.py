"""Do 95 % intervals cover? Simulations with a known truth: the share that hold it must be 0.95 within what so many trials can tell.

Hits among TRIALS are binomial, so a nominal interval leaves the band of 3.3 standard errors once in a thousand. The smallest n of docs/evaluation.md are
checked too: there the plain percentile bootstrap fails.
"""

import math

import numpy as np
import pytest

from luthier.nn import intervals

TRIALS = 600
ERROR = 3.3 * math.sqrt(0.95 * 0.05 / TRIALS)


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """Trials of several tests resample 200 rows by the same seeds; each resample is drawn once for all of them."""
    honest, known = intervals._counts, {}

    def counts(rng, n, times):
        if (n, times) != (200, 400):
            return honest(rng, n, times)
        start = rng.bit_generator.state["state"]["state"], rng.bit_generator.state["state"]["inc"]
        if start not in known:
            known[start] = [c.astype(np.uint8) for c in honest(rng, n, times)]  # a row is drawn some ten times at most
        return (c.astype(np.float64) for c in known[start])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "_counts", counts)
        yield


def coverage(draw, truth, interval, trials=TRIALS):
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(trials):
        found = interval(draw(rng), trial)
        hits += found.low <= truth <= found.high
    return hits / trials


def nominal(share, slack=0.0):
    """Within the band; ``slack``: what an interval is known to lack on so few rows."""
    return 0.95 - ERROR - slack <= share <= 0.95 + ERROR


def test_of_a_mean_of_200_skewed_rows():
    draw = lambda rng: rng.exponential(2.0, 200)  # noqa: E731
    assert nominal(coverage(draw, 2.0, lambda x, seed: intervals.mean(x, seed=seed, times=400)), slack=0.01)


@pytest.mark.parametrize(("n", "p"), [(10, 0.5), (20, 0.9), (50, 0.98), (200, 0.7)])
def test_of_a_share_that_is_near_one_on_few_rows(n, p):
    """Exactly: the coverage of every possible count, weighted by how likely it is; averaged over truths near p, since one truth alone jumps about."""
    total = 0.0
    truths = np.linspace(p - 0.015, p + 0.015, 31)
    found = [intervals.share(k, n) for k in range(n + 1)]
    for truth in truths:
        total += sum(math.comb(n, k) * truth**k * (1 - truth) ** (n - k) for k, i in enumerate(found) if i.low <= truth <= i.high)
    assert 0.93 <= total / len(truths) <= 0.98


def test_of_loss_per_token_over_200_rows_of_unlike_length():
    def draw(rng):
        tokens = rng.integers(1, 200, 200)
        return tokens * (2.5 + rng.normal(0, 0.6, 200)) + rng.normal(0, 1, 200) * np.sqrt(tokens), tokens

    assert nominal(coverage(draw, 2.5, lambda x, seed: intervals.ratio(*x, seed=seed, times=400)))


def answers(rng, n, right):
    """BLEU statistics (n, 10) of answers of 8 to 20 words, of which a share of about ``right`` match, longer n-grams less often."""
    length = rng.integers(8, 21, n)
    own = np.clip(rng.beta(20 * right, 20 * (1 - right), n), 0.02, 0.98)
    totals = np.stack([length - k for k in range(4)], 1)
    matches = np.stack([rng.binomial(totals[:, k], own ** (k + 1)) for k in range(4)], 1)
    return np.concatenate([length[:, None], length[:, None] + rng.integers(-1, 3, (n, 1)), matches, totals], 1).astype(float)


def test_of_corpus_bleu_over_200_rows():
    truth = float(intervals.bleu(answers(np.random.default_rng(1), 400_000, 0.6).sum(0, keepdims=True))[0])
    assert nominal(coverage(lambda rng: answers(rng, 200, 0.6), truth, lambda x, seed: intervals.bootstrap(x, intervals.bleu, seed=seed, times=400)))


def test_of_the_paired_difference_of_bleu_over_200_rows():
    big = np.random.default_rng(2)
    of = lambda right: float(intervals.bleu(answers(big, 400_000, right).sum(0, keepdims=True))[0])  # noqa: E731
    truth = of(0.62) - of(0.6)
    draw = lambda rng: (answers(rng, 200, 0.6), answers(rng, 200, 0.62))  # noqa: E731
    assert nominal(coverage(draw, truth, lambda x, seed: intervals.paired(*x, intervals.bleu, seed=seed, times=400)))


def test_ten_rows_cover_since_the_percentiles_are_widened_and_would_not_without():
    draw = lambda rng: rng.normal(1.0, 1.0, 10)  # noqa: E731
    assert nominal(coverage(draw, 1.0, lambda x, seed: intervals.mean(x, seed=seed)))

    def plain(x, seed):
        stats = np.stack([x, np.ones(10)], 1)
        low, high = np.percentile(intervals.ratio_of_sums(intervals.resampled_sums(stats, seed=seed, times=1000)), [2.5, 97.5])
        return intervals.Interval(0, low, high, 10)

    assert coverage(draw, 1.0, plain) < 0.93


def test_the_p_value_is_small_as_often_as_it_says_where_two_systems_are_alike():
    rng = np.random.default_rng(0)
    found = []
    for trial in range(400):
        easy = rng.normal(0, 2, 60)
        a, b = easy + rng.normal(0, 1, 60), easy + rng.normal(0, 1, 60)
        found.append(intervals.permuted(60, lambda swap_RN, d=b - a: (1 - 2 * swap_RN) @ d, seed=trial, times=400))
    for level in (0.05, 0.2, 0.5):
        assert abs(np.mean(np.array(found) <= level) - level) < 3.3 * math.sqrt(level * (1 - level) / 400) + 0.003


def test_the_p_value_is_that_of_all_ways_to_swap():
    rng = np.random.default_rng(3)
    d = rng.normal(0.5, 1, 10)
    ways = np.array([[i >> k & 1 for k in range(10)] for i in range(1024)])
    exact = np.mean(np.abs((1 - 2 * ways) @ d) >= abs(d.sum()) - 1e-12)
    assert intervals.permuted(10, lambda swap_RN: (1 - 2 * swap_RN) @ d, times=20_000) == pytest.approx(exact, abs=0.012)
    assert intervals.permuted(5, lambda swap_RN: swap_RN.sum(1) * 0.0) == 1.0


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (5, 2.571), (9, 2.262), (30, 2.042), (120, 1.980), (5000, 1.960)])
def test_students_quantile_is_that_of_the_tables(freedom, t):
    assert intervals.student(0.95, freedom) == pytest.approx(t, abs=6e-4)


def test_wilsons_interval_is_where_the_score_test_just_rejects():
    for right, n in ((0, 12), (3, 12), (80, 100), (12, 12)):
        found = intervals.share(right, n)
        for edge in (found.low, found.high):
            if 0 < edge < 1:
                assert abs(right / n - edge) / math.sqrt(edge * (1 - edge) / n) == pytest.approx(1.959964, abs=1e-5)
    assert intervals.share(12, 12).high == 1.0 and intervals.share(0, 12).low == 0.0
    assert intervals.mean(np.array([1.0] * 12)) == intervals.share(12, 12)
