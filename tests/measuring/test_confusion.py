"""The report on labels, against slow counts."""

import pytest

from luthier.measuring.confusion import report
from luthier.tasks.classification import Task

GIVEN = "aaaaabbbccd"
SAID = "aaabcbbacce"


def test_precision_recall_and_f1_are_what_counting_by_hand_gives():
    found = report(Task(), [{"refs": [g]} for g in GIVEN], list(SAID))
    assert [x.name for x in found.labels] == ["a", "b", "c", "d", "e"] and found.rows == 11  # most rows first
    for label in found.labels:
        tp = sum(g == s == label.name for g, s in zip(GIVEN, SAID, strict=True))
        given, said = GIVEN.count(label.name), SAID.count(label.name)
        assert (label.given, label.said) == (given, said)
        assert (label.precision and label.precision.value) == (pytest.approx(tp / said) if said else None)
        assert (label.recall and label.recall.value) == (pytest.approx(tp / given) if given else None)
        if given:
            assert label.f1.value == pytest.approx(2 * tp / (given + said)) and label.f1.low <= label.f1.value <= label.f1.high
    never = found.labels[3]
    assert never.f1.value == 0 and never.f1.high > 0  # one row that was missed does not prove that all are


def test_confusions_are_in_the_order_of_how_often_they_are_made():
    found = report(Task(), [{"refs": [g]} for g in "aaabbc"], list("bbcaac"))
    assert found.confusions == [("a", "b", 2), ("b", "a", 2), ("a", "c", 1)]
    assert found.plain()["confusions"][0] == {"given": "a", "said": "b", "n": 2}


def test_several_labels_a_row_have_no_confusions():
    rows = [{"refs": ['["x", "y"]']}, {"refs": ['["y"]']}]
    found = report(Task(problem="multiple"), rows, ['["x"]', '["x", "y"]'])
    by_name = {x.name: x for x in found.labels}
    assert (by_name["x"].precision.value, by_name["x"].recall.value, by_name["y"].recall.value) == (0.5, 1.0, 0.5)
    assert found.confusions == []
