"""Judged answers as rows: one row a record, both answers in it, what is marked, what is cut, what is shown."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import ranked
import small
import tiny
from luthier.core import LuthierError, Row, examples_of, join
from luthier.data.feed import Batches
from luthier.data.prepare import Prepared, prepare
from luthier.data.preview import show
from luthier.data.rankings import with_others
from luthier.data.rows import Form, sides
from luthier.objectives.dpo import Objective as Dpo

BERT, T5 = Form("encoder", token_types=True), Form("encoder_decoder", start=0)


def pairs(n: int = 40, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Is house {i} cheap?", "chosen": f"Yes, number {i} is.", "rejected": "Go away."} | more for i in range(n)]


def prepared(path: Path, rows: list[dict[str, Any]], tokenizer: Any, renders: str = "pairs", said: list[str] | None = None, **how: Any) -> Prepared:
    (path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    say = (lambda _: None) if said is None else said.append
    return prepare([str(path / "a.jsonl")], tokenizer, renders=renders, **{"max_tokens": 256, "say": say} | how)  # type: ignore[arg-type]


def text(tokenizer: Any, row: Row, which: Any = None) -> str:
    return tokenizer.decode(row.ids if which is None else row.ids[which], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_joined_examples_come_apart_as_they_were() -> None:
    given = [
        Row(np.arange(3 + i, dtype=np.int32), np.arange(3 + i) > 0, "f:1", {"source": np.arange(i + 1, dtype=np.int32), "inputs": {"t": np.full(3 + i, i)}})
        for i in range(3)
    ]
    whole = join(given, ranks=(0, 1, 2))
    assert len(whole) == 12 and sides(whole) == (12, 6) and whole.extras["ranks"] == (0, 1, 2)
    for a, b in zip(given, examples_of(whole), strict=True):
        assert a.ids.tolist() == b.ids.tolist() and a.train.tolist() == b.train.tolist() and b.where == "f:1"
        assert a.extras["source"].tolist() == b.extras["source"].tolist() and a.extras["inputs"]["t"].tolist() == b.extras["inputs"]["t"].tolist()
    assert examples_of(given[0]) == [given[0]] and examples_of(Row(given[0].ids, given[0].train, extras={"lengths": [1, 2]}))[0].extras["lengths"] == [1, 2]


def test_the_answers_of_a_record_are_one_row_and_theirs_are_the_marked_tokens(tmp_path: Path, chatml: Any) -> None:
    data = prepared(tmp_path, pairs(), chatml)
    assert len(data.train) + len(data.validation) == 40 and len(data.validation) == 2
    for row in data.train:
        better, worse = examples_of(row)
        i = text(chatml, better).split("house ")[1].split(" ")[0]
        assert text(chatml, better, better.train) == f"Yes, number {i} is.<|im_end|>" and text(chatml, worse, worse.train) == "Go away.<|im_end|>"
        assert text(chatml, better, ~better.train) == text(chatml, worse, ~worse.train)
    held = data.validation_records[0]
    assert held.references == [held.extras["chosen"]] and held.extras["answers"] == [held.extras["chosen"], "Go away."] and held.extras["ranks"] == [0, 1]


def test_a_reward_is_read_at_the_last_token_and_an_encoders_at_the_first(tmp_path: Path, chatml: Any) -> None:
    for row in prepared(tmp_path, pairs(), chatml, "ranked").train:
        assert all(np.flatnonzero(e.train).tolist() == [len(e) - 1] and text(chatml, e, e.train) == "<|im_end|>" for e in examples_of(row))
    tokenizer = small.wordpiece()
    for row in prepared(tmp_path, pairs(), tokenizer, "ranked", form=BERT, max_tokens=64).train:
        better, worse = examples_of(row)
        assert np.flatnonzero(better.train).tolist() == [0] and better.ids[0] == tokenizer.cls_token_id
        types = better.extras["inputs"]["token_type_ids"]
        assert text(tokenizer, better, types == 0).startswith("[CLS] is house") and "yes" in text(tokenizer, better, types == 1)
        assert text(tokenizer, worse, worse.extras["inputs"]["token_type_ids"] == 1).startswith("go away")


def test_an_encoder_decoder_reads_answers_for_a_reward_and_writes_them_for_dpo(tmp_path: Path) -> None:
    tokenizer = small.with_sentinels()
    for row in prepared(tmp_path, pairs(), tokenizer, "ranked", form=T5, max_tokens=200).train:
        for e, said in zip(examples_of(row), ("Yes, number", "Go away."), strict=True):
            assert e.ids.tolist() == [0] and said in tokenizer.decode(e.extras["source"]) and "Is house" in tokenizer.decode(e.extras["source"])
    for row in prepared(tmp_path, pairs(), tokenizer, "pairs", form=T5, max_tokens=200).train:
        better, worse = examples_of(row)
        assert better.extras["source"].tolist() == worse.extras["source"].tolist() and "Is house" in tokenizer.decode(better.extras["source"])
        assert tokenizer.decode(worse.ids[worse.train]) == "Go away.</s>" and not worse.train[0]


def test_what_is_too_long_loses_the_same_of_its_prompt_in_all_answers(tmp_path: Path, chatml: Any) -> None:
    long = [{"prompt": "one two three " * 60, "chosen": "four " * 12, "rejected": "No."}, *pairs(5)]
    data = prepared(tmp_path, long, chatml, max_tokens=100, validation_share=0.0)
    rows = [examples_of(r) for r in data.train if "three" in text(chatml, r)]
    assert len(rows) == 1 and data.facts["truncated"] == 1 and data.facts["longest"] == 100
    better, worse = rows[0]
    assert len(better) == 100 and text(chatml, better, ~better.train) == text(chatml, worse, ~worse.train)
    assert text(chatml, better, better.train) == "four " * 12 + "<|im_end|>" and text(chatml, worse, worse.train) == "No.<|im_end|>"
    short = prepared(tmp_path, long, chatml, max_tokens=100, over_length="drop", validation_share=0.0)
    assert short.facts["dropped_long"] == 1 and len(short.train) == 5
    with pytest.raises(LuthierError, match="over_length=split is for raw text"):
        prepared(tmp_path, long, chatml, over_length="split")


def test_equal_answers_and_ties_are_left_out_where_they_teach_nothing(tmp_path: Path, chatml: Any) -> None:
    odd = [{"prompt": "q", "chosen": "same", "rejected": "same"}, {"prompt": "r", "chosen": "a", "rejected": "b", "tie": True}, *pairs(5, tie=False)]
    said: list[str] = []
    assert len(prepared(tmp_path, odd, chatml, validation_share=0.0, said=said).train) == 5
    assert any("nothing to compare" in line for line in said) and any("all answers of a record are tied" in line for line in said)
    data = prepared(tmp_path, odd, chatml, "ranked", validation_share=0.0, said=said)
    assert len(data.train) == 6 and any("1 of them ties" in line for line in said)


def test_the_length_that_would_win_is_said(tmp_path: Path, chatml: Any) -> None:
    said: list[str] = []
    prepared(tmp_path, pairs(), chatml, "ranked", said=said)
    assert any("always preferring the longer answer would be right on 100.0% of the pairs" in line for line in said)
    shorter = [{"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in pairs()]
    prepared(tmp_path, shorter, chatml, "ranked", said=said)
    assert any("always preferring the shorter answer would be right on 100.0%" in line for line in said)


def test_answers_to_one_prompt_stay_on_one_side_of_the_division(tmp_path: Path, chatml: Any) -> None:
    rows = [{**r, "prompt": f"Is house {i // 4} cheap?"} for i, r in enumerate(pairs(80))]
    data = prepared(tmp_path, rows, chatml, validation_share=0.3)
    prompt = lambda row: text(chatml, examples_of(row)[0]).split("?")[0]  # noqa: E731
    assert data.validation and not {prompt(r) for r in data.train} & {prompt(r) for r in data.validation}
    assert len(data.validation_records) == len(data.validation)
    for row, record in zip(data.validation, data.validation_records, strict=True):
        assert record.extras["chosen"] in text(chatml, row)


def test_every_judged_answer_has_one_to_another_prompt_beside_it(tmp_path: Path, chatml: Any) -> None:
    rows = [{"prompt": f"Is house {i // 2} cheap?", "completion": f"Number {i} is.", "label": i % 3 == 0} for i in range(40)]
    data = prepared(tmp_path, rows, chatml, "judged", validation_share=0.3)
    assert data.facts["good"] + data.facts["bad"] == len(data.train)
    for row in [*data.train, *data.validation]:
        own, other = examples_of(row)
        assert text(chatml, own, ~own.train) == text(chatml, other, ~other.train)
        assert text(chatml, own, own.train) != text(chatml, other, other.train)
        house, number = text(chatml, own).split("house ")[1].split(" ")[0], text(chatml, other).split("Number ")[1].split(" ")[0]
        assert int(number) // 2 != int(house) and isinstance(row.extras["good"], bool)
    again = prepared(tmp_path, rows, chatml, "judged", validation_share=0.3)
    assert [r.ids.tolist() for r in again.train] == [r.ids.tolist() for r in data.train]
    assert [r.ids.tolist() for r in prepared(tmp_path, rows, chatml, "judged", validation_share=0.3, seed=1).train] != [r.ids.tolist() for r in data.train]
    alone = [join([tiny.row([3, 4, 5])], ranks=(), margin=0.0, good=True)]
    assert len(examples_of(with_others(alone, max_tokens=9, seed=0)[0])) == 1


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_never_part_the_answers_of_a_row(packed: bool) -> None:
    rows = ranked.rows("llama", "pairs", (2, 3, 2, 4, 2, 2, 3) * 3)
    feed = Batches(rows, Dpo().collate, pad=0, packed=packed, batch_examples=7, micro_tokens=80, epochs=1)
    steps = list(feed)
    assert len(steps) == 3 and all(sum(b.units["rankings"] for b in step) == 7 for step in steps)
    assert max(len(step) for step in steps) > 1
    for batch in (b for step in steps for b in step):
        assert batch.units["rankings"] == 1 or batch.ids.numel() <= 80 + 64  # widths are rounded up
        assert len(batch.extras["better"]) == sum(n * (n - 1) // 2 for n in np.bincount(batch.extras["row"].numpy()))


@pytest.mark.parametrize(("renders", "parts"), [
    ("pairs", ["better:", "worse:", "⟦Go away.<|im_end|>⟧", "log-probabilities are compared"]),
    ("ranked", ["better:", "worse:", "Go away.⟦<|im_end|>⟧", "score is read", "always preferring the longer"]),
    ("judged", ["bad:", "an answer to another prompt", "⟦Go away.<|im_end|>⟧", "good answers and"]),
])  # fmt: skip
def test_both_answers_are_shown_and_what_is_marked_in_them(renders: str, parts: list[str], tmp_path: Path, chatml: Any) -> None:
    data = prepared(tmp_path, pairs(), chatml, renders)
    out = io.StringIO()
    row = next(r for r in data.train if r.extras["good"] is not True)
    show([row], chatml, data.facts, Console(file=out, width=200))
    for part in parts:
        assert part in out.getvalue(), part


def test_places_of_a_ranking_are_shown(tmp_path: Path, chatml: Any) -> None:
    rows = [{"prompt": f"q {i}", "ranked": ["a", ["b", "c"], "d"]} for i in range(30)]
    data = prepared(tmp_path, rows, chatml, "ranked")
    assert data.facts["pairs"] == 6 * len(data.train) and data.facts["ties"] == len(data.train)
    out = io.StringIO()
    show(data.train[:1], chatml, data.facts, Console(file=out, width=200))
    assert "place 1 of 3:" in out.getvalue() and out.getvalue().count("place 2 of 3, tied:") == 2 and "4 answers" in out.getvalue()


def test_a_shape_of_other_data_is_refused(tmp_path: Path, chatml: Any) -> None:
    with pytest.raises(LuthierError, match="data.shape=messages: this objective reads judged answers"):
        prepared(tmp_path, pairs(), chatml, shape="messages")
