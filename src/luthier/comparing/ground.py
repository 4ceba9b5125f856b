"""Looking at the base before anything is trained: which rows can run, what it and the baselines score on the test rows, and what measuring takes here."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from .. import build, counts
from ..core import LuthierError
from ..measuring.measure import task_rows
from ..optim import default_lr
from ..planning.microbatch import lacks_labels, with_labels
from ..policy import Policy
from ..reading import fitted, form_of
from ..settings import config
from ..settings.run import Run
from . import examine
from .held import Reading
from .observing import now

ASKED_FIRST = 16  # answers that say how long one takes
LEAST_ROWS = 64  # test rows whose loss is taken
WORTH_TIMING = 3.0  # seconds of reading from which on it is read again to see what that takes
LEAST, MOST_ANSWERS = 20, 500  # test records that are answered


def ground(task: dict[str, Any]) -> dict[str, Any]:
    """Which rows can run, with the size of each; the base's own numbers on the test rows; the baselines; what measuring takes."""
    first = config.load_run(task["rows"][0]["run"])
    first, _ = build.resolve(first)
    build.seed_everything(first.seed)
    base = build.load(first.model, precision=first.precision, device=first.place.device)
    if base.tokenizer is None:
        build.load_tokenizer(first.model)  # says what is missing
    limit = min(base.max_positions, base.tokenizer.model_max_length)
    rows = {r["name"]: survey(r["run"], base.width) for r in task["rows"]}
    shifts = [r["shift"] for r in rows.values() if "shift" in r and not r["chooses"]]
    positions = limit - max(shifts, default=0)
    max_tokens = min(first.data.max_tokens or 2048, positions)
    task = task | {"max_tokens": max_tokens}
    run = replace(first, data=replace(first.data, max_tokens=max_tokens), out=task["out"])
    reading = Reading(test=task["test"], seed=task["seed"], positions=positions)
    prepared = reading(run, base.tokenizer, form=form_of(base))
    run = fitted(run, prepared)
    tests, loaded = reading.tests, now() - reading.seconds + again(task, run, base, reading)
    tokens = {k: sum(len(r) for r in rows_) for k, rows_ in (("train", prepared.train), ("choose", prepared.validation), ("test", tests.rows))}
    for row in task["rows"]:
        rows[row["name"]]["steps"] = natural_steps(config.load_run(row["run"]), tokens["train"], len(prepared.train))
    policy = Policy(base)
    run.place.put(policy)
    max_new = examine.longest_answer(prepared.train)
    said: dict[str, Any] = {}
    plain, of_base = speechless(policy, run), {}
    began = time.perf_counter()
    if not plain:
        examine.bring_references(policy, run.objective, tests, run, base.packs)
        most = answerable(policy, run, tests, max_new, task["answering"])
        loss_rows = readable(policy, run, tests, task["answering"] / 2)
        of_base = examine.examine(policy, run.objective, tests, run, most=most, loss_rows=loss_rows, max_new=max_new, packed=base.packs)
        said["base"] = of_base["answers"]
    else:
        most, loss_rows = min(len(tests.records), MOST_ANSWERS), len(tests.rows)
        of_base = {"general": examine.general(policy, run), "took": {"losses": 0.0, "answers": 0.0, "general": time.perf_counter() - began, "latency": 0.0}}
    told = examine.task_of(run)
    labels = list(prepared.facts.get("labels") or ())
    if told is not None and run.objective.renders in ("chat", "label"):
        said["copy"] = examine.copied(prepared.train, tests, base.tokenizer, most if run.objective.renders == "chat" else len(tests.rows), labels)
        said |= {"commonest": c} if (c := examine.commonest(prepared.train, labels, len(tests.rows))) else {}
    records = task_rows(tests.records if run.objective.renders != "chat" else tests.records[:most])
    measured = {
        "general": of_base.get("general"),
        "base": None if plain else of_base,
        "no_base": plain,
        "answers": said,
        "records": records,
        "task": told and told[0],
        "problem": getattr(run.objective, "problem", None),
        "renders": run.objective.renders,
    }
    sizes = {
        "tokens": tokens,
        "parameters": counts.total(policy)[1],
        "train_rows": len(prepared.train),
        "median": statistics.median(len(r) for r in prepared.train),
        "chosen_on": len(prepared.validation),
        "test_rows": len(tests.rows),
        "test_said": tests.said,
    }
    tokens["test"] = sum(len(r) for r in tests.rows[:loss_rows])
    limits = {"rows": rows, "positions": positions, "max_tokens": max_tokens, "max_new": max_new, "most": most, "loss_rows": loss_rows}
    machine = {"device": str(run.place.device), "threads": torch.get_num_threads(), "loaded": loaded, "took": of_base["took"]}
    return measured | sizes | limits | machine


