"""What is asked, out of data of any shape, and the answers that come along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.core import LuthierError
from luthier.data.questions import Question, asked, read_questions, spoken

USER = {"role": "user", "content": "Is it cheap?"}
ANSWER = {"role": "assistant", "content": "Yes."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "price", "parameters": {}}}]


def read(path: Path, *rows: Any, name: str = "a.jsonl", **columns: str) -> list[Question]:
    (path / name).write_text("\n".join(json.dumps(r) if isinstance(r, dict) else r for r in rows))
    return read_questions(str(path / name), columns=columns)[0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Is it cheap?"},
        {"prompt": [USER]},
        {"question": "Is it cheap?", "id": 3},
        {"question": "Is it cheap?", "answer": "Yes."},
        {"prompt": "Is it cheap?", "completion": ""},
        {"prompt": "Is it cheap?", "refs": ["Yes.", "No."], "completion": ["Yes.", "No."]},
        {"instruction": "Is it cheap?", "output": "Yes."},
        {"instruction": "Is it cheap?"},
        {"messages": [USER]},
        {"messages": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "Is it cheap?"}]},
        {"prompt": "\n\nHuman: Is it cheap?\n\nAssistant:"},
        {"mr": "Is it cheap?", "ref": "Yes."},
        {"prompt": "Is it cheap?", "completion": "Yes.", "label": True},
        {"messages": [USER, ANSWER], "kto_tag": False},
        {"prompt": "Is it cheap?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Is it cheap?", "answers": ["Yes.", "No."]},
    ],
)
def test_every_shape_asks_the_same(tmp_path: Path, row: dict[str, Any]) -> None:
    (question,) = read(tmp_path, row)
    assert question.messages == [USER] and question.prompt == "Is it cheap?" and question.where.endswith("a.jsonl:1")
    assert question.key == asked("Is it cheap?").key


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Is it", "input": "cheap?"}, [{**USER, "content": "Is it\ncheap?"}]),
        ({"system": "Be brief.", "prompt": "Is it cheap?"}, [SYSTEM, USER]),
        ({"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}, [SYSTEM, USER, ANSWER, USER]),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER]),
        ({"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, {**ANSWER, "content": "No."}]}, [SYSTEM, USER]),
        ({"prompt": "\n\nHuman: Is it cheap?\n\nAssistant: Yes.\n\nHuman: Is it cheap?\n\nAssistant:"}, [USER, ANSWER, USER]),
        ({"prompt": [SYSTEM, USER], "answers": ["a", "b"]}, [SYSTEM, USER]),
    ],
)
def test_what_belongs_to_a_question_comes_along(tmp_path: Path, row: dict[str, Any], messages: list[Any]) -> None:
    (question,) = read(tmp_path, row)
    assert question.messages == messages
    assert asked(question.prompt).key == question.key  # written and read again it is the same


def test_tools_belong_to_a_question(tmp_path: Path) -> None:
    (question,) = read(tmp_path, {"messages": [USER], "tools": TOOLS})
    assert question.tools == TOOLS and question.key != asked("Is it cheap?").key == asked([USER]).key
    assert read(tmp_path, {"prompt": "Is it cheap?", "tools": TOOLS})[0].tools == TOOLS


def test_calls_of_tools_are_spoken_too() -> None:
    call = {"type": "function", "function": {"name": "price", "arguments": {"of": "tea"}}}
    assert spoken({"role": "assistant", "content": "", "tool_calls": [call]}) == '{"name": "price", "arguments": {"of": "tea"}}'
    assert spoken(USER) == "Is it cheap?"


def test_a_text_that_would_be_read_as_turns_is_written_as_a_message() -> None:
    odd = Question([{"role": "user", "content": "Human: hello"}])
    assert odd.prompt == odd.messages and asked("plain").prompt == "plain"


def test_lines_of_a_text_file_are_prompts(tmp_path: Path) -> None:
    found = read(tmp_path, "Is it cheap?", "", "  Where is it? ", "Is it cheap?", name="a.txt")
    assert [q.prompt for q in found] == ["Is it cheap?", "Where is it?"] and found[1].where.endswith("a.txt:3")


def test_answers_and_how_they_were_judged_come_along_and_rows_of_one_question_are_joined(tmp_path: Path) -> None:
    ranked = {"prompt": "q", "ranked": ["a", ["b", "c"]]}
    (question,) = read(tmp_path, ranked, name="r.jsonl")
    assert question.answers == ("a", "b", "c") and question.better == ((0, 1), (0, 2))
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "a"}, {"prompt": "p", "chosen": "x", "rejected": "y"}]
    found, notes = read_questions(str(_written(tmp_path / "p.jsonl", pairs)))
    assert [(q.answers, q.better) for q in found] == [(("a", "b", "c"), ((0, 1), (2, 0))), (("x", "y"), ((0, 1),))]
    assert notes == ["1 rows repeat a question; it is asked once, about all of their answers"]


def _written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_columns_can_be_named(tmp_path: Path) -> None:
    (question,) = read(tmp_path, {"ask": "q", "text": "t"}, prompt="ask")
    assert question.prompt == "q"
    (question,) = read(tmp_path, {"ask": "q", "said": ["a", "b"]}, prompt="ask", answers="said")
    assert question.prompt == "q" and question.answers == ("a", "b")
    with pytest.raises(LuthierError, match="a.jsonl:1: no column 'asked'.*Columns found: ask"):
        read(tmp_path, {"ask": "q"}, prompt="asked")
    with pytest.raises(LuthierError, match="answers need a prompt, and no column 'prompt' is here.*Columns found: ask, answers"):
        read(tmp_path, {"ask": "q", "answers": ["a", "b"]})


def test_bad_rows_are_skipped_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "chosen": "a", "rejected": ""}\n{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "o"}\n')
    found, notes = read_questions(str(path))
    assert [q.prompt for q in found] == ["p"] and notes[0].startswith("2 bad rows skipped; the first: ") and "is empty" in notes[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "Once upon a time."}, "raw text.*which asks nothing.*--column prompt=NAME"),
        ({"headline": "a", "body": "b"}, "cannot tell the shape.*Columns found: headline, body"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "holds no question; 1 bad rows skipped"),
        ({"prompt": " "}, "holds no question; 1 bad rows skipped; the first: .*a.jsonl:1: column 'prompt' is no prompt"),
        ({"prompt": "", "answers": ["a", "b"]}, "1 bad rows skipped; the first: .*column 'prompt' is no prompt"),
        ({"prompt": "q", "answers": [1, 2]}, "column 'answers' is no list of texts"),
    ],
)
def test_what_asks_nothing_is_refused_in_a_sentence(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(LuthierError, match=reason):
        read(tmp_path, row)


@pytest.mark.parametrize(("file", "n"), [
    ("e2e/dev_multiref.jsonl", 547), ("instructions/alpaca_en_demo.json", 985), ("instructions/v1_sft_demo.jsonl", 498), ("instructions/identity.json", 89),
    ("instructions/glaive_toolcall_en_demo.json", 264), ("preferences/gsm8k_pairs.jsonl", 1163), ("preferences/hh_harmless_test_pairs.jsonl", 2301),
    ("preferences/dpo_en_demo.json", 295), ("preferences/kto_en_demo.json", 297),
])  # fmt: skip
def test_real_data_is_asked(file: str, n: int, shared: Path) -> None:
    found, _ = read_questions(str(shared / "data" / file))
    assert len(found) == n and all(q.messages[-1]["role"] in ("user", "tool") for q in found)
    assert all(asked(q.prompt, q.tools).key == q.key for q in found)
