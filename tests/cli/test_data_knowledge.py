"""luthier data knowledge as a user runs it."""

import json

import pytest

import tiny
from luthier.cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("knowledge") / "base")


@pytest.fixture
def qa(tmp_path):
    rows = [{"question": f"What is word {i}?", "answer": "abc"[i % 3], "id": i} for i in range(8)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "qa.jsonl"


@pytest.fixture
def run(base, tmp_path, capsys):
    def run(*arguments):
        code = main(["data", "knowledge", *(str(a) for a in arguments), "--model", str(base), "--cache", str(tmp_path / "kept")])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


QUICK = ("--prompts", 2, "--shots", 2, "--samples", 3, "--max-new", 3, "--precision", "float32")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_written_as_they_were_with_what_was_found_and_can_be_trained_on(qa, tmp_path, run, base, capsys):
    out = tmp_path / "known.jsonl"
    code, said, _ = run(qa, *QUICK, "--out", out)
    assert code == 0
    assert "8 rows, 8 questions; 2 prompts of 2 exemplars, 1 greedy answer and 3 at temperature 0.5" in said
    for part in (
        "asked as chat; the first prompt:",
        "| <user>What is word",
        "Unknown, for example:",
        "100.0% of the rows [67.6%, 100.0%] are new to",
        "--cap Unknown=0.1",
    ):
        assert part in said, part
    row = lines(out)[3]
    assert row == {**lines(qa)[3], "knowledge": "Unknown", "greedy_right": 0, "greedy_asked": 2, "sampled_right": 0, "sampled_asked": 6}
    again = run(qa, *QUICK)[1]
    assert "8 of them asked before" in again and again.split("category")[1].split("8 rows of 8")[0].strip() in said
    assert main(["data", "preview", str(out), "--model", str(base)]) == 0
    assert "prompt = column 'question', completion = column 'answer'" in " ".join(capsys.readouterr().out.split())


def test_a_random_model_that_may_say_anything_is_right_now_and_then(qa, tmp_path, run):
    """A tiny random model says one token: hot, it gives each of a few hundred characters, so some answers of one letter come by chance."""
    out = tmp_path / "known.jsonl"
    code, said, _ = run(qa, "--prompts", 3, "--shots", 1, "--samples", 60, "--max-new", 1, "--temperature", 5, "--precision", "float32", "--out", out)
    found = {r["knowledge"] for r in lines(out)}
    assert code == 0 and "WeaklyKnown" in found and "WeaklyKnown, for example:" in said and "more it says only now and then" in said


def test_statements_are_asked_by_patterns_and_written_as_prompts(tmp_path, run):
    facts, out = tmp_path / "f.jsonl", tmp_path / "o.jsonl"
    facts.write_text("".join(json.dumps({"sub_label": f"Ann {i}", "obj_label": "Rome"}) + "\n" for i in range(6)))
    code, said, _ = run(facts, *QUICK, "--pattern", "[X] was born in [Y].", "--out", out)
    assert code == 0 and "asked as text" in said and "was born in Rome." in said
    assert (lines(out)[0]["prompt"], lines(out)[0]["completion"]) == ("Ann 0 was born in", "Rome")


def test_choosing_by_category_leaves_rows_out_and_orders_the_others(qa, tmp_path, run):
    out = tmp_path / "o.jsonl"
    hot = ("--prompts", 3, "--shots", 1, "--samples", 60, "--max-new", 1, "--temperature", 5, "--precision", "float32", "--out", out)
    code, said, _ = run(qa, *hot, "--order", "known-first")
    ranks = [["HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown"].index(r["knowledge"]) for r in lines(out)]
    assert code == 0 and ranks == sorted(ranks) and len(set(ranks)) > 1 and "training shuffles rows" in said
    code, said, _ = run(qa, *hot, "--keep", "weaklyknown")
    assert code == 0 and {r["knowledge"] for r in lines(out)} == {"WeaklyKnown"}
    before = out.read_text()
    code, _, err = run(qa, *hot, "--keep", "HighlyKnown")
    assert code == 2 and "no row is left to write" in err and out.read_text() == before


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--keep", "Unknown"], "say where: --out FILE.jsonl"),
        (["--keep", "Unkown", "--out", "x.jsonl"], "'Unkown' is no category; there are HighlyKnown, MaybeKnown, WeaklyKnown, Unknown"),
        (["--cap", "Unknown=10", "--out", "x.jsonl"], "--cap Unknown=10: say CATEGORY=SHARE with a share from 0 to 1"),
        (["--out", "x.csv"], "--out x.csv: name a new .jsonl file"),
        (["--shots", "9"], "9 exemplars are drawn from other facts of its group"),
        (["--group", "topic"], "no column 'topic' to group by. Columns found: question, answer, id"),
        (["--pattern", "[Y] is [X]"], "the pattern '[Y] is [X]' cannot ask"),
        (["--column", "question"], "--column question: say OURS=YOURS"),
        (["--prompt", "3"], "no option --prompt; did you mean --prompts?"),
    ],
)
def test_what_is_wrong_is_one_sentence(qa, run, more, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(qa, *more)
    assert code == 2 and sentence in err and err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} <= {"qa.jsonl", "kept"}


def test_files_that_hold_no_questions_are_one_sentence(tmp_path, run):
    for name, content, sentence in (
        ("t.txt", "A text.", "raw text"),
        ("e.jsonl", "", "the file is empty"),
        ("c.jsonl", '{"question": "x", "ans', "ends in the middle of a row"),
        ("s.jsonl", '{"sub_label": "Ann", "obj_label": "Rome"}\n', '--pattern "[X] was born in [Y]."'),
    ):
        (tmp_path / name).write_text(content)
        code, _, err = run(tmp_path / name)
        assert code == 2 and sentence in err and err.count("\n") == 1, (name, err)
