"""Charts: round ticks, values where they belong, long series thinned without losing an extreme."""

import math
import re

import pytest

from luthier.report import chart
from luthier.report.chart import Scale, Series


@pytest.mark.parametrize(("low", "high", "expected"), [(0, 10, [0, 5, 10]), (0, 1, [0, 0.5, 1]), (3.41, 4.02, [3.6, 3.8, 4.0]), (-0.2, 0.3, [-0.2, 0, 0.2])])
def test_ticks_are_round_and_few(low, high, expected):
    assert chart.ticks(low, high) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("low", "high"), [(0, 7e-6), (1e-9, 2e-9), (0.999, 1.001), (-5, 123456), (1, 1000000007)])
def test_there_are_always_ticks_and_all_lie_inside(low, high):
    found = chart.ticks(low, high)
    assert 1 <= len(found) <= 5 and all(low - 1e-9 * abs(low) <= t <= high * (1 + 1e-9) for t in found)


def test_a_scale_puts_the_ends_at_the_ends_and_the_middle_in_the_middle():
    up = Scale(2.0, 4.0, 190, 12)
    assert (up(2.0), up(4.0), up(3.0)) == (190, 12, 101)


def test_a_long_series_keeps_its_ends_and_its_extremes():
    points = [(i, math.sin(i / 50)) for i in range(10_000)]
    points[7777] = (7777, 40.0)
    points[1234] = (1234, -40.0)
    thin = chart.thinned(points)
    assert len(thin) <= chart.MOST + 2 and thin[0] == points[0] and thin[-1] == points[-1]
    assert (7777, 40.0) in thin and (1234, -40.0) in thin and thin == sorted(thin) and set(thin) <= set(points)
    assert chart.thinned(points[:400]) == points[:400]


def test_one_point_and_equal_points_are_drawn():
    for points in ([(3, 0.5)], [(1, 2.0), (2, 2.0), (3, 2.0)], [(0, 0.0), (1, 0.0)]):
        figure = chart.line("t", [Series("s", points)])
        assert "nan" not in figure and "inf" not in figure and "<svg" in figure
        for x in re.findall(r'c[xy]="([-\d.]+)"', figure):
            assert 0 <= float(x) <= chart.WIDTH
    assert chart.line("t", [Series("s", [])]) == ""


def test_names_are_escaped_and_a_picture_says_its_first_and_last_value():
    figure = chart.line("<loss>", [Series("a&b", [(1, 3.0), (2, 1.5)]), Series("c", [(1, 2.0)])])
    assert "<loss>" not in figure and "&lt;loss&gt;" in figure and "a&amp;b: first 3, last 1.5" in figure


@pytest.mark.parametrize(("value", "said"), [(0, "0"), (0.004, "0.004"), (1.5e-5, "1.5e-5"), (1234.5, "1,234"), (2_500_000, "2.5M"), (-0.25, "-0.25")])
def test_numbers_are_short(value, said):
    assert chart.short(value) == said


def test_ticks_that_would_read_the_same_get_more_places():
    assert chart.labels([5.5300, 5.5302, 5.5304]) == ["5.5300", "5.5302", "5.5304"] and chart.labels([5.53001, 5.53002]) == ["5.53001", "5.53002"]
    assert chart.labels([1e6, 2e6]) == ["1M", "2M"]
    for low in (0.0, 3.0, 1234.0):
        said = chart.labels(chart.ticks(low, low + 1e-4))
        assert len({*said}) == len(said) and [float(x.replace(",", "")) for x in said] == pytest.approx(chart.ticks(low, low + 1e-4))
