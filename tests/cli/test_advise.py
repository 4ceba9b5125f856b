"""luthier advise: what is printed, what is written, and what is refused."""

import json

import pytest

from luthier.cli import advise, main
from luthier.planning.advising import NEEDS
from luthier.settings.config import load_run


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {i}?", "completion": f"It is {i}."}) + "\n" for i in range(60)))
    return path


def said(capsys, *arguments):
    code = main(["advise", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_advice_names_its_rules_with_sources_what_it_takes_and_writes_a_run_that_can_be_read(rows, tmp_path, capsys):
    out = tmp_path / "run.yaml"
    code, text, err = said(capsys, rows, "--need", "no-latency", "--need", "keep-abilities", "--out", out)
    assert code == 0, err
    assert "for objective sft (told from the data) on 57 examples, base fiddle (decoder, 7,344,384 parameters)" in text
    first = text.split("advised: ")[1].split("then: ")[0]
    assert "arXiv 2405.09673" in first and "trained parameters (" in first and " of memory" in first and "a step" in first
    assert "also: data.replay={source: [self], share: 0.1}" in text and "crafted_prompt" in text and "luthier compare" in text
    run = load_run(str(out))
    assert run.data.train == (str(rows),) and run.data.replay.source == ("self",) and run.data.max_tokens is None
    assert f"advised: {type(run.method).__module__.rsplit('.', 1)[-1]}" in text
    assert out.read_text().startswith("# Advised: ") and "arXiv" in out.read_text()


def test_the_objective_is_told_from_the_data_unless_it_is_given(tmp_path, capsys):
    labelled = tmp_path / "l.jsonl"
    labelled.write_text("".join(json.dumps({"text": f"word {i}", "label": "ab"[i % 2]}) + "\n" for i in range(40)))
    code, text, err = said(capsys, labelled)
    assert code == 0, err
    assert "for objective classify (told from the data) on 38 examples" in text and "TREC" in text
    code, text, err = said(capsys, labelled, "--objective", "text")
    assert code == 0 and "for objective text on" in text, err


def test_a_slip_is_one_sentence_and_nothing_is_written_over(rows, tmp_path, capsys):
    code, _, err = said(capsys, rows, "--need", "lateny")
    assert code == 2 and "did you mean no-latency?" in err
    (tmp_path / "there.yaml").write_text("model: fiddle\n")
    code, _, err = said(capsys, rows, "--out", tmp_path / "there.yaml")
    assert code == 2 and "is there already" in err and (tmp_path / "there.yaml").read_text() == "model: fiddle\n"
    code, _, err = said(capsys, tmp_path / "none.jsonl")
    assert code == 2 and "no such file" in err


def test_the_help_names_every_need():
    assert advise.NEEDS.split(", ") == list(NEEDS)
