"""Prompts out of data of every shape, as the ids that are generated from and the row that rewards are shown."""

from __future__ import annotations

import json

import numpy as np
import pytest

import small
from luthier.core import LuthierError
from luthier.data.formats import Bad, Record
from luthier.data.prepare import prepare
from luthier.data.prompted import convert_prompts, detect_prompts
from luthier.data.render import render_prompt
from luthier.data.rows import Form

ENCODER_DECODER = Form(kind="encoder_decoder", start=0)
USER, SYSTEM = {"role": "user", "content": "Who sews?"}, {"role": "system", "content": "Be brief."}
SAID, MORE = {"role": "assistant", "content": "A mother."}, {"role": "user", "content": "What?"}


def read(*records, columns=None, shape="auto", on_bad="fatal"):
    """The prompts of records, and what was bad."""
    rows, bad = [Record(r, f"made:{i + 1}") for i, r in enumerate(records)], Bad(on_bad)
    found = detect_prompts(rows, shape=shape, columns=columns or {})
    return [p for r in rows for p in convert_prompts(r, found, bad)], bad


def prepared(tmp_path, tokenizer, records, name="d.jsonl", **how):
    lines = records if isinstance(records, str) else "\n".join(map(json.dumps, records))
    (tmp_path / name).write_text(lines)
    said: list[str] = []
    settings = {"renders": "prompts", "max_tokens": 60, "validation_share": 0.0, "say": said.append, **how}
    return prepare([str(tmp_path / name)], tokenizer, **settings), said


SHAPES = {
    "prompt and completion": ({"prompt": "Who sews?", "completion": "A mother."}, [USER], ("A mother.",)),
    "several answers": ({"prompt": "Who sews?", "completion": ["A mother.", "She."]}, [USER], ("A mother.", "She.")),
    "question and answer": ({"question": "Who sews?", "answer": "A mother.", "system": "Be brief."}, [SYSTEM, USER], ("A mother.",)),
    "an answer that is empty": ({"prompt": "Who sews?", "completion": ""}, [USER], ()),
    "messages": ({"messages": [USER, SAID]}, [USER], ("A mother.",)),
    "several turns": ({"messages": [USER, SAID, MORE, {"role": "assistant", "content": "A shirt."}]}, [USER, SAID, MORE], ("A shirt.",)),
    "messages that wait": ({"messages": [USER]}, [USER], ()),
    "messages that wait again": ({"messages": [SYSTEM, USER, SAID, MORE]}, [SYSTEM, USER, SAID, MORE], ()),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Who sews?"}, {"from": "gpt", "value": "A mother."}]}, [USER], ("A mother.",)),
    "sharegpt that waits": ({"conversations": [{"from": "human", "value": "Who sews?"}]}, [USER], ()),
    "alpaca": ({"instruction": "Who", "input": "sews?", "output": "A mother."}, [{"role": "user", "content": "Who\nsews?"}], ("A mother.",)),
    "alpaca without answers": ({"instruction": "Who", "input": "sews?"}, [{"role": "user", "content": "Who\nsews?"}], ()),
    "a pair": ({"prompt": "Who sews?", "chosen": "A mother.", "rejected": "No."}, [USER], ("A mother.",)),
    "a tie": ({"prompt": "Who sews?", "chosen": "She.", "rejected": "A mother.", "tie": True}, [USER], ("She.", "A mother.")),
    "a pair of conversations": ({"chosen": [USER, SAID], "rejected": [USER, {"role": "assistant", "content": "No."}]}, [USER], ("A mother.",)),
    "a ranking": ({"prompt": "Who sews?", "ranked": [["A mother.", "She."], "No."]}, [USER], ("A mother.", "She.")),
    "a good answer": ({"prompt": "Who sews?", "completion": "A mother.", "label": True}, [USER], ("A mother.",)),
    "a bad answer": ({"prompt": "Who sews?", "completion": "No.", "label": False}, [USER], ()),
    "a prompt alone": ({"prompt": "Who sews?", "topic": "needles"}, [USER], ()),
    "a prompt with a system": ({"prompt": "Who sews?", "system": "Be brief."}, [SYSTEM, USER], ()),
    "a question alone": ({"question": "Who sews?"}, [USER], ()),
    "a conversation that waits": ({"prompt": [SYSTEM, USER, SAID, MORE]}, [SYSTEM, USER, SAID, MORE], ()),
    "marked turns": ({"prompt": "\n\nHuman: Who sews?\n\nAssistant: A mother.\n\nHuman: What?\n\nAssistant:"}, [USER, SAID, MORE], ()),
}


