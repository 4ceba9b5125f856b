"""Stages from end to end on a tiny base: what they hand on, skip, go on with, refuse and report, and that a kill anywhere changes no bit."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from luthier import atomic
from luthier.errors import ConfigError, Interrupted, LuthierError
from luthier.opening import load
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.saving import adapter, checkpoint
from luthier.settings import config
from luthier.settings.config import load_run
from luthier.staging import ledger, relay
from luthier.staging.ledger import Ledger, sha256
from luthier.staging.relay import train_stages
from luthier.staging.stages import load_stages

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Between two stages garbage is collected, which is slow where other tests have left a million objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A tiny base, and data for three stages."""
    folder = tmp_path_factory.mktemp("stages")
    tiny.folder(folder / "base")
    rng = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three"]
    prompts = [" ".join(rng.choices(words, k=rng.randint(2, 5))) for _ in range(24)]
    (folder / "books.txt").write_text("\n<|endoftext|>\n".join(f"A short story, number {i}, about nothing at all." for i in range(20)))
    (folder / "general.txt").write_text("The river runs to the sea.\n")
    (folder / "chats.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": p.upper()}) + "\n" for p in prompts))
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"prompt": p, "chosen": p.upper(), "rejected": p}) + "\n" for p in prompts))
    return folder


def settings(home, out, name="s"):
    """Full fine-tuning on text, LoRA on answers, the same LoRA on pairs."""
    lora = {"kind": "lora", "rank": 4, "dropout": 0.1}
    return {
        "model": str(home / "base"),
        "precision": "float32",
        "name": name,
        "out": str(out),
        "data": {"general": [str(home / "general.txt")], "validation_rows": 3},
        "optim": {"steps": 4, "batch_tokens": 150, "lr": 1e-2},
        "evaluate": {"every_steps": 2, "samples": 1, "sample_tokens": 2},
        "checkpoint": {"every_steps": 1},
        "stages": {
            "reading": {"objective": "text", "method": "full", "data": str(home / "books.txt")},
            "sft": {"model": "stage:reading", "method": lora, "data": str(home / "chats.jsonl")},
            "dpo": {"model": "stage:reading", "method": lora | {"from": "stage:sft"}, "objective": "dpo", "data": str(home / "pairs.jsonl")},
        },
    }


@pytest.fixture(scope="session")
def whole(home, tmp_path_factory):
    """All stages in one go; not to be changed."""
    out = tmp_path_factory.mktemp("whole")
    return train_stages(settings(home, out), reporter=QUIET)


@pytest.fixture
def copied(whole, tmp_path):
    """The finished stages, to change."""
    subprocess.run(["cp", "-a", str(whole.folder), str(tmp_path / "s")], check=True)
    return tmp_path / "s"


WEIGHTS = {"reading": "1-reading/model/model.safetensors", "sft": "2-sft/adapter/adapter_model.safetensors", "dpo": "3-dpo/adapter/adapter_model.safetensors"}


def same(a, b):
    a, b = load_file(a), load_file(b)
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def all_same(a, b):
    return all(same(a / f, b / f) for f in WEIGHTS.values())


def told(folder):
    return {r["name"]: r for r in json.loads((folder / "stages.json").read_text())["stages"]}


# --- what they leave ------------------------------------------------------------------------------------------------


def test_stages_are_trained_in_order_and_handed_on_by_hash(whole, home):
    folder = whole.folder
    assert {p.name for p in folder.iterdir()} == {"run.yaml", "stages.json", "report.md", "1-reading", "2-sft", "3-dpo", ".references"}
    records = told(folder)
    for name, file in WEIGHTS.items():
        r = records[name]
        assert r["state"] == "done" and r["sha256"] == {Path(file).name: sha256(folder / file)} and f"{r['artefact']}/{Path(file).name}" == file
        assert r["result"]["tokens"] > 0 and r["result"]["peak_bytes"] > 1e7 and r["started"] <= r["finished"]
    assert records["dpo"]["handed"] == {"reading": records["reading"]["sha256"], "sft": records["sft"]["sha256"]}
    assert set(records["reading"]["inputs"]) == {str(home / "books.txt"), str(home / "general.txt"), f"model {home / 'base'}"}
    assert records["sft"]["settings"]["model"]["id"] == "stage:reading"
    assert json.loads((folder / "stages.json").read_text())["artefact"] == "3-dpo/adapter"
    assert list(whole.results) == ["reading", "sft", "dpo"] and whole.artefact == folder / "3-dpo" / "adapter"


