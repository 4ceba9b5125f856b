"""How long a user waits: for `luthier --help`, and from `luthier train` to the end of the first step on the embedded base."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HELP, FIRST = "luthier --help", "luthier train, first step on fiddle"
UNMEASURED = "the same, nothing measured before it (evaluate.forgetting=no evaluate.samples=0)"
TARGETS = {HELP: 0.3, FIRST: 5.0, UNMEASURED: 5.0}
PATIENCE_S = 120.0


def measure(times: int, *, warm: bool = True) -> dict[str, Any]:
    """{"median", "least", "largest", "target"} of each, over so many starts. ``warm``: after one that is not counted, which brings files into memory."""
    ways = {HELP: _help, FIRST: _first_step, UNMEASURED: lambda: _first_step("evaluate.forgetting=no", "evaluate.samples=0")}
    found = {name: [way() for _ in range(times + warm)][warm:] for name, way in ways.items()}
    return {n: {"median": statistics.median(s), "least": min(s), "largest": max(s), "target": TARGETS[n]} for n, s in found.items()}


def _command() -> list[str]:
    """The program as it is installed beside this Python, else as a module."""
    beside = Path(sys.executable).with_name("luthier")
    return [str(beside)] if beside.is_file() else [sys.executable, "-m", "luthier"]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])}


def _help() -> float:
    began = time.perf_counter()
    subprocess.run([*_command(), "--help"], env=_environment(), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def _first_step(*settings: str) -> float:
    """All other settings as they come: what is measured before training is part of the wait."""
    with tempfile.TemporaryDirectory(prefix="luthier-start-") as name:
        folder = Path(name)
        rows = [{"prompt": f"Say the number {i} in words.", "completion": f"The number is {i}, and {i + 1} comes next."} for i in range(200)]
        (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        log = (folder / "log.txt").open("w")
        command = [*_command(), "train", str(folder / "train.jsonl"), f"out={folder}", "name=run", *settings]
        began = time.perf_counter()
        run = subprocess.Popen(command, cwd=folder, env=_environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            while not _trained(folder / "run" / "metrics.jsonl"):
                if run.poll() is not None or time.perf_counter() - began > PATIENCE_S:
                    raise RuntimeError("luthier train did not come to a first step:\n" + (folder / "log.txt").read_text()[-2000:])
                time.sleep(0.01)
            return time.perf_counter() - began
        finally:
            if run.poll() is None:
                run.send_signal(signal.SIGKILL)
                run.wait()
            log.close()


def _trained(metrics: Path) -> bool:
    return metrics.is_file() and any('"grad_norm"' in line for line in metrics.read_text().splitlines())
