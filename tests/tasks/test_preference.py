"""Held-out preferences as a task."""

from __future__ import annotations

import json
import math

import pytest

from luthier.core import LuthierError
from luthier.measuring.evaluate import score
from luthier.tasks.preference import Task

PAIR = {"ranks": [0, 1]}


def said(scores):
    return json.dumps(scores)


def test_a_pair_is_right_where_the_better_answer_scores_higher():
    assert Task().score(PAIR, said([1.0, 0.0])) == pytest.approx({"accuracy": 1, "probability": 1 / (1 + math.exp(-1))})
    assert Task().score(PAIR, said([0.0, 1.0])) == pytest.approx({"accuracy": 0, "probability": 1 / (1 + math.e)})
    assert Task().score(PAIR, said([2.0, 2.0])) == {"accuracy": 0.5, "probability": 0.5}
    assert Task().score({"ranks": [1, 0]}, said([0.0, 1.0]))["accuracy"] == 1


def test_a_ranking_is_the_share_of_its_pairs_in_order_and_ties_do_not_count():
    assert Task().score({"ranks": [0, 1, 2]}, said([3.0, 1.0, 2.0]))["accuracy"] == pytest.approx(2 / 3)
    assert Task().score({"ranks": [0, 1, 1]}, said([3.0, 1.0, 9.0]))["accuracy"] == pytest.approx(1 / 2)
    assert Task().score({"ranks": [0, 0]}, said([3.0, 1.0])) == {}


def test_scores_come_with_intervals_and_a_calibration_error():
    rows = [PAIR] * 80 + [{"ranks": [0, 0]}] * 5
    answers = [said([math.log(3), 0.0])] * 60 + [said([0.0, math.log(3)])] * 20 + [said([0.0, 1.0])] * 5  # three in four right, and it says so
    found = score(lambda _: answers, Task(), rows)
    assert found["accuracy"].value == 0.75 and found["accuracy"].n == 80 and found["accuracy"].low < 0.75 < found["accuracy"].high
    assert found["calibration_error"].value == pytest.approx(0, abs=1e-12)
    sure = [a.replace("1.0986122886681098", "30.0") for a in answers]
    assert score(lambda _: sure, Task(), rows)["calibration_error"].value == pytest.approx(0.25, abs=1e-3)


def test_scores_that_do_not_fit_the_ranks_are_refused():
    with pytest.raises(LuthierError, match="ranks of its 2 answers; it has 0"):
        Task().score({}, said([1.0, 2.0]))


def test_an_answer_that_is_no_scores_is_wrong():
    for answer in ("the first", '{"a": 1}', '["a", "b"]'):
        assert Task().score(PAIR, answer) == {"accuracy": 0, "probability": 0}
