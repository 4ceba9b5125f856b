"""luthier eval on a tiny run: slices, another run beside it, a judge, labels; and what it refuses."""

import json

import pytest

import tiny
from luthier.cli import main
from stub_judge import parts, serving


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny base, two runs on it and held-out rows of two kinds."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.folder(folder / "base")
    rows = [{"prompt": f"word {i}" + " more" * (i % 3), "completion": f"answer {i}", "kind": "odd" if i % 2 else "even"} for i in range(30)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, steps in (("r", 6), ("less", 2)):
        settings = [f"optim.steps={steps}", "optim.batch_tokens=200", "precision=float32", "optim.lr=2e-2", f"out={folder / 'runs'}", f"name={name}"]
        more = ["evaluate.samples=0", "evaluate.forgetting=no"]
        assert main(["train", str(folder / "data.jsonl"), "--model", str(folder / "base"), "--quiet", *settings, *more]) == 0
    return folder


def said(capsys, home, *arguments):
    code = main(["eval", str(home / "runs" / "r"), "--data", str(home / "data.jsonl"), "--max-new", "6", "--precision", "float32", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_every_number_has_its_interval_its_difference_and_its_slices(home, capsys):
    code, out, _ = said(capsys, home, "--task", "f1", "--task", "bleu", "--by", "kind", "--by", "length", "--json")
    found = json.loads(out)
    tuned = found["scores"]["tuned"]
    assert code == 0 and set(tuned) == {"loss per token", "perplexity", "f1", "bleu"}
    assert all(v["low"] <= v["value"] <= v["high"] and v["n"] == 30 for v in tuned.values())
    gap = found["differences"]["tuned - base"]["loss per token"]
    assert gap["value"] == pytest.approx(tuned["loss per token"]["value"] - found["scores"]["base"]["loss per token"]["value"])
    assert gap["verdict"] == "better" and gap["p"] < 0.01
    kinds = found["slices"]["tuned"]["kind"]["scores"]["loss per token"]
    assert {k: v["n"] for k, v in kinds.items()} == {"even": 15, "odd": 15}
    assert kinds["even"]["value"] != tuned["loss per token"]["value"] and set(found["slices"]) == {"tuned", "base"}
    assert found["slices"]["tuned"]["kind"]["worst"]["loss per token"]["slice"] in kinds
    code, out, _ = said(capsys, home, "--task", "f1", "--by", "kind")
    assert code == 0 and "tuned - base, on the same rows:" in out and "by kind, tuned:" in out and "clearly worse" in out


def test_another_run_is_paired_with_it_and_a_judge_compares_their_answers(home, capsys, tmp_path):
    longer = lambda payload: "Verdict: A" if len(parts(payload)[1]) > len(parts(payload)[2]) else "Verdict: B"  # noqa: E731
    with serving(longer) as stub:
        ask = ("--against", home / "runs" / "less", "--alone", "--judge", stub.url, "--rows", 8, "--json", "--output", tmp_path / "o.jsonl")
        code, out, err = said(capsys, home, *ask)
    found, lines = json.loads(out), [json.loads(x) for x in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert code == 0 and set(found["scores"]) == {"tuned", "less"} and "judge: stub" in err
    assert found["differences"]["tuned - less"]["loss per token"]["n"] == 30
    wins = found["wins"]["tuned against less"]
    sizes = [(len(x["tuned"].strip()), len(x["less"].strip())) for x in lines if x["tuned"].strip() != x["less"].strip()]
    assert wins["wins"] == sum(a > b for a, b in sizes) and wins["losses"] == sum(a < b for a, b in sizes)
    assert wins["wins"] + wins["ties"] + wins["losses"] == 8


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--by", "knd"), "did you mean kind"),
        (("--judge", "http://127.0.0.1:9/v1", "--judge-model", "m", "--alone"), "name the other with --against"),
        (("--judge", "nowhere"), "there is no such folder"),
        (("--principle", "be kind"), "are of --judge"),
        (("--against", "base", "--alone"), "contradict one another"),
        (("--harness-tasks", "x"), "--harness-tasks is of --harness"),
        (("--task", "f1 normalize=x"), "normalise"),
    ],
)
def test_what_does_not_go_together_is_said(home, capsys, arguments, sentence):
    code, _, err = said(capsys, home, "--rows", 1, *arguments)
    assert code == 2 and sentence in err, err


def test_without_data_or_tasks_it_says_what_to_name(home, capsys):
    assert main(["eval", str(home / "base")]) == 2
    assert "--data is missing" in capsys.readouterr().err
