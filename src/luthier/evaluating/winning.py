"""Win rates: two models' answers to the same prompts, and whose is better, by a reward model or by a judge behind an endpoint.

A win counts 1, a tie one half, a loss 0, and the win rate is their mean over prompts: 0.5 where the two are alike. A reward model scores each answer by itself;
the higher wins. An endpoint is asked in both orders, and prefers an answer only where it does so in both (judging.py says how); else it is a tie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import opening
from ..core import LuthierError
from ..data.preferences import Judged
from ..data.questions import asked
from ..data.shapes import Chat
from ..feedback.endpoint import Endpoint
from ..feedback.judging import Judge, judge_all
from ..measuring.marks import Score, score_of
from ..measuring.measure import rewards
from ..nn import intervals
from ..saving import adapter

WORTH = {"first": 1.0, "second": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Wins:
    """What came of it. ``worth``: of each prompt 1, 0.5 or 0 for the first model; None where there was no verdict."""

    worth: list[float | None]
    rate: Score
    notes: list[str]

    @property
    def counts(self) -> tuple[int, int, int]:
        """(wins, ties, losses)."""
        return self.worth.count(1.0), self.worth.count(0.5), self.worth.count(0.0)

    @property
    def is_clear(self) -> bool:
        """The interval excludes one half."""
        return self.rate.low > 0.5 or self.rate.high < 0.5

    def said(self, first: str, second: str) -> str:
        """In a sentence."""
        wins, ties, losses = self.counts
        verdict = "" if self.is_clear else "; the interval holds 0.5, so this may be chance"
        return f"{first} against {second}: {wins} wins, {ties} ties, {losses} losses; win rate {self.rate}{verdict}"

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return dict(zip(("wins", "ties", "losses"), self.counts, strict=True)) | {"rate": vars(self.rate), "notes": self.notes}


def by_scores(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Wins:
    """The higher score wins."""
    return counted([1.0 if a > b else 0.0 if a < b else 0.5 for a, b in zip(first, second, strict=True)], seed=seed)


def counted(worth: Sequence[float | None], notes: Sequence[str] = (), *, seed: int = 0) -> Wins:
    """The win rate of prompts. Raises LuthierError where none has a verdict."""
    decided = [w for w in worth if w is not None]
    if not decided:
        raise LuthierError("win rate: there is no verdict on any of the answers" + (f"; {notes[0]}" if notes else ""))
    return Wins(list(worth), score_of(intervals.mean(np.array(decided), seed=seed)), list(notes))


# --- a reward model --------------------------------------------------------------------------------------------------


def reward_model(folder: Path) -> Path:
    """Where a reward model lies. Raises LuthierError for a folder that was not trained with objective: reward."""
    found = adapter.artefact(folder.expanduser())
    if found is None:
        raise LuthierError(f"--judge {folder}: there is no such folder; name a run trained with objective: reward, or an endpoint (http://127.0.0.1:8000/v1)")
    if getattr(adapter.objective_of(found), "renders", "") != "ranked":
        raise LuthierError(f"--judge {folder}: was not trained to score answers; name a run trained with objective: reward, or an endpoint")
    return found


def reward_of(folder: Path) -> Callable[[Sequence[Any], Sequence[str]], list[float]]:
    """What a reward model gives to answers to prompts, by its own template. An answer of no text gets less than any other."""
    model = opening.load(folder)
    ours = json.loads((folder / adapter.OURS).read_text()) if (folder / adapter.OURS).is_file() else {}
    template = (((ours.get("training") or {}).get("run") or {}).get("model") or {}).get("template")

    def score(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        chats = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
        said = [(c, a) for c, a in zip(chats, answers, strict=True) if a.strip()]
        given = iter(rewards(model, [Judged((Chat([*c, {"role": "assistant", "content": a}]),), len(c)) for c, a in said], template=template))
        return [next(given)[0] if a.strip() else -np.inf for a in answers]

    return score


# --- an endpoint -----------------------------------------------------------------------------------------------------


def by_endpoint(
    server: Endpoint, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str], *, on_judged: Callable[[], None], seed: int = 0, **how: Any
) -> Wins:
    """A judge's verdicts, both orders asked. Equal answers tie unasked, and an empty one loses. ``how``: parallel, and fields of `Judge`."""
    parallel = how.pop("parallel", 4)
    judge = Judge(endpoint=server, seed=seed, **how)
    worth: list[float | None] = [_plainly(a.strip(), b.strip()) for a, b in zip(first, second, strict=True)]
    todo = [i for i, w in enumerate(worth) if w is None]
    unread, example, turned = 0, "", 0
    for _ in range(len(worth) - len(todo)):
        on_judged()
    for i, judgement in zip(todo, judge_all(judge, ((asked(prompts[i]), (first[i], second[i])) for i in todo), parallel=parallel), strict=True):
        outcome = judgement.outcomes[0, 1]
        if outcome.is_read:
            worth[i] = WORTH[outcome.straight] if outcome.is_consistent and outcome.straight else 0.5
            turned += not outcome.is_consistent
        else:
            unread, example = unread + 1, example or outcome.unread
        on_judged()
    notes = [f"{turned:,} of {len(todo) - unread:,} verdicts changed with the order of the answers, and are ties"] if turned else []
    if unread:
        notes.append(f"{unread:,} pairs have no readable verdict and are not counted; the first: {example}")
    return counted(worth, notes, seed=seed)


def _plainly(a: str, b: str) -> float | None:
    """What needs no judge."""
    return 0.5 if a == b else 0.0 if not a else 1.0 if not b else None
