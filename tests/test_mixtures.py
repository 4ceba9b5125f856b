"""Runs over several sources, from end to end on a tiny base: what they write by source, how they go on, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

import tiny
from luthier import opening
from luthier.cli import main
from luthier.measuring.measure import Measures
from luthier.running.progress import Reporter, rows_of
from luthier.running.starting import execute
from luthier.saving import checkpoint
from luthier.settings.config import load_run

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny base; pairs, labels, text, and records for templates."""
    folder = tmp_path_factory.mktemp("mixed")
    tiny.folder(folder / "base")
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))  # noqa: E731
    write("pairs.jsonl", [{"prompt": f"say {i}", "completion": f"{i} said"} for i in range(60)])
    write("moods.jsonl", [{"text": f"a {'fine' if i % 2 else 'dull'} day {i}", "label": "good" if i % 2 else "bad"} for i in range(24)])
    write("stars.jsonl", [{"text": f"a tale of {i}", "label": str(i % 3)} for i in range(24)])
    write("reviews.jsonl", [{"review": f"film {i}", "stars": i % 5, "title": f"Title {i}"} for i in range(20)])
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(f"A short story, number {i}, about nothing." for i in range(30)))
    return folder


def tree(home, out, sources, *, mix=None, objective=None, **more):
    sources = {n: (str(home / s) if isinstance(s, str) else s | {"files": str(home / s["files"])}) for n, s in sources.items()}
    return {
        "model": str(home / "base"),
        "data": {"mix": {"sources": sources} | (mix or {}), "validation_share": 0.2},
        "objective": objective or "sft",
        "precision": "float32",
        "optim": {"steps": 8, "batch_tokens": 400, "lr": 1e-2},
        "evaluate": {"every_steps": 4, "sample_tokens": 4, "forgetting": False},
        "checkpoint": {"every_steps": 2, "keep": 9},
        "out": str(out),
        "name": "r",
    } | more


MULTI = {
    "write": {"files": "pairs.jsonl", "objective": "sft"},
    "mood": {"files": "moods.jsonl", "objective": "classify"},
    "stars": {"files": "stars.jsonl", "objective": "classify"},
    "tales": {"files": "text.txt", "objective": "text"},
}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_multitask_run_tells_every_source_before_during_and_after(home, tmp_path, capsys):
    run = load_run(tree(home, tmp_path, MULTI, mix={"rule": "equal"}, objective="multitask"))
    reporter = Reporter()
    result = execute(run, reporter=reporter)
    reporter.result(result)
    told = {e: [x for x in lines(result.folder) if x["event"] == e] for e in ("before", "evaluation", "after", "train")}
    for one in told["before"] + told["evaluation"] + told["after"]:
        losses = [one[f"{name}/loss"] for name in MULTI]
        assert one["average_loss"] == pytest.approx(sum(losses) / 4)
        assert one["loss"] == pytest.approx(sum(losses))  # each part has one source here, and weight 1
    assert {"mood/accuracy", "stars/accuracy", "accuracy", "mood/epochs"} <= told["after"][0].keys() | told["evaluation"][0].keys()
    assert {"units_sft.tokens", "units_mood.examples", "loss_stars.examples", "loss_text.tokens"} <= set().union(*told["train"])
    assert told["after"][0]["mood/loss"] < told["before"][0]["mood/loss"]
    facts = json.loads((result.folder / "result.json").read_text())
    assert set(facts["after"]["sources"]) == set(facts["mixture"]) == set(MULTI)
    drawn = {n: s["drawn"] for n, s in facts["mixture"].items()}
    assert max(drawn.values()) - min(drawn.values()) <= 3 and facts["mixture"]["mood"]["epochs"] == pytest.approx(drawn["mood"] / 19)
    assert Measures.from_dict(facts["after"]).average == pytest.approx(told["after"][0]["average_loss"])
    table = rows_of(result.before, result.after)
    assert [k.strip() for k in table][:6] == ["held-out loss", "average of them", *MULTI]
    said = capsys.readouterr().out
    assert "an epoch is 110 draws" in said and re.search(r"mood +19 ", said) and "the mixture after 8 steps" in said
    policy = opening.load(result.artefact, precision="float32")
    assert policy.objective.parts["mood"].labels == ("bad", "good") and set(policy.heads) == {"mood/label", "stars/label"}


