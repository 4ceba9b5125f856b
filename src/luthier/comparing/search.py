"""Finding a row's learning rate: a few steps on the clock, then short runs by successive halving, all in one process that reads the data once."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import atomic
from ..core import LuthierError
from ..running.result import Result
from ..running.starting import execute
from . import budget
from .held import Reading
from .observing import Observer, events, now, run_of

OVERTIME = 1.15  # of its seconds: no short run begins after them
PROBE = 4  # steps that are timed; the first stands apart


def search(task: dict[str, Any]) -> dict[str, Any]:
    """Time a few steps, then try rates by successive halving on short runs, by the loss on rows to choose by. What an earlier process tried is kept."""
    where, deadline = Path(task["folder"]), task["seconds"]
    where.mkdir(parents=True, exist_ok=True)
    share(where, Path(task["out"]))
    reading = Reading(test=task["test"], seed=task["seed"], positions=task["positions"], choose=task["choose"])
    kept = where / "tried.json"
    told: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {"tried": [], "rungs": None}
    if "probe" not in told:
        told["probe"] = probe(task, reading)
        told["rungs"] = budget.rungs(deadline - now(), len(task["rates"]), step=told["probe"]["step"], run=told["probe"]["run"])
        atomic.as_json(kept, told)
    rates, best = list(task["rates"]), None
    for number, steps in enumerate(told["rungs"]):
        found = {t["lr"]: t["loss"] for t in told["tried"] if t["rung"] == number}
        for lr in rates:
            if found and lr not in found and now() > OVERTIME * deadline:
                break  # this machine became slower than it was a moment ago
            if lr not in found:
                found[lr] = short_run(task, reading, lr, steps, f"rung-{number + 1}-lr-{lr:g}")[0]
                told["tried"].append({"rung": number, "lr": lr, "steps": steps, "loss": found[lr]})
                atomic.as_json(kept, told)
        if best is None or len(found) == len(rates):  # else the time was up in the middle
            best = min(found, key=lambda r: (found[r] != found[r], found[r]))
        rates = budget.survivors(found)
    told["probe"]["step"] = median_step(where, told["probe"]["step"])
    return told | {"lr": best if best is not None else task["default"] if len(task["rates"]) > 1 else task["rates"][0], "searched": best is not None}


def share(where: Path, runs: Path) -> None:
    """What runs keep beside one another (references, text of the base's own) is computed once for the searches and the runs that count."""
    for name in (".references", ".replay"):
        (runs / name).mkdir(parents=True, exist_ok=True)
        if not (where / name).exists():
            with suppress(OSError):  # a system without links computes it again
                (where / name).symlink_to((runs / name).resolve(), target_is_directory=True)


def probe(task: dict[str, Any], reading: Reading) -> dict[str, float]:
    """Seconds of a step; of a short run besides its steps; and of what a run in a process of its own is made of, see Cost in conduct.py."""
    began = now()
    _, result, seen = short_run(task, reading, task["rates"][len(task["rates"]) // 2], PROBE, "timing")
    assert result is not None
    besides = now() - began - result.seconds
    ready = seen.ready - began  # the model was opened and the data read
    lines = [x for x in events(result.folder) if x["event"] == "train"]
    step = statistics.median([x["seconds"] for x in lines[1:]] or [lines[0]["seconds"]])
    look, score = timed(lambda: seen.session.scorer.measure(tasks=False)), timed(seen.score)
    shutil.rmtree(result.folder, ignore_errors=True)
    besides -= timed_scores(seen, score)
    return {
        "step": step, "run": max(0.1, besides - reading.seconds), "start": seen.ready, "look": look, "score": score,
        "tokens": statistics.mean(x["tokens"] for x in lines), "other": max(0.0, besides - ready - 3 * look),
    }  # fmt: skip


def median_step(where: Path, probed: float) -> float:
    """Seconds of a step over all short runs, but for the first of each: a few steps on the clock may fall into a busy moment of the machine."""
    took = [x["seconds"] for f in sorted(where.glob("rung-*")) if (f / "metrics.jsonl").is_file() for x in events(f) if x["event"] == "train" and x["step"] > 1]
    return statistics.median(took) if took else probed


def timed_scores(seen: Observer, score: float) -> float:
    """Seconds that the scores of a run's evaluations took."""
    return len(seen.scores) * score


def timed(what: Callable[[], Any]) -> float:
    """Seconds that something takes."""
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def short_run(task: dict[str, Any], reading: Reading, lr: float, steps: int, name: str) -> tuple[float, Result | None, Observer]:
    """(held-out loss, what it came to) of a run of a few steps; what it leaves but for its numbers is deleted."""
    run = run_of(task, task["run"], name=name, out=task["folder"])
    run = replace(run, optim=replace(run.optim, lr=lr, steps=steps), evaluate=replace(run.evaluate, every_steps=steps, tasks=()))
    shutil.rmtree(Path(run.out) / name, ignore_errors=True)
    seen = Observer(reading, task["curve_rows"] if name == "timing" else 0, task["tested"]["max_new"])
    try:
        result = execute(run, reporter=seen, read=reading)
    except LuthierError as e:
        if name == "timing" or "not finite" not in str(e):
            raise
        return float("inf"), None, seen  # a rate that is too high
    for left in ("checkpoints", "best", "adapter", "model"):
        shutil.rmtree(result.folder / left, ignore_errors=True)
    assert result.after.loss is not None
    return result.after.loss.value, result, seen
