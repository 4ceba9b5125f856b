"""Learning-rate schedules."""

import math

import pytest

from luthier.nn.schedule import factor


def test_warm_up_rises_from_above_zero_and_reaches_the_peak_right_after():
    rises = [factor(s, 100, kind="cosine", warmup=4) for s in range(5)]
    assert rises == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_is_half_way_down_in_the_middle_and_linear_falls_evenly():
    assert factor(55, 100, kind="cosine", warmup=10) == pytest.approx(0.5)
    assert factor(30, 100, kind="cosine", warmup=0) == pytest.approx(0.5 * (1 + math.cos(0.3 * math.pi)))
    assert factor(75, 100, kind="linear", warmup=0) == pytest.approx(0.25)


def test_constant_stays_and_a_floor_is_kept():
    assert factor(99, 100, kind="constant", warmup=5) == 1.0
    assert factor(100, 100, kind="cosine", warmup=0, floor=0.1) == pytest.approx(0.1)
    assert factor(50, 100, kind="linear", warmup=0, floor=0.1) == pytest.approx(0.55)