@pytest.mark.parametrize(("record", "messages", "references"), list(SHAPES.values()), ids=list(SHAPES))
def test_every_shape_gives_its_prompt_and_its_references(record, messages, references):
    (found,), _ = read(record)
    assert found.messages == messages and found.references == references and not found.text and found.where == "made:1"
    row = found.task_row()
    assert row["prompt"] == messages and row["refs"] == list(references) and {**row, "prompt": 0} == {**record, "prompt": 0, "tools": None, "refs": row["refs"]}


def test_a_tree_gives_every_question_that_was_ranked():
    answer = lambda text, rank, *replies: {"text": text, "role": "assistant", "rank": rank, "replies": list(replies)}  # noqa: E731
    follow = {"text": "What?", "role": "prompter", "replies": [answer("A shirt.", 0), answer("No.", 1)]}
    tree = {"prompt": {"text": "Who sews?", "role": "prompter", "replies": [answer("A mother.", 0, follow), answer("Nobody.", 1)]}}
    first, second = read(tree)[0]
    assert first.messages == [USER] and first.references == ("A mother.",)
    assert second.messages == [USER, SAID, MORE] and second.references == ("A shirt.",)


def test_columns_are_found_by_the_users_names():
    record = {"q": "Who sews?", "better": "A mother.", "worse": "No.", "prompt": "not this"}
    (found,), _ = read(record, columns={"prompt": "q"})
    assert found.messages == [USER] and found.references == ()
    (found,), _ = read(record, columns={"prompt": "q", "chosen": "better", "rejected": "worse"})
    assert found.messages == [USER] and found.references == ("A mother.",)
    (found,), _ = read(record, columns={"prompt": "q", "completion": "better"})
    assert found.messages == [USER] and found.references == ("A mother.",)
    with pytest.raises(LuthierError, match=r"made:1: no column 'Q' \(wanted for 'prompt'\). Columns found: q, better"):
        read(record, columns={"prompt": "Q"})
    with pytest.raises(LuthierError, match="cannot tell the shape of the data. Columns found: a, b"):
        read({"a": "1", "b": "2"})


def test_what_is_no_prompt_is_a_bad_row():
    found, bad = read({"prompt": "Who sews?"}, {"prompt": " "}, {"prompt": None}, {"prompt": [USER, SAID]}, {"prompt": [{"who": "?"}]}, on_bad="skip")
    assert len(found) == 1 and bad.count == 4
    assert "is no prompt: a text or a list of messages is accepted" in bad.rows[0][1] and "ends with an answer" in bad.rows[2][1]
    with pytest.raises(LuthierError, match="made:2: column 'prompt' is no prompt"):
        read({"prompt": "a"}, {"prompt": 3}, on_bad="stop")


def test_tools_and_the_record_come_along():
    tools = [{"type": "function", "function": {"name": "sew"}}]
    (found,), _ = read({"prompt": [USER], "tools": json.dumps(tools), "level": 3})
    assert found.tools == tools and found.task_row()["tools"] == tools and found.task_row()["level"] == 3


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_what_is_generated_from(tmp_path, chatml):
    data, said = prepared(tmp_path, chatml, [{"messages": [SYSTEM, USER, SAID]}, {"messages": [MORE, SAID]}])
    for row, messages in zip(data.train, ([SYSTEM, USER], [MORE]), strict=True):
        assert row.ids.tolist() == render_prompt(messages, chatml) and row.ids.dtype == np.int32 and not row.train.any()
        assert chatml.decode(row.ids).endswith("<|im_start|>assistant\n") and row.extras["task"]["refs"] == ["A mother."]
    assert any("2 rows" in s and "prompts to answer" in s for s in said) and any("chat template" in s for s in said)


def test_a_long_prompt_is_dropped_and_counted_not_cut(tmp_path, chatml):
    data, said = prepared(tmp_path, chatml, [{"prompt": "Who sews?"}, {"prompt": "Who? " * 60}], max_tokens=40)
    assert [r.where for r in data.train] == [f"{tmp_path}/d.jsonl:1"] and data.facts["dropped_long"] == 1
    assert "1 records longer than 40 tokens dropped" in said


