"""Bootstrap intervals: do they cover, are they seeded, and is BLEU from sums what it should be."""

import numpy as np
import pytest

from luthier.nn import intervals


def test_the_interval_of_a_mean_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        found = intervals.mean(rng.exponential(2.0, size=120), seed=trial)
        covered += found.low <= 2.0 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_the_interval_of_a_ratio_covers_the_true_ratio():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        tokens = rng.integers(5, 200, size=100)
        found = intervals.ratio(tokens * 3.0 + rng.normal(0, 1, 100) * tokens, tokens, seed=trial)
        covered += found.low <= 3.0 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_a_ratio_weighs_rows_by_their_size():
    assert intervals.ratio(np.array([10.0, 1.0]), np.array([10.0, 2.0])).value == pytest.approx(11 / 12)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(0).normal(size=50)
    assert intervals.mean(values, seed=3) == intervals.mean(values, seed=3)
    assert intervals.mean(values, seed=3) != intervals.mean(values, seed=4)


def test_resampling_in_parts_is_resampling_at_once(monkeypatch):
    stats = np.random.default_rng(0).normal(size=(40, 3))
    whole = intervals.resampled_sums(stats, seed=5, times=100)
    monkeypatch.setattr(intervals, "CELLS", 40 * 7)
    # The same rows are drawn; a product of another height may add them in another order.
    np.testing.assert_allclose(intervals.resampled_sums(stats, seed=5, times=100), whole, rtol=1e-11, atol=1e-12)


def test_a_paired_difference_is_narrower_than_two_intervals_when_rows_differ_more_than_systems():
    rng = np.random.default_rng(0)
    easy = rng.normal(0, 10, size=200)
    a, b = (np.stack([easy + shift + rng.normal(0, 0.5, 200), np.ones(200)], 1) for shift in (0.0, 1.0))
    found = intervals.paired(a, b, intervals.ratio_of_sums)
    assert found.low > 0.8 and found.high < 1.2
    alone = intervals.bootstrap(a, intervals.ratio_of_sums)
    assert alone.high - alone.low > 2


def test_no_rows_is_an_error_and_not_a_nan():
    with pytest.raises(ValueError, match="at least one row"):
        intervals.mean(np.array([]))


def test_bleu_of_nothing_right_is_zero_and_of_everything_right_is_100():
    right = np.array([[9, 9, 9, 8, 7, 6, 9, 8, 7, 6]])
    none = np.array([[9, 9, 0, 0, 0, 0, 9, 8, 7, 6]])
    empty = np.zeros((1, 10))
    assert intervals.bleu(np.concatenate([right, none, empty])).tolist() == pytest.approx([100.0, 0.0, 0.0])


@pytest.mark.parametrize(("df", "value"), [(5, 2.5706), (7, 2.3646), (10, 2.2281), (23, 2.0687), (100, 1.9840), (10**6, 1.9600)])
def test_students_t_is_that_of_the_tables(df, value):
    assert intervals.t_975(df) == pytest.approx(value, abs=3e-3 if df < 7 else 1e-3)
