"""What runs in a process of its own: see task.py; the JSON of --one names a file with the task.

Its numbers are printed in the last line. What the user can put right is a sentence on stderr and exit code 2.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core import LuthierError
from ..errors import Interrupted
from ..running.starting import execute
from ..saving import checkpoint
from ..settings import config
from . import examine
from .apart import STOPPED, USER
from .budget import LOOKS
from .files import own_bytes
from .ground import ground
from .held import Reading
from .observing import Observer, curve, now, run_of, step_seconds
from .search import search


def final(task: dict[str, Any]) -> dict[str, Any]:
    """Train a row with one seed, or go on where it was stopped; then test it."""
    reading = Reading(test=task["test"], seed=task["seed"], positions=task["positions"], choose=task["choose"])
    steps, folder = task["steps"], Path(task["out"]) / task["name"]
    run = run_of(task, task["run"], name=task["name"], out=task["out"], seed=task["run_seed"])
    every = max(1, round((steps or 1) / LOOKS))
    run = replace(run, optim=replace(run.optim, lr=task["lr"], steps=steps or 1), evaluate=replace(run.evaluate, every_steps=every, tasks=()))
    resume = folder if checkpoint.steps(folder) else None
    if resume is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        run = replace(config.load_run(folder / "run.yaml"), out=task["out"])  # with what its beginning resolved
    seen = Observer(reading, task["curve_rows"], task["tested"]["max_new"], task.get("choosing", 0.0))
    began = now()
    result = execute(run, resume=resume, accept_changes=True, reporter=seen, read=reading)
    trained = now()
    peak, session = result.peak_bytes, seen.session
    asked = replace(config.load_run(task["run"]), data=run.data, out=run.out)
    found = examine.examine(session.policy, session.objective, reading.tests, asked, packed=session.packed, **task["tested"])
    for left in ("checkpoints", "best"):  # it is finished, and nothing goes on from them
        shutil.rmtree(folder / left, ignore_errors=True)
    return found | {
        "folder": str(folder), "artefact": str(result.artefact), "trained": result.trained, "whole": result.total, "steps": result.steps,
        "tokens": result.tokens, "seconds": result.seconds, "step": step_seconds(folder), "peak": peak, "best_step": result.best_step,
        "stopped": result.stopped, "bytes": own_bytes(result.artefact), "curve": curve(folder, seen.scores),
        "chosen_loss": None if result.after.loss is None else result.after.loss.value,
        "lr": task["lr"], "run_seed": task["run_seed"], "start": began, "wall": {"training": trained - began, "all": now()},
    }  # fmt: skip


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"ground": ground, "search": search, "final": final}


def main(argv: list[str]) -> int:
    """Do the task of a file and print its numbers."""
    task = json.loads(Path(json.loads(argv[1])["file"]).read_text())
    try:
        with redirect_stdout(sys.stderr):
            numbers = TASKS[task["kind"]](task)
    except LuthierError as e:
        print(f"error: {e}", file=sys.stderr)
        return USER
    except (KeyboardInterrupt, Interrupted):
        return STOPPED
    print(json.dumps(numbers))
    return 0
