"""Every command of docs/first-hour.md and every line of docs/python.md runs, in the order in which a reader would run them."""

import re
import shlex
from pathlib import Path

import pytest

from luthier.cli import main

pytestmark = pytest.mark.usefixtures("quick_clock")

DOCS = Path(__file__).resolve().parent.parent / "docs"
# What a command gets besides, so that it takes a second here; the commands are otherwise as they are printed.
SHORTER = {
    "demo": ["--steps", "1", "--rows", "2"],
    "train": [
        *("optim.steps=4", "optim.batch_tokens=1024", "data.validation_rows=20"),
        *("evaluate.every_steps=4", "evaluate.task_rows=4", "evaluate.samples=1", "evaluate.sample_tokens=8"),
    ],
    "eval": ["--max-new", "12"],
    "generate": ["--max-new", "8"],
}
CODES = {"data check": {0, 3}}  # it ends with 3 where it warns


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands():
    lines = [line for block in blocks("first-hour.md", "sh") for line in block.splitlines() if line.strip()]
    return [shlex.split(line) for line in lines]


def test_every_command_of_the_first_hour_does_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = []
    for program, *arguments in commands():
        assert program == "luthier"
        verb = " ".join(arguments[: 2 if arguments[0] == "data" else 1])
        code = main([*arguments, *(["--rows", "4"] if verb == "eval" else []), *SHORTER.get(verb, [])])
        out = capsys.readouterr()
        assert code in CODES.get(verb, {0}), (arguments, out.err or out.out[-2000:])
        done.append(verb)
    assert len(done) >= 14 and {"doctor", "demo", "advise", "plan", "train", "runs", "eval", "merge", "generate"} <= set(done)
    assert (tmp_path / "runs/first/report.html").is_file() and (tmp_path / "merged/config.json").is_file()


def test_the_commands_that_are_named_in_the_text_are_commands():
    from luthier.cli import VERBS

    named = set(re.findall(r"`luthier ([a-z-]+)", (DOCS / "first-hour.md").read_text()))
    assert named and named <= set(VERBS)


def test_the_code_of_the_python_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    found = blocks("python.md", "python")
    assert len(found) >= 7
    for block in found:
        exec(compile(block, "docs/python.md", "exec"), names)
    said = capsys.readouterr().out
    assert "did you mean method.rank?" in said and "parameters" in said and "predicted: " in said and "0.500 [" in said
    assert names["result"].trained > 0 and len(names["both"].ids) == 2


@pytest.mark.parametrize("page", ["first-hour.md", "python.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (DOCS / page).read_text()):
        assert (DOCS / target).exists(), target
