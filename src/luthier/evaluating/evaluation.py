"""An evaluation: what models make of held-out rows, one model in memory after the other, and what their numbers come to.

A model's numbers are kept as marks (a few numbers a row) and its answers as text, so that nothing of a model has to stay for them to be sliced or compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import LuthierError, Row, examples_of
from ..data.prepare import prepare
from ..data.rows import sides
from ..feedback.rewards import Judge
from ..measuring import marks, rowloss
from ..measuring.by_name import open_task
from ..measuring.evaluate import nearest_copy
from ..measuring.marks import Mark
from ..measuring.measure import answer_rows, as_answer, can_write, learned, predict, task_rows
from ..measuring.slices import record_of
from ..opening import load
from ..policy import Policy
from ..reading import form_of
from ..settings.plugins import plugin
from . import asking

HEADED = ("label", "ranked")  # how rows are rendered for objectives that answer by a head
ROWS = 500  # answered where nothing else is asked for


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an evaluation is to find out; the command line's words."""

    data: Sequence[str]
    tasks: Sequence[str] = ()
    rows: int | None = None
    text: bool = False
    part: str | None = None
    prompts: bool = False
    rewards: Sequence[str] = ()
    temperature: float = 0.0
    beginning: int = 16
    columns: Mapping[str, str] = field(default_factory=dict)
    copy_from: str | None = None
    max_new: int = 128
    template: str | None = None
    precision: str = "auto"
    seed: int = 0
    answers: bool = False  # wanted where no task asks for them: something else is done with them


@dataclass(frozen=True)
class Opening:
    """Which model, with which adapters on it. ``alone``: without its base beside it."""

    what: str
    model: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    use: str | None = None
    alone: bool = False


@dataclass
class Sheet:
    """One model's numbers: of the loss, over all records (of raw text over rows); of scores, over the records that it answered."""

    losses: dict[str, Mark] = field(default_factory=dict)
    scores: dict[str, Mark] = field(default_factory=dict)
    answers: list[str] | None = None

    @property
    def marks(self) -> dict[str, Mark]:
        """All of them."""
        return self.losses | self.scores


@dataclass
class Found:
    """What was found: a sheet for each column, and the rows they are of."""

    sheets: dict[str, Sheet]
    subjects: list[str]  # the columns of what is evaluated; the others are there to be compared with
    rows: list[Row]
    records: list[Any]  # all; the first ``asked`` of them were answered
    asked: int
    shown: list[dict[str, Any]]  # the answered ones, as tasks see them
    goal: Any = None  # the objective that the rows are of; None for prompts alone
    task: Any = None  # classification, where that is scored and labels are what it reads

    @property
    def writes(self) -> bool:
        """Whether answers are what a model writes, and not what a head says or raw text."""
        return self.goal is None or self.goal.renders in ("chat", "pairs", "judged")


def examine(opening: Opening, asked: Asked, say: Any, *, ready: Callable[[Found], None] = lambda found: None) -> Found:
    """Open a model, and measure it, its other adapters and its base on the same rows. Raises LuthierError for what does not go together.

    ``ready``: is shown the rows before anything is measured, which takes long.
    """
    policy, labels, subjects = opened(opening, asked.precision, with_base=True if asked.prompts else lambda p: _goal(p, asked).renders not in HEADED)
    found = _prompted(policy, asked, labels, say, ready) if asked.prompts else _held_out(policy, _goal(policy, asked), asked, labels, say, ready)
    found.subjects = subjects
    return found


def opened(opening: Opening, precision: str, *, with_base: bool | Callable[[Policy], bool]) -> tuple[Policy, dict[str | None, str], list[str]]:
    """The policy, the label of each of its adapters (None: the base) that is to be measured, and the labels of those that are evaluated.

    ``with_base``: whether the base says anything without them; a head without its delta does not.
    """
    more = opening.adapters
    policy = load(opening.what, model=opening.model, precision=precision, adapters=more, use=opening.use or ("none" if more else None))
    serves = list(policy.deltas) if more and opening.use is None else [policy.active]
    base_too = any(serves) and not opening.alone and (with_base if isinstance(with_base, bool) else with_base(policy))
    names = [*serves, None] if base_too else serves
    policy.use(max(names, key=lambda n: policy.deltas[n].shift if n in policy.deltas else 0))  # rows are read for the one with the least room
    labels = {n: _label(n, names, Path(opening.what).name, bool(more)) for n in names}
    return policy, labels, [labels[n] for n in serves]


