"""A machine that is not there: jobs cost simulated seconds on a simulated clock, so that a comparison of half an hour takes no time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.comparing import budget
from luthier.comparing.conduct import Conduct
from luthier.comparing.state import State
from luthier.comparing.sweep import rows_of
from luthier.errors import LuthierError

METHODS = {"lora": 1.0, "adapter": 0.8, "prefix": 0.9, "full": 1.1, "dora": 1.6, "ia3": 0.7}


@dataclass
class World:
    """``slow``: how much longer than measured everything takes from a moment on; ``noise``: the spread of every job's time."""

    start: float = 8.0
    step: float = 0.5
    slow: float = 1.0
    slow_after: float = float("inf")
    noise: float = 0.0
    sticks: str = ""  # a job that takes ``stuck`` seconds more than anything could foretell
    stuck: float = 0.0
    seed: int = 0
    time: float = 0.0
    jobs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def clock(self) -> float:
        return self.time

    @property
    def factor(self) -> float:
        """How much slower it is by now."""
        return self.slow if self.time > self.slow_after else 1.0

    def spend(self, seconds: float) -> None:
        self.time += seconds * self.factor * (1 + self.noise * self.random.uniform(-1, 1))

    def launch(self, name: str, task: dict[str, Any], limit: float) -> dict[str, Any]:
        self.jobs.append(name)
        began = self.time
        numbers: dict[str, Any] = getattr(self, task["kind"])(task)
        self.time += self.stuck if name == self.sticks else 0.0
        if self.time - began > limit:
            self.time = began + limit
            raise LuthierError(f"{name} was stopped")
        return numbers

    def ground(self, task: dict[str, Any]) -> dict[str, Any]:
        took = {"losses": 2.0, "answers": min(10.0, task["answering"]), "general": 1.5, "latency": 0.0}
        self.spend(self.start + 12 + sum(took.values()))
        told = {"trained": 1000, "whole": 10_000, "lr": 1e-3, "chooses": False, "shift": 0, "steps": 100_000}
        rows = {r["name"]: told | {"chooses": r["run"]["method"]["kind"] == "crafted_prompt"} for r in task["rows"]}
        return {
            "rows": rows, "task": "bleu" if task["rows"][0]["run"]["objective"]["kind"] == "sft" else None,
            "positions": 1024, "max_tokens": 1024, "tokens": {"train": 10**6, "choose": 9000, "test": 60_000}, "parameters": 10_000,
            "chosen_on": 150, "took": took, "loaded": self.start, "renders": "chat", "most": 100, "max_new": 64, "loss_rows": 300,
            "median": 60, "general": {"value": 4.0, "n": 4000},
        }  # fmt: skip

    def search(self, task: dict[str, Any]) -> dict[str, Any]:
        step, f, began = self.step * METHODS[task["run"]["method"]["kind"]], self.factor, self.time
        probe = {"step": step * f, "run": 1.5 * f, "start": self.start * f, "look": 0.4 * f, "score": 0.5 * f, "tokens": 2048.0, "other": 1.0 * f}
        self.spend(self.start + 4 * step + 3)
        rungs = budget.rungs(task["seconds"] - (self.time - began), len(task["rates"]), step=step * f, run=1.5 * f)
        for n, runs in zip(rungs, (len(task["rates"]), 2), strict=False):
            self.spend(runs * (1.5 + n * step))
        return {"tried": [], "rungs": rungs, "probe": probe, "lr": 1e-3, "searched": bool(rungs)}

    def final(self, task: dict[str, Any]) -> dict[str, Any]:
        step = self.step * METHODS.get(task["run"]["method"]["kind"], 1.0)
        chosen = task["choosing"] + 60 if "choosing" in task else 0.0
        self.spend(self.start + 1 + 10 * 0.4 + 8 * 0.5 + 5 + 10 + task["steps"] * step + chosen)
        return {"steps": task["steps"], "tokens": task["steps"] * 2048}


def comparison(folder: Path, world: World, *settings: str, minutes: float = 30, equal: str = "tokens", launch: Any = None, said: Any = None) -> Conduct:
    """A comparison in this world, ready to go."""
    asked = {"file": None, "settings": list(settings), "minutes": minutes, "target": None, "test": [], "equal": equal, "rates": 3}
    rows = rows_of(None, ["data=a.jsonl", *settings])
    return Conduct(rows, State(folder, asked), launch or world.launch, clock=world.clock, say=said or (lambda _: None))
