"""What is measured around a run: held-out loss, loss on general text (forgetting), task scores with intervals, fixed samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .core import Batch, Objective, Row
from .data.prepare import Prepared, prepare
from .data.render import render_prompt, stop_ids
from .evaluate import Score, loss_on, score
from .objectives import text as text_objective
from .plugins import plugin
from .policy import Policy
from .run import Run

GENERAL = Path(__file__).parent / "assets" / "general" / "general.txt"
ANSWER_ROWS = 32  # prompts answered at a time


@dataclass
class Mean:
    """A mean loss per unit, and over how many."""

    value: float
    n: int


@dataclass
class Measures:
    """One visit to the held-out data."""

    loss: Mean | None = None  # nats per trained token of the validation rows
    general: Mean | None = None  # nats per token of general text
    scores: dict[str, Score] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Flat, for metrics.jsonl."""
        out: dict[str, float] = {}
        if self.loss is not None:
            out["loss"] = self.loss.value
        if self.general is not None:
            out["general_loss"] = self.general.value
        for name, s in self.scores.items():
            out |= {name: s.value, f"{name}_low": s.low, f"{name}_high": s.high}
        return out

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Measures:
        """From dataclasses.asdict, as a checkpoint keeps it."""
        mean = lambda m: None if m is None else Mean(**m)  # noqa: E731
        return cls(mean(d.get("loss")), mean(d.get("general")), {k: Score(**s) for k, s in d.get("scores", {}).items()})


class Scorer:
    """Measures one policy on the held-out part of its run's data."""

    def __init__(self, policy: Policy, objective: Objective, prepared: Prepared, run: Run, *, packed: bool):
        self.policy, self.objective, self.prepared, self.run, self.packed = policy, objective, prepared, run, packed
        self.groups = group(prepared.validation, run.optim.micro_tokens, packed)
        self.general_groups = group(self._general_rows(), run.optim.micro_tokens, packed) if run.evaluate.forgetting else []

    def measure(self, *, tasks: bool, say: Any = None) -> Measures:
        """Held-out and general loss; with ``tasks`` the run's tasks too."""
        out = Measures(self._loss(self.objective, self.groups), self._loss(text_objective.Objective(), self.general_groups))
        if tasks:
            for kind in self.run.evaluate.tasks:
                out.scores |= self.task(kind, say)
        return out

    def task(self, kind: str, say: Any = None) -> dict[str, Score]:
        """Scores of one task on the validation records (or on the task's own rows, where it brings them)."""
        task = plugin("tasks", kind)()
        rows = task.rows("validation") or task_rows(self.prepared.validation_records)
        rows = rows[: self.run.evaluate.task_rows]
        answers = self.answers(rows, say=say, label=kind)
        return score(lambda _: answers, task, rows, seed=self.run.seed)

    def answers(self, rows: Sequence[dict[str, Any]], *, say: Any = None, label: str = "", max_new: int = 128) -> list[str]:
        """Greedy answers to task rows, in their order."""
        return [a["answer"] for a in answer_rows(self.policy, rows, template=self.run.model.template, max_new=max_new, say=say, label=label)]

    def samples(self) -> list[dict[str, Any]]:
        """The fixed prompts with the policy's greedy answers."""
        n = self.run.evaluate.samples
        if n == 0:
            return []
        if self.objective.renders == "chat":
            rows = task_rows(self.prepared.validation_records[:n])
            got = answer_rows(self.policy, rows, template=self.run.model.template, max_new=self.run.evaluate.sample_tokens)
            return [{**a, "reference": r["refs"][0]} for a, r in zip(got, rows, strict=True)]
        tokenizer = self.policy.base.tokenizer
        starts = [r.ids[:24].tolist() for r in self.prepared.validation[:n] if len(r) > 24]
        rollout = self.policy.generate(starts, max_new=self.run.evaluate.sample_tokens, stop=stop_ids(tokenizer, None))
        return [
            {"prompt": tokenizer.decode(s), "answer": tokenizer.decode(ids, skip_special_tokens=True), "stopped": how}
            for s, ids, how in zip(starts, rollout.ids, rollout.stopped, strict=True)
        ]

    def _loss(self, objective: Objective, groups: list[list[Row]]) -> Mean | None:
        if not groups:
            return None
        pad = self.policy.base.tokenizer.pad_token_id or 0
        batches = (to_device(objective.collate(g, pad=pad, packed=self.packed), self.policy) for g in groups)
        losses = loss_on(self.policy, objective, batches)
        return Mean(losses.value, losses.n)

    def _general_rows(self) -> list[Row]:
        d = self.run.data
        general: Prepared = prepare(
            d.general or (str(GENERAL),),
            self.policy.base.tokenizer,
            renders="text",
            template=None,
            shape="text" if not d.general else "auto",
            columns={},
            split="train",
            limit=None,
            max_tokens=min(d.max_tokens or 2048, self.policy.base.max_positions),
            over_length="split",
            train_on="all",
            on_bad_row="stop",
            validation=(),
            validation_share=0.0,
            validation_rows=1,
            seed=self.run.seed,
            say=lambda _: None,
        )
        return general.train


