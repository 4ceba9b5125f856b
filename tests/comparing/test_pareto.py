"""The front against a version that follows the definition word by word."""

from __future__ import annotations

import random

import pytest

from luthier.comparing.pareto import front


def slowly(points):
    """Whoever is left when every pair was looked at and the loser taken out."""
    left = dict(points)
    for a, p in points.items():
        for q in points.values():
            pairs = [(float("inf") if x is None else x, float("inf") if y is None else y) for x, y in zip(p, q, strict=True)]
            worse_somewhere = any(y < x for x, y in pairs)
            better_somewhere = any(x < y for x, y in pairs)
            if worse_somewhere and not better_somewhere:
                left.pop(a, None)
    return list(left)


@pytest.mark.parametrize("seed", range(40))
def test_the_front_is_that_of_the_definition(seed):
    rng = random.Random(seed)
    width = rng.randint(1, 4)
    points = {f"p{i}": [rng.choice([None, *range(6)]) for _ in range(width)] for i in range(rng.randint(1, 12))}
    assert front(points) == slowly(points)


def test_equal_points_are_both_on_the_front_and_what_was_not_measured_loses():
    assert front({"a": [1, 2], "b": [1, 2], "c": [1, None], "d": [0, None]}) == ["a", "b", "d"]
    assert front({"a": [1.0], "b": [float("nan")]}) == ["a"]
