"""What is measured around a run: held-out loss, loss on general text (forgetting), task scores with intervals, fixed samples."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import Batch, LuthierError, Objective, Row, spread, spread_answers
from ..data.answers import Renderer
from ..data.codec import Codec
from ..data.encode import hiding_of, render_labelled
from ..data.labels import Labelled
from ..data.preferences import Judged
from ..data.prepare import Prepared, prepare
from ..data.rankings import render_preferences
from ..data.render import render_prompt, stop_ids
from ..data.rows import Counts, Dropped, by_beginning, sides
from ..objectives import masked_text
from ..objectives import text as text_objective
from ..policy import Policy
from ..reading import form_of, read_data
from ..settings.plugins import plugin
from ..settings.run import Run
from . import by_source
from .by_name import open_task
from .evaluate import Losses, Score, loss_on, score

GENERAL = Path(__file__).parents[1] / "assets" / "general" / "general.txt"
ANSWER_ROWS = 32  # answers written at a time
BATCHES, SHORT = 24, 256  # batches of held-out rows, about; tokens of one
LINES = {"instructions": "instructions_loss", "sampled": "sampled_loss", "moved": "general_kl", "facts": "known_facts"}  # in metrics.jsonl
OWN_TASK = {"label": "classification", "ranked": "preference", "pairs": "preference"}  # scored unasked, by how the objective's rows are rendered


@dataclass
class Mean:
    """A mean loss per unit, and over how many."""

    value: float
    n: int
    unit: str = "tokens"


@dataclass
class Measures:
    """One visit to the held-out data."""

    loss: Mean | None = None  # per trained token (nats) or example of the validation rows
    general: Mean | None = None  # nats per token of general text; of models that are no decoders, per hidden token
    replayed: Mean | None = None  # the same on held-out rows of what is replayed beside the data
    scores: dict[str, Score] = field(default_factory=dict)  # of a mixture SOURCE/SCORE, and SCORE for their average
    sources: dict[str, Mean] = field(default_factory=dict)  # of a mixture: the loss of each source on its own held-out rows
    suite: dict[str, Mean] = field(default_factory=dict)  # what is retained (retention.py): instructions, sampled, moved, facts
    retained: dict[str, Score] = field(default_factory=dict)  # of tasks that are to be retained: TASK/SCORE

    @property
    def average(self) -> float | None:
        """The sources' losses, each counted once; None where there are none."""
        return sum(m.value for m in self.sources.values()) / len(self.sources) if self.sources else None

    def numbers(self) -> dict[str, float]:
        """Flat, for metrics.jsonl."""
        out: dict[str, float] = {}
        if self.loss is not None:
            out["loss"] = self.loss.value
        if self.general is not None:
            out["general_loss"] = self.general.value
        if self.replayed is not None:
            out["replayed_loss"] = self.replayed.value
        if self.average is not None:
            out |= {"average_loss": self.average} | {f"{name}/loss": m.value for name, m in self.sources.items()}
        out |= {LINES.get(name, name): m.value for name, m in self.suite.items()}
        for name, s in (self.scores | {f"retained/{name}": s for name, s in self.retained.items()}).items():
            out |= {name: s.value, f"{name}_low": s.low, f"{name}_high": s.high}
        return out

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Measures:
        """From dataclasses.asdict, as a checkpoint keeps it."""
        mean = lambda m: None if m is None else Mean(**m)  # noqa: E731
        scores = {k: Score(**s) for k, s in d.get("scores", {}).items()}
        sources = {k: Mean(**m) for k, m in d.get("sources", {}).items()}
        suite, retained = {k: Mean(**m) for k, m in d.get("suite", {}).items()}, {k: Score(**s) for k, s in d.get("retained", {}).items()}
        return cls(mean(d.get("loss")), mean(d.get("general")), mean(d.get("replayed")), scores, sources, suite, retained)


Rewarding = Callable[[Sequence[Row]], dict[str, Score]]


