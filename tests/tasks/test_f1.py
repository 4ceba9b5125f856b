"""Word-overlap F1, against a slow version that matches words one by one, and examples worked by hand."""

import random

import pytest

from luthier.core import LuthierError
from luthier.tasks.f1 import Task, overlap


def slow(said, wanted):
    """Precision and recall by crossing out."""
    if not said or not wanted:
        return float(not said and not wanted)
    left, shared = list(wanted), 0
    for word in said:
        if word in left:
            left.remove(word)
            shared += 1
    p, r = shared / len(said), shared / len(wanted)
    return 2 * p * r / (p + r) if shared else 0.0


@pytest.mark.parametrize("seed", range(20))
def test_overlap_is_the_harmonic_mean_of_precision_and_recall(seed):
    rng = random.Random(seed)
    said, wanted = (rng.choices("abcdef", k=rng.randint(0, 8)) for _ in range(2))
    assert overlap(said, wanted) == pytest.approx(slow(said, wanted))


def test_squads_tidying_drops_case_punctuation_and_articles_and_the_best_reference_counts():
    row = {"refs": ["in 1998", "The Saint Bernadette Soubirous!"]}
    assert Task().score(row, "saint bernadette Soubirous")["f1"] == 1.0
    assert Task().score(row, "Bernadette")["f1"] == pytest.approx(2 * 1 * (1 / 3) / (1 + 1 / 3))
    assert Task(normalise="plain").score(row, "saint bernadette Soubirous")["f1"] == 0.0
    assert Task().score({"refs": ["another theme"]}, "theme")["f1"] == pytest.approx(2 / 3)  # an article inside a word stays


def test_nothing_against_nothing_is_right_and_against_something_wrong():
    assert Task().score({"refs": ["the"]}, "...")["f1"] == 1.0
    assert Task().score({"refs": ["yes"]}, "")["f1"] == 0.0


def test_a_row_without_references_is_refused():
    with pytest.raises(LuthierError, match="refs"):
        Task().score({"prompt": "x"}, "y")
