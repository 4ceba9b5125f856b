"""From sources to rows: what is held out, what is counted, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.core import LuthierError, Row
from luthier.data.prepare import Prepared, prepare


def jsonl(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / name)


def run(source: str | list[str], tokenizer: Any, **how: Any) -> Prepared:
    sources = [source] if isinstance(source, str) else source
    return prepare(sources, tokenizer, **{"renders": "chat", "max_tokens": 256, "say": lambda _: None, **how})


PAIRS = [{"prompt": f"question {i // 3}", "completion": f"answer {i}"} for i in range(300)]  # every prompt three times


def wheres(rows: list[Row]) -> set[str]:
    return {r.where for r in rows}


def test_equal_prompts_are_held_out_together_or_not_at_all(tmp_path: Path, tokenizer: Any) -> None:
    got = run(jsonl(tmp_path, "a.jsonl", PAIRS), tokenizer, validation_share=0.1)
    prompt = lambda rows: {r.extras["prompt"] for r in rows}  # noqa: E731
    assert not prompt(got.train) & prompt(got.validation)
    assert len(got.validation) == 30 and len(got.train) == 270
    assert len(got.validation_records) == 10
    for held in got.validation_records:  # all answers the data has are references
        i = int(held.prompt[0]["content"].split()[1])
        assert held.references == [f"answer {3 * i + k}" for k in range(3)]
        assert held.extras == PAIRS[3 * i]


def test_the_division_depends_on_the_seed_and_not_on_the_order_of_the_rows(tmp_path: Path, tokenizer: Any) -> None:
    one = jsonl(tmp_path, "a.jsonl", PAIRS)
    other = jsonl(tmp_path, "b.jsonl", PAIRS[::-1])
    held = lambda source, seed: {r.extras["completion"] for r in run(source, tokenizer, seed=seed).validation}  # noqa: E731
    assert held(one, 0) == held(one, 0) == held(other, 0)
    assert held(one, 0) != held(one, 1)


def test_the_held_out_rows_are_bounded(tmp_path: Path, tokenizer: Any) -> None:
    got = run(jsonl(tmp_path, "a.jsonl", PAIRS), tokenizer, validation_share=0.5, validation_rows=12)
    assert len(got.validation) == 12 and len(got.train) == 288
    none = run(jsonl(tmp_path, "a.jsonl", PAIRS), tokenizer, validation_share=0)
    assert none.validation == [] and len(none.train) == 300


def test_one_row_is_trained_and_not_held_out(tmp_path: Path, tokenizer: Any) -> None:
    got = run(jsonl(tmp_path, "a.jsonl", PAIRS[:1]), tokenizer, validation_share=0.5)
    assert len(got.train) == 1 and got.validation == []


def test_a_named_validation_file_is_used_and_what_it_shares_with_training_is_said(tmp_path: Path, tokenizer: Any) -> None:
    train, valid = jsonl(tmp_path, "a.jsonl", PAIRS[:60]), jsonl(tmp_path, "v.jsonl", PAIRS[57:66])
    said: list[str] = []
    got = run(train, tokenizer, validation=[valid], say=said.append)
    assert len(got.train) == 60 and len(got.validation) == 9
    assert got.facts["validation"]["prompts_also_trained"] == 1
    assert any("1 of 3 validation prompts are also in the training data" in s for s in said)


def test_a_folder_brings_its_own_validation_file(tmp_path: Path, tokenizer: Any) -> None:
    jsonl(tmp_path, "train.jsonl", PAIRS[:30])
    jsonl(tmp_path, "valid.jsonl", PAIRS[30:36])
    jsonl(tmp_path, "test.jsonl", PAIRS[36:39])
    got = run(str(tmp_path), tokenizer)
    assert (len(got.train), len(got.validation)) == (30, 6)


def test_few_long_documents_give_the_end_of_one(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "book.txt").write_text("She said so. " * 2000)
    got = run(str(tmp_path / "book.txt"), tokenizer, renders="text", max_tokens=64, validation_share=0.1)
    whole = run(str(tmp_path / "book.txt"), tokenizer, renders="text", max_tokens=64, validation_share=0)
    assert len(got.train) + len(got.validation) == len(whole.train)
    assert abs(len(got.validation) / len(whole.train) - 0.1) < 0.01
    assert np.array_equal(got.validation[-1].ids, whole.train[-1].ids)
    assert got.validation_records == []


def test_equal_documents_are_on_one_side(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"document {i % 50}"} for i in range(150)]
    got = run(jsonl(tmp_path, "a.jsonl", rows), tokenizer, renders="text", validation_share=0.2)
    text = lambda rows: {tokenizer.decode(r.ids) for r in rows}  # noqa: E731
    assert got.validation and not text(got.train) & text(got.validation)


def test_text_for_an_objective_that_learns_answers_is_refused_with_the_way_out(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(LuthierError, match=r"this is raw text.*Set objective: text"):
        run(jsonl(tmp_path, "a.jsonl", [{"text": "a"}]), tokenizer)


def test_a_conversation_can_be_learned_as_text(tmp_path: Path, chatml: Any) -> None:
    got = run(jsonl(tmp_path, "a.jsonl", PAIRS[:1]), chatml, renders="text", validation_share=0)
    assert chatml.decode(got.train[0].ids) == "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\nanswer 0<|im_end|>\n"
    assert got.train[0].train.tolist() == [False] + [True] * (len(got.train[0]) - 1)


def test_files_of_different_kinds_make_one_text_corpus(tmp_path: Path, chatml: Any) -> None:
    (tmp_path / "a.txt").write_text("She said so.")
    got = run([str(tmp_path / "a.txt"), jsonl(tmp_path, "b.jsonl", PAIRS[:2])], chatml, renders="text", validation_share=0)
    assert len(got.train) == 3 and len(got.facts["shapes"]) == 2


def test_nothing_left_to_train_is_refused_with_the_cause(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path, "a.jsonl", PAIRS)
    with pytest.raises(LuthierError, match=r"no trained token is left of 300 records. 300 longer than max_tokens=8 and dropped: raise data.max_tokens"):
        run(source, tokenizer, max_tokens=8, over_length="drop")
    empty = jsonl(tmp_path, "b.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    with pytest.raises(LuthierError, match=r"no trained token is left of 0 records. 3 bad rows, the first .*b.jsonl:1: column 'completion' is empty"):
        run(empty, tokenizer, on_bad_row="skip")
    with pytest.raises(LuthierError, match="split is for raw text"):
        run(source, tokenizer, over_length="split")
    with pytest.raises(LuthierError, match="no training data"):
        run([], tokenizer)


def test_what_is_lost_is_counted_and_said(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        *PAIRS[:20],
        {"prompt": "a", "completion": ""},
        {"prompt": "near the river " * 60, "completion": "yes"},
        {"prompt": "a", "completion": "the river " * 200},
    ]
    said: list[str] = []
    facts = run(jsonl(tmp_path, "a.jsonl", rows), tokenizer, max_tokens=64, on_bad_row="skip", validation_share=0, say=said.append).facts
    assert (facts["rows"], facts["bad_rows"], facts["truncated"], facts["cut_responses"]) == (22, 1, 2, 1)
    assert facts["longest"] == 64
    text = "\n".join(said)
    for part in ("22 rows", "1 bad rows skipped", "2 records longer than 64 tokens truncated, of which 1 also lost the end of the response", "plain is used"):
        assert part in text


def test_the_counts_are_those_of_the_rows(tmp_path: Path, tokenizer: Any) -> None:
    got = run(jsonl(tmp_path, "a.jsonl", PAIRS), tokenizer)
    assert got.facts["rows"] == len(got.train)
    assert got.facts["tokens"] == sum(len(r) for r in got.train)
    assert got.facts["trained_tokens"] == sum(int(r.train[1:].sum()) for r in got.train)
    assert json.loads(json.dumps(got.facts)) == got.facts


def test_a_limit_reads_only_so_many_records(tmp_path: Path, tokenizer: Any) -> None:
    got = run(jsonl(tmp_path, "a.jsonl", PAIRS), tokenizer, limit=10, validation_share=0)
    assert [r.where.rsplit(":", 1)[1] for r in got.train] == [str(i) for i in range(1, 11)]


def test_progress_counts_every_record(tmp_path: Path, tokenizer: Any) -> None:
    done: list[int] = []
    run(jsonl(tmp_path, "a.jsonl", PAIRS), tokenizer, progress=done.append)
    assert sum(done) == 300


def test_a_template_that_refuses_a_row_is_a_bad_row_with_its_place(tmp_path: Path, chatml: Any) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{%- if messages[0]['content'] == 'question 1' %}{{ raise_exception('no') }}{%- endif %}{%- for m in messages %}{{ m['content'] }}{%- endfor %}"
    )
    with pytest.raises(LuthierError, match=r"a.jsonl:4: the chat template refuses this conversation: no. Set model.template"):
        run(jsonl(tmp_path, "a.jsonl", PAIRS[:6]), chatml, template=str(template))
    assert run(jsonl(tmp_path, "a.jsonl", PAIRS[:6]), chatml, template=str(template), on_bad_row="skip", validation_share=0).facts["bad_rows"] == 3


# --- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "renders", "least"),
    [
        ("instructions/glaive_toolcall_en_demo.json", "chat", 300),
        ("instructions/v1_sft_demo.jsonl", "chat", 500),
        ("instructions/identity.json", "chat", 91),
        ("e2e/dev.jsonl", "chat", 4672),
        ("e2e/dev_multiref.jsonl", "chat", 4672),
        ("gsm8k/test.jsonl", "chat", 1319),
        ("corpus/african_storybook_en.txt", "text", 316),
        ("corpus/tinystories_train.jsonl", "text", 2316),
    ],
)
def test_real_files_become_rows_with_nothing_lost(name: str, renders: str, least: int, shared: Path, with_bos: Any) -> None:
    got = run(str(shared / "data" / name), with_bos, renders=renders, max_tokens=4096)
    rows = got.train + got.validation
    assert len(rows) >= least and got.facts["bad_rows"] == 0
    assert all(r.train[1:].any() and not r.train[0] for r in rows)
    assert all(r.ids.tolist().count(with_bos.bos_token_id) <= 1 for r in rows)


def test_the_two_ways_to_write_several_references_give_the_same_division(shared: Path, tokenizer: Any) -> None:
    held = [
        {json.dumps(h.prompt): h.references for h in run(str(shared / "data" / "e2e" / f), tokenizer).validation_records}
        for f in ("dev.jsonl", "dev_multiref.jsonl")
    ]
    assert held[0].keys() == held[1].keys() and len(held[0]) > 10
    assert all(sorted(held[0][k]) == sorted(set(held[1][k])) for k in held[0])


def test_part_of_medquad_as_parquet_is_the_same_as_its_lines(shared: Path, tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    source = shared / "data" / "medquad" / "medquad.jsonl"
    some = source.read_text().splitlines()[:200]
    (tmp_path / "m.jsonl").write_text("\n".join(some))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(x) for x in some]), tmp_path / "m.parquet")
    a, b = run(str(tmp_path / "m.jsonl"), tokenizer), run(str(tmp_path / "m.parquet"), tokenizer)
    assert [r.ids.tolist() for r in a.train] == [r.ids.tolist() for r in b.train]
    assert b.train[0].extras["qtype"]
