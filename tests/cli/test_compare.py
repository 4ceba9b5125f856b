"""luthier compare: what it asks for, what it refuses, what it prints."""

from __future__ import annotations

import re

import pytest

from luthier.cli import main

PLAIN = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """What reaches the comparison; nothing is run."""
    from luthier.comparing import compare as module

    found = []
    monkeypatch.setattr(module, "compare", lambda wanted, folder, quiet: found.append((wanted, folder, quiet)))
    monkeypatch.setattr(module, "show", lambda table, folder: None)
    return found


def test_help_shows_lists_in_brackets_and_says_which_are_swept(capsys):
    assert main(["compare", "--help"]) == 0
    said = " ".join(PLAIN.sub("", capsys.readouterr().out).split())
    for part in ("methods=[lora,full]", "method.rank=[4,8]", "seed=[0,1,2]", "[[query],[all]]", "Where a setting is a list itself"):
        assert part in said


def test_data_settings_and_options_reach_the_comparison(data, asked):
    assert main(["compare", "d.jsonl", "method.rank=[4,8]", "--minutes", "2", "--target", "0.5", "--test", "t.jsonl", "--equal", "time", "--out", "here"]) == 0
    wanted, folder, quiet = asked[0]
    assert wanted == {
        "file": None, "settings": ['data.train=["d.jsonl"]', "method.rank=[4,8]"], "minutes": 2.0, "target": 0.5, "test": ["t.jsonl"],
        "equal": "time", "rates": 3,
    }  # fmt: skip
    assert str(folder) == "here" and not quiet


def test_going_on_takes_what_was_asked_and_new_minutes(data, asked):
    (data / "c").mkdir()
    (data / "c" / "compare.yaml").write_text("file: null\nsettings: [data=d.jsonl]\nminutes: 2.0\ntarget: null\ntest: []\nequal: tokens\nrates: 3\n")
    assert main(["compare", "--resume", "c", "--minutes", "9"]) == 0
    assert asked[0][0]["minutes"] == 9.0 and asked[0][0]["settings"] == ["data=d.jsonl"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "no training data: say luthier compare FILE"),
        (["nosuch.jsonl"], "nosuch.jsonl: no such file or folder"),
        (["d.jsonl", "--test", "t.jsonl"], "t.jsonl: no such file"),
        (["d.jsonl", "--minuts", "3"], "did you mean --minutes?"),
        (["d.jsonl", "--equal", "seconds"], "accepted are tokens and time"),
        (["d.jsonl", "--csv", "--latex"], "one at a time"),
        (["d.jsonl", "methods=[lora,lorra]"], "did you mean lora?"),
        (["d.jsonl", "method.rank=[4,x]"], "method.rank=x: found 'x'"),
        (["--resume", "nowhere"], "no compare.yaml here"),
        (["--resume", "nowhere", "d.jsonl"], "goes on as it was asked"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence_and_leaves_nothing(data, capsys, args, said):
    assert main(["compare", *args, *([] if "--resume" in args else ["--out", "c"])]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (data / "c").exists()


def test_a_comparison_whose_first_job_fails_leaves_no_folder(data, monkeypatch, capsys):
    from luthier.comparing import compare as module
    from luthier.errors import LuthierError

    def fail(*args, **how):
        raise LuthierError("the base cannot be opened")

    monkeypatch.setattr(module, "numbers_of", fail)
    assert main(["compare", "d.jsonl", "--out", "c"]) == 2
    assert "the base cannot be opened" in capsys.readouterr().err and not (data / "c").exists()
