"""Scores of labels, against slow counts and published definitions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from luthier.measuring.evaluate import compare, score
from luthier.nn import agreement
from luthier.tasks.classification import Task


def rows(labels):
    return [{"prompt": "x", "refs": [x]} for x in labels]


def slow_f1(given, said, names):
    each = []
    for n in names:
        tp = sum(n in g and n in s for g, s in zip(given, said, strict=True))
        wrong = sum((n in g) != (n in s) for g, s in zip(given, said, strict=True))
        if tp + wrong:
            each.append(2 * tp / (2 * tp + wrong))
    return sum(each) / len(each)


def slow_matthews(given, said):
    """The covariance of the two labellings' indicator vectors, over the root of the product of their variances."""
    names = sorted({*given, *said})
    x, y = (np.array([[float(n == v) for n in names] for v in side]) for side in (given, said))
    cov = lambda a, b: sum(np.mean(a[:, k] * b[:, k]) - a[:, k].mean() * b[:, k].mean() for k in range(len(names)))  # noqa: E731
    return cov(x, y) / math.sqrt(cov(x, x) * cov(y, y)) if cov(x, x) * cov(y, y) > 1e-12 else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_single_labels(seed):
    rng = np.random.default_rng(seed)
    given = rng.choice(["a", "b", "c"], 60).tolist()
    said = [g if rng.random() < 0.6 else str(rng.choice(["a", "b", "c", "made up"])) for g in given]
    got = score(lambda _: said, Task(), rows(given))
    assert got["accuracy"].value == pytest.approx(np.mean([g == s for g, s in zip(given, said, strict=True)]))
    assert got["macro_f1"].value == pytest.approx(slow_f1([{g} for g in given], [{s} for s in said], ["a", "b", "c", "made up"]))
    assert got["matthews"].value == pytest.approx(slow_matthews(given, said))
    assert all(s.low <= s.value <= s.high and s.n == 60 for s in got.values())


def test_two_labels_give_the_textbook_matthews():
    tp, tn, fp, fn = 17, 30, 5, 8
    given = ["1"] * tp + ["0"] * tn + ["0"] * fp + ["1"] * fn
    said = ["1"] * tp + ["0"] * tn + ["1"] * fp + ["0"] * fn
    want = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score(lambda _: said, Task(), rows(given))["matthews"].value == pytest.approx(want)
    assert score(lambda _: ["1"] * 60, Task(), rows(given))["matthews"].value == 0.0


def test_several_labels():
    given = [["a"], ["a", "b"], [], ["c"]]
    said = [["a"], ["b"], ["c"], ["c"]]
    got = score(lambda _: [json.dumps(s) for s in said], Task(problem="multiple"), rows([json.dumps(g) for g in given]))
    assert got["accuracy"].value == 0.5
    assert got["micro_f1"].value == pytest.approx(2 * 3 / (4 + 4))
    assert got["macro_f1"].value == pytest.approx(slow_f1(given, said, "abc"))


def test_numbers():
    rng = np.random.default_rng(0)
    given = np.round(rng.normal(size=50), 1)  # with ties
    said = given + rng.normal(size=50)
    got = score(lambda _: [str(x) for x in said], Task(problem="regression"), rows([str(x) for x in given]))
    assert got["pearson"].value == pytest.approx(np.corrcoef(given, said)[0, 1])
    ranks = lambda x: np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x])  # noqa: E731
    assert got["spearman"].value == pytest.approx(np.corrcoef(ranks(given), ranks(said))[0, 1])
    assert got["squared_error"].value == pytest.approx(np.mean((given - said) ** 2))
    constant = score(lambda _: ["1.0"] * 50, Task(problem="regression"), rows([str(x) for x in given]))
    assert constant["pearson"].value == constant["spearman"].value == 0.0


@pytest.mark.parametrize("name", ["macro_f1", "micro_f1", "matthews", "pearson", "spearman"])
def test_counting_a_row_twice_is_having_it_twice(name):
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 3, 40)
    statistic = getattr(agreement, name)
    if name in ("pearson", "spearman"):
        x, y = np.round(rng.normal(size=40), 1), np.round(rng.normal(size=40), 1)
    else:
        x, y = np.eye(4)[rng.integers(0, 4, 40)], np.eye(4)[rng.integers(0, 4, 40)]
    repeated = statistic(np.repeat(x, counts, 0), np.repeat(y, counts, 0))(np.ones((1, counts.sum())))
    np.testing.assert_allclose(statistic(x, y)(np.stack([counts, np.ones(40)]).astype(float))[0], repeated[0], atol=1e-12)


def test_a_label_that_a_resample_lacks_is_left_out_of_the_mean():
    given, said = np.eye(3)[[0, 1, 0, 1, 2]], np.eye(3)[[0, 1, 1, 1, 2]]
    counts = np.array([[1.0, 1, 1, 1, 0]])  # the third label is gone with the last row
    names = [[{"a"}, {"b"}, {"a"}, {"b"}], [{"a"}, {"b"}, {"b"}, {"b"}]]
    assert agreement.macro_f1(given, said)(counts)[0] == pytest.approx(slow_f1(*names, ["a", "b", "c"])) == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_two_systems_are_compared_on_the_same_rows():
    given = ["a", "b"] * 40
    before, after = ["a"] * 80, ["a", "b"] * 30 + ["a"] * 20
    got = compare(Task(), rows(given), before, after)
    for name in ("accuracy", "macro_f1", "matthews"):
        alone = [score(lambda _, s=s: s, Task(), rows(given))[name].value for s in (before, after)]
        assert got[name].value == pytest.approx(alone[1] - alone[0]) and got[name].low > 0