def again(task: dict[str, Any], run: Run, base: Any, first: Reading) -> float:
    """Seconds that reading the data takes the next process: less than the first time, where prepared data is kept on disk."""
    if first.seconds < WORTH_TIMING:
        return first.seconds
    second = Reading(test=task["test"], seed=task["seed"], positions=first.positions)
    second(run, base.tokenizer, form=form_of(base))
    return second.seconds


def survey(settings: dict[str, Any], width: int) -> dict[str, Any]:
    """Whether a row's choices go together, from configurations alone; its trained parameters and its default learning rate."""
    try:
        run, _ = build.resolve(config.load_run(settings))
        run = replace(run, objective=with_labels(run.objective)) if lacks_labels(run.objective) else run
        meta = build.load(run.model, precision=run.precision, device="meta", weights=False, trains_base=run.method.edits == "weights")
        policy, _ = build.assemble(run, meta)
    except LuthierError as e:
        return {"refused": str(e)}
    trained, whole = counts.total(policy)
    chooses = hasattr(run.method, "candidates")
    return {"trained": trained, "whole": whole, "lr": default_lr(run.method, width)[0], "chooses": chooses, "shift": getattr(run.method, "shift", 0)}


def natural_steps(run: Run, tokens: int, rows: int) -> int:
    """Steps that the settings ask for."""
    o = run.optim
    if o.steps is not None:
        return o.steps
    return max(1, round(o.epochs * (rows / o.batch_examples if o.batch_examples else tokens / o.batch_tokens)))


def speechless(policy: Policy, run: Run) -> str:
    """Why the base by itself says nothing about the task; "" where it does."""
    if run.objective.renders in ("label", "ranked"):
        return "its head is random before training"
    if run.objective.renders == "judged":
        return "it is the reference itself, so its loss is a constant"
    return "an encoder's own head says nothing of the task" if policy.base.anatomy.kind == "encoder" and run.objective.renders != "masked" else ""


def readable(policy: Policy, run: Run, tests: Any, seconds: float) -> int:
    """How many test rows there is time to take the loss of, in so many ``seconds``: found by taking that of a few."""
    there = len(tests.rows)
    if run.objective.renders in examine.OWN_TASK or there <= LEAST_ROWS:
        return there
    examine.losses(policy, run.objective, tests.rows[: LEAST_ROWS // 2], policy.base.packs)  # the first forwards of a process are slow
    began = time.perf_counter()
    examine.losses(policy, run.objective, tests.rows[:LEAST_ROWS], policy.base.packs)
    one = (time.perf_counter() - began) / LEAST_ROWS
    return max(LEAST_ROWS, min(there, int(seconds / one)))


def answerable(policy: Policy, run: Run, tests: Any, max_new: int, seconds: float) -> int:
    """How many test records there is time to answer, in so many ``seconds``: found by answering a few."""
    there = min(len(tests.records), MOST_ANSWERS)
    if run.objective.renders != "chat" or there <= LEAST:
        return there
    began = time.perf_counter()
    examine.answers(policy, run.objective, tests, run, ASKED_FIRST, max_new)
    one = (time.perf_counter() - began) / ASKED_FIRST
    return max(LEAST, min(there, int(seconds / one)))