class Scorer:
    """Measures one policy on the held-out part of its run's data."""

    def __init__(self, policy: Policy, objective: Objective, prepared: Prepared, run: Run, *, packed: bool, rewarded: Rewarding | None = None):
        """``rewarded``: scores the policy's answers to held-out prompts, of an objective that learns from its own answers."""
        self.policy, self.objective, self.prepared, self.run, self.packed, self.rewarded = policy, objective, prepared, run, packed, rewarded
        self.replayed: Callable[[], Mean | None] | None = None  # the loss on held-out rows of what a run replays
        answers = objective.renders == "prompts"  # what is held out are prompts, which have no loss
        self.sources = {name: Scorer(policy, goal, rows, own, packed=packed) for name, goal, rows, own in by_source.runs_of(run, prepared)}
        self.groups = [] if answers or self.sources else group(prepared.validation, small_enough(prepared.validation, run.optim.micro_tokens), packed)
        self.held_out: Losses | None = None  # the last measurement of the held-out loss, batch by batch
        self.general: Objective = text_objective.Objective() if policy.base.anatomy.kind == "decoder" else masked_text.Objective()
        self.general_groups = group(self._general_rows(), run.optim.micro_tokens, packed) if run.evaluate.forgetting else []

    def measure(self, *, tasks: bool, say: Any = None) -> Measures:
        """Held-out and general loss; with ``tasks`` the run's tasks too."""
        self.held_out = self.losses(self.objective, self.groups) if self.groups else None
        out = Measures(None if self.held_out is None else _mean(self.held_out, self.objective), self._loss(self.general, self.general_groups))
        if tasks and self.replayed is not None:
            out.replayed = self.replayed()
        if self.sources:
            self._measure_sources(out, tasks, say)
            return out
        if self.rewarded is not None and self.prepared.validation:
            out.scores |= self.rewarded(self.prepared.validation[: self.run.evaluate.task_rows])
        if tasks:
            out.scores |= self.task_scores(say)
        return out

    def _measure_sources(self, out: Measures, tasks: bool, say: Any) -> None:
        """Each source by itself, and all of them together: the loss over all held-out rows, and the average of each score."""
        losses: dict[str, Losses] = {}
        named: dict[str, list[Score]] = defaultdict(list)
        for name, scorer in self.sources.items():
            if not scorer.groups:
                continue
            losses[name] = scorer.losses(scorer.objective, scorer.groups)
            out.sources[name] = _mean(losses[name], scorer.objective)
            for score_name, value in (scorer.task_scores(say) if tasks else {}).items():
                out.scores[f"{name}/{score_name}"] = value
                named[score_name].append(value)
        if losses:
            self.held_out = whole = by_source.pooled(self.run, losses)
            out.loss = Mean(whole.value, whole.n, "units") if self.objective.renders == "mixed" else _mean(whole, self.objective)
        out.scores |= {name: by_source.average(values) for name, values in named.items() if len(values) > 1}

    def task_scores(self, say: Any = None) -> dict[str, Score]:
        """Scores of the objective's own task and of the run's."""
        own = OWN_TASK.get(self.objective.renders) if self.groups else None  # it costs one forward a row
        scores: dict[str, Score] = {}
        for kind in dict.fromkeys([*([own] if own else []), *self.run.evaluate.tasks]):
            scores |= self.task(kind, say)
        return scores

    def task(self, kind: str, say: Any = None) -> dict[str, Score]:
        """Scores of one task on the validation records (or on the task's own rows, where it brings them)."""
        if self.objective.renders in ("label", "ranked") or kind == "preference":
            most = self.run.evaluate.task_rows
            return score_labels(self.policy, self.objective, self.prepared.validation[:most], self.prepared.validation_records[:most], kind, self.run.seed)[0]
        task = open_task(kind, "evaluate.tasks")
        rows = task.rows("validation") or task_rows(self.prepared.validation_records)
        rows = rows[: self.run.evaluate.task_rows]
        answers = self.answers(rows, say=say, label=kind)
        return score(lambda _: answers, task, rows, seed=self.run.seed)

    def answers(self, rows: Sequence[dict[str, Any]], *, say: Any = None, label: str = "", max_new: int = 128) -> list[str]:
        """Greedy answers to task rows, in their order."""
        return [a["answer"] for a in answer_rows(self.policy, rows, template=self.run.model.template, max_new=max_new, say=say, label=label)]

    def samples(self) -> list[dict[str, Any]]:
        """The fixed prompts with the policy's greedy answers."""
        if self.sources:
            return [{"source": name} | row for name, scorer in self.sources.items() for row in scorer.samples()]
        n = self.run.evaluate.samples
        if n == 0:
            return []
        if self.objective.renders in ("chat", "pairs", "judged"):
            rows = task_rows(self.prepared.validation_records[:n])
            got = answer_rows(self.policy, rows, template=self.run.model.template, max_new=self.run.evaluate.sample_tokens)
            return [{**a, "reference": next(iter(r["refs"]), None)} for a, r in zip(got, rows, strict=True)]
        if self.objective.renders == "ranked":
            rows = task_rows(self.prepared.validation_records[:n])
            said = predict(self.policy, self.objective, self.prepared.validation[:n])
            return [{k: r[k] for k in ("prompt", "answers", "ranks")} | p for p, r in zip(said, rows, strict=True)]
        if self.objective.renders == "label":
            records = self.prepared.validation_records[:n]
            said = predict(self.policy, self.objective, self.prepared.validation[:n])
            return [
                {"prompt": r.prompt[0]["content"], "answer": as_answer(p), "probability": p.get("probability"), "reference": r.references[0]}
                for p, r in zip(said, records, strict=True)
            ]
        if self.objective.renders == "masked":
            return []
        tokenizer = self.policy.base.tokenizer
        if self.objective.renders == "prompts":
            starts = [r.ids.tolist() for r in self.prepared.validation[:n]]
            stops = stop_ids(tokenizer, self.run.model.template, kind=self.policy.base.anatomy.kind)
        else:
            starts = [r.ids[:24].tolist() for r in self.prepared.validation[:n] if len(r) > 24]
            stops = stop_ids(tokenizer, None)
        rollout = spread_answers(self.policy, starts, max_new=self.run.evaluate.sample_tokens, stop=stops)
        return [
            {"prompt": tokenizer.decode(s), "answer": tokenizer.decode(ids, skip_special_tokens=True), "stopped": how}
            for s, ids, how in zip(starts, rollout.ids, rollout.stopped, strict=True)
        ]

    def _loss(self, objective: Objective, groups: list[list[Row]]) -> Mean | None:
        return _mean(self.losses(objective, groups), objective) if groups else None

    def losses(self, objective: Objective, groups: list[list[Row]]) -> Losses:
        """Summed loss and counts of held-out rows."""
        pad = self.policy.base.tokenizer.pad_token_id or 0
        batches = (to_device(objective.collate(g, pad=pad, packed=self.packed), self.policy) for g in groups)
        return loss_on(self.policy, objective, batches)

    def _general_rows(self) -> list[Row]:
        d, form = self.run.data, form_of(self.policy.base)
        if self.general.renders == "masked":
            if self.policy.base.probes.get("head", 0.0) is None:  # an encoder whose files hold no language-model head
                return []
            try:
                hiding_of(Codec(self.policy.base.tokenizer), form)
            except LuthierError:  # BART and the like: no sentinels, so there is no general text to measure
                return []
        general: Prepared = prepare(
            d.general or (str(GENERAL),),
            self.policy.base.tokenizer,
            renders=self.general.renders,
            form=form,
            template=None,
            shape="text" if not d.general else "auto",
            columns={},
            split="train",
            limit=None,
            max_tokens=min(d.max_tokens or 2048, self.policy.limit),
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


def _mean(losses: Losses, objective: Objective) -> Mean:
    unit = next(iter(objective.terms))
    return Mean(losses.value, losses.counts[unit], unit)


def once(policy: Policy, run: Run) -> Measures:
    """Loss of a policy on the validation rows that a run's settings hold out, and on general text; only the second where they name no data."""
    prepared = Prepared([], [], [])
    if run.data.files:
        prepared = read_data(run, policy.base.tokenizer, positions=policy.limit, say=lambda _: None, form=form_of(policy.base))
    return Scorer(policy, run.objective, prepared, run, packed=policy.base.packs).measure(tasks=False)


def beside(measured: dict[str, Measures]) -> Iterator[str]:
    """Held-out and general losses side by side, a line each, with what the last gains or loses on the first."""
    first, last = next(iter(measured.values())), list(measured.values())[-1]
    for what, name in (("held-out loss", "loss"), ("loss on general text", "general")):
        known = getattr(first, name)
        if known is not None:
            said = ", ".join(f"{label} {getattr(m, name).value:.4f}" for label, m in measured.items())
            yield f"  {what} (n={known.n:,}): {said} ({getattr(last, name).value - known.value:+.4f})"


def to_device(batch: Batch, policy: Policy) -> Batch:
    """A batch where the model is."""
    return batch.to(policy.device)


def group(rows: Sequence[Row], tokens: int, packed: bool, *, together: bool = False) -> list[list[Row]]:
    """Rows of like length in groups of at most ``tokens`` positions, padding included. ``together``: where they are packed, those that begin alike."""
    out: list[list[Row]] = []
    total = 0
    length = lambda row: sum(sides(row))  # noqa: E731
    for row in [rows[i] for i in by_beginning(rows)] if together and packed else sorted(rows, key=length):
        width = total + length(row) if packed else (len(out[-1]) + 1) * length(row) if out else 0
        if not out or width > tokens:
            out.append([])
            total = 0
        out[-1].append(row)
        total += length(row)
    return out


def small_enough(rows: Sequence[Row], most: int) -> int:
    """Tokens of a batch of held-out rows: so few that there are some batches, whose losses say how sure a change of the loss is, and at most ``most``.

    BATCHES of them, but for short data fewer, down to a third, rather than batches of less than SHORT tokens, which take longer by the token.
    """
    total = sum(sum(sides(r)) for r in rows)
    return max(1, min(most, max(total // BATCHES, min(SHORT, 3 * total // BATCHES))))


def task_rows(records: Sequence[Any]) -> list[dict[str, Any]]:
    """Held-out conversations as task rows: the prompt's messages, the tools, the reference answers, and the record's own fields."""
    return [{**r.extras, "prompt": r.prompt, "tools": r.tools, "refs": list(r.references)} for r in records]


# --- labels ---------------------------------------------------------------------------------------------------------


def predict(policy: Policy, objective: Any, rows: Sequence[Row], *, tokens: int = 8192) -> list[dict[str, Any]]:
    """What a head (or, of pairs, the policy itself) says of each row, in their order; see the objective's predict."""
    pad, packed = policy.base.tokenizer.pad_token_id or 0, policy.base.packs
    place = {id(row): i for i, row in enumerate(rows)}
    out: list[dict[str, Any]] = [{} for _ in rows]
    training = policy.training
    policy.eval()
    try:
        groups = group(rows, tokens, packed, together=True)
        one = lambda some: objective.predict(policy, to_device(objective.collate(some, pad=pad, packed=packed), policy))  # noqa: E731
        for some, answers in zip(groups, spread(policy, groups, lambda part: [one(g) for g in part], "predictions"), strict=True):
            for row, said in zip(some, answers, strict=True):
                out[place[id(row)]] = said
    finally:
        policy.train(training)
    return out


def learned(policy: Policy, part: str | None = None) -> Any:
    """What a policy with heads was trained with; of several tasks, the one that is named. Raises LuthierError where a name is missing or says nothing."""
    objective: Any = policy.objective
    if objective is None or objective.renders != "mixed":
        if part is not None:
            raise LuthierError(f"--part {part}: this model was not trained on several tasks; leave it out")
        return objective
    if part is None:
        raise LuthierError(f"this model learned several tasks: {', '.join(objective.parts)}; say which of them is meant with --part")
    return objective.part(part)


def predict_texts(policy: Policy, texts: Sequence[Labelled], *, part: str | None = None) -> list[dict[str, Any]]:
    """What a policy with a classification head says of texts (``Labelled`` without a label). Raises LuthierError for one without a head.

    ``part``: of a policy that was trained on several tasks, the one that is meant.
    """
    objective = learned(policy, part)
    if not policy.heads or objective is None or objective.renders != "label":
        raise LuthierError("this model has no classification head; name a run or an adapter that was trained with objective: classify")
    codec, counts = Codec(policy.base.tokenizer), Counts()
    room = min(2048, policy.limit, policy.base.tokenizer.model_max_length)
    rendered = render_labelled(texts, codec, form_of(policy.base), max_tokens=room, over_length="truncate", counts=counts)
    return predict(policy, objective, [row for _, rows in rendered for row in rows])


def rewards(policy: Policy, items: Sequence[Judged], *, template: str | None = None, part: str | None = None) -> list[list[float]]:
    """The reward of every answer, by item. Raises LuthierError for a policy without a reward head, and for an item that the template cannot render."""
    objective = learned(policy, part)
    if not policy.heads or getattr(objective, "renders", "") != "ranked":
        raise LuthierError("this model has no reward head; name a run or an adapter that was trained with objective: reward")
    room = min(2048, policy.limit, policy.base.tokenizer.model_max_length)
    renderer, form = Renderer(policy.base.tokenizer, template), form_of(policy.base)
    alone = [Judged((c,), item.prompt, where=item.where) for item in items for c in item.chats]  # equal answers are left out where they are compared
    rows: list[Row] = []
    for item, made in render_preferences(alone, renderer, form, renders="ranked", max_tokens=room, over_length="truncate", counts=Counts()):
        if isinstance(made, Dropped):
            raise LuthierError(f"{item.where}: {made.reason}; set --template to one that can render it")
        rows += made
    scores = iter(said["scores"][0] for said in predict(policy, objective, rows))
    return [[next(scores) for _ in item.chats] for item in items]


def as_answer(said: dict[str, Any]) -> str:
    """A prediction as the text that tasks score."""
    if "scores" in said:
        return json.dumps(said["scores"])
    label = said["label"]
    return label if isinstance(label, str) else json.dumps(label, ensure_ascii=False)


def score_labels(
    policy: Policy, objective: Any, rows: Sequence[Row], records: Sequence[Any], kind: str = "classification", seed: int = 0
) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """Scores of a head on labelled rows and their records, and its predictions."""
    said = predict(policy, objective, rows)
    task = plugin("tasks", kind)(**({"problem": objective.problem} if kind == "classification" else {}))
    return score(lambda _: [as_answer(p) for p in said], task, task_rows(records), seed=seed), said


def can_write(policy: Policy) -> None:
    """Raise LuthierError for a policy that gives labels, or that only reads."""
    if policy.heads and not getattr(policy.objective, "reads_head", False):
        gives = "reward model: it scores answers" if getattr(policy.objective, "renders", "") == "ranked" else "classifier: it gives labels"
        raise LuthierError(f"this is a {gives} and writes no text; use luthier predict")
    if policy.base.anatomy.kind == "encoder":
        raise LuthierError(f"this model ({policy.base.anatomy.family}) is an encoder: it reads text and writes none; train it with objective: classify")


# --- answers --------------------------------------------------------------------------------------------------------


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
    samples: int = 1,
    say: Any = None,
    label: str = "",
    offset: int = 0,
    **how: Any,
) -> list[dict[str, Any]]:
    """``samples`` answers to each of the prompts (a text or messages): {"prompt", "answer", "stopped", "tokens"}, in their order, a prompt's side by side.

    ``offset``: number of the first prompt, for the random numbers; ``how``: see Policy.generate.
    A prompt that leaves no room for an answer is answered with nothing, stopped "too long".
    """
    can_write(policy)
    tokenizer, limit = policy.base.tokenizer, policy.limit
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    kind = policy.base.anatomy.kind
    ids = [render_prompt(c, tokenizer, template, tools=t, kind=kind) for c, t in zip(chats, tools or [None] * len(chats), strict=True)]
    out: list[dict[str, Any]] = [{"prompt": p, "answer": "", "stopped": "too long", "tokens": 0} for p in prompts for _ in range(samples)]
    short = [i for i in range(len(ids)) if len(ids[i]) < limit]

    def tick(done: int) -> None:
        if say is not None:
            say.tick(label, done, len(short) * samples)

    how |= {"stop": stop_ids(tokenizer, template, kind=kind), "numbers": [offset + i for i in short], "batch_rows": ANSWER_ROWS, "on_answers": tick}
    rollout = spread_answers(policy, [ids[i] for i in short], max_new=max_new, samples=samples, **how)
    places = (i * samples + s for i in short for s in range(samples))
    for place, new, stopped in zip(places, rollout.ids, rollout.stopped, strict=True):
        out[place] |= {"answer": tokenizer.decode(new, skip_special_tokens=True).strip(), "stopped": stopped, "tokens": len(new)}
    return out
