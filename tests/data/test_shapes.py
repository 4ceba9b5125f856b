"""The shape of the data is detected and named; what could mean two things is not guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.core import LuthierError
from luthier.data.formats import Record
from luthier.data.shapes import detect


def records(*rows: dict[str, Any]) -> list[Record]:
    return [Record(row, f"f.jsonl:{i}") for i, row in enumerate(rows, 1)]


M = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
S = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
KNOWN = [
    ({"text": "a"}, "text", {"text": "text"}),
    ({"text": "a", "label": 1}, "text", {"text": "text"}),
    ({"prompt": "a", "completion": "b"}, "prompt", {"prompt": "prompt", "completion": "completion"}),
    ({"prompt": M[:1], "completion": M[1:]}, "prompt", {"prompt": "prompt", "completion": "completion"}),
    ({"question": "a", "answer": "b", "source": "c"}, "prompt", {"prompt": "question", "completion": "answer"}),
    ({"mr": "a", "ref": "b"}, "prompt", {"prompt": "mr", "completion": "ref"}),
    ({"mr": "a", "refs": ["b"]}, "prompt", {"prompt": "mr", "completion": "refs"}),
    ({"input": "a", "output": "b"}, "prompt", {"prompt": "input", "completion": "output"}),
    ({"source": "a", "target": "b"}, "prompt", {"prompt": "source", "completion": "target"}),
    ({"query": "a", "response": "b"}, "prompt", {"prompt": "query", "completion": "response"}),
    ({"instruction": "a", "output": "b"}, "alpaca", {"instruction": "instruction", "output": "output"}),
    ({"instruction": "a", "input": "i", "output": "b"}, "alpaca", {"instruction": "instruction", "input": "input", "output": "output"}),
    ({"instruction": "a", "context": "c", "response": "b"}, "alpaca", {"instruction": "instruction", "input": "context", "output": "response"}),
    ({"messages": M}, "messages", {"messages": "messages"}),
    ({"messages": M, "tools": []}, "messages", {"messages": "messages", "tools": "tools"}),
    ({"conversations": S, "tools": "[]", "system": "s"}, "sharegpt", {"conversations": "conversations", "tools": "tools", "system": "system"}),
    ({"prompt": "a", "prompt_id": "x", "messages": M}, "messages", {"messages": "messages"}),
]


@pytest.mark.parametrize(("row", "name", "columns"), KNOWN)
def test_known_shapes_are_named_with_their_columns(row: dict, name: str, columns: dict) -> None:
    shape = detect(records(row, row))
    assert (shape.name, dict(shape.columns)) == (name, columns)


def test_a_renamed_column_is_said() -> None:
    assert str(detect(records({"mr": "a", "ref": "b"}))) == "prompt (prompt = column 'mr', completion = column 'ref')"


def test_a_part_that_only_some_rows_have_is_found() -> None:
    shape = detect(records({"instruction": "a", "output": "b"}, {"instruction": "a", "input": "i", "output": "b"}))
    assert "input" in shape.columns


def test_mixed_shapes_are_refused_with_a_place_for_each() -> None:
    with pytest.raises(LuthierError, match=r"text at f.jsonl:1 .*prompt at f.jsonl:3"):
        detect(records({"text": "a"}, {"text": "b"}, {"prompt": "a", "completion": "b"}))


def test_two_possible_pairs_are_not_guessed() -> None:
    with pytest.raises(LuthierError, match=r"Several pairs would do: question / answer, source / target"):
        detect(records({"question": "a", "answer": "b", "source": "c", "target": "d"}))


def test_unknown_columns_are_listed_with_what_to_write() -> None:
    with pytest.raises(LuthierError, match=r"f.jsonl:1: cannot tell.*Columns found: headline, body.*data.columns=\{prompt: headline, completion"):
        detect(records({"headline": "a", "body": "b"}))


def test_a_mapping_decides_before_the_names_do() -> None:
    shape = detect(records({"question": "a", "answer": "b", "body": "c"}), columns={"text": "body"})
    assert (shape.name, dict(shape.columns)) == ("text", {"text": "body"})
    shape = detect(records({"instruction": "a", "facts": "f", "output": "b"}), columns={"input": "facts"})
    assert (shape.name, shape.columns["input"]) == ("alpaca", "facts")


def test_a_mapped_column_that_is_missing_names_those_found_and_the_nearest() -> None:
    with pytest.raises(LuthierError, match=r"no column 'questoin'.*Columns found: question, answer. Did you mean 'question'\?"):
        detect(records({"question": "a", "answer": "b"}), columns={"prompt": "questoin", "completion": "answer"})


def test_a_mapping_of_unknown_parts_names_the_parts() -> None:
    with pytest.raises(LuthierError, match=r"data.columns maps promt, which is no shape. Accepted.*prompt, completion"):
        detect(records({"q": "a"}), columns={"promt": "q"})
    with pytest.raises(LuthierError, match="the shape text has no part 'completion'"):
        detect(records({"q": "a"}), shape="text", columns={"completion": "q"})


def test_a_given_shape_is_not_overruled() -> None:
    row = {"text": "t", "prompt": "a", "completion": "b"}
    assert detect(records(row)).name == "prompt"
    assert detect(records(row), shape="text").name == "text"
    with pytest.raises(LuthierError, match=r"not the shape alpaca.*needs instruction, output"):
        detect(records(row), shape="alpaca")


@pytest.mark.parametrize(
    "row",
    [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"conversations": S, "chosen": {}, "rejected": {}}, {"messages": M, "label": False}],
)
def test_judged_data_is_not_taken_for_demonstrations(row: dict) -> None:
    with pytest.raises(LuthierError, match="would also teach the bad answers"):
        detect(records(row))


def test_one_side_of_a_preference_can_be_chosen() -> None:
    shape = detect(records({"prompt": "a", "chosen": "b", "rejected": "c"}), columns={"prompt": "prompt", "completion": "chosen"})
    assert shape.columns["completion"] == "chosen"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("alpaca_18k.jsonl", "alpaca"),
        ("alpaca_en_demo.json", "alpaca"),
        ("c4_demo.jsonl", "text"),
        ("dolly_3k.json", "alpaca"),
        ("glaive_toolcall_en_demo.json", "sharegpt"),
        ("identity.json", "alpaca"),
        ("v1_sft_demo.jsonl", "messages"),
        ("wiki_demo.txt", "text"),
    ],
)
def test_files_of_other_tools_load_with_no_mapping(shared: Path, name: str, shape: str) -> None:
    from luthier.data.convert import convert
    from luthier.data.formats import Bad
    from luthier.data.sources import read

    bad = Bad()
    found = list(read(str(shared / "data" / "instructions" / name), bad=bad))
    one = detect(found[:100])
    items = [i for r in found for i in convert(r, one, bad)]
    assert one.name == shape and len(items) == len(found) > 0
    assert json.dumps(one.columns)