def test_a_stage_begins_where_the_one_before_ended(whole):
    r = whole.results
    assert r["sft"].before.general.value == pytest.approx(r["reading"].after.general.value, rel=1e-5)  # model: stage:reading
    assert r["dpo"].before.general.value == pytest.approx(r["sft"].after.general.value, rel=1e-5)  # from: stage:sft
    assert r["dpo"].before.loss.value == pytest.approx(0.6931, abs=1e-4)  # its reference is what it begins from
    assert not same(whole.folder / WEIGHTS["sft"], whole.folder / WEIGHTS["dpo"])


def test_an_adapter_of_a_stage_finds_its_base_from_anywhere(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = settings(home, "runs") | {"optim": {"steps": 1, "batch_tokens": 150}}
    train_stages(tree, reporter=QUIET)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("2-sft", "3-dpo"):
        policy = load(tmp_path / "runs" / "s" / name, precision="float32")
        assert Path(policy.base.source) == tmp_path / "runs" / "s" / "1-reading" / "model"
        peft = json.loads((tmp_path / "runs" / "s" / name / "adapter" / "adapter_config.json").read_text())
        assert peft["base_model_name_or_path"] == policy.base.source


def test_a_stage_of_a_chain_is_the_run_it_would_be_alone_bit_for_bit(whole, tmp_path):
    for name in ("2-sft", "3-dpo"):
        relay.as_fresh(load_run(None), torch.get_num_threads())
        alone = execute(load_run(whole.folder / name / "run.yaml", [f"out={tmp_path}", f"name={name}"]), reporter=QUIET)
        assert same(alone.artefact / "adapter_model.safetensors", whole.folder / name / "adapter" / "adapter_model.safetensors")


def test_every_stage_finds_the_process_as_the_first_one_did(home, tmp_path, monkeypatch):
    found, honest, before = [], relay.execute, torch.get_num_threads()

    def execute(run, **how):
        denormal = float(torch.tensor([1e-40]) * 0.5)  # zero where they are flushed, as a run does for good
        found.append((torch.get_num_threads(), denormal > 0, torch.rand(1).item(), random.random()))
        result = honest(run, **how)
        torch.set_num_threads(before + 1)  # as place.threads does
        return result

    monkeypatch.setattr(relay, "execute", execute)
    try:
        train_stages(settings(home, tmp_path), reporter=QUIET)
    finally:
        torch.set_num_threads(before)
    assert len(found) == 3 and set(found) == {found[0]} and found[0][1]


def test_no_tensor_of_a_stage_is_left_when_the_next_one_starts(home, tmp_path, monkeypatch):
    left, honest = [], relay.execute
    big = lambda: {id(o) for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.numel() > 1000}  # noqa: E731
    before = big()
    monkeypatch.setattr(relay, "execute", lambda run, **how: left.append(len(big() - before)) or honest(run, **how))
    train_stages(settings(home, tmp_path), reporter=QUIET)
    assert left == [0, 0, 0]


def test_full_fine_tuning_may_begin_from_a_model_of_full_fine_tuning(home, tmp_path):
    tree = settings(home, tmp_path)
    tree["stages"] = {"a": tree["stages"]["reading"], "b": {"model": "stage:a", "method": "full", "data": str(home / "chats.jsonl")}}
    done = train_stages(tree, reporter=QUIET)
    assert done.results["b"].before.general.value == pytest.approx(done.results["a"].after.general.value, rel=1e-5)
    assert done.artefact == tmp_path / "s" / "2-b" / "model" and load(done.artefact, precision="float32").base.source == str(done.artefact)


# --- going on -------------------------------------------------------------------------------------------------------


def test_stages_are_among_the_public_names(whole):
    import luthier

    assert luthier.train_stages is train_stages and luthier.load_stages(whole.folder / "run.yaml").stage("sft").folder == "2-sft"


def test_finished_stages_are_skipped(copied):
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.is_file() and p.parent != copied}
    again = train_stages(resume=copied, reporter=QUIET)
    assert again.results == {} and [r.state for r in again.records] == ["done"] * 3
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.is_file() and p.parent != copied} == before


