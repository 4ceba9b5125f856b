"""Every shape becomes the same normal form, and rows that teach nothing are reported."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.core import LuthierError
from luthier.data.convert import convert
from luthier.data.formats import Bad, Record
from luthier.data.shapes import Chat, Document, detect


def one(row: dict[str, Any], **how: Any) -> Chat:
    chats = several(row, **how)
    assert len(chats) == 1 and isinstance(chats[0], Chat)
    return chats[0]


def several(row: dict[str, Any], **how: Any) -> list[Chat | Document]:
    record = Record(row, "f.jsonl:7")
    return convert(record, detect([record], **how), Bad())


def said(chat: Chat) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in chat.messages]


PAIR = [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "", "input": "a", "output": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]},
        {"prompt": "a", "completion": "b<|endoftext|>"},
    ],
)
def test_one_question_and_one_answer_are_the_same_chat_in_every_shape(row: dict) -> None:
    assert said(one(row)) == PAIR


def test_numbers_are_read_as_text_and_the_record_is_kept() -> None:
    row = {"question": "how many?", "answer": 72, "id": 5}
    chat = one(row)
    assert said(chat)[1] == ("assistant", "72")
    assert chat.extras == row and chat.where == "f.jsonl:7"


def test_several_answers_become_one_chat_each() -> None:
    assert [said(c)[1][1] for c in several({"mr": "a", "refs": ["b", "c"]})] == ["b", "c"]  # type: ignore[arg-type]


def test_alpaca_with_input_system_and_history() -> None:
    chat = one({"instruction": "a", "input": "i", "output": "b", "system": "s", "history": [["q1", "a1"]]})
    assert said(chat) == [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "a\ni"), ("assistant", "b")]


def test_what_stands_in_a_prompt_is_given_and_not_learned() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    chat = one({"prompt": turns, "completion": "d"})
    assert chat.untrained == {1}


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train"])
def test_a_turn_of_weight_zero_is_not_learned(key: str) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", key: 0}, {"from": "human", "value": "c"}, {"from": "gpt", "value": "d", key: 1.0}]
    assert one({"conversations": turns, "system": "s"}).untrained == {2}


def test_sharegpt_tools_become_tool_calls() -> None:
    chat = one(
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "f", "arguments": "{\\"x\\": 1}"}'},
                {"from": "observation", "value": "r"},
                {"from": "gpt", "value": "b"},
            ],
            "tools": '[{"name": "f", "parameters": {}}]',
        }
    )
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert chat.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_a_document_loses_its_end_marker() -> None:
    assert several({"text": "a\n<|endoftext|>\n"}) == [Document("a\n", "f.jsonl:7", {"text": "a\n<|endoftext|>\n"})]


def turns(*roles: str, content: Any = "x") -> dict[str, Any]:
    return {"messages": [{"role": r, "content": content} for r in roles]}


BAD = [
    ({"prompt": "a", "completion": " \n"}, "column 'completion' is empty: there is nothing to learn"),
    ({"prompt": "a", "completion": "<|endoftext|>"}, "is empty"),
    ({"prompt": "a", "completion": None}, "column 'completion' is null"),
    ({"prompt": "a", "completion": True}, "is true or false; text is accepted"),
    ({"prompt": {"x": 1}, "completion": "b"}, "column 'prompt' is an object; text is accepted"),
    ({"mr": "a", "refs": []}, "column 'refs' is an empty list"),
    ({"instruction": "a", "output": ""}, "column 'output' is empty"),
    ({"instruction": "a", "output": "b", "history": ["x"]}, "history[0] is not a pair"),
    ({"text": "  "}, "column 'text' is empty"),
    ({"messages": []}, "an empty list"),
    ({"messages": ["hi"]}, "message 1 is of the type str"),
    (turns("user", "user", "assistant"), "message 2: the role user comes after user"),
    (turns("assistant"), "message 1: the role assistant comes first"),
    (turns("user", "assistant", "assistant"), "message 3: the role assistant comes after assistant"),
    (turns("user", "system", "assistant"), "message 2: the role system comes only first"),
    (turns("user"), "no assistant message to learn from"),
    (turns("user", "tool", "assistant"), "message 2: the role tool comes after user"),
    (turns("user", "bot"), "message 2 has the role 'bot'; accepted: system"),
    (turns("user", "assistant", content=None), "message 1 is null"),
    (turns("user", "assistant", content=[{"type": "image", "url": "u"}]), "a part of the type 'image'; only text"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}, "the weight 0.5"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}, "no assistant message to learn"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"x": 1}]}]}, "a tool call is"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{"}]}, "message 2: not JSON"),
    ({"messages": turns("user", "assistant")["messages"], "tools": "[{"}, "tools: not JSON"),
    ({"messages": turns("system", "user", "assistant")["messages"], "system": "s"}, "two system prompts"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_row_that_cannot_be_learned_is_reported_with_its_place(row: dict, reason: str) -> None:
    with pytest.raises(LuthierError) as caught:
        several(row)
    assert "f.jsonl:7" in str(caught.value) and reason in str(caught.value)


def test_a_bad_row_can_be_skipped() -> None:
    good = Record({"prompt": "a", "completion": "b"}, "f.jsonl:1")
    bad = Bad("skip")
    assert convert(Record({"prompt": "a"}, "f.jsonl:2"), detect([good]), bad) == []
    assert bad.rows == [("f.jsonl:2", "column 'completion' is missing (columns found: prompt)")]
