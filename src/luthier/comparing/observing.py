"""A run of a comparison while it trains: its settings, and what is seen of it besides what it writes itself."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from ..crafting import put
from ..measuring.evaluate import score
from ..measuring.measure import OWN_TASK, Measures, answer_rows, group, score_labels, task_rows
from ..running.progress import Reporter
from ..running.session import Session
from ..settings import config
from ..settings.run import Checkpoint, Run
from ..train import Step
from . import examine
from .held import Reading

TIMED = 8  # rows to choose by, at the least, and to time a prompt on


def now() -> float:
    """Seconds since this process began, the reading of torch included."""
    return time.time() - psutil.Process().create_time()


class Observer(Reporter):
    """Says nothing; keeps the session, and adds scores to the evaluations of a run."""

    def __init__(self, reading: Reading, curve_rows: int = 0, max_new: int = 64, choosing: float = 0.0):
        """``choosing``: seconds that a method which chooses a prompt has for that."""
        super().__init__(Console(quiet=True), quiet=True)
        self.choosing = choosing
        self.reading, self.curve_rows, self.max_new = reading, curve_rows, max_new
        self.ready = 0.0  # seconds until the first step, but for measuring before it
        self.scores: dict[int, float] = {}  # step -> score on rows to choose by

    def plan(self, session: Session) -> None:
        """Before anything is trained: the test rows get what they need of the reference."""
        self.session = session
        self.ready = now()
        examine.bring_references(session.policy, session.objective, self.reading.tests, session.run, session.packed)
        if session.chooses:
            choose_within(session, self.choosing)

    def evaluated(self, step: Step, m: Measures, *, best: bool) -> None:
        """A point of the curve."""
        if (found := self.score()) is not None:
            self.scores[step.step] = found

    def score(self) -> float | None:
        """The first score of the comparison's task on rows to choose by; None where there is none, or no time for it."""
        s = self.session
        found = examine.task_of(s.run)
        if found is None or not self.curve_rows:
            return None
        kind, task = found
        rows, records = s.prepared.validation[: self.curve_rows], s.prepared.validation_records[: self.curve_rows]
        if s.objective.renders in OWN_TASK:
            return next(iter(score_labels(s.policy, s.objective, rows, records, kind)[0].values())).value
        asked = task_rows(records)
        got = [a["answer"] for a in answer_rows(s.policy, asked, template=s.run.model.template, max_new=self.max_new)]
        scores = score(lambda _: got, task, asked)
        return next(iter(scores.values())).value


def choose_within(session: Session, seconds: float) -> None:
    """Let a session choose its prompt on as many rows as so many seconds allow: found by timing the longest candidate on a few."""
    method: Any = session.run.method
    rows, policy, scorer = session.prepared.validation, session.policy, session.scorer
    if method.ids or not rows:
        return
    positions = session.base.max_positions - max(len(r) for r in [*session.prepared.train, *rows]) - 1
    candidates = method.candidates(session.prepared.train, session.base.tokenizer, limit=positions, seed=session.run.seed)
    mean = sum(len(r) for r in rows) / len(rows)
    put(policy, max(candidates, key=lambda c: len(c.ids)))
    some = rows[:TIMED]
    tokens = examine.with_room(policy, rows, session.run.optim.micro_tokens)
    groups = group(some, tokens, session.packed)
    scorer.losses(session.objective, groups)  # the first forwards of a shape are slow
    began = time.perf_counter()
    scorer.losses(session.objective, groups)
    one = (time.perf_counter() - began) / (len(some) * (mean + policy.room(policy.active)))
    put(policy, method)
    each = one * sum(len(c.ids) + mean for c in candidates)
    scorer.groups = group(rows[: max(TIMED, int(seconds / each))], tokens, session.packed)


def run_of(task: dict[str, Any], settings: dict[str, Any], **changes: Any) -> Run:
    """A run of the comparison: as asked, on rows that all rows share, measured by the comparison itself."""
    run = config.load_run(settings)
    data = replace(run.data, max_tokens=task["max_tokens"])
    quiet = replace(run.evaluate, tasks=() if run.objective.renders not in OWN_TASK else run.evaluate.tasks, samples=0, forgetting=False)
    return replace(run, **{"data": data, "evaluate": quiet, "checkpoint": Checkpoint(keep=1), **changes})


def events(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step_seconds(folder: Path) -> float | None:
    """The median step; the first stands apart."""
    took = [x["seconds"] for x in events(folder) if x["event"] == "train"]
    return statistics.median(took[1:] or took) if took else None


def curve(folder: Path, scores: dict[int, float]) -> list[dict[str, Any]]:
    """Loss, and score where there was one, on rows to choose by: against steps, tokens and seconds of training."""
    tokens = seconds = 0.0
    out: list[dict[str, Any]] = []
    for x in events(folder):
        if x["event"] == "train":
            tokens, seconds = tokens + x["tokens"], seconds + x["seconds"]
        elif x["event"] in ("before", "evaluation") and "loss" in x:
            score = {"score": scores[x["step"]]} if x["step"] in scores else {}
            out.append({"step": x["step"], "tokens": int(tokens), "seconds": round(seconds, 3), "loss": x["loss"], **score})
    return out