def test_the_same_command_again_gives_the_usual_error(whole, home):
    with pytest.raises(LuthierError, match=r"there is a run of this name already; .* luthier train --resume .*/s$"):
        train_stages(settings(home, whole.folder.parent), reporter=QUIET)


def test_a_changed_stage_makes_those_after_it_stale_and_stops(copied):
    change = ["stages.reading.optim.weight_decay=0.5"]
    with pytest.raises(LuthierError) as e:
        train_stages(copied / "run.yaml", change, resume=copied, reporter=QUIET)
    said = str(e.value)
    assert "stage reading is not as it was trained: its settings have changed (optim.weight_decay: 0.01 -> 0.5)" in said
    assert "sft and dpo began from what is, or will be, another, so they are stale" in said and "--accept-changes to train reading, sft, dpo again" in said
    assert not (copied / "1-reading.1").exists()
    train_stages(copied / "run.yaml", change, resume=copied, accept_changes=True, reporter=QUIET)
    assert (copied / "1-reading.1" / "result.json").is_file() and (copied / "3-dpo.1" / "adapter").is_dir()  # what was there is kept
    assert told(copied)["sft"]["handed"]["reading"] == {"model.safetensors": sha256(copied / WEIGHTS["reading"])}
    assert load_stages(copied / "run.yaml").stage("reading").asked.optim.weight_decay == 0.5
    assert train_stages(resume=copied, reporter=QUIET).results == {}  # nothing is left to do


def test_a_changed_last_stage_is_trained_again_alone(copied, whole):
    done = train_stages(copied / "run.yaml", ["stages.dpo.optim.steps=3"], resume=copied, accept_changes=True, reporter=QUIET)
    assert list(done.results) == ["dpo"] and same(copied / WEIGHTS["sft"], whole.folder / WEIGHTS["sft"])


def test_what_changes_nothing_of_the_result_makes_nothing_stale(copied):
    change = ["log.every_steps=2", "checkpoint.keep=1", "stages.sft.checkpoint.every_steps=2"]
    assert train_stages(copied / "run.yaml", change, resume=copied, reporter=QUIET).results == {}


def test_a_setting_that_is_new_in_the_program_makes_nothing_stale(copied):
    """Written by a version that did not know recompute, and knew a setting that is gone."""
    path = copied / "stages.json"
    told = json.loads(path.read_text())
    for r in told["stages"]:
        del r["settings"]["recompute"]
        r["digest"] = "of another version"
    path.write_text(json.dumps(told))
    assert train_stages(resume=copied, reporter=QUIET).results == {}
    told["stages"][2]["settings"]["gone"] = 1
    path.write_text(json.dumps(told))
    with pytest.raises(LuthierError, match="stage dpo is not as it was trained: its settings have changed .*gone: 1 -> not there"):
        train_stages(resume=copied, reporter=QUIET)


def test_a_changed_file_of_data_is_a_change(home, tmp_path):
    own = tmp_path / "chats.jsonl"
    own.write_bytes((home / "chats.jsonl").read_bytes())
    tree = settings(home, tmp_path)
    tree["stages"] = {"sft": {"data": str(own)}, "more": {"method": {"from": "stage:sft"}, "data": str(home / "chats.jsonl")}}
    train_stages(tree, reporter=QUIET)
    os.utime(own)  # touched, not changed
    assert train_stages(resume=tmp_path / "s", reporter=QUIET).results == {}
    own.write_text(own.read_text() + json.dumps({"prompt": "more", "completion": "MORE"}) + "\n")
    with pytest.raises(LuthierError, match=r"stage sft is not as it was trained: .*chats\.jsonl is not what it was; more began from .* stale"):
        train_stages(resume=tmp_path / "s", reporter=QUIET)