@pytest.mark.parametrize("stream", [False, True])
def test_killed_at_any_checkpoint_and_resumed_it_is_the_same_run(home, tmp_path, stream):
    sources = MULTI | {"write": {"files": "pairs.jsonl", "objective": "sft"} | ({"stream": True, "buffer": 16} if stream else {})}
    asked = tree(home, tmp_path / "whole", sources, mix={"rule": "equal"}, objective="multitask")
    whole = execute(load_run(asked), reporter=QUIET)
    for stop in (2, 6):
        part = execute(load_run(asked | {"out": str(tmp_path / f"at{stop}")}), reporter=QUIET).folder
        for step in checkpoint.steps(part):  # as it stood when it was killed
            if step > stop:
                shutil.rmtree(part / "checkpoints" / f"step-{step}")
        shutil.rmtree(part / "adapter")
        (part / "result.json").unlink()
        again = execute(load_run(str(part / "run.yaml")), resume=part, reporter=QUIET)
        assert [x["loss"] for x in lines(part) if x["event"] == "train"] == [x["loss"] for x in lines(whole.folder) if x["event"] == "train"]
        a, b = (opening.load(r.artefact, precision="float32").trained() for r in (whole, again))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_templates_ask_one_record_in_several_ways_and_keep_it_on_one_side(home, tmp_path):
    templates = [{"prompt": "Stars for {review}?", "completion": "{stars}"}, {"prompt": "{{{title}}}: good?", "completion": "{stars} of 5"}]
    source = {"files": "reviews.jsonl", "templates": templates, "tasks": ["exact_match"]}
    run = load_run(tree(home, tmp_path, {"reviews": source, "pairs": "pairs.jsonl"}))
    result = execute(run, reporter=QUIET)
    facts = json.loads((result.folder / "environment.json").read_text())["data"]["sources"]["reviews"]
    assert facts["records"] == 40 and facts["rows"] + facts["validation"]["rows"] == 40
    assert json.loads((result.folder / "result.json").read_text())["mixture"]["reviews"]["rows"] == 16  # records, not renderings
    after = next(x for x in lines(result.folder) if x["event"] == "after")
    assert "reviews/exact_match" in after and "pairs/exact_match" not in after
    samples = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()]
    assert {s["source"] for s in samples} == {"reviews", "pairs"}
    assert any(s["prompt"][0]["content"].startswith(("Stars for film", "{Title")) for s in samples)


def test_lists_of_files_are_put_end_to_end_as_ever(home):
    run = load_run(None, [f"data.train=[{home / 'pairs.jsonl'}, {home / 'text.txt'}]"])
    assert run.data.mix is None and run.data.files == run.data.train


