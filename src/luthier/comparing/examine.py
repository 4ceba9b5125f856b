"""One policy on the test rows: losses, answers, general text, latency. What was said is kept row by row, so that rows of the table compare in pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import references
from ..core import Row, example_logps
from ..data.prepare import Prepared
from ..data.render import render_prompt
from ..measuring.evaluate import loss_on
from ..measuring.measure import OWN_TASK, answer_rows, as_answer, group, once, predict, task_rows, to_device
from ..policy import Policy
from ..saving import adapter
from ..settings.plugins import kind_of, plugin
from ..settings.run import Data, Run
from . import latency
from .held import Tests

PER_ROW = ("sft", "text")  # objectives whose loss is that of next tokens
BLOCK = 16  # rows of others whose loss is summed together: what is resampled for the interval of the loss
ROOM = 1.25  # of the longest answer in the data: tokens that an answer may have
LOOKED_AT = 2000  # rows, for that
TASK = "bleu"  # of answers, where the run names none


def task_of(run: Run) -> tuple[str, Any] | None:
    """(kind, task) that the test rows are scored with; None where only the loss says how good a model is."""
    own = OWN_TASK.get(run.objective.renders)
    if own is None and run.objective.renders != "chat":
        return None
    kind = own or next(iter(run.evaluate.tasks), TASK)
    return kind, plugin("tasks", kind)(**({"problem": run.objective.problem} if kind == "classification" else {}))


def longest_answer(train: Sequence[Row]) -> int:
    """Tokens that an answer may have, from the answers in the training rows."""
    step = max(1, len(train) // LOOKED_AT)
    return min(256, max(16, int(ROOM * max((int(r.train.sum()) for r in train[::step]), default=16))))


def bring_references(policy: Policy, objective: Any, tests: Tests, run: Run, packed: bool) -> None:
    """The reference's log-probabilities of the test rows, for objectives that want them; before training."""
    made = Prepared([], tests.rows, [])
    started = getattr(run.method, "from_", None) is not None
    references.bring(policy, objective, made, folder=Path(run.out) / ".references", tokens=run.optim.micro_tokens, packed=packed, started=started)


def losses(policy: Policy, objective: Any, rows: Sequence[Row], packed: bool, tokens: int = 8192) -> list[list[float]]:
    """(rows, 2): the summed loss and the units of every row, in their order, where the objective is the loss of next tokens.

    Of others (blocks, 2), of BLOCK rows each; of an objective with several terms, whose units differ, its value and 1.
    """
    policy.eval()
    if kind_of(objective) in PER_ROW:
        tokens = with_room(policy, rows, tokens)
        place, out = {id(r): i for i, r in enumerate(rows)}, [[0.0, 0.0] for _ in rows]
        for some in group(rows, tokens, packed):  # few shapes: on a CPU every new one costs
            batch = to_device(objective.collate(some, pad=policy.pad, packed=packed), policy)
            with torch.no_grad():
                logp_S, n_S = example_logps(policy, batch)
            for row, logp, n in zip(some, logp_S.tolist(), n_S.tolist(), strict=True):
                out[place[id(row)]] = [-logp, n]
        return out
    blocks = []
    for i in range(0, len(rows), BLOCK):
        batch = to_device(objective.collate(list(rows[i : i + BLOCK]), pad=policy.pad, packed=packed), policy)
        if any(batch.units.values()):
            found = loss_on(policy, objective, [batch])
            units = found.n if len(found.terms) == 1 else 1
            blocks.append([found.value * units, float(units)])
    return blocks


def with_room(policy: Policy, rows: Sequence[Row], tokens: int) -> int:
    """Tokens of rows that make a forward of so many positions, where a prompt stands before every row."""
    mean = sum(len(r) for r in rows) / max(1, len(rows))
    return max(1, int(tokens * mean / (mean + policy.room(policy.active))))


def answers(policy: Policy, objective: Any, tests: Tests, run: Run, most: int, max_new: int, say: Any = None) -> list[str]:
    """What the policy says to the first ``most`` records (a head: to all rows), as tasks score it."""
    if objective.renders in OWN_TASK:
        return [as_answer(said) for said in predict(policy, objective, tests.rows)]
    if objective.renders != "chat":
        return []
    got = answer_rows(policy, task_rows(tests.records[:most]), template=run.model.template, max_new=max_new, say=say, label="answers")
    return [a["answer"] for a in got]


