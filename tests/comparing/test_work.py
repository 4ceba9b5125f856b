"""The jobs themselves, on a tiny base: looking at it, searching a rate, training, testing; and a run that is killed while it trains."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import tiny
from luthier import build, opening
from luthier.comparing import examine, latency
from luthier.comparing.files import own_bytes
from luthier.comparing.ground import ground
from luthier.comparing.held import Reading
from luthier.comparing.search import search
from luthier.comparing.sweep import rows_of
from luthier.comparing.work import final
from luthier.core import Incompatible
from luthier.measuring.evaluate import loss_on
from luthier.policy import Policy
from luthier.reading import form_of
from luthier.settings import config


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A tiny base and rows that say a colour back."""
    folder = tmp_path_factory.mktemp("work")
    tiny.folder(folder / "base")
    rng = random.Random(0)
    rows = [{"prompt": f"{i} {(c := rng.choice(['red', 'green', 'blue']))}", "completion": c} for i in range(150)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    labels = [{"text": r["prompt"], "label": r["completion"]} for r in rows]
    (folder / "labels.jsonl").write_text("".join(json.dumps(r) + "\n" for r in labels))
    return folder


def rows(where, *settings, data="data.jsonl"):
    own = [f"model={where / 'base'}", f"data={where / data}", "precision=float32", "optim.batch_tokens=300", "data.validation_share=0.2"]
    return rows_of(None, [*own, *settings]).rows


def looked(where, *settings, **more):
    some = rows(where, *settings, **more)
    return some, ground(
        {"rows": [{"name": r.name, "run": config.plain(r.run)} for r in some], "test": [], "seed": 0, "answering": 5.0, "out": str(where / "runs")}
    )


@pytest.fixture(scope="module")
def seen(where):
    return looked(where, "methods=[lora,prefix,crafted_prompt]")


def task(seen, row, **more):
    some, g = seen
    run = config.plain(next(r for r in some if r.name == row).run)
    tested = {k: g[k] for k in ("most", "loss_rows", "max_new")}
    shared = {"run": run, "test": [], "seed": 0, "positions": g["positions"], "max_tokens": g["max_tokens"], "tested": tested, "choose": 30, "curve_rows": 8}
    return shared | more


def test_the_base_is_looked_at_with_its_baselines_and_every_row_s_size(seen):
    _, g = seen
    assert g["rows"]["lora"]["trained"] > 0 and g["rows"]["crafted_prompt"]["chooses"]
    assert len(g["answers"]["copy"]) == g["most"] == len(g["records"]) == len(g["answers"]["base"])
    assert g["task"] == "bleu" and len(g["base"]["losses"]) == g["test_rows"] and g["base"]["latency"]["merged"]["token"] > 0
    assert g["positions"] == 512 - 20  # the prefix's room, for all: the same rows for every method
    assert all(g["took"][k] > 0 for k in ("losses", "answers", "general", "latency"))


def test_a_classifier_s_base_says_nothing_and_a_prompt_is_refused_with_the_reason(where):
    _, g = looked(where, "methods=[lora,crafted_prompt]", "objective=classify", data="labels.jsonl")
    assert g["base"] is None and "random" in g["no_base"]
    assert "trains nothing" in g["rows"]["crafted_prompt"]["refused"] and "refused" not in g["rows"]["lora"]
    assert set(g["answers"]) == {"copy", "commonest"} and len({*g["answers"]["commonest"]}) == 1
    assert len(g["answers"]["copy"]) == len(g["records"]) == g["test_rows"]


def test_losses_row_by_row_are_those_of_the_objective(where):
    run = rows(where, "method=lora")[0].run
    base = build.load(run.model, precision=run.precision)
    reading = Reading(test=[], seed=0, positions=60)
    reading(run, base.tokenizer, form=form_of(base))
    policy, tests = Policy(base), reading.tests.rows
    found = examine.losses(policy, run.objective, tests, base.packs, tokens=100)
    assert len(found) == len(tests)
    whole = loss_on(policy, run.objective, [run.objective.collate(tests, pad=0, packed=base.packs)])
    assert sum(a for a, _ in found) / sum(n for _, n in found) == pytest.approx(whole.value, rel=1e-5)
    alone = loss_on(policy, run.objective, [run.objective.collate([tests[3]], pad=0, packed=base.packs)])
    assert found[3][0] / found[3][1] == pytest.approx(alone.value, rel=1e-5)


def test_a_rate_is_searched_by_halving_and_what_was_tried_is_kept(where, seen, tmp_path, monkeypatch):
    monkeypatch.setattr("luthier.comparing.search.now", lambda: 0.0)  # not the age of the tests
    asked = task(seen, "lora", kind="search", rates=[1e-5, 1e-2, 3e-2], default=1e-2, seconds=60.0, folder=str(tmp_path / "s"), out=str(tmp_path))
    monkeypatch.setattr("luthier.comparing.budget.rungs", lambda *a, **k: [4, 8])
    told = search(asked)
    first, second = ([t for t in told["tried"] if t["rung"] == n] for n in (0, 1))
    assert [t["lr"] for t in first] == [1e-5, 1e-2, 3e-2] and len(second) == 2 and {t["steps"] for t in second} == {8}
    assert told["lr"] == min(second, key=lambda t: t["loss"])["lr"] != 1e-5
    assert told["probe"]["step"] > 0 and told["searched"]
    assert not list((tmp_path / "s").glob("*/adapter")) and not list((tmp_path / "s").glob("*/checkpoints"))
    kept = json.loads((tmp_path / "s" / "tried.json").read_text())
    kept["tried"] = kept["tried"][:2]  # as if it had been killed then
    (tmp_path / "s" / "tried.json").write_text(json.dumps(kept))
    before = (tmp_path / "s" / "rung-1-lr-0.01" / "run.yaml").stat().st_mtime_ns
    assert search(asked)["tried"] == told["tried"]
    assert (tmp_path / "s" / "rung-1-lr-0.01" / "run.yaml").stat().st_mtime_ns == before


def test_a_run_is_trained_tested_and_left_as_an_ordinary_folder(where, seen, tmp_path):
    told = final(task(seen, "lora", kind="final", steps=16, lr=1e-2, run_seed=3, out=str(tmp_path), name="lora-seed-3"))
    folder = tmp_path / "lora-seed-3"
    assert {"run.yaml", "metrics.jsonl", "result.json", "report.html", "adapter"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "checkpoints").exists()
    assert [p["step"] for p in told["curve"]] == [0, *range(2, 17, 2)] and all("score" in p for p in told["curve"][1:])
    assert told["curve"][-1]["loss"] < told["curve"][0]["loss"] and told["curve"][-1]["tokens"] == told["tokens"]
    assert told["bytes"] == own_bytes(folder / "adapter") > 0 and told["latency"]["attached"]["token"] > 0 and told["latency"]["merged"]["prefill"] > 0
    run = config.load_run(folder / "run.yaml")
    again = examine.general(opening.load(folder / "adapter", precision="float32"), run)
    assert told["general"]["value"] == pytest.approx(again["value"], rel=1e-4)  # of what was saved


def test_a_prefix_has_no_merged_latency_and_a_prompt_is_chosen(where, seen, tmp_path):
    prefix = final(task(seen, "prefix", kind="final", steps=2, lr=1e-2, run_seed=0, out=str(tmp_path), name="p"))
    assert prefix["latency"]["attached"] and prefix["latency"]["merged"] is None
    crafted = final(task(seen, "crafted_prompt", kind="final", steps=0, lr=None, run_seed=0, out=str(tmp_path), name="c"))
    assert crafted["trained"] == 0 and crafted["tokens"] == 0 and len(crafted["answers"]) == seen[1]["most"]


def test_a_run_that_is_killed_while_it_trains_comes_to_the_same_end(where, seen, tmp_path):
    asked = task(seen, "lora", kind="final", steps=24, lr=1e-2, run_seed=0, name="lora") | {"curve_rows": 0}
    whole = final(asked | {"out": str(tmp_path / "whole")})
    (tmp_path / "task.json").write_text(json.dumps(asked | {"out": str(tmp_path / "killed")}))
    command = [sys.executable, "-m", "luthier.comparing.task", "--one", json.dumps({"file": str(tmp_path / "task.json")})]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list((tmp_path / "killed" / "lora").glob("checkpoints/step-*/state.json")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    told = final(asked | {"out": str(tmp_path / "killed")})
    assert [(p["step"], p["loss"]) for p in told["curve"]] == [(p["step"], p["loss"]) for p in whole["curve"]]
    assert told["losses"] == whole["losses"] and told["answers"] == whole["answers"]
    lines = [json.loads(x) for x in (tmp_path / "killed" / "lora" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["event"] == "train"] == list(range(1, 25))


def test_latency_is_the_time_of_the_prompt_and_of_a_token_after_it(monkeypatch):
    class Slow:
        limit, device = 1000, torch.device("cpu")

        def generate(self, prompts, max_new):
            clock[0] += 0.5 + 0.01 * len(prompts[0]) + 0.02 * max_new

    clock = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    found = latency.measured(Slow(), list(range(10)))
    assert found.token == pytest.approx(0.02) and found.prefill == pytest.approx(0.62)


def test_what_cannot_be_folded_says_so(monkeypatch):
    def refuse(policy):
        raise Incompatible("no weight can take it")

    monkeypatch.setattr(latency, "foldable", refuse)
    assert latency.folded(None) is False


@pytest.fixture(scope="module")
def judged(where):
    """Pairs, and texts."""
    rng = random.Random(1)
    pairs = [{"prompt": f"{i} {(c := rng.choice(['red', 'green', 'blue']))}", "chosen": c, "rejected": "none"} for i in range(90)]
    (where / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs))
    (where / "texts.jsonl").write_text("".join(json.dumps({"text": f"{p['prompt']} is {p['chosen']} and not {i}"}) + "\n" for i, p in enumerate(pairs)))


@pytest.mark.parametrize(
    ("objective", "data", "task_is", "answers_base"),
    [
        ("dpo", "pairs.jsonl", "preference", True),
        ("orpo", "pairs.jsonl", "preference", True),
        ("reward", "pairs.jsonl", "preference", False),
        ("text", "texts.jsonl", None, True),
    ],
)
def test_preferences_and_raw_text_are_compared_too(where, judged, tmp_path, objective, data, task_is, answers_base):
    method = "full" if objective == "dpo" else "lora"  # whose reference has to be known before the first step
    seen = looked(where, f"method={method}", f"objective={objective}", data=data)
    g = seen[1]
    assert g["task"] == task_is and (g["base"] is not None) is answers_base
    told = final(task(seen, method, kind="final", steps=3, lr=1e-3, run_seed=0, out=str(tmp_path), name="r"))
    assert len(told["answers"]) == (len(g["records"]) if task_is else 0)
    assert told["losses"] and all(n > 0 for _, n in told["losses"]) and len(told["curve"]) >= 2
    if task_is and answers_base:
        assert len(g["answers"]["base"]) == len(g["records"])
