"""Runs from end to end on a tiny base: what they write, keep, refuse, and how they go on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import forked
import tiny
from luthier import build
from luthier.cli import main
from luthier.core import LuthierError
from luthier.running.starting import execute
from luthier.saving import adapter, checkpoint
from luthier.settings.config import load_run
from tinyruns import QUIET, home_in, settings


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return home_in(tmp_path_factory.mktemp("home"))


def weights(folder):
    return load_file(next(p for p in (folder / "adapter" / "adapter_model.safetensors", folder / "model" / "model.safetensors") if p.exists()))


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_what_it_promises(home, tmp_path):
    result = execute(settings(home, tmp_path, "evaluate.tasks=[exact_match]", "log.to=[tensorboard]"), reporter=QUIET)
    folder = tmp_path / "r"
    there = {p.name for p in folder.iterdir()}
    assert there == {
        "run.yaml",
        "environment.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "best",
        "adapter",
        "result.json",
        "tensorboard",
        "facts.json",
        "report.html",
    }
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-6", "step-8"]
    assert result.after.loss.value < result.before.loss.value and result.after.general is not None
    assert "exact_match" in result.after.scores and result.before.scores
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["event"] for x in lines] == ["before"] + ["train"] * 4 + ["evaluation"] + ["train"] * 4 + ["evaluation", "after"]
    assert all(x["loss"] > 0 and x["tokens"] > 0 and x["lr"] >= 0 for x in lines if x["event"] == "train")
    samples = [json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 4, 8} and all(s["reference"] for s in samples)
    again = load_run(str(folder / "run.yaml"))
    assert again.optim.lr == 1e-2 and again.evaluate.every_steps == 4


def test_the_same_seed_twice_is_the_same_bits_and_another_is_not(home, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        execute(settings(home, tmp_path, f"name={name}", f"seed={seed}"), reporter=QUIET)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize(
    ("method", "objective", "data"), [("lora", "sft", "data.jsonl"), ("full", "sft", "data.jsonl"), ("lora", "text", "text.txt"), ("full", "text", "text.txt")]
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_combination_trains_saves_and_reopens(home, tmp_path, method, objective, data, precision):
    from luthier.opening import load

    run = settings(home, tmp_path, f"method={method}", f"objective={objective}", f"precision={precision}", data=data)
    result = execute(run, reporter=QUIET)
    assert result.after.loss.value < result.before.loss.value
    policy = load(tmp_path / "r", model=str(home / "base") if method == "lora" else None, precision="float32")
    assert len(policy.generate([[7, 8, 9]], max_new=3).ids[0]) >= 1


def test_recomputing_blocks_changes_no_weight(home, tmp_path):
    execute(settings(home, tmp_path, "name=a", "method.dropout=0"), reporter=QUIET)
    execute(settings(home, tmp_path, "name=b", "method.dropout=0", "recompute=blocks"), reporter=QUIET)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_early_stopping_ends_a_run_and_keeps_the_best(home, tmp_path):
    run = settings(home, tmp_path, "optim.lr=0.9", "optim.steps=30", "evaluate.every_steps=1", "evaluate.patience=2", "optim.clip=0", "evaluate.samples=0")
    result = execute(run, reporter=QUIET)
    assert result.steps < 30 and "no better validation loss in 2" in result.stopped
    history = [json.loads(x) for x in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    best = min((x for x in history if x["event"] == "evaluation"), key=lambda x: x["loss"])
    assert result.best_step == best["step"] and result.after.loss.value == pytest.approx(best["loss"], rel=1e-5)


def test_a_run_can_start_from_a_saved_delta(home, tmp_path):
    execute(settings(home, tmp_path, "name=a"), reporter=QUIET)
    second = execute(settings(home, tmp_path, "name=b", f"method.from={tmp_path / 'a'}"), reporter=QUIET)
    first = json.loads((tmp_path / "a" / "result.json").read_text())
    assert second.before.loss.value == pytest.approx(first["after"]["loss"]["value"], rel=1e-4)


class Poison:
    """Makes the loss infinite for some steps."""

    def __init__(self, monkeypatch, bad):
        from luthier.objectives.sft import Objective

        honest, calls = Objective.loss, [0]

        def loss(self, policy, batch):
            out = honest(self, policy, batch)
            if policy.training:
                calls[0] += 1
                if calls[0] in bad:
                    out.sums["tokens"] = out.sums["tokens"] * float("inf")
            return out

        monkeypatch.setattr(Objective, "loss", loss)


def test_a_step_that_is_not_finite_is_skipped_and_counted(home, tmp_path, monkeypatch):
    Poison(monkeypatch, {2, 5})
    execute(settings(home, tmp_path), reporter=QUIET)
    lines = [json.loads(x) for x in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x.get("skipped")] == [2, 5]
    assert all("data.jsonl:" in w for x in lines if x.get("skipped") for w in x["where"])
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "r").values())


def test_three_in_a_row_stop_the_run_and_name_the_examples(home, tmp_path, monkeypatch):
    Poison(monkeypatch, {4, 5, 6})
    with pytest.raises(LuthierError, match=r"three steps in a row were not finite.*data\.jsonl:\d+.*lower optim.lr"):
        execute(settings(home, tmp_path), reporter=QUIET)


def test_resuming_a_changed_run_shows_the_difference_and_refuses(home, tmp_path):
    execute(settings(home, tmp_path), reporter=QUIET)
    changed = load_run(str(tmp_path / "r" / "run.yaml"), ["optim.weight_decay=0.5"])
    with pytest.raises(LuthierError, match=r"optim\.weight_decay: 0\.01 -> 0\.5.*--accept-changes"):
        execute(changed, resume=tmp_path / "r", reporter=QUIET)
    execute(changed, resume=tmp_path / "r", accept_changes=True, reporter=QUIET)


def test_a_damaged_checkpoint_is_one_sentence(home, tmp_path):
    execute(settings(home, tmp_path), reporter=QUIET)
    newest = tmp_path / "r" / "checkpoints" / "step-8" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:200])
    with pytest.raises(LuthierError, match="damaged.*delete .*step-8 to go on from the checkpoint before it"):
        checkpoint.newest(tmp_path / "r")


def test_data_that_is_not_there_is_said_before_a_model_is_opened(home, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "open_base", lambda run: pytest.fail("a model was opened"))
    with pytest.raises(LuthierError, match=r"dat\.jsonl: no such file or folder\. Did you mean .*data\.jsonl"):
        execute(settings(home, tmp_path, data="dat.jsonl"), reporter=QUIET)
    with pytest.raises(LuthierError, match=r"held\.jsonl: no such file or folder"):
        execute(settings(home, tmp_path, f"data.validation={home / 'held.jsonl'}"), reporter=QUIET)


def test_nothing_half_written_stays_when_a_run_cannot_start(home, tmp_path):
    with pytest.raises(LuthierError):
        execute(settings(home, tmp_path, "method.targets=[nothing]"), reporter=QUIET)
    assert not (tmp_path / "r").exists()


def test_a_full_disk_is_found_before_the_start(home, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(LuthierError, match=r"needs .* of disk for checkpoints and 1 KB are free"):
        execute(settings(home, tmp_path), reporter=QUIET)


def arguments(home, out, *more, resume=None):
    what = ["--resume", str(resume)] if resume else [str(home / "data.jsonl"), "--model", str(home / "base")]
    shape = "optim.steps=12 optim.batch_tokens=300 optim.lr=1e-2 evaluate.every_steps=4 checkpoint.every_steps=1 evaluate.sample_tokens=4 method.dropout=0.1"
    fixed = [] if resume else [f"out={out}", "name=r", "precision=float32", *shape.split()]
    return ["train", *what, *fixed, *more]


def test_sigkill_at_random_steps_resumes_to_the_same_bits(home, tmp_path):
    """Again and again, each time wherever the run happens to be, and to the end by a fresh process; LUTHIER_KILLS=10 for the long form."""
    kills, rng = int(os.environ.get("LUTHIER_KILLS", "2")), random.Random(os.environ.get("LUTHIER_KILLS", "2"))
    code, said = forked.Program(main, arguments(home, tmp_path / "whole"), tmp_path / "said").wait()
    assert code == 0, said
    reached, killed = 0, 0
    while killed < kills:
        resume = tmp_path / "cut" / "r" if checkpoint.steps(tmp_path / "cut" / "r") else None
        program = forked.Program(main, arguments(home, tmp_path / "cut", resume=resume), tmp_path / "said")
        target = min(reached + rng.randint(1, 3), 11)
        while (checkpoint.steps(tmp_path / "cut" / "r") or [0])[-1] < target and not program.over():
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        program.send(signal.SIGKILL)
        code, said = program.wait()
        assert code in (0, -signal.SIGKILL), said
        killed += code == -signal.SIGKILL
        reached = (checkpoint.steps(tmp_path / "cut" / "r") or [0])[-1]
        if reached >= 11:  # start over: there is nothing left to interrupt
            if killed >= kills:
                break
            reached = 0
            _finish(home, tmp_path)
            _compare(tmp_path)
            subprocess.run(["rm", "-r", str(tmp_path / "cut")], check=True)
    if checkpoint.steps(tmp_path / "cut" / "r"):
        _finish(home, tmp_path)
        _compare(tmp_path)


def _finish(home, tmp_path):
    command = [sys.executable, "-m", "luthier", *arguments(home, tmp_path / "cut", resume=tmp_path / "cut" / "r")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _compare(tmp_path):
    assert same(weights(tmp_path / "whole" / "r"), weights(tmp_path / "cut" / "r"))
    losses = [
        [(x["event"], x["step"], x["loss"]) for x in map(json.loads, (tmp_path / d / "r" / "metrics.jsonl").read_text().splitlines())] for d in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(home, tmp_path):
    program = forked.Program(main, arguments(home, tmp_path / "cut", "optim.steps=4000"), tmp_path / "said")
    while not checkpoint.steps(tmp_path / "cut" / "r") and not program.over():
        time.sleep(0.02)
    program.send(signal.SIGINT)
    code, said = program.wait(60)
    assert code == 130, said
    assert "go on with: luthier train --resume" in said and "Traceback" not in said
    assert checkpoint.newest(tmp_path / "cut" / "r") is not None


def test_an_adapter_moved_elsewhere_still_finds_its_base_when_told(home, tmp_path):
    execute(settings(home, tmp_path), reporter=QUIET)
    moved = tmp_path / "moved"
    (tmp_path / "r" / "adapter").rename(moved)
    from luthier.opening import load

    assert adapter.is_adapter(moved) and isinstance(moved, Path)
    load(moved, model=str(home / "base"))
    tiny.folder(tmp_path / "other", seed=1)
    with pytest.raises(LuthierError, match="An adapter only fits its own base"):
        load(moved, model=str(tmp_path / "other"))
