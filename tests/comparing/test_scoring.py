"""Scores as functions of counts: against evaluate.score and evaluate.compare, which draw the same resamples."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.comparing import scoring
from luthier.measuring.evaluate import compare, score
from luthier.nn.intervals import Interval
from luthier.settings.plugins import plugin

ROWS = [{"prompt": f"p{i}", "refs": [f"the {w} cat sat on the mat number {i}"]} for i, w in enumerate(("red", "blue", "green", "old", "new", "big") * 5)]
GOOD = [r["refs"][0] for r in ROWS]
SOME = [a if i % 3 else a.replace("cat", "dog") for i, a in enumerate(GOOD)]
BAD = [f"a mat number {i}" for i in range(len(ROWS))]
LABELS = [{"refs": [x]} for x in ("a", "b", "c", "a", "a", "b") * 5]
SAID = ["a", "b", "a", "a", "c", "b"] * 5


@pytest.mark.parametrize(("kind", "rows", "answers"), [("bleu", ROWS, SOME), ("exact_match", ROWS, SOME), ("classification", LABELS, SAID)])
def test_one_seed_s_scores_and_intervals_are_those_of_evaluate(kind, rows, answers):
    task = plugin("tasks", kind)()
    want = score(lambda _: answers, task, rows)
    got = scoring.counted(task, rows, answers)
    assert list(got) == list(want)
    for name, statistic in got.items():
        found = scoring.interval(len(rows), statistic)
        assert found.value == pytest.approx(want[name].value, abs=1e-9)
        share = name in ("exact_match", "accuracy")  # evaluate gives Wilson's interval of one run's share
        assert (found.low, found.high) == pytest.approx((want[name].low, want[name].high), abs=0.05 if share else 1e-9)


def test_a_difference_is_the_paired_one_of_evaluate():
    task = plugin("tasks", "bleu")()
    want = compare(task, ROWS, BAD, SOME)["bleu"]
    a, b = (scoring.counted(task, ROWS, x)["bleu"] for x in (SOME, BAD))
    found = scoring.difference(len(ROWS), a, b)
    assert (found.value, found.low, found.high) == pytest.approx((want.value, want.low, want.high), abs=1e-9)


def test_a_paired_difference_is_narrower_than_two_intervals_side_by_side():
    task = plugin("tasks", "exact_match")()
    fewer = [a if i % 10 else "no" for i, a in enumerate(SOME)]  # wrong where the other is, and a little more
    a, b = (scoring.counted(task, ROWS, x)["exact_match"] for x in (SOME, fewer))
    found, one, two = scoring.difference(len(ROWS), a, b), scoring.interval(len(ROWS), a), scoring.interval(len(ROWS), b)
    assert found.high - found.low < 0.8 * ((one.high - one.low) ** 2 + (two.high - two.low) ** 2) ** 0.5


def test_several_seeds_are_averaged_row_by_row():
    task = plugin("tasks", "exact_match")()
    first, second = (scoring.counted(task, ROWS, x)["exact_match"] for x in (GOOD, BAD))
    both = scoring.interval(len(ROWS), scoring.averaged([first, second]))
    assert both.value == pytest.approx(0.5)
    assert (both.low, both.high) == (0.5, 0.5)  # whatever rows are drawn, one seed has all and one none


def test_the_loss_of_rows_is_weighed_by_their_tokens():
    found = scoring.loss_counted([[2.0, 1.0], [9.0, 3.0]])
    assert found(np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 1.0]])) == pytest.approx([11 / 4, 2.0, 3.0])


def test_clearly_worse_is_an_interval_wholly_on_the_worse_side():
    below, across, above = Interval(-2, -3, -1, 9), Interval(0.5, -1, 2, 9), Interval(2, 1, 3, 9)
    assert [scoring.clearly_worse("bleu", d) for d in (below, across, above)] == [True, False, False]
    assert [scoring.clearly_worse(scoring.LOSS, d) for d in (below, across, above)] == [False, False, True]
