"""Labelled texts: which columns, which problem, which numbers, and what is said and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import small
from luthier.core import LuthierError
from luthier.data.labels import name_of
from luthier.data.prepare import Prepared, prepare
from luthier.data.rows import Form

ENCODER = Form(kind="encoder", token_types=True)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    return write(path, "".join(json.dumps(r) + "\n" for r in rows))


def run(source: Any, **how: Any) -> tuple[Prepared, list[str]]:
    lines: list[str] = []
    tokenizer = how.pop("tokenizer", None) or small.wordpiece()
    sources = [source] if isinstance(source, str) else source
    return prepare(sources, tokenizer, **{"renders": "label", "max_tokens": 64, "form": ENCODER, "say": lines.append, **how}), lines


def labels_of(p: Prepared) -> list[Any]:
    return [r.extras["label"] for r in p.train]


FILM = [{"text": f"film number {i}", "label": ["good", "bad", "fair"][i % 3]} for i in range(30)]


def test_names_are_sorted_and_numbered_and_counted(tmp_path: Path) -> None:
    p, lines = run(jsonl(tmp_path / "a.jsonl", FILM), validation_share=0)
    assert p.facts["labels"] == ["bad", "fair", "good"] and p.facts["problem"] == "single"
    assert labels_of(p) == [[2, 0, 1][i % 3] for i in range(30)]
    assert "3 labels, one a row: bad 10, fair 10, good 10" in lines
    assert any("would be right on 33.3%" in x for x in lines)
    assert not any("uneven" in x for x in lines)


def test_uneven_labels_are_said(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": "rare" if i == 0 else "common"} for i in range(41)]
    _, lines = run(jsonl(tmp_path / "a.jsonl", rows), validation_share=0)
    assert any("'common' is 40 times as frequent as 'rare'" in x for x in lines)


@pytest.mark.parametrize(
    ("columns", "pair"),
    [
        (("sentence", "label"), False),
        (("text", "category"), False),
        (("question1", "question2", "label"), True),
        (("premise", "hypothesis", "label"), True),
        (("sentence1", "sentence2", "label"), True),
        (("question", "sentence", "label"), True),
        (("review", "sentiment"), False),
        (("title", "text", "label"), False),  # text says what it is
    ],
)
def test_columns_are_found_by_the_names_the_field_uses(columns: tuple[str, ...], pair: bool, tmp_path: Path) -> None:
    lines = ["\t".join(columns)] + ["\t".join([f"{c} {i}" for c in columns[:-1]] + ["ab"[i % 2]]) for i in range(6)]
    p, said = run(write(tmp_path / "a.tsv", "\n".join(lines)), validation_share=0)
    assert len(p.train) == 6 and sorted(set(labels_of(p))) == [0, 1]
    assert ("inputs" in p.train[0].extras) == pair
    assert "label (text" in said[0] and ("pair = column" in said[0]) == pair


def test_unknown_or_doubtful_columns_are_asked_for(tmp_path: Path) -> None:
    odd = jsonl(tmp_path / "a.jsonl", [{"body": "x", "stars": i} for i in range(4)])
    with pytest.raises(LuthierError, match=r"Columns found: body, stars.*data.columns=\{text: body, label: YOUR_COLUMN\}"):
        run(odd)
    p, _ = run(odd, columns={"text": "body", "label": "stars"}, validation_share=0)
    assert p.facts["labels"] == ["0", "1", "2", "3"]
    with pytest.raises(LuthierError, match=r"no column 'star'.*Did you mean 'stars'"):
        run(odd, columns={"text": "body", "label": "star"})
    with pytest.raises(LuthierError, match="several columns could be its text: review, comment"):
        run(jsonl(tmp_path / "b.jsonl", [{"review": "x", "comment": "y", "label": "z"}]))
    with pytest.raises(LuthierError, match="labelled texts have no part 'prompt'"):
        run(odd, columns={"prompt": "body"})


def test_a_pair_is_joined_as_the_models_own_tokenizer_joins_it(tmp_path: Path) -> None:
    rows = [{"premise": "the film is slow", "hypothesis": "it is dull", "label": x} for x in "ab"]
    tokenizer = small.wordpiece()
    p, _ = run(jsonl(tmp_path / "a.jsonl", rows), tokenizer=tokenizer, validation_share=0)
    want = tokenizer("the film is slow", "it is dull")
    assert p.train[0].ids.tolist() == want["input_ids"] and p.train[0].extras["inputs"]["token_type_ids"].tolist() == want["token_type_ids"]
    assert "inputs" not in run(jsonl(tmp_path / "b.jsonl", rows), form=Form(kind="encoder"), validation_share=0)[0].train[0].extras  # RoBERTa has no types


def test_an_encoder_decoder_reads_the_texts_and_answers_one_token(tmp_path: Path) -> None:
    tokenizer = small.with_sentinels()
    rows = [{"sentence1": "the film is slow", "sentence2": "it is dull", "label": x} for x in "ab"]
    form = Form(kind="encoder_decoder", start=7)
    p, _ = run(jsonl(tmp_path / "a.jsonl", rows), tokenizer=tokenizer, form=form, validation_share=0)
    assert p.train[0].ids.tolist() == [7]
    assert p.train[0].extras["source"].tolist() == tokenizer("the film is slow", "it is dull")["input_ids"]
    assert p.facts["tokens"] == 2 * (1 + len(p.train[0].extras["source"]))


def test_a_decoder_reads_two_texts_with_the_end_of_sequence_between(tmp_path: Path, with_bos: Any) -> None:
    rows = [{"sentence1": "a user asks", "sentence2": "the assistant", "label": x} for x in "ab"]
    p, _ = run(jsonl(tmp_path / "a.jsonl", rows), tokenizer=with_bos, form=Form(), validation_share=0)
    ids = lambda text: with_bos(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    assert p.train[0].ids.tolist() == [with_bos.bos_token_id, *ids("a user asks"), with_bos.eos_token_id, *ids("the assistant")]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_what_is_too_long_loses_the_end_of_the_longer_text(kind: str, tmp_path: Path, with_bos: Any) -> None:
    long, short = "the film is slow and dull " * 20, "what a fine story"
    rows = [{"sentence1": a, "sentence2": b, "label": x} for x, a, b in (("a", long, short), ("b", short, long), ("b", short, short))]
    tokenizer = small.wordpiece() if kind == "encoder" else with_bos
    source = jsonl(tmp_path / "a.jsonl", rows)
    p, lines = run(source, tokenizer=tokenizer, form=Form(kind=kind), max_tokens=32, validation_share=0)
    assert [len(r) for r in p.train[:2]] == [32, 32] and len(p.train[2]) < 32 and p.facts["truncated"] == 2
    few = tokenizer(short, add_special_tokens=False)["input_ids"]
    for r in p.train:
        assert any(r.ids[i : i + len(few)].tolist() == few for i in range(len(r)))  # the short one is whole
    assert any("2 records longer than 32 tokens truncated, the longer text first" in x for x in lines)
    p, _ = run(source, tokenizer=tokenizer, form=Form(kind=kind), max_tokens=32, over_length="drop", validation_share=0, problem="multiple")
    assert len(p.train) == 1 and p.facts["dropped_long"] == 2
    with pytest.raises(LuthierError, match="half a text has no label"):
        run(source, over_length="split")


def test_lists_are_several_labels(tmp_path: Path) -> None:
    rows = [{"text": "x y", "labels": ["b", "a"]}, {"text": "y z", "labels": []}, {"text": "z z", "labels": ["c", 1]}]
    p, lines = run(jsonl(tmp_path / "a.jsonl", rows), validation_share=0)
    assert p.facts["labels"] == ["1", "a", "b", "c"] and p.facts["problem"] == "multiple"
    assert labels_of(p) == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert "4 labels, any number a row: 1 1, a 1, b 1, c 1" in lines
    with pytest.raises(LuthierError, match="set objective.problem=multiple"):
        run(jsonl(tmp_path / "a.jsonl", rows), problem="single")


def test_fractions_are_regression_and_whole_numbers_are_names(tmp_path: Path) -> None:
    head = "sentence1\tsentence2\tscore\n"
    p, lines = run(write(tmp_path / "a.tsv", head + "a b\tc d\t2.5\ne f\tg h\t4\ni j\tk l\t0.25\n"), validation_share=0)
    assert p.facts["problem"] == "regression" and labels_of(p) == [2.5, 4.0, 0.25]
    assert any("numbers from 0.25 to 4, 2.25 on average: regression" in x for x in lines)
    p, _ = run(write(tmp_path / "b.tsv", "text\tlabel\n" + "".join(f"t {i}\t{i % 12}\n" for i in range(24))), validation_share=0)
    assert p.facts["labels"] == [str(i) for i in range(12)]  # by size, not by letters
    p, _ = run(jsonl(tmp_path / "c.jsonl", [{"text": f"t {i}", "label": float(i % 2)} for i in range(4)]), validation_share=0)
    assert p.facts["labels"] == ["0", "1"]
    p, _ = run(str(tmp_path / "b.tsv"), problem="regression", validation_share=0)
    assert labels_of(p)[:3] == [0.0, 1.0, 2.0]
    with pytest.raises(LuthierError, match=r"a.jsonl:1: the label 'good' is no number"):
        run(jsonl(tmp_path / "a.jsonl", FILM), problem="regression")


def test_a_label_that_is_unknown_is_one_clear_error(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", FILM)
    other = jsonl(tmp_path / "v.jsonl", [{"text": "x y", "label": "good"}, {"text": "y", "label": "odd"}, {"text": "z", "label": "even"}])
    with pytest.raises(LuthierError, match=r"v.jsonl:2: the label 'odd' is not one of the labels of the training data \(bad, fair, good\); 2 rows have such"):
        run(train, validation=[other])
    with pytest.raises(LuthierError, match=r"a.jsonl:3: the label 'fair' is not one of objective.labels \(bad, good\); 10 rows"):
        run(train, labels=("bad", "good"))
    p, _ = run(train, labels=("good", "fair", "bad", "never"), validation_share=0)
    assert p.facts["labels"] == ["good", "fair", "bad", "never"] and p.facts["label_counts"]["never"] == 0 and labels_of(p)[:3] == [0, 2, 1]


def test_bad_rows_are_reported(tmp_path: Path) -> None:
    rows = [*FILM[:4], {"text": "x", "label": None}, {"text": " ", "label": "bad"}, {"text": 3, "label": "bad"}, {"text": "x", "label": float("nan")}]
    source = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(LuthierError, match=r"a.jsonl:5: column 'label' is null"):
        run(source)
    p, _ = run(source, on_bad_row="skip", validation_share=0)
    assert len(p.train) == 4 and p.facts["bad_rows"] == 4
    with pytest.raises(LuthierError, match="all labels are 'bad'"):
        run(jsonl(tmp_path / "b.jsonl", [{"text": f"{i}", "label": "bad"} for i in range(5)]))
    with pytest.raises(LuthierError, match="is that the label's column"):
        run(jsonl(tmp_path / "c.jsonl", [{"text": "x", "label": f"an essay {i}"} for i in range(1500)]))


def test_equal_texts_stay_on_one_side_and_records_go_with_their_rows(tmp_path: Path) -> None:
    rows = [{"text": f"film {i // 2}", "label": "ab"[i % 2]} for i in range(60)]
    p, _ = run(jsonl(tmp_path / "a.jsonl", rows), validation_share=0.2)
    assert len(p.validation) == len(p.validation_records) == 12
    text = lambda some: {(int(r.where.rpartition(":")[2]) - 1) // 2 for r in some}  # noqa: E731
    assert not text(p.train) & text(p.validation) and len(text(p.validation)) == 6
    for row, held in zip(p.validation, p.validation_records, strict=True):
        assert row.where == held.where and held.references == [p.facts["labels"][row.extras["label"]]]


def test_shapes_and_objectives_have_to_fit(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", FILM)
    with pytest.raises(LuthierError, match="objective classify reads labelled texts"):
        run(source, shape="alpaca")
    with pytest.raises(LuthierError, match="labelled texts are for objective: classify"):
        run(source, renders="chat", shape="label", form=Form())


def test_names_of_labels() -> None:
    assert [name_of(x) for x in ("a", 1.0, 0.5, ("b", "ä"))] == ["a", "1", "0.5", '["b", "ä"]']


def test_real_files_load_as_they_are(shared: Path) -> None:
    tokenizer = small.wordpiece()
    p, _ = run(str(shared / "data" / "sst2"), tokenizer=tokenizer, limit=2000)
    assert len(p.train) == 2000 and p.facts["labels"] == ["0", "1"]
    assert p.facts["validation"]["from"][0].endswith("dev.tsv") and len(p.validation) == 500
    p, _ = run(str(shared / "data" / "trec"), tokenizer=tokenizer, validation_share=0)  # Latin-1, label and text on a line; the test file is left alone
    assert len(p.train) == 5452 and p.facts["labels"] == [str(i) for i in range(6)]
    p, _ = run(str(shared / "data" / "banking77" / "train.csv"), tokenizer=tokenizer, validation_share=0)
    assert len(p.facts["labels"]) == 77 and len(p.train) > 9900
    assert np.mean([len(r) for r in p.train]) > 8
