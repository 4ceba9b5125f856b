"""Conversations as source and answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import small
from luthier.core import LuthierError
from luthier.data.prepare import Prepared, prepare
from luthier.data.render import render_prompt, stop_ids
from luthier.data.rows import Form

FORM = Form(kind="encoder_decoder", start=0)
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what a film"},
    {"role": "assistant", "content": "it is slow"},
    {"role": "user", "content": "and the end"},
    {"role": "assistant", "content": "they laughed"},
]


def run(tmp_path: Path, rows: list[dict[str, Any]], **how: Any) -> Prepared:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    how = {"renders": "chat", "form": FORM, "max_tokens": 64, "validation_share": 0, "say": lambda _: None, **how}
    return prepare([str(path)], how.pop("tokenizer", None) or small.with_sentinels(), **how)


def test_a_row_is_the_answer_and_its_source_the_prompt(tmp_path: Path) -> None:
    tokenizer = small.with_sentinels()
    p = run(tmp_path, [{"prompt": "what a film", "completion": "it is slow", "source": "my own column"}])
    (row,) = p.train
    assert row.extras["source"].tolist() == tokenizer("what a film")["input_ids"] and row.extras["source"][-1] == 1
    assert row.ids.tolist() == [0, *tokenizer("it is slow")["input_ids"]] and row.ids[-1] == 1
    assert row.train.tolist() == [False] + [True] * (len(row) - 1)
    assert p.facts["tokens"] == len(row) + len(row.extras["source"]) and p.facts["trained_tokens"] == len(row) - 1


def test_every_answer_of_a_conversation_is_a_row(tmp_path: Path) -> None:
    tokenizer = small.with_sentinels()
    said = lambda p: [(tokenizer.decode(r.extras["source"]), tokenizer.decode(r.ids[1:])) for r in p.train]  # noqa: E731
    first = ("be kind\nwhat a film</s>", "it is slow</s>")
    second = ("be kind\nwhat a film\nit is slow</s>\nand the end</s>", "they laughed</s>")
    assert said(run(tmp_path, [{"messages": CHAT}])) == [first, second]
    assert said(run(tmp_path, [{"messages": CHAT}], train_on="last")) == [second]
    given = [CHAT[2] | {"weight": 0} if i == 2 else m for i, m in enumerate(CHAT)]
    assert said(run(tmp_path, [{"messages": given}])) == [second]


def test_generation_reads_what_training_read(tmp_path: Path) -> None:
    for template in (None, "chatml", "alpaca"):
        tokenizer = small.with_sentinels()
        p = run(tmp_path, [{"messages": CHAT}], tokenizer=tokenizer, template=template, train_on="last", max_tokens=512)
        assert render_prompt(CHAT[:-1], tokenizer, template, kind="encoder_decoder") == p.train[0].extras["source"].tolist()
        assert stop_ids(tokenizer, template, kind="encoder_decoder") == [1]


def test_each_side_is_cut_at_its_end(tmp_path: Path) -> None:
    rows = [{"prompt": "what a film " * 30, "completion": "it is slow"}, {"prompt": "what", "completion": "it is slow " * 30}]
    p = run(tmp_path, rows, max_tokens=20)
    first, second = p.train
    assert len(first.extras["source"]) == 20 and first.extras["source"][-1] == 1 and first.ids[-1] == 1
    assert len(second) == 20 and second.ids[-1] != 1  # it does not end here, so no end is taught
    assert p.facts["truncated"] == 2 and p.facts["cut_responses"] == 1
    with pytest.raises(LuthierError, match="no trained token is left of 2 records. 2 longer than max_tokens=20"):
        run(tmp_path, rows, max_tokens=20, over_length="drop")
