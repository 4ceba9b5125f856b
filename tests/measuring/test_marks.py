"""A number over rows as a function of counts: on some rows, on a resample, on rows of two models; and paired differences of it."""

import numpy as np
import pytest

from luthier.core import LuthierError
from luthier.measuring.evaluate import compare, score
from luthier.measuring.marks import Score, mean, of_task, pooled
from luthier.measuring.paired import Difference, chance, difference, differences
from luthier.nn.intervals import ratio_of_sums
from luthier.tasks import bleu, classification

ROWS = [{"refs": [f"the {w} sat on the mat by the old door"]} for w in ("cat", "dog", "hen", "fox") * 10]
SAID = [r["refs"][0] if i % 3 else "the thing sat on a mat by the door" for i, r in enumerate(ROWS)]
OTHER = [r["refs"][0] if i % 5 else "nothing at all" for i, r in enumerate(ROWS)]
LABELLED = [{"refs": [x]} for x in "aabbc" * 8]
LABELS, MORE = list("abbbc" * 8), list("aabcc" * 8)


def test_a_mark_on_some_rows_is_the_score_of_those_rows_alone():
    some = np.arange(0, 40, 3)
    for task, rows, said in ((bleu.Task(), ROWS, SAID), (classification.Task(), LABELLED, LABELS)):
        whole = of_task(task, rows, said)
        alone = of_task(task, [rows[i] for i in some], [said[i] for i in some])
        for name, mark in whole.items():
            assert mark.of(some).value == pytest.approx(alone[name].value), name
            found, wanted = mark.of(some).score(), alone[name].score()
            assert (found.low, found.high, found.n) == pytest.approx((wanted.low, wanted.high, len(some))), name


def test_counting_rows_is_having_them_so_often():
    counts = np.random.default_rng(0).integers(0, 3, 40)
    for task, rows, said in ((bleu.Task(), ROWS, SAID), (classification.Task(), LABELLED, LABELS)):
        again = of_task(
            task, [r for r, c in zip(rows, counts, strict=True) for _ in range(c)], [a for a, c in zip(said, counts, strict=True) for _ in range(c)]
        )
        for name, mark in of_task(task, rows, said).items():
            assert mark.at(counts[None].astype(float))[0] == pytest.approx(again[name].value), name


def test_rows_of_two_models_beside_one_another_are_scored_as_if_they_were_one_model():
    swap = np.random.default_rng(1).integers(0, 2, 40)
    for task, rows, a, b in ((bleu.Task(), ROWS, SAID, OTHER), (classification.Task(), LABELLED, LABELS, MORE)):
        first, second = of_task(task, rows, a), of_task(task, rows, b)
        mixed = of_task(task, rows, [y if s else x for x, y, s in zip(a, b, swap, strict=True)])
        for name in first:
            both = first[name].beside(second[name])
            assert both.at(np.concatenate([1 - swap, swap])[None].astype(float))[0] == pytest.approx(mixed[name].value), name


def test_a_difference_is_the_second_less_the_first_and_compare_gives_the_same():
    for task, rows, a, b in ((bleu.Task(), ROWS, SAID, OTHER), (classification.Task(), LABELLED, LABELS, MORE)):
        found = differences(of_task(task, rows, a), of_task(task, rows, b))
        said, theirs = score(lambda _: a, task, rows), score(lambda _: b, task, rows)  # noqa: B023
        for name, d in found.items():
            assert d.value == pytest.approx(theirs[name].value - said[name].value)
            assert compare(task, rows, a, b)[name] == Score(d.value, d.low, d.high, d.n)
            assert 0 < d.p <= 1


def test_a_steady_gain_is_clear_and_one_model_against_itself_is_not():
    better = [r["refs"][0] for r in ROWS]
    gain = differences(of_task(bleu.Task(), ROWS, SAID), of_task(bleu.Task(), ROWS, better))["bleu"]
    assert gain.verdict == "better" and gain.p < 0.01 and gain.low > 0
    assert differences(of_task(bleu.Task(), ROWS, better), of_task(bleu.Task(), ROWS, SAID))["bleu"].verdict == "worse"
    same = differences(of_task(bleu.Task(), ROWS, SAID), of_task(bleu.Task(), ROWS, SAID))["bleu"]
    assert same.verdict == "alike" and same.p == 1.0
    assert Difference(-0.2, -0.3, -0.1, 9, 0.01, lower_is_better=True).verdict == "better"
    assert Difference(0.2, 0.1, 0.3, 9, 0.01, lower_is_better=None).verdict == "more"
    assert Difference(0.2, -0.1, 0.3, 9, 0.2).verdict == "may be chance"


def test_rows_that_one_model_has_no_value_for_are_left_out_of_both():
    a, b = mean("x", [1.0, None, 0.5, 0.25]), mean("x", [2.0, 5.0, None, 0.25])
    assert difference(a, b).value == pytest.approx(0.5) and difference(a, b).n == 2
    assert chance(a, b) == 1.0  # of two rows, one unlike: either way is as likely
    with pytest.raises(LuthierError, match="4 rows and 2 rows"):
        difference(a, mean("x", [1.0, 2.0]))


def test_the_p_value_of_loss_per_token_swaps_whole_rows():
    stats = np.array([[20.0, 10], [6, 2], [9, 3], [40, 20]])
    less = stats - np.array([[2.0, 0], [1, 0], [0.5, 0], [4, 0]])
    a, b = pooled("loss", stats, ratio_of_sums), pooled("loss", less, ratio_of_sums)
    ways = [[i >> k & 1 for k in range(4)] for i in range(16)]
    gaps = [abs(sum((y - x if not w else x - y)[0] for x, y, w in zip(stats, less, way, strict=True))) for way in ways]
    assert chance(a, b) == pytest.approx(np.mean(np.array(gaps) >= gaps[0] - 1e-9), abs=0.02)
