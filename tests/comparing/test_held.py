"""What is held out: nothing that rates are chosen by is tested on, and no prompt is on two sides."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from luthier import build
from luthier.comparing.held import Reading, fewer, grouped, take_tests
from luthier.core import Row
from luthier.data.prepare import Prepared
from luthier.errors import LuthierError
from luthier.settings.config import load_run


@pytest.fixture(scope="module")
def tokenizer():
    return build.load_tokenizer(load_run(None).model)


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"name[{i // 3}]", "completion": f"This is number {i} of {i // 3}."} for i in range(300)]  # three answers a prompt
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "train.jsonl"


def read(data, tokenizer, *settings, test=(), seed=0, choose=None):
    reading = Reading(test=test, seed=seed, positions=200, choose=choose)
    return reading(load_run(None, [f"data.train={data}", *settings]), tokenizer), reading.tests


def prompts(rows, tokenizer):
    return {tokenizer.decode(r.ids[~r.train]) for r in rows}


def test_no_prompt_is_both_trained_chosen_by_and_tested_on(data, tokenizer):
    made, tests = read(data, tokenizer, "data.validation_share=0.15")
    sides = [prompts(rows, tokenizer) for rows in (made.train, made.validation, tests.rows)]
    assert [len(s) for s in sides] == [70, 10, 20]
    assert len(set.union(*sides)) == 100  # no two share one
    assert len(tests.rows) == 60 and len(tests.records) == 20 and all(len(r.references) == 3 for r in tests.records)
    assert "two in three" in tests.said


def test_a_run_s_seed_moves_no_row(data, tokenizer):
    (one, tests_1), (two, tests_2) = (read(data, tokenizer, f"seed={s}") for s in (0, 7))
    where = lambda rows: [r.where for r in rows]  # noqa: E731
    assert where(one.train) == where(two.train) and where(tests_1.rows) == where(tests_2.rows)


def test_a_test_file_is_all_test_and_the_held_out_rows_are_all_to_choose_by(data, tokenizer, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "name[new]", "completion": "New."}) + "\n")
    made, tests = read(data, tokenizer, "data.validation_share=0.1", test=[str(tmp_path / "test.jsonl")])
    assert len(made.validation) == 30 and len(tests.rows) == 1 and tests.records[0].references == ["New."]


def test_fewer_rows_to_choose_by_keep_their_records(data, tokenizer):
    made, _ = read(data, tokenizer, "data.validation_share=0.15", choose=7)
    assert len(made.validation) == 7 and len(made.validation_records) == 3
    assert {r.where for r in made.validation_records} <= {r.where for r in made.validation}


def test_labels_and_their_records_stay_side_by_side(tmp_path, tokenizer):
    rows = [{"text": f"text {i // 2}", "label": f"l{i % 3}"} for i in range(120)]  # a text twice, with two labels
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    made, tests = read(tmp_path / "l.jsonl", tokenizer, "objective=classify", "data.validation_share=0.2")
    names = made.facts["labels"]
    for side, records in ((made.validation, made.validation_records), (tests.rows, tests.records)):
        assert len(side) == len(records) > 0
        assert [names[int(r.extras["label"])] for r in side] == [r.references[0] for r in records]
    assert not {r.where for r in made.validation} & {r.where for r in tests.rows}


@dataclass
class Record:
    where: str
    prompt: list


def chat(*texts):
    return [{"role": r, "content": t} for r, t in zip(("user", "assistant", "user"), texts, strict=False)]


def row(where):
    return Row(np.arange(3), np.ones(3, dtype=bool), where)


def test_conversations_that_open_alike_are_one_group():
    rows = [row("a:1"), row("a:2"), row("a:3"), row("a:4")]
    records = [Record("a:1", chat("hi")), Record("a:3", chat("hi", "yes", "and")), Record("a:4", chat("other"))]
    groups = grouped(rows, records)
    assert [[r.where for r in g] for g, _ in groups] == [["a:1", "a:2", "a:3"], ["a:4"]]
    assert [len(r) for _, r in groups] == [2, 1]


def test_one_long_document_is_tested_on_by_its_end():
    made = Prepared([], [replace(row("d"), ids=np.arange(i, i + 3)) for i in range(9)], [])
    tests = take_tests(made)
    assert [int(r.ids[0]) for r in made.validation] == [0, 1, 2] and [int(r.ids[0]) for r in tests.rows] == [3, 4, 5, 6, 7, 8]
    fewer(made, 2)
    assert len(made.validation) == 2


def test_too_few_rows_and_what_cannot_be_compared_are_refused(data, tokenizer, tmp_path):
    (tmp_path / "few.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    with pytest.raises(LuthierError, match="too few rows are held out .*--test"):
        read(tmp_path / "few.jsonl", tokenizer)
    with pytest.raises(LuthierError, match="answers prompts"):
        read(data, tokenizer, "objective={kind: grpo, rewards: {exact_match: 1.0}}")
    mixed = load_run({"data": {"mix": {"rule": "equal", "sources": {"a": {"files": [str(data)]}, "b": {"files": [str(data)]}}}}})
    with pytest.raises(LuthierError, match="takes one data set"):
        Reading(test=(), seed=0, positions=200)(mixed, tokenizer)
