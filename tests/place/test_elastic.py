"""Ranks that die and ranks that hang: the run goes on from its last checkpoint, or ends with the name of who is missing.

Whole runs under torchrun take their time to start; they are run by `python -m tests.ranks --elastic` and skipped otherwise.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import forked
import launching
import tiny

LAUNCHES = pytest.mark.skipif("LUTHIER_LAUNCHES" not in os.environ, reason="whole runs under torchrun: python -m tests.ranks --elastic")
MISSING = """
import os, signal, sys, time
from luthier.devices.launched import launched
from luthier.place.fsdp import Place

place = Place(on="cpu", timeout=2)
place.wait("the start")
if launched().rank == 1:
    time.sleep(1.2)  # so that it has told where it is
    os.kill(os.getpid(), signal.SIGSTOP)
if launched().rank == 2:
    time.sleep(60)
place.sums({"a": 1.0}, "a sum")
"""


def _missing(arguments: Sequence[str]) -> int:
    rank, size, meet = arguments
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": meet}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    exec(MISSING, {})
    return 0


def test_a_rank_that_is_stopped_and_one_that_is_elsewhere_are_named_with_the_operation(tmp_path: Path) -> None:
    meet = str(launching.port())
    started = [forked.Program(_missing, [str(rank), "3", meet], tmp_path / f"said by {rank}") for rank in range(3)]
    try:
        code, said = started[0].wait(60)
    finally:
        for p in started[1:]:
            p.send(signal.SIGKILL)
            p.wait(5)
    assert code == 1
    assert re.search(r"error: rank 1 on \S+ does not answer any more; when last heard of it was computing after 'the start'", said), said
    assert re.search(r"rank 2 on \S+ is alive and elsewhere: for \d+ s after 'the start'", said), said
    assert re.search(r"Rank 0 of 3 waited for it \d+ s in 'a sum'", said), said


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and data."""
    folder = tmp_path_factory.mktemp("elastic")
    tiny.folder(folder / "base")
    rng = random.Random(0)
    said = [" ".join(rng.choices(["red", "green", "blue", "one", "two"], k=rng.randint(1, 5))) for _ in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": p.upper()}) + "\n" for p in said))
    return folder


def settings(home: Path, out: str, *more: str) -> list[str]:
    own = ["precision=float32", "place.on=cpu", "optim.batch_tokens=200", "optim.lr=1e-2", "method.dropout=0.1", "evaluate.samples=0", "evaluate.forgetting=no"]
    return [str(home / "data.jsonl"), f"model.id={home / 'base'}", f"out={home / out}", *own, *more]


def until(there: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something. Raises AssertionError where it does not come."""
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, f"{what} did not come within {seconds} s"
        time.sleep(0.02)


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(launching.TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def test_an_error_of_all_is_told_once_and_by_the_first_rank(tmp_path: Path) -> None:
    started = launching.start(2, ["-m", "luthier", "train", str(tmp_path / "data.jsonl"), "optim.lrr=1"])
    try:
        until(lambda: started[0].poll() is not None, 60, "an end")
        assert started[1].poll() is None  # it leaves the first its word, and is then ended, by torchrun
    finally:
        started[1].kill()
    (code, _, said), (_, _, other) = launching.finish(started, 5)
    assert code == 2 and said == "error: optim.lrr=1: unknown key; did you mean optim.lr?\n" and not other


@LAUNCHES
def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_nothing_had_happened(home: Path) -> None:
    """Dropout is on, so chance must be the same after the restart too. The run is named by the time it began, and is found by the launch."""
    steps = ["optim.steps=40", "evaluate.every_steps=20", "checkpoint.every_steps=5"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "--monitor-interval", "0.1"]
    argv = [sys.executable, *torchrun, "-m", "luthier", "train", *settings(home, "killed", *steps)]
    launched = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until(lambda: list((home / "killed").glob("*/checkpoints/step-5/state.json")) or launched.poll() is not None, 60, "a checkpoint")
        assert launched.poll() is None, launched.communicate()[0][-2000:]
        (second,) = (p for p in psutil.Process(launched.pid).children() if p.environ().get("RANK") == "1")
        second.send_signal(signal.SIGKILL)
        said = launched.communicate(timeout=150)[0]
    finally:
        launched.kill()
    assert launched.returncode == 0, said[-3000:]
    assert "this launch was started again: going on in" in said and "resuming after step" in said
    (folder,) = (p for p in (home / "killed").iterdir() if not p.name.startswith("."))
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["event"] == "train"] == list(range(1, 41))
    undisturbed = launching.finish(launching.start(2, ["-m", "luthier", "train", *settings(home, "undisturbed", *steps, "name=r")]), 60)
    assert all(code == 0 for code, _, _ in undisturbed), undisturbed
    one, other = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, home / "undisturbed" / "r"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@LAUNCHES
def test_a_stopped_rank_is_named_with_the_operation_and_the_run_ends(home: Path) -> None:
    long = ["optim.steps=100000", "evaluate.every_steps=100000", "checkpoint.every_steps=100000", "name=r", "place={kind: fsdp, on: cpu, timeout: 3}"]
    both = launching.start(2, ["-m", "luthier", "train", *settings(home, "stopped", *long)])
    try:
        log = home / "stopped" / "r" / "metrics.jsonl"
        until(lambda: (log.is_file() and log.read_text().count('"train"') >= 2) or both[0].poll() is not None, 60, "a step")
        both[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        said = both[0].communicate(timeout=30)[1]
        assert both[0].returncode not in (0, None) and time.monotonic() - began < 15
        assert "Rank 0 of 2 waited" in said and "rank 1 on" in said and "does not answer any more" in said
        assert any(f" s in '{what}'" in said for what in ("units", "losses and metrics", "gradients")), said
    finally:
        both[1].kill()
        launching.finish(both, 5)
