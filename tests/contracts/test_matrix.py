"""A cover of the contract matrix: every pair of a method, an objective, a precision and a family meets at least once."""

import itertools

import pytest

from tests import matrix

COVER = matrix.cover()


def test_every_pair_of_values_meets():
    values = matrix.axes()
    met = {(i, c[i], j, c[j]) for c in COVER for i, j in itertools.combinations(range(4), 2)}
    assert met == {(i, a, j, b) for i, j in itertools.combinations(range(4), 2) for a in values[i] for b in values[j]}


@pytest.mark.parametrize("cell", COVER, ids=lambda c: "-".join(c))
def test_a_cell_trains_or_says_why_not(cell):
    matrix.run(cell)