def to_device(batch: Batch, policy: Policy) -> Batch:
    """A batch where the model is."""
    return batch.to(policy.device)


def group(rows: Sequence[Row], tokens: int, packed: bool) -> list[list[Row]]:
    """Rows of like length in groups of at most ``tokens`` positions, padding included."""
    out: list[list[Row]] = []
    total = 0
    for row in sorted(rows, key=len):
        width = total + len(row) if packed else (len(out[-1]) + 1) * len(row) if out else 0
        if not out or width > tokens:
            out.append([])
            total = 0
        out[-1].append(row)
        total += len(row)
    return out


def task_rows(records: Sequence[Any]) -> list[dict[str, Any]]:
    """Held-out conversations as task rows: the prompt's messages, the tools, the reference answers, and the record's own fields."""
    return [{**r.extras, "prompt": r.prompt, "tools": r.tools, "refs": list(r.references)} for r in records]


def answer_rows(policy: Policy, rows: Sequence[dict[str, Any]], **how: Any) -> list[dict[str, Any]]:
    """Answers to task rows; see `answer`."""
    return answer(policy, [r["prompt"] for r in rows], tools=[r.get("tools") for r in rows], **how)


def answer(
    policy: Policy,
    prompts: Sequence[Any],
    *,
    tools: Sequence[Any] | None = None,
    template: str | None = None,
    max_new: int = 128,
    say: Any = None,
    label: str = "",
    offset: int = 0,
    **how: Any,
) -> list[dict[str, Any]]:
    """Answers to prompts (a text or messages each): {"prompt", "answer", "stopped", "tokens"}, in their order.

    ``offset``: number of the first prompt, for the random numbers; ``how``: see generation.generate.
    Prompts are taken shortest first in groups; one that leaves no room for an answer is answered with nothing, stopped "too long".
    """
    tokenizer, limit = policy.base.tokenizer, policy.base.max_positions
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    ids = [render_prompt(c, tokenizer, template, tools=t) for c, t in zip(chats, tools or [None] * len(chats), strict=True)]
    stops = stop_ids(tokenizer, template)
    out: list[dict[str, Any]] = [{"prompt": p, "answer": "", "stopped": "too long", "tokens": 0} for p in prompts]
    order = sorted((i for i in range(len(ids)) if len(ids[i]) < limit), key=lambda i: len(ids[i]))
    for start in range(0, len(order), ANSWER_ROWS):
        here = order[start : start + ANSWER_ROWS]
        rollout = policy.generate([ids[i] for i in here], max_new=max_new, stop=stops, numbers=[offset + i for i in here], **how)
        for i, new, stopped in zip(here, rollout.ids, rollout.stopped, strict=True):
            text = tokenizer.decode(new, skip_special_tokens=True).strip()
            out[i] |= {"answer": text, "stopped": stopped, "tokens": len(new)}
        if say is not None:
            say.tick(label, min(start + ANSWER_ROWS, len(order)), len(order))
    return out
