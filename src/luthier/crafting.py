"""Choosing a crafted prompt: every candidate is scored on held-out rows, and the best is put in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .core import LuthierError
from .measuring.measure import Scorer
from .policy import Policy


@dataclass(frozen=True)
class Tried:
    """One candidate prompt and what it scored."""

    method: Any
    loss: float
    score: float | None  # of the run's first task, where that decides


def choose(policy: Policy, scorer: Scorer, candidates: list[Any], *, task: str | None, tick: Callable[[int, int], None]) -> list[Tried]:
    """All candidates, the best first; the best is what the policy has from now on.

    ``task``: the task whose first score decides; None: the held-out loss. Raises LuthierError where there are no held-out rows.
    """
    out = []
    for i, method in enumerate(candidates):
        put(policy, method)
        measured = scorer.measure(tasks=False)
        if measured.loss is None:
            raise LuthierError("a crafted prompt is chosen on held-out rows, and there are none; give data.validation or a data.validation_share")
        scores = list(scorer.task(task).values()) if task is not None else []
        out.append(Tried(method, measured.loss.value, scores[0].value if scores else None))
        tick(i + 1, len(candidates))
    out.sort(key=lambda t: t.loss if t.score is None else -t.score)
    put(policy, out[0].method)
    return out


def put(policy: Policy, method: Any) -> None:
    """Put a candidate prompt in place."""
    policy.deltas[policy.name] = method.attach(policy.base, policy.name)
    policy.method = method