def test_equal_prompts_are_one_with_the_references_of_all(tmp_path, chatml):
    records = [{"mr": "name[A]", "ref": "It is A."}, {"mr": "name[B]", "ref": "B."}, {"mr": "name[A]", "ref": "A it is."}, {"mr": "name[A]", "ref": "It is A."}]
    data, said = prepared(tmp_path, chatml, records)
    assert [r.extras["task"]["refs"] for r in data.train] == [["It is A.", "A it is."], ["B."]]
    assert any("rows repeat a prompt" in s and "(2 rows)" in s for s in said)


def test_held_out_prompts_are_others_than_those_that_are_trained(tmp_path, chatml):
    records = [{"prompt": f"Who sews {i % 10}?", "completion": f"She {i}."} for i in range(40)]
    data, _ = prepared(tmp_path, chatml, records, validation_share=0.3)
    asked = lambda rows: {r.extras["task"]["prompt"][0]["content"] for r in rows}  # noqa: E731
    assert len(data.train) == 7 and len(data.validation) == 3 and not asked(data.train) & asked(data.validation)
    assert [r.references for r in data.validation_records] == [r.extras["task"]["refs"] for r in data.validation]
    assert all(len(r.references) == 4 for r in data.validation_records)
    again, _ = prepared(tmp_path, chatml, records, validation_share=0.3)
    assert asked(again.validation) == asked(data.validation)
    other, _ = prepared(tmp_path, chatml, records, validation_share=0.3, seed=5)
    assert asked(other.validation) != asked(data.validation)


def test_a_held_out_file_that_asks_what_is_trained_is_told(tmp_path, chatml):
    (tmp_path / "held.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in ("Who sews?", "Who else?")))
    data, said = prepared(tmp_path, chatml, [{"prompt": "Who sews?", "completion": "She."}], validation=[str(tmp_path / "held.jsonl")])
    assert len(data.validation) == 2 and data.facts["validation"]["prompts_also_trained"] == 1
    assert any("1 of 2 validation prompts are also in the training data" in s for s in said)


TEXT = "One day a little girl found a needle in her room.\nShe went on.\n\n  \nNo.\n\nHer mother could sew a button on her shirt, and it is not far."


def test_raw_text_gives_the_beginnings_of_its_paragraphs(tmp_path, with_bos):
    data, said = prepared(tmp_path, with_bos, TEXT, name="d.txt", beginning=6)
    assert [len(r) for r in data.train] == [6, 6] and all(r.ids[0] == with_bos.bos_token_id for r in data.train)
    paragraphs = [p for p in TEXT.split("\n\n") if len(p) > 10]
    for row, paragraph in zip(data.train, paragraphs, strict=True):
        begun = row.extras["task"]["prompt"]
        assert isinstance(begun, str) and paragraph.startswith(begun) and 0 < len(begun) < len(paragraph) and row.extras["task"]["refs"] == []
    assert any("paragraphs shorter than objective.beginning=6 tokens give no prompt (1 rows)" in s for s in said)
    with pytest.raises(LuthierError, match="paragraphs shorter than objective.beginning=200"):
        prepared(tmp_path, with_bos, TEXT, name="d.txt", beginning=200)


def test_an_encoder_decoder_reads_the_prompt_as_its_source(tmp_path):
    tokenizer = small.with_sentinels()
    data, _ = prepared(tmp_path, tokenizer, [{"prompt": "What a fine story", "completion": "It is slow."}], form=ENCODER_DECODER)
    (row,) = data.train
    assert row.ids.tolist() == render_prompt([{"role": "user", "content": "What a fine story"}], tokenizer, kind="encoder_decoder")
    assert row.ids[-1] == tokenizer.eos_token_id and row.extras["task"]["refs"] == ["It is slow."]
    data, _ = prepared(tmp_path, tokenizer, TEXT, name="d.txt", form=ENCODER_DECODER, beginning=6)
    assert [len(r) for r in data.train] == [7, 7] and all(r.ids[-1] == tokenizer.eos_token_id for r in data.train)


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tmp_path, chatml):
    chatml = type(chatml)(tokenizer_object=chatml.backend_tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    chatml.chat_template = "{% if messages|length > 2 %}{{ raise_exception('too much') }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    records = [{"messages": [USER]}, {"messages": [USER, SAID, MORE]}]
    with pytest.raises(LuthierError, match=r"d.jsonl:2: the chat template refuses this conversation"):
        prepared(tmp_path, chatml, records)
    data, _ = prepared(tmp_path, chatml, records, on_bad_row="skip")
    assert len(data.train) == 1 and data.facts["bad_rows"] == 1