def general(policy: Policy, run: Run) -> dict[str, Any] | None:
    """Loss on general text, as a run measures it."""
    found = once(policy, replace(run, data=Data(general=run.data.general, max_tokens=run.data.max_tokens), evaluate=replace(run.evaluate, forgetting=True)))
    return None if found.general is None else asdict(found.general)


def how_fast(policy: Policy, objective: Any, tests: Tests, run: Run) -> dict[str, Any]:
    """Latency as it is served beside its base and, where the delta folds, merged into it. The policy cannot be used afterwards."""
    fast = _clock(policy, objective, tests, run)
    attached = asdict(fast()) if policy.delta is not None and adapter.writes(policy.method) != "model" else None
    merged = asdict(fast()) if latency.folded(policy) else None
    return {"attached": attached, "merged": merged}


def _clock(policy: Policy, objective: Any, tests: Tests, run: Run) -> Callable[[], latency.Latency]:
    if objective.renders in ("label", "ranked") or policy.base.anatomy.kind == "encoder":
        middle = sorted(tests.rows, key=len)[len(tests.rows) // 2]
        return lambda: latency.measured(policy, [], middle, objective)
    tokenizer, kind = policy.base.tokenizer, policy.base.anatomy.kind
    if tests.records and objective.renders != "text":
        some = [render_prompt(r.prompt, tokenizer, run.model.template, tools=r.tools, kind=kind) for r in tests.records[:101]]
    else:
        some = [list(map(int, r.ids)) for r in tests.rows[:101]]
    middle_ids = sorted(some, key=len)[len(some) // 2]
    return lambda: latency.measured(policy, middle_ids)


def examine(policy: Policy, objective: Any, tests: Tests, run: Run, *, most: int, loss_rows: int, max_new: int, packed: bool) -> dict[str, Any]:
    """Everything, with the seconds each part took: the loss of ``loss_rows`` rows, the answers to ``most`` records. The policy is folded at the end."""
    clock = time.perf_counter
    began = clock()
    lost = losses(policy, objective, tests.rows[:loss_rows], packed)
    loss_s, began = clock() - began, clock()
    said = answers(policy, objective, tests, run, most, max_new)
    answer_s, began = clock() - began, clock()
    text = general(policy, run) if run.evaluate.forgetting else None
    general_s, began = clock() - began, clock()
    fast = how_fast(policy, objective, tests, run)
    took = {"losses": loss_s, "answers": answer_s, "general": general_s, "latency": clock() - began}
    return {"losses": [[round(a, 6), b] for a, b in lost], "answers": said, "general": text, "latency": fast, "took": took}


def copied(train: Sequence[Row], tests: Tests, tokenizer: Any, most: int, labels: Sequence[str] = ()) -> list[str]:
    """The copying baseline: the answer, or the label, of the training row whose prompt is most like the test row's. Texts are read back from tokens."""
    from ..measuring.evaluate import nearest_copy

    pairs = []
    for row in train:
        if "label" in row.extras:
            label = row.extras["label"]
            read = row.extras.get("source", row.ids)
            pairs.append(
                (tokenizer.decode(read, skip_special_tokens=True), labels[int(label)] if labels and isinstance(label, int | np.integer) else str(label))
            )
            continue
        prompt = row.extras["source"] if isinstance(row.extras.get("source"), np.ndarray) else row.ids[~row.train]
        pairs.append((tokenizer.decode(prompt, skip_special_tokens=True), tokenizer.decode(row.ids[row.train], skip_special_tokens=True).strip()))
    return nearest_copy(pairs, [r.prompt for r in tests.records[:most]])


def commonest(train: Sequence[Row], labels: Sequence[str], n: int) -> list[str]:
    """The baseline that looks at nothing: always the label that most training rows have."""
    given = [int(r.extras["label"]) for r in train if isinstance(r.extras.get("label"), int | np.integer) and int(r.extras["label"]) >= 0]
    return [labels[max(set(given), key=given.count)]] * n if given and labels else []