def test_a_source_written_as_a_file_takes_settings_from_the_command_line(home, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  mix:\n    sources:\n      a: a.jsonl\n      b: [b.jsonl, c.jsonl]\n")
    run = load_run(str(file), ["data.mix.rule=weights", "data.mix.sources.a.weight=2", "data.mix.sources.b.weight=1", "data.mix.sources.b.files.1=d.jsonl"])
    assert run.data.mix is not None and [s.weight for s in run.data.mix.sources.values()] == [2.0, 1.0]
    assert run.data.files == ("a.jsonl", "b.jsonl", "d.jsonl")


WRITE = {"files": "pairs.jsonl"}
TWO = {"kind": "multitask", "parts": {"x": "sft", "y": "text"}}


def asked_by(prompt):
    return {"files": "reviews.jsonl", "templates": [{"prompt": prompt, "completion": "{stars}"}]}


BAD = [
    ("a rule misspelt", {"a": WRITE}, {"rule": "propotional"}, None, "did you mean proportional"),
    ("an unknown key of a source", {"a": WRITE | {"wieght": 1}}, {}, None, r"did you mean data\.mix\.sources\.a\.weight"),
    ("weights under another rule", {"a": WRITE | {"weight": 1}}, {}, None, r"set data\.mix\.rule=weights"),
    ("a weight missing", {"a": WRITE | {"weight": 1}, "b": WRITE}, {"rule": "weights"}, None, "b has no weight"),
    ("a temperature without its rule", {"a": WRITE}, {"temperature": 2}, None, "belongs to rule=temperature"),
    ("a cap that says nothing", {"a": WRITE}, {"rule": "equal", "cap": 5}, None, "does not look at sizes"),
    ("a temperature of nothing", {"a": WRITE}, {"rule": "temperature", "temperature": 0}, None, "above 0"),
    ("no sources", {}, {}, None, "names none"),
    ("a source's file missing", {"a": "pears.jsonl"}, {}, None, r"Did you mean .*pairs\.jsonl"),
    ("a part without multitask", {"a": WRITE | {"objective": "sft"}}, {}, "sft", "set objective=multitask"),
    ("a source of no part", {"a": WRITE}, {}, "multitask", r"say which learns its rows"),
    ("a part that is no kind", {"a": WRITE | {"objective": "stf"}}, {}, "multitask", "found 'stf', accepted are"),
    ("a part without a source", {"a": WRITE | {"objective": "x"}}, {}, TWO, "no source of data.mix is for the part 'y'"),
    ("a rollout part", {"a": WRITE | {"objective": "ppo"}}, {}, "multitask", "own answers"),
    ("a mixture of prompts", {"a": WRITE}, {}, {"kind": "ppo", "rewards": {"exact_match": 1.0}}, "takes in turns"),
    ("one head for two sources", {"a": "moods.jsonl", "b": "stars.jsonl"}, {}, "classify", r"objective\.labels"),
    ("a template's column missing", {"a": asked_by("{revue}")}, {}, None, "Did you mean 'review'"),
    ("a brace that stands alone", {"a": asked_by("{review")}, {}, None, "a brace"),
    ("templates beside columns", {"a": WRITE | {"columns": {"prompt": "x"}, "templates": [{"prompt": "a", "completion": "b"}]}}, {}, None, "leave columns"),
    ("templates for labels", {"a": asked_by("{review}")}, {}, "text", "prompts with completions"),
    ("a stream of unknown size", {"a": WRITE | {"stream": True}}, {}, None, "how many"),
    ("rows of what is counted", {"a": WRITE | {"rows": 5}}, {}, None, "read whole and counted"),
    ("a stream without steps", {"a": WRITE | {"stream": True, "rows": 60}}, {"no steps": True}, None, r"optim\.steps: must be given"),
]  # fmt: skip


@pytest.mark.parametrize(("sources", "mix", "objective", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_mixture_is_one_clear_sentence_and_leaves_nothing(home, tmp_path, capsys, sources, mix, objective, says):
    import yaml

    steps = {} if mix.pop("no steps", False) else {"steps": 2}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree(home, tmp_path / "runs", sources, mix=mix, objective=objective, optim=steps)))
    code, err = main(["train", str(file)]), capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in err, err
    assert re.search(says, errors[0]), errors[0]
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_files_beside_a_mixture_and_multitask_without_one_are_refused(home, tmp_path, capsys):
    import yaml

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree(home, tmp_path / "runs", {"a": WRITE})))
    assert main(["train", str(file), f"data.train={home / 'pairs.jsonl'}"]) == 2
    assert "data.mix names its own" in capsys.readouterr().err
    assert main(["train", str(home / "pairs.jsonl"), "objective=multitask", f"out={tmp_path}"]) == 2
    assert "learns the sources of data.mix" in capsys.readouterr().err
