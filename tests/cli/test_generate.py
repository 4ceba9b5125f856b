"""luthier generate with several answers to a prompt."""

from __future__ import annotations

import json

import pytest

import tiny
from luthier.cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("generate") / "base")


@pytest.fixture
def ask(base, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"word {i}", "id": i}) + "\n" for i in range(5)))
    return ["generate", str(base), "--input", str(tmp_path / "p.jsonl"), "--max-new", "6", "--temperature", "1", "--seed", "3", "--precision", "float32"]


def lines(path):
    return [json.loads(x) for x in path.read_text().splitlines()]


def test_a_file_gets_every_sample_of_a_prompt_side_by_side(ask, tmp_path, capsys):
    assert main([*ask, "--samples", "3", "--output", str(tmp_path / "three.jsonl")]) == 0
    assert "15 answers" in capsys.readouterr().out
    three = lines(tmp_path / "three.jsonl")
    assert [(x["id"], x["sample"]) for x in three] == [(i, s) for i in range(5) for s in range(3)]
    assert len({x["answer"] for x in three}) > 10
    assert main([*ask, "--output", str(tmp_path / "one.jsonl")]) == 0
    one = lines(tmp_path / "one.jsonl")
    assert [x["answer"] for x in one] == [x["answer"] for x in three[::3]] and "sample" not in one[0]


def test_an_interrupted_file_goes_on_in_the_middle_of_a_prompt(ask, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("luthier.cli.generate.WINDOW", 4)
    ask += ["--samples", "3", "--output"]
    assert main([*ask, str(tmp_path / "whole.jsonl")]) == 0
    whole = (tmp_path / "whole.jsonl").read_text()
    (tmp_path / "cut.jsonl").write_text("".join(whole.splitlines(keepends=True)[:7]) + '{"prompt": "wo')
    capsys.readouterr()
    assert main([*ask, str(tmp_path / "cut.jsonl")]) == 0
    assert "going on after 7 of 15" in capsys.readouterr().out
    assert (tmp_path / "cut.jsonl").read_text() == whole


def test_another_number_of_samples_than_a_file_was_begun_with_is_refused(ask, tmp_path, capsys):
    assert main([*ask, "--samples", "3", "--output", str(tmp_path / "o.jsonl")]) == 0
    assert main([*ask, "--samples", "2", "--output", str(tmp_path / "o.jsonl")]) == 2
    assert "o.jsonl:3: was written with another number of --samples" in capsys.readouterr().err


def test_the_screen_numbers_samples_and_a_temperature_of_0_is_refused(base, capsys):
    ask = ["generate", str(base), "--prompt", "word", "--max-new", "3", "--samples", "2"]
    assert main([*ask, "--temperature", "0.8"]) == 0
    out = capsys.readouterr().out
    assert "[1 of 2]" in out and "[2 of 2]" in out
    assert main(ask) == 2
    assert "--samples 2 with a temperature of 0 would be the same answer 2 times; set --temperature" in capsys.readouterr().err