def _label(name: str | None, names: Sequence[str | None], what: str, more: bool) -> str:
    """What a column is called."""
    return (name if more else "tuned") if name else ("base" if len(names) > 1 else what)


def _goal(policy: Policy, asked: Asked) -> Any:
    """What the data is read for: labels, where the model has a head; else responses; of raw text the text itself."""
    if asked.part is not None or (policy.heads and not asked.text):
        return learned(policy, asked.part)
    return plugin("objectives", "sft" if not asked.text else "text" if policy.base.anatomy.kind == "decoder" else "masked_text")()


# --- rows that have answers, labels or judgements -------------------------------------------------------------------


def _held_out(policy: Policy, goal: Any, asked: Asked, labels: Mapping[str | None, str], say: Any, ready: Callable[[Found], None]) -> Found:
    goal.serves(policy.base.anatomy.kind)
    tasks = _tasks(goal, asked)
    prepared = _prepare(policy, goal, asked)
    most = asked.rows or (len(prepared.validation) if goal.renders in HEADED else ROWS)
    records = prepared.validation_records
    shown = task_rows(records[:most])
    task = next((t for name, t in tasks.items() if name.split()[0] == "classification" and t.problem != "regression"), None)
    found = Found({}, [], prepared.validation, records, len(shown), shown, goal, task)
    ready(found)
    together = record_of(records, prepared.validation)
    for name, label in labels.items():
        policy.use(name)
        sheet = found.sheets[label] = Sheet(rowloss.losses(policy, goal, prepared.validation, together))
        if tasks or asked.answers:
            sheet.answers = _answers(policy, goal, found, asked, say, label)
            sheet.scores = scores_of(tasks, shown, sheet.answers)
    if goal.renders == "ranked":
        lengths = [json.dumps([sum(sides(e)) for e in examples_of(row)]) for row in prepared.validation[:most]]
        only = scores_of({"preference": tasks["preference"]}, shown, lengths)["accuracy"]
        found.sheets["longer"] = Sheet(scores={"accuracy": only}, answers=lengths)  # the reward that a reward model has to beat
    if asked.copy_from is not None:
        copied = _copies(policy, asked, shown)
        found.sheets["copy"] = Sheet(scores=scores_of(tasks, shown, copied), answers=copied)
    return found


def _tasks(goal: Any, asked: Asked) -> dict[str, Any]:
    """The tasks that are named, and the objective's own."""
    tasks: dict[str, Any] = {name: open_task(name) for name in asked.tasks}
    if goal.renders == "label":
        if asked.copy_from:
            raise LuthierError("--copy-from copies answers, and this model gives labels; the share of the commonest label is what to beat")
        return {"classification": plugin("tasks", "classification")(problem=goal.problem)} | {k: v for k, v in tasks.items() if k != "classification"}
    if goal.renders == "ranked":
        if asked.copy_from:
            raise LuthierError("--copy-from copies answers, and this model scores them; preferring the longer answer is what to beat")
        return {"preference": plugin("tasks", "preference")()} | {k: v for k, v in tasks.items() if k != "preference"}
    return tasks


def scores_of(tasks: Mapping[str, Any], shown: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, Mark]:
    """Every score of several tasks; where two have a score of one name, the second is called by its task too."""
    if not shown and tasks:
        raise LuthierError("there are no rows to score; the data has no answers to compare with (for raw text say --text)")
    out: dict[str, Mark] = {}
    for name, task in tasks.items():
        for k, mark in marks.of_task(task, shown, answers).items():
            out[k if k not in out else f"{name}: {k}"] = mark
    return out


