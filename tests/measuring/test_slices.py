"""Slices: by length, by label, by file and by column; and the worst one, which has to be worse than chance makes it look."""

from types import SimpleNamespace

import numpy as np
import pytest

from luthier.core import LuthierError, Row
from luthier.measuring.marks import mean
from luthier.measuring.slices import record_of, slicing, worst


def record(i, label, **extras):
    return SimpleNamespace(where=f"films.jsonl:{i}", places=[f"films.jsonl:{i}"], references=[label], extras=extras)


def row(i, prompt=5, answer=3, file="films.jsonl"):
    return Row(np.arange(prompt + answer, dtype=np.int32), np.arange(prompt + answer) >= prompt, f"{file}:{i}")


RECORDS = [record(i, "good" if i % 2 else "bad", kind="long" if i > 7 else "short", stars=i % 3, year=1990 + i) for i in range(12)]
ROWS = [row(i, prompt=5 + i) for i in range(12)]


def groups(by, **how):
    return {k: v.tolist() for k, v in slicing(by, how.pop("records", RECORDS), how.pop("rows", ROWS), answers=True, **how).places.items()}


def test_slices_are_by_label_and_by_any_column_and_few_numbers_stay_as_they_are():
    assert groups("label") == {"bad": [0, 2, 4, 6, 8, 10], "good": [1, 3, 5, 7, 9, 11]}
    assert groups("kind") == {"long": [8, 9, 10, 11], "short": [0, 1, 2, 3, 4, 5, 6, 7]}
    assert list(groups("stars")) == ["0", "1", "2"]


def test_many_numbers_are_put_into_bins_of_like_size_in_their_order():
    assert groups("length") == {"5 to 7 tokens": [0, 1, 2], "8 to 10 tokens": [3, 4, 5], "11 to 13 tokens": [6, 7, 8], "14 to 16 tokens": [9, 10, 11]}
    assert list(groups("year")) == ["1990 to 1992", "1993 to 1995", "1996 to 1998", "1999 to 2001"]
    rows = [row(i, answer=2 + i % 2) for i in range(12)]
    assert list(groups("answer_length", rows=rows)) == ["2 tokens", "3 tokens"]


def test_files_are_sources_and_a_column_of_that_name_is_asked_for_by_column():
    rows = [row(i, file="a.jsonl" if i < 4 else "b.jsonl") for i in range(12)]
    assert {k: len(v) for k, v in groups("source", rows=rows).items()} == {"a.jsonl": 4, "b.jsonl": 8}
    records = [record(i, "x", length="tall" if i else "small") for i in range(12)]
    assert groups("column:length", records=records)["small"] == [0]


def test_several_answers_to_one_prompt_are_one_record():
    records = [RECORDS[0], RECORDS[1]]
    records[0].places.append("films.jsonl:40")
    try:
        rows = [row(0), row(40, answer=9), row(1, prompt=9)]
        assert record_of(records, rows) == [0, 0, 1]
        assert groups("length", records=records, rows=rows) == {"5 tokens": [0], "9 tokens": [1]}
    finally:
        records[0].places.pop()
    assert record_of([], rows) == [0, 1, 2]  # raw text


@pytest.mark.parametrize(
    ("by", "sentence"),
    [
        ("kin", "did you mean kind"),
        ("nonsense", "accepted are length, answer_length, label, source, and the columns kind, stars, year"),
        ("source", "all rows are alike"),
    ],
)
def test_what_makes_no_slices_is_refused_with_what_would(by, sentence):
    with pytest.raises(LuthierError, match=sentence):
        groups(by)
    many = [record(i, f"text {i}") for i in range(60)]
    with pytest.raises(LuthierError, match="60 different values in 60 rows"):
        groups("label", records=many, rows=[row(i) for i in range(60)])
    with pytest.raises(LuthierError, match="no answers"):
        slicing("answer_length", RECORDS, ROWS, answers=False)


def cut(values, names):
    mark = mean("accuracy", values)
    return mark, {n: mark.of(np.array([i for i, x in enumerate(names) if x == n])) for n in dict.fromkeys(names)}


def test_a_slice_that_is_clearly_worse_is_named_and_small_ones_never_are():
    rng = np.random.default_rng(0)
    names = ["easy"] * 100 + ["hard"] * 60 + ["tiny"] * 5
    values = [*(rng.random(100) < 0.9).astype(float), *(rng.random(60) < 0.5).astype(float), *[0.0] * 5]
    found = worst(*cut(values, names))
    assert found.slice == "hard" and found.is_clear and found.difference.high < 0 and found.score.n == 60 and found.rest.n == 105
    assert found.said("kind").startswith("worst by kind: hard, accuracy 0.")
    assert worst(*cut([0.0] * 5 + [1.0] * 5, ["a"] * 5 + ["b"] * 5)) is None


def test_a_loss_is_worst_where_it_is_highest():
    values = list(np.concatenate([np.random.default_rng(0).normal(1, 0.1, 40), np.random.default_rng(1).normal(2, 0.1, 40)]))
    mark = mean("loss per token", values, lower_is_better=True)
    found = worst(mark, {"low": mark.of(np.arange(40)), "high": mark.of(np.arange(40, 80))})
    assert found.slice == "high" and found.is_clear


def test_slices_that_are_alike_are_called_worse_about_once_in_twenty_times_and_no_more():
    """The worst of eight looks bad by chance: without the correction it would be called so in every third evaluation."""
    rng = np.random.default_rng(0)
    named = sum(worst(*cut(list((rng.random(240) < 0.7).astype(float)), [f"s{i % 8}" for i in range(240)]), seed=t).is_clear for t in range(150))
    assert named / 150 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 150)