def test_an_artefact_that_was_changed_on_disk_makes_what_came_of_it_stale(copied):
    path = copied / WEIGHTS["reading"]
    tensors = load_file(path)
    torch.manual_seed(0)
    tensors["model.norm.weight"] += 0.1
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(LuthierError, match=r"what stage reading left has been changed since, on disk; sft and dpo began .* stale; .* to train sft, dpo again"):
        train_stages(resume=copied, reporter=QUIET)
    done = train_stages(resume=copied, accept_changes=True, reporter=QUIET)
    assert list(done.results) == ["sft", "dpo"] and told(copied)["reading"]["sha256"] == {"model.safetensors": sha256(path)}


def test_an_artefact_that_is_gone_is_made_again_where_it_is_needed_and_to_the_same_bits(copied, whole):
    subprocess.run(["rm", "-r", str(copied / "1-reading" / "model")], check=True)
    assert train_stages(resume=copied, reporter=QUIET).results == {}  # everything it was for is done
    subprocess.run(["rm", "-r", str(copied / "3-dpo")], check=True)
    done = train_stages(resume=copied, reporter=QUIET)
    assert list(done.results) == ["reading", "dpo"] and all_same(copied, whole.folder)  # sft was handed these bits before, so it stays


def test_a_kill_while_something_gone_is_made_again_asks_for_nothing_more(copied, whole, home):
    for gone in ("1-reading/model", "3-dpo"):
        subprocess.run(["rm", "-r", str(copied / gone)], check=True)
    tree = settings(home, copied.parent)
    assert run_until(tree, lambda: (copied / "1-reading.1").exists() and checkpoint.steps(copied / "1-reading"), resume=copied) == -signal.SIGKILL
    done = train_stages(resume=copied, reporter=QUIET)
    assert list(done.results) == ["reading", "dpo"] and all_same(copied, whole.folder)


def test_what_is_made_again_with_other_bits_makes_what_came_of_it_stale(copied, monkeypatch):
    """As on another machine: the settings are the same and the bits are not."""
    for gone in ("1-reading/model", "3-dpo"):
        subprocess.run(["rm", "-r", str(copied / gone)], check=True)
    honest = relay.execute
    elsewhere = lambda run, **how: honest(replace(run, seed=9) if run.name == "1-reading" else run, **how)  # noqa: E731
    monkeypatch.setattr(relay, "execute", elsewhere)
    with pytest.raises(
        LuthierError, match="stage reading was made again and came out with other bits than before .*; sft came of the earlier ones: say --accept"
    ):
        train_stages(resume=copied, reporter=QUIET)
    with pytest.raises(LuthierError, match="sft and dpo began from what is, or will be, another, so they are stale"):
        train_stages(resume=copied, reporter=QUIET)
    assert list(train_stages(resume=copied, accept_changes=True, reporter=QUIET).results) == ["sft", "dpo"]


def test_stages_may_be_added_and_the_file_given_anew(copied, home, whole):
    tree = settings(home, copied.parent)
    tree["stages"]["more"] = {
        "model": "stage:reading",
        "method": {"kind": "lora", "rank": 4, "dropout": 0.1, "from": "stage:dpo"},
        "data": str(home / "chats.jsonl"),
    }
    done = train_stages(tree, resume=copied, reporter=QUIET)
    assert list(done.results) == ["more"] and (copied / "4-more" / "adapter").is_dir() and all_same(copied, whole.folder)


def test_one_stage_alone(home, tmp_path, whole):
    tree = settings(home, tmp_path)
    with pytest.raises(LuthierError, match="stage sft needs what stage reading leaves, which is not there yet; train that first: --stage reading"):
        train_stages(tree, only="sft", reporter=QUIET)
    assert not (tmp_path / "s").exists()
    for name in ("reading", "sft", "dpo"):
        assert list(train_stages(tree, only=name, reporter=QUIET).results) == [name]
    assert all_same(tmp_path / "s", whole.folder)
    with pytest.raises(LuthierError, match="2-sft: stage sft is done already"):
        train_stages(tree, only="sft", reporter=QUIET)
    tree["stages"]["reading"]["seed"] = 3
    with pytest.raises(LuthierError, match=r"stage sft needs what stage reading left, and of that stage its settings have changed \(seed: 0 -> 3\)"):
        train_stages(tree, only="sft", reporter=QUIET)
    with pytest.raises(ConfigError, match="there is no stage 'stf'; did you mean sft"):
        train_stages(tree, only="stf", reporter=QUIET)


