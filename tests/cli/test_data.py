"""luthier data: collecting preferences from a person at the keyboard and from a judge behind an endpoint, and reading them again."""

import io
import json
import re

import pytest

import tiny
from luthier.cli import main
from luthier.cli.data.prefer import on_screen
from luthier.data.formats import Bad
from luthier.data.preferences import convert_preferences, detect_preferences
from luthier.data.sources import read
from stub_judge import parts, serving


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("data") / "base")


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text("word 1\nword 2\nword 3\n")
    return tmp_path / "p.txt"


@pytest.fixture
def answers(tmp_path):
    rows = [{"prompt": f"q{i}", "answers": ["x" * (i + 1), "y" * (i + 3), "z" * (i + 2)]} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "a.jsonl"


@pytest.fixture
def run(capsys, monkeypatch):
    def run(*arguments, typed=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        code = main(["data", *(str(a) for a in arguments)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def judged(path, renders="ranked"):
    records = list(read(str(path), bad=Bad("fatal")))
    shape = detect_preferences(records, renders=renders)
    return [j for r in records for j in convert_preferences(r, shape, Bad("fatal"), renders=renders)]


def panels(out):
    """The answers of each prompt, as they were shown."""
    blocks = re.split(r"─ \d+ of \d+ ─", out)[1:]
    return [[" ".join(re.findall(r"│ (.*?) *│", box)) for box in re.split(r"╭─ \w+ ─", block)[1:]] for block in blocks]


# --- a person --------------------------------------------------------------------------------------------------------


def test_what_a_person_types_is_written_at_once_in_the_shape_that_is_read(base, prompts, tmp_path, run):
    out = tmp_path / "o.jsonl"
    ask = ("prefer", base, prompts, "--answers", 3, "--max-new", 6, "--precision", "float32", "--output", out)
    code, said, _ = run(*ask, typed="2 1 3\n1=3 2\n3\n")
    assert code == 0 and "3 prompts to judge" in said and "3 judgements written" in said
    shown = panels(said)
    found = judged(out)
    assert [[on_screen(a).plain for a in j.answers()] for j in found] == [
        [shown[0][i] for i in (1, 0, 2)],
        [shown[1][i] for i in (0, 2, 1)],
        [shown[2][i] for i in (2, 0, 1)],
    ]
    assert [j.ranks for j in found] == [(0, 1, 2), (0, 0, 1), (0, 1, 1)]
    line = lines(out)[0]
    assert list(line) == ["prompt", "ranked", "collected"] and line["prompt"] == "word 1"
    assert line["collected"] | {"time": ""} == {
        "by": "person", "model": str(base), "temperature": 0.8, "top_p": 0.95, "max_new": 6, "seed": 0, "time": ""
    }  # fmt: skip
    code, said, _ = run(*ask)
    assert code == 0 and f"{out}: 3 prompts, all judged already" in said


def test_skipping_quitting_and_going_on_with_the_same_answers(base, prompts, tmp_path, run):
    ask = ("prefer", base, prompts, "--answers", 3, "--max-new", 6, "--precision", "float32", "--output")
    whole = panels(run(*ask, tmp_path / "whole.jsonl", typed="1 2 3\n1 2 3\n1 2 3\n")[1])
    out = tmp_path / "o.jsonl"
    code, said, _ = run(*ask, out, typed="s\n1 2 3\nq\n")
    assert code == 0 and [x["prompt"] for x in lines(out)] == ["word 2"] and "1 judgement written" in said
    code, said, _ = run(*ask, out, typed="1 2 3\n1 2 3\n")
    assert "2 prompts to judge; 1 more in" in said and panels(said)[:2] == [whole[0], whole[2]]
    assert [x["prompt"] for x in lines(out)] == ["word 2", "word 1", "word 3"]


def test_a_judgement_can_be_taken_back_even_the_last(answers, tmp_path, run):
    out = tmp_path / "o.jsonl"
    code, said, _ = run("prefer", answers, "--output", out, typed="u\n1\n2\nu\nu\n3\ns\nu\n1 2\n1\n1\nu\n2\n\n")
    assert code == 0 and "nothing to undo" in said
    assert re.findall(r"user: (q\d)", said) == ["q0", "q1", "q2", "q1", "q0", "q1", "q2", "q1", "q2", "q3", "q3"]
    shown = dict(zip(re.findall(r"user: (q\d)", said), panels(said), strict=True))
    assert [(x["prompt"], x["ranked"][0]) for x in lines(out)] == [
        ("q0", shown["q0"][2]),
        ("q1", shown["q1"][0]),
        ("q2", shown["q2"][0]),
        ("q3", shown["q3"][1]),
    ]


def test_pairs_are_a_choice_of_two(answers, tmp_path, run):
    out = tmp_path / "o.jsonl"
    code, said, _ = run("prefer", answers, "--pairs", "--output", out, typed="a\nB\n=\n1\nx\na\n")
    shown = panels(said)
    assert code == 0 and all(len(s) == 2 for s in shown) and said.count("is none of a, b and =") == 2
    assert [(j.answers(), j.ranks) for j in judged(out, "pairs")] == [
        (shown[0], (0, 1)), (shown[1][::-1], (0, 1)), (shown[2], (0, 0)), (shown[3], (0, 1))
    ]  # fmt: skip
    assert lines(out)[0]["collected"]["by"] == "person" and "model" not in lines(out)[0]["collected"]


def test_answers_are_shown_by_chance_in_an_order_that_the_seed_decides(tmp_path, run):
    rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    how = ("prefer", tmp_path / "a.jsonl", "--output")
    first = [s[0] for s in panels(run(*how, tmp_path / "1.jsonl", typed="1\n" * 40)[1])]
    assert 8 < first.count("good") < 32
    assert [s[0] for s in panels(run(*how, tmp_path / "2.jsonl", typed="1\n" * 40)[1])] == first
    assert [s[0] for s in panels(run(*how, tmp_path / "3.jsonl", "--seed", 1, typed="1\n" * 40)[1])] != first


def test_help_typing_errors_and_what_a_terminal_would_obey_are_shown(tmp_path, run):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "[bold]q[/bold]", "answers": ["\x1b[2Jgone", "a [red]b"]}))
    code, said, _ = run("prefer", tmp_path / "a.jsonl", "--output", tmp_path / "o.jsonl", typed="?\n3\n12\n\n1\n")
    assert code == 0 and "\x1b" not in said and "\\x1b[2Jgone" in said and "a [red]b" in said and "user: [bold]q[/bold]" in said
    for part in ("2=1 3     2 and 1 are as good", "u   undo", "there is no answer 3: there are 1 to 2", "did you mean 1 2?", "nothing was typed"):
        assert part in said


def test_prompts_without_two_answers_are_passed_over_and_said(tmp_path, run):
    rows = [{"prompt": "q1", "answers": ["a", "a"]}, {"prompt": "q2", "answers": ["a", "b"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, said, _ = run("prefer", tmp_path / "a.jsonl", "--output", tmp_path / "o.jsonl", typed="1\n")
    assert code == 0 and "1 prompt had no two answers to compare, the last: 2 of its answers are here" in said and len(lines(tmp_path / "o.jsonl")) == 1


def test_ctrl_c_keeps_what_was_judged(answers, tmp_path, capsys, monkeypatch):
    typed = iter(["1"])

    def type_(_=""):
        for line in typed:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", type_)
    code = main(["data", "prefer", str(answers), "--output", str(tmp_path / "o.jsonl")])
    assert code == 130 and "interrupted; 1 judgement written" in capsys.readouterr().err and len(lines(tmp_path / "o.jsonl")) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["prefer", "fiddle"], "missing option '--output'"),
        (["prefer", "fiddle", "--output", "o.jsonl"], "fiddle is asked nothing: name a file of prompts"),
        (["prefer", "fiddle", "{p}", "--prompt", "x", "--output", "o.jsonl"], "leave one of the two out"),
        (["prefer", "fiddle", "{p}", "--output", "no/o.jsonl"], "there is no folder no"),
        (["prefer", "{p}", "--output", "o.jsonl"], "has no two answers to any question"),
        (["prefer", "fiddle", "{p}", "--output", "{p}"], "is where the prompts come from"),
        (["prefer", "fiddle", "{p}", "--output", "o.jsonl", "--answer", "3"], "no option --answer; did you mean --answers?"),
        (["judge", "{a}", "--output", "o.jsonl"], "missing option '--endpoint'"),
        (["judge", "{a}", "--output", "o.jsonl", "--endpoint", "127.0.0.1:1"], "an address is http://HOST:PORT/v1"),
        (["judge", "{a}", "--output", "o.jsonl", "--endpoint", "http://127.0.0.1:1/v1"], "cannot be reached: connection refused; is the server running"),
        (["judge", "{a}", "--output", "o.jsonl", "--endpoint", "http://x/v1", "--key-env", "NO_SUCH_KEY"], "no environment variable of that name is set"),
        (["judge", "{a}", "--output", "o.jsonl", "--endpoint", "http://x/v1", "--principles", "none.txt"], "none.txt: no such file"),
        (["judge", "{a}", "--output", "o.jsonl", "--endpoint", "http://x/v1", "--principle", " "], "no principle is given"),
        (["judge", "{a}", "--output", "o.jsonl", "--endpoint", "http://x/v1", "--disagreement", "win"], "'win' is not one of 'tie', 'drop'"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_writes_nothing(arguments, reason, prompts, answers, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, _, err = run(*(a.format(p=prompts, a=answers) for a in arguments))
    assert code == 2 and reason in err and err.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


# --- a judge ---------------------------------------------------------------------------------------------------------


def shorter(payload):
    _, a, b = parts(payload)
    return f"Verdict: {'A' if len(a) < len(b) else 'B'}"


def test_a_judge_ranks_the_answers_of_a_file_and_is_asked_nothing_twice(answers, tmp_path, run):
    out = tmp_path / "o.jsonl"
    with serving(shorter) as stub:
        ask = ("judge", answers, "--endpoint", stub.url, "--principle", "Choose the shorter answer.", "--output", out)
        code, said, _ = run(*ask, "--limit", 2)
        assert code == 0 and f"judge: stub at {stub.url}" in said and "2 prompts written" in said
        code, said, _ = run(*ask)
        assert code == 0 and "2 prompts to judge; 2 more in" in said and "now holds 4 prompts" in said
        posts = [p for path, _, p in stub.asked if p]
        assert len(posts) == 4 * 3 * 2 and all("Choose the shorter answer." in parts(p)[0] for p in posts)
        assert "all judged already" in run(*ask)[1] and len([1 for *_, p in stub.asked if p]) == len(posts)
    assert [[a[0] for a in j.answers()] for j in judged(out)] == [["x", "z", "y"]] * 4 and all(j.ranks == (0, 1, 2) for j in judged(out))
    assert lines(out)[0]["collected"] | {"time": ""} == {
        "by": "judge", "judge": "stub", "endpoint": stub.url, "time": "", "principle": "Choose the shorter answer.", "consistent": 3, "pairs": 3
    }  # fmt: skip
    assert "the same verdict in both orders: 1.000 [0.342, 1.000] n=6" in said and "preferred in 0.500" in said
    assert "win rate of answer 1: 1.000" in said and "win rate of answer 3: 0.500" in said


@pytest.mark.parametrize("how", ["tie", "drop"])
def test_a_judge_that_likes_what_stands_first_decides_nothing(how, answers, tmp_path, run):
    with serving(lambda _: "A") as stub:
        code, said, _ = run("judge", answers, "--endpoint", stub.url, "--disagreement", how, "--pairs", "--output", tmp_path / "o.jsonl")
    assert code == 0 and "the same verdict in both orders: 0.000" in said and "shown first was preferred in 1.000" in said
    assert ("written as ties" in said) == (how == "tie") and (tmp_path / "o.jsonl").exists() == (how == "tie")
    if how == "tie":
        assert len(lines(tmp_path / "o.jsonl")) == 12 and all(j.ranks == (0, 0) for j in judged(tmp_path / "o.jsonl", "pairs"))


def test_a_judge_is_measured_against_what_people_said(tmp_path, run):
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "y" if i % 4 == 0 else "y" * 9} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with serving(shorter) as stub:
        code, said, _ = run("judge", tmp_path / "a.jsonl", "--endpoint", stub.url, "--pairs", "--output", tmp_path / "o.jsonl")
    assert (
        code == 0 and re.search(r"agrees with the judgements in the data, where both decide: 0\.750 \[0\.\d+, 0\.\d+\] n=20", said) and "win rate" not in said
    )
    assert [x["chosen"] for x in lines(tmp_path / "o.jsonl")] == ["y" if i % 4 == 0 else "yes" for i in range(20)]


def test_verdicts_that_cannot_be_read_are_counted_and_shown_and_the_others_written(answers, tmp_path, run):
    with serving(lambda p: "I would rather not say." if "x" in parts(p)[1] + parts(p)[2] else shorter(p)) as stub:
        code, said, _ = run("judge", answers, "--endpoint", stub.url, "--output", tmp_path / "o.jsonl")
    assert code == 0 and "8 pairs have no readable verdict and are not counted; the first: I would rather not say." in said
    assert [[a[0] for a in x["ranked"]] for x in lines(tmp_path / "o.jsonl")] == [["z", "y"]] * 4
    with serving(lambda p: "Hm." if "q1" in parts(p)[0] else shorter(p)) as stub:  # a prompt without any verdict has no line, and is asked again
        code, said, _ = run("judge", answers, "--endpoint", stub.url, "--output", tmp_path / "p.jsonl")
    assert code == 0 and "3 prompts written" in said and [x["prompt"] for x in lines(tmp_path / "p.jsonl")] == ["q0", "q2", "q3"]


def test_a_model_answers_and_a_judge_compares(base, prompts, tmp_path, monkeypatch, run):
    monkeypatch.setenv("JUDGE_KEY", "sk-verysecret")
    (tmp_path / "rules.txt").write_text("# of tone\nChoose the kinder answer.\n\nChoose the shorter answer.\n")
    with serving(shorter, models=("one", "two")) as stub:
        ask = ["judge", base, prompts, "--answers", 3, "--max-new", 6, "--precision", "float32", "--endpoint", stub.url, "--output", tmp_path / "o.jsonl"]
        assert "serves one, two; name the judge: --judge-model NAME" in run(*ask)[2]
        ask += ["--judge-model", "two", "--key-env", "JUDGE_KEY", "--principles", tmp_path / "rules.txt", "--reasons"]
        code, said, _ = run(*ask)
        posts = [(h, p) for _, h, p in stub.asked if p]
    assert code == 0 and len(posts) == 18 and all(h["Authorization"] == "Bearer sk-verysecret" and p["model"] == "two" for h, p in posts)
    assert "principle: Choose the kinder answer.\nprinciple: Choose the shorter answer.\n" in said and "of tone" not in said
    found = lines(tmp_path / "o.jsonl")
    assert [x["prompt"] for x in found] == ["word 1", "word 2", "word 3"] and "verysecret" not in (tmp_path / "o.jsonl").read_text() + said
    assert found[0]["collected"]["model"] == str(base) and found[0]["collected"]["temperature"] == 0.8 and found[0]["collected"]["reasons"] is True
    assert all(j.answers() == sorted(j.answers(), key=len) for j in judged(tmp_path / "o.jsonl"))


def test_what_was_judged_before_the_server_failed_is_kept(answers, tmp_path, run):
    out = tmp_path / "o.jsonl"
    broken = True
    with serving(lambda p: (401, {"error": "no more credit"}) if broken and "q2" in parts(p)[0] else shorter(p)) as stub:
        ask = ("judge", answers, "--endpoint", stub.url, "--parallel", 1, "--output", out)
        code, said, err = run(*ask)
        assert code == 2 and "no more credit" in err and "2 prompts written" in said
        broken = False
        code, said, _ = run(*ask)
    assert code == 0 and [x["prompt"] for x in lines(out)] == ["q0", "q1", "q2", "q3"]


def test_collected_preferences_train_a_model(base, answers, tmp_path, run, capsys):
    with serving(shorter) as stub:
        run("judge", answers, "--endpoint", stub.url, "--output", tmp_path / "r.jsonl")
        run("judge", answers, "--endpoint", stub.url, "--pairs", "--output", tmp_path / "p.jsonl")
    for name, objective in (("r", "reward"), ("p", "dpo")):
        settings = [f"objective={objective}", "optim.steps=2", "precision=float32", f"out={tmp_path}", f"name={name}", "evaluate.samples=0"]
        assert main(["train", str(tmp_path / f"{name}.jsonl"), "--model", str(base), "--quiet", *settings]) == 0, capsys.readouterr().err
        assert (tmp_path / name / "result.json").exists()


# --- looking ---------------------------------------------------------------------------------------------------------


def test_preview_shows_rankings_that_were_collected(base, answers, tmp_path, run):
    run("prefer", answers, "--output", tmp_path / "o.jsonl", typed="1 2 3\n1=2 3\n1\n1\n")
    code, said, _ = run("preview", tmp_path / "o.jsonl", "--model", base, "--objective", "reward", "--rows", 1)
    assert code == 0 and "ranked (prompt, ranked)" in said and "place 1 of" in said


def test_the_commands_of_data_are_listed(run):
    code, said, _ = run("--help")
    assert code == 0 and all(name in said for name in ("preview", "prefer", "judge"))
    assert "no such command 'prefre'" in run("prefre")[2]