def _prepare(policy: Policy, goal: Any, asked: Asked) -> Any:
    known = {"problem": goal.problem, "labels": goal.labels} if goal.renders == "label" else {}
    # Read as validation data of itself: everything in it is held out here.
    return prepare(
        asked.data,
        policy.base.tokenizer,
        renders=goal.renders,
        form=form_of(policy.base),
        template=asked.template,
        columns=asked.columns,
        max_tokens=min(2048, policy.limit),
        over_length="split" if goal.renders in ("text", "masked") else "truncate",
        on_bad_row="stop",
        validation=asked.data,
        validation_rows=10**9,
        say=lambda _: None,
        **known,
    )


def _answers(policy: Policy, goal: Any, found: Found, asked: Asked, say: Any, label: str) -> list[str]:
    if goal.renders in HEADED:
        return [as_answer(said) for said in predict(policy, goal, found.rows[: found.asked])]
    how: dict[str, Any] = {"template": asked.template, "max_new": asked.max_new, "say": say, "label": f"answering ({label})"}
    return [a["answer"] for a in answer_rows(policy, found.shown, **how)]


def _copies(policy: Policy, asked: Asked, shown: Sequence[Mapping[str, Any]]) -> list[str]:
    assert asked.copy_from is not None
    source = [asked.copy_from]
    how: dict[str, Any] = {"template": asked.template, "max_tokens": 2048, "validation_rows": 10**9, "say": lambda _: None}
    train = prepare(source, policy.base.tokenizer, renders="chat", validation=source, **how)
    return nearest_copy([(r["prompt"], r["refs"][0]) for r in task_rows(train.validation_records)], [r["prompt"] for r in shown])


# --- prompts alone ---------------------------------------------------------------------------------------------------


def _prompted(policy: Policy, asked: Asked, labels: Mapping[str | None, str], say: Any, ready: Callable[[Found], None]) -> Found:
    can_write(policy)
    tasks = {name: open_task(name) for name in asked.tasks}
    how: dict[str, Any] = {"template": asked.template, "columns": asked.columns, "beginning": asked.beginning, "room": asked.max_new}
    rows = asking.asked(policy, asked.data, **how)[: asked.rows or ROWS]
    shown = [dict(r.extras["task"]) for r in rows]
    judge = Judge(dict.fromkeys(asked.rewards, 1.0), (), policy)
    found = Found({}, [], rows, [_Prompt(r) for r in rows], len(rows), shown)
    ready(found)
    for name, label in labels.items():
        policy.use(name)
        written: dict[str, Any] = {"template": asked.template, "max_new": asked.max_new, "temperature": asked.temperature, "seed": asked.seed}
        answers = asking.answered(policy, rows, say=say, **written)
        said = [a.text for a in answers]
        found.sheets[label] = Sheet(scores=scores_of(tasks, shown, said) | asking.rewarded(judge, answers), answers=said)
    return found


class _Prompt:
    """A prompt as slices look at it."""

    def __init__(self, row: Row):
        task = row.extras["task"]
        self.where, self.references, self.places = row.where, list(task.get("refs") or ()), [row.where]
        self.extras = {k: v for k, v in task.items() if k not in ("prompt", "refs", "tools")}


# --- another model on the same rows ----------------------------------------------------------------------------------


def set_beside(found: Found, other: Found, name: str, *, notes: Callable[[str], None]) -> str:
    """Put another model's sheet beside those of ``found``, and give the name of its column. Raises LuthierError where the two did not read the same rows."""
    sheet = other.sheets[other.subjects[0]]
    if [r.where for r in found.records[: found.asked]] != [r.where for r in other.records[: other.asked]]:
        raise LuthierError(
            f"--against {name}: it reads {other.asked:,} rows where the other reads {found.asked:,}, so they cannot be paired; "
            "one of the two templates or tokenizers cannot take some of them"
        )
    pairs = zip(found.rows, other.rows, strict=False)
    alike = len(found.rows) == len(other.rows) and all(len(a) == len(b) and bool((a.ids == b.ids).all()) for a, b in pairs)
    if sheet.losses and not alike:
        notes(f"{name} reads other tokens (another tokenizer or template), so its loss per token is not set beside the others'")
        sheet = Sheet({}, sheet.scores, sheet.answers)
    label = name if name not in found.sheets else f"against {name}"
    found.sheets[label] = sheet
    return label