def test_a_folder_that_was_moved_goes_on_where_it_is_now(home, tmp_path, whole):
    tree = settings(home, tmp_path, name="a")
    assert run_until(tree, lambda: checkpoint.steps(tmp_path / "a" / "3-dpo")) == -signal.SIGKILL
    (tmp_path / "a").rename(tmp_path / "b")
    train_stages(resume=tmp_path / "b", reporter=QUIET)
    assert all_same(tmp_path / "b", whole.folder) and not (tmp_path / "a").exists()


def test_an_interrupted_stage_takes_new_settings_only_when_told_and_then_goes_on(home, tmp_path):
    tree = settings(home, tmp_path)
    run_until(tree, lambda: checkpoint.steps(tmp_path / "s" / "2-sft"))
    change = ["stages.sft.optim.weight_decay=0.2"]
    with pytest.raises(LuthierError, match=r"stage sft is not .*weight_decay: 0.01 -> 0.2.*to go on with sft from the last checkpoint under the new settings"):
        train_stages(tree, change, resume=tmp_path / "s", reporter=QUIET)
    train_stages(tree, change, resume=tmp_path / "s", accept_changes=True, reporter=QUIET)
    run = load_run(tmp_path / "s" / "2-sft" / "run.yaml")
    assert run.optim.weight_decay == 0.2 and not (tmp_path / "s" / "2-sft.1").exists()
    lines = [json.loads(x) for x in (tmp_path / "s" / "2-sft" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["event"] == "train"] == [1, 2, 3, 4]


# --- kills ----------------------------------------------------------------------------------------------------------


def child(body):
    """A process that runs ``body`` and ends; its number. Forked, so that a kill costs no import."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except Interrupted:
            os._exit(130)
        except BaseException:
            os._exit(1)
    return pid


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_until(tree, reached, *, resume=None, pause=0.0):
    """Train, and SIGKILL the process when something is reached; its exit code."""
    pid = child(lambda: train_stages(tree, resume=resume, reporter=QUIET))
    deadline = time.monotonic() + 120
    while not reached() and time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return 0
        time.sleep(0.002)
    time.sleep(pause)
    os.kill(pid, signal.SIGKILL)
    return ended(pid)


@pytest.mark.parametrize("stage", ["1-reading", "2-sft", "3-dpo"])
def test_a_sigkill_in_any_stage_goes_on_to_the_same_bits(home, tmp_path, whole, stage):
    rng = random.Random(stage)
    tree, step = settings(home, tmp_path), rng.randint(1, 3)
    code = run_until(tree, lambda: (checkpoint.steps(tmp_path / "s" / stage) or [0])[-1] >= step, pause=rng.random() * 0.02)
    assert code == -signal.SIGKILL and told(tmp_path / "s")[stage[2:]]["state"] == "running"
    train_stages(resume=tmp_path / "s", reporter=QUIET)
    assert all_same(tmp_path / "s", whole.folder)
    losses = [
        [(x["event"], x["step"], x.get("loss")) for x in map(json.loads, (f / stage / "metrics.jsonl").read_text().splitlines())]
        for f in (tmp_path / "s", whole.folder)
    ]
    assert losses[0] == losses[1]


def kills_itself(module, name, when):
    """A function that kills the process at its n-th call, before it does anything."""
    honest, calls = getattr(module, name), [0]

    def dies(*args, **kwargs):
        calls[0] += 1
        if calls[0] == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*args, **kwargs)

    return dies


@pytest.mark.parametrize(
    ("where", "when"),
    [
        ((relay.Ledger, "write"), 1),  # before there is a folder
        ((relay.Ledger, "write"), 2),  # the folder is there, no stage has begun
        ((relay, "execute"), 2),  # the second stage is said to run, and has not begun
        ((relay.Ledger, "write"), 5),  # the second stage is finished, and not yet said to be
        ((adapter, "save"), 2),  # trained, and not saved
        ((atomic, "as_json"), 3),  # while a record is written
        ((relay.overview, "markdown"), 2),  # recorded, and not reported
    ],
)
def test_a_sigkill_between_two_steps_of_the_bookkeeping_loses_nothing(home, tmp_path, whole, where, when):
    tree = settings(home, tmp_path)

    def body():
        setattr(*where, kills_itself(*where, when))
        train_stages(tree, reporter=QUIET)

    assert ended(child(body)) == -signal.SIGKILL
    there = (tmp_path / "s").exists()
    train_stages(tree, resume=tmp_path / "s" if there else None, reporter=QUIET)
    assert all_same(tmp_path / "s", whole.folder) and [r["state"] for r in told(tmp_path / "s").values()] == ["done"] * 3
    assert not list((tmp_path / "s").rglob("*.tmp"))


def test_a_full_disk_in_the_middle_is_one_sentence_and_the_stages_go_on(home, tmp_path, whole, monkeypatch):
    tree = settings(home, tmp_path)
    honest, calls = checkpoint.save, [0]

    def full(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 6:  # the second checkpoint of the second stage
            monkeypatch.setattr("luthier.saving.checkpoint.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        return honest(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(LuthierError, match=r"stage sft: .*step-2: cannot be written: No space left on device.*stages before it are kept; .*--resume .*/s$"):
        train_stages(tree, reporter=QUIET)
    monkeypatch.undo()
    states = {n: r["state"] for n, r in told(tmp_path / "s").items()}
    assert states == {"reading": "done", "sft": "running", "dpo": "waiting"}
    assert json.loads((tmp_path / "s" / "stages.json").read_text())["artefact"] is None
    train_stages(resume=tmp_path / "s", reporter=QUIET)
    assert all_same(tmp_path / "s", whole.folder)


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(home, tmp_path):
    tree = settings(home, tmp_path)
    tree["stages"]["sft"]["optim"] = {"steps": 3000}
    (tmp_path / "run.yaml").write_text(json.dumps(tree))  # JSON is YAML
    process = subprocess.Popen(
        [sys.executable, "-m", "luthier", "train", str(tmp_path / "run.yaml")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not checkpoint.steps(tmp_path / "s" / "2-sft") and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "stage sft: stopped after step" in err and err.rstrip().endswith(f"everything is saved; go on with: luthier train --resume {tmp_path / 's'}")
    assert told(tmp_path / "s")["sft"]["state"] == "running"


def test_a_stage_that_cannot_start_leaves_nothing_of_itself(home, tmp_path, monkeypatch):
    tree = settings(home, tmp_path)
    honest = relay.execute
    monkeypatch.setattr(
        relay, "execute", lambda run, **k: honest(run, **k) if "reading" in run.name else honest(config.load_run({**config.plain(run), "tokens": ["A"]}), **k)
    )
    with pytest.raises(LuthierError, match=r"stage sft: tokens: 'A' is already in this model's vocabulary.*; the stages before it are kept"):
        train_stages(tree, reporter=QUIET)
    assert not (tmp_path / "s" / "2-sft").exists() and told(tmp_path / "s")["sft"]["state"] == "waiting"


# --- the ledger -----------------------------------------------------------------------------------------------------


def test_a_damaged_ledger_is_one_sentence(copied):
    (copied / "stages.json").write_text('{"stages": [')
    with pytest.raises(LuthierError, match=r"stages\.json: damaged .*nothing says which stages are done"):
        train_stages(resume=copied, reporter=QUIET)


def test_a_folder_of_a_single_run_is_not_taken_for_one_of_stages(whole, home):
    with pytest.raises(ConfigError, match=r"2-sft: this run has no stages; go on with it by itself"):
        train_stages(settings(home, whole.folder), resume=whole.folder / "2-sft", reporter=QUIET)


def test_hashes_are_those_of_sha256sum(whole):
    path = whole.folder / WEIGHTS["sft"]
    assert ledger.artefact_hashes(path.parent) == {
        path.name: subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]
    }
    assert ledger.artefact_hashes(whole.folder / "nowhere") == {}


def test_a_stage_that_left_the_file_keeps_its_record(copied, home):
    tree = settings(home, copied.parent)
    del tree["stages"]["dpo"]
    train_stages(tree, resume=copied, reporter=QUIET)
    assert list(told(copied)) == ["reading", "sft", "dpo"]
    assert train_stages(settings(home, copied.parent), resume=copied, reporter=QUIET).results == {}
    assert Ledger.read(copied).records["dpo"].state == "done"
