"""Two processes train as one does: what they agree on, deal out, measure, keep and go on from. One launch for all of it (together.py)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import launching
import ranks
import tiny
from luthier.core import LuthierError
from luthier.place.fsdp import Place
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.settings.config import load_run

QUIET = Reporter(quiet=True)
MINE = '''
def small(prompt, answer, row):
    """The share of small letters."""
    return sum(c.islower() for c in answer) / max(1, len(answer))
'''
COMMON = ["precision=float32", "place.on=cpu", "optim.lr=1e-2", "evaluate.sample_tokens=4", "seed=1", "data.cache=no"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, data, prompts and a reward."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.folder(folder / "base")
    rng = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three"]
    said = [" ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": p.upper()}) + "\n" for p in said))
    (folder / "more.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": p[::-1]}) + "\n" for p in said))
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a} {b}?"}) + "\n" for a in ("who", "what") for b in ("runs", "sews", "sings", "is it"))
    )
    (folder / "mine.py").write_text(MINE)
    return folder


def settings(home: Path) -> dict[str, list[str]]:
    """Whole runs that are made by two processes and by one: of a mixture, one of its sources a stream, with text replayed beside it; and of own answers."""
    data, more = home / "data.jsonl", home / "more.jsonl"
    against = [f"data.replay.source=[{data}]", "data.replay.kl=0.1"]
    watched = ["evaluate.tasks=[exact_match]", "evaluate.every_steps=3", "checkpoint.every_steps=2", "checkpoint.keep=9"]
    mixed = f"data.mix={{rule: equal, sources: {{a: {data}, b: {{files: {more}, stream: true, buffer: 20, rows: 60}}}}}}"
    rollouts = ["objective=ppo", f"objective.rewards={{{home / 'mine.py'}:small: 1}}", "objective.prompts=3", "objective.samples=2", "objective.max_new=6"]
    passes = ["objective.epochs=1", "objective.minibatches=2", "method={kind: lora, targets: [all, head]}"]
    return {
        "run-sft": [mixed, *against, *watched, "optim.steps=6", "optim.batch_tokens=200"],
        "run-ppo": [f"data.train={home / 'prompts.jsonl'}", *rollouts, *passes, "optim.steps=8", "data.validation_share=0.3", "evaluate.forgetting=no"],
    }


def asked(home: Path, out: str, name: str, more: list[str]) -> list[str]:
    """Settings of one of the runs."""
    return [f"model={home / 'base'}", f"out={home / out}", f"name={name}", *COMMON, *more]


@pytest.fixture(scope="module")
def found(home: Path) -> Iterator[dict[str, Any]]:
    """What the two ranks found; beside "alone", the same runs in this process."""
    for name, more in settings(home).items():
        (home / f"{name}.json").write_text(json.dumps(asked(home, "together", name, more)))
    started = launching.start(2, [str(Path(__file__).parent / "together.py"), str(home)])
    try:
        alone = {name: execute(load_run(None, asked(home, "alone", name, more)), reporter=QUIET) for name, more in settings(home).items()}
        done = launching.finish(started, 120)
    finally:
        launching.finish(started, 0)
    assert all(code == 0 for code, _, _ in done), "\n".join(f"rank {r}: {code}\n{said}{wrong[-3000:]}" for r, (code, said, wrong) in enumerate(done))
    yield json.loads((home / "found.json").read_text()) | {"alone": alone}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


# --- agreeing ---------------------------------------------------------------------------------------------------------


def test_ranks_agree_on_sums_means_and_objects_and_count_the_bytes(found: dict[str, Any]) -> None:
    a = found["agreeing"]
    assert a["first"] == {"both": 4.0, "own 0": 10.0, "own 1": 11.0}
    assert a["again"] == {"both": 2.0}  # not the names of another time
    assert (a["mean"], a["flat"], a["gathered"], a["shared"]) == (0.5, [1.5] * 6, [0, 1], ["of", 0])
    # two rows of 8 bytes for the number of new names, for the three names too, and again for the three; and the new names, once
    assert 16 * (1 + 4 + 4) < a["sent"]["a test"] < 16 * (1 + 4 + 4) + 100 and a["sent"]["a test's gradients"] == 24


def test_work_is_spread_and_comes_back_in_order(found: dict[str, Any]) -> None:
    assert found["spreading"] == {"got": [0, 10, 20, 30, 40], "seen": [[0, 2, 4], [1, 3]], "fewer than ranks": [1]}


def test_every_row_of_a_step_is_dealt_to_one_rank_and_ranks_without_one_train_nothing(found: dict[str, Any]) -> None:
    dealt, alone = found["dealing"]["dealt"], found["dealing"]["alone"]
    assert len(alone) == 2 and [len(s) for s in dealt[0]] == [len(s) for s in dealt[1]]
    for step in range(2):
        rows = [w for rank in dealt for batch in rank[step] for w in batch if not w.startswith("(nothing")]
        assert sorted(rows) == sorted(w for batch in alone[step] for w in batch)


# --- measuring --------------------------------------------------------------------------------------------------------


def test_what_is_measured_is_the_same_to_the_last_bit_where_batches_are_the_same(found: dict[str, Any]) -> None:
    for name, both in found["measuring"].items():
        together, alone = both["together"], both["alone"]
        assert together.keys() == alone.keys()
        exact = [k for k in together if k not in ("logps", *(("loss", "parts") if name == "kto" else ()))]
        assert "loss" in exact or name == "kto"
        for key in exact:
            assert together[key] == alone[key], (name, key)
    assert found["measuring"]["kto"]["together"]["loss"] == pytest.approx(found["measuring"]["kto"]["alone"]["loss"], rel=1e-6)
    two, one = ([x for some in found["measuring"]["sft"][who]["logps"] for x in some] for who in ("together", "alone"))
    assert two == pytest.approx(one, rel=1e-5)  # answers are written in other batches


# --- training ---------------------------------------------------------------------------------------------------------


def test_every_method_objective_and_precision_trains_as_one_process_does(found: dict[str, Any], home: Path) -> None:
    """A cover of tests/ranks.py; `python -m tests.ranks` runs all of it, on 2 and 4."""
    told = [json.loads(line) for line in (home / "cover.jsonl").read_text().splitlines()]
    assert len(told) == len(ranks.cover()) >= 10
    assert {m for m, _, _ in ranks.cover()} == {m for m, _, _ in ranks.cells()}
    trained = [t for t in told if "refused" not in t["one"]]
    assert len(trained) >= 9 and {t["cell"][1] for t in trained} == set(ranks.OBJECTIVES) and {t["cell"][2] for t in trained} == set(ranks.NEAR)
    for t in told:
        difference, why = ranks.apart(t["one"], t["many"])
        assert not why and difference <= ranks.allowed(t["cell"]), (t["cell"], difference, why)


def test_a_step_sends_the_gradient_once_and_little_else(found: dict[str, Any], home: Path) -> None:
    sft = [t for t in lines(home / "together" / "run-sft") if t["event"] == "train"]
    gradient = 4 * sum(v.numel() for v in load_file(home / "together" / "run-sft" / "adapter" / "adapter_model.safetensors").values())
    assert gradient > 0
    for step in sft[1:]:
        assert gradient <= step["traffic_bytes"] < gradient + 1000  # and so many numbers beside it
    told = json.loads((home / "together" / "run-sft" / "result.json").read_text())["ranks"]
    assert len(told["peak_bytes"]) == 2 and min(told["peak_bytes"]) > 1e8
    assert told["size"] == 2 and gradient * 6 <= told["traffic_bytes"]["gradients"] < gradient * 6 + 6 * 256


def test_a_tensor_with_a_gradient_on_one_rank_moves_on_both(found: dict[str, Any]) -> None:
    first, second = found["a_head_of_one_rank"]
    assert first == second and all(v < 0.99 for v in first)


def test_memory_that_runs_out_on_one_rank_is_told_to_the_other(found: dict[str, Any]) -> None:
    assert found["out_of_memory_on_one"] == ["memory ran out on another rank", "no room here"]


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_both_and_names_its_rows(found: dict[str, Any]) -> None:
    told, bad = found["not_finite_on_one"]["told"], found["not_finite_on_one"]["bad"]
    assert told[0] == told[1] == {"finite": False, "where": bad, "still": True} and bad


def test_what_two_ranks_began_one_goes_on_with(found: dict[str, Any]) -> None:
    assert found["going_on"]["in two"] == pytest.approx(found["going_on"]["whole"], rel=1e-6)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run-sft", "run-ppo"])
def test_a_run_of_two_processes_writes_one_folder_with_the_numbers_of_one(found: dict[str, Any], home: Path, name: str) -> None:
    one, two = home / "alone" / name, home / "together" / name
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    clocks = ("second", "memory", "traffic")
    compared = 0
    for a, b in zip(lines(one), lines(two), strict=True):
        assert (a["event"], a["step"]) == (b["event"], b["step"])
        assert {k for k in a if not k.startswith("traffic")} == {k for k in b if not k.startswith("traffic")}
        for key, value in a.items():
            if isinstance(value, float) and not any(c in key for c in clocks):
                assert b[key] == pytest.approx(value, rel=2e-5, abs=1e-7), (a["event"], a["step"], key)
                compared += 1
            elif not any(c in key for c in clocks):
                assert b[key] == value, (a["event"], a["step"], key)
    assert compared > 40
    assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()
    mine, other = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (one, two))
    assert mine.keys() == other.keys() and all(torch.allclose(mine[k], other[k], atol=2e-4) for k in mine)


def test_a_run_of_two_processes_is_resumed_by_one(found: dict[str, Any], home: Path) -> None:
    import shutil

    folder = home / "resumed" / "run-sft"
    shutil.copytree(home / "together" / "run-sft", folder)
    for step in (4, 6):
        shutil.rmtree(folder / "checkpoints" / f"step-{step}")
    execute(load_run(str(folder / "run.yaml"), [f"out={home / 'resumed'}", "place=one"]), resume=folder, accept_changes=True, reporter=QUIET)
    again, before = ([t["loss"] for t in lines(f) if t["event"] == "train"] for f in (folder, home / "together" / "run-sft"))
    assert again == pytest.approx(before, rel=1e-5)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_with_one_process_it_is_as_place_one() -> None:
    place: Any = Place(on="cpu")
    tensor = torch.ones(2)
    place.average([tensor])
    assert (place.rank, place.size, place.leads) == (0, 1, True) and place.sums({"a": 2.0}) == {"a": 2.0} and place.gather(3) == [3] and place.share(4) == 4
    assert tensor.tolist() == [1, 1] and not place.traffic


@pytest.mark.parametrize(("wrong", "said"), [({"timeout": 0.5}, "timeout: must be at least 1"), ({"offload": True}, "nothing to offload")])
def test_a_setting_that_cannot_be_is_refused_in_a_sentence(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(LuthierError, match=said):
        Place(on="cpu", **wrong)
