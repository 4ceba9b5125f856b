"""Scoring a policy: task scores and held-out loss, each seeded, with a count and a 95 % interval beside it; and the baseline that copies.

A task's scores are means over rows, unless it defines ``statistics`` and ``corpus``: then its rows are summed and scored as one (corpus BLEU); or
``whole``: then all of them are scored together (macro-F1, a rank correlation). See marks.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from ..core import Batch, Coupled, LuthierError, Objective, Place, Task
from .marks import Pooled, Row, Score, Whole, of_task
from .paired import difference

__all__ = ["Losses", "Pooled", "Row", "Score", "Whole", "compare", "loss_on", "nearest_copy", "score"]


def score(generate: Callable[[Sequence[Row]], Sequence[str]], task: Task, rows: Sequence[Row], *, seed: int = 0) -> dict[str, Score]:
    """Answer all rows with ``generate`` and score them; ``seed`` draws the resamples.

    Raises LuthierError without rows, and where answers are not one a row.
    """
    if not rows:
        raise LuthierError("there are no rows to score; name a validation file, or raise data.validation_share")
    answers = generate(rows)
    if len(answers) != len(rows):
        raise LuthierError(f"{len(rows)} rows were asked and {len(answers)} answers came back; one a row is needed")
    return {name: mark.score(seed=seed) for name, mark in of_task(task, rows, answers).items()}


def compare(task: Task, rows: Sequence[Row], before: Sequence[str], after: Sequence[str], *, seed: int = 0) -> dict[str, Score]:
    """How much better ``after`` answers the same rows than ``before``: the paired difference of every score. `paired.differences` also tests it."""
    first, second = of_task(task, rows, before), of_task(task, rows, after)
    return {name: difference(first[name], second[name], seed=seed) for name in first}


NOTHING = "the held-out data has nothing to score: no token of it is trained on"

# --- held-out loss ---------------------------------------------------------------------------------------------------


Part = tuple[dict[str, float], dict[str, int]]  # (sums, counts) by term


@dataclass(frozen=True)
class Losses:
    """Summed held-out loss and its count, by term."""

    sums: dict[str, float]
    counts: dict[str, int]
    weights: dict[str, float]
    parts: tuple[Part, ...] = ()  # the same of each batch, in their order

    @property
    def terms(self) -> dict[str, float]:
        """The mean of each term."""
        return {k: s / self.counts[k] for k, s in self.sums.items() if self.counts[k]}

    @property
    def value(self) -> float:
        """The objective's loss: the weighted sum of its terms' means."""
        return sum(self.weights[k] * v for k, v in self.terms.items())

    @property
    def n(self) -> int:
        """How many units were counted."""
        return sum(self.counts.values())

    def bits_per_byte(self, size: int, term: str = "tokens") -> float:
        """What a text of ``size`` bytes costs by this model: comparable between tokenizers."""
        return self.sums[term] / math.log(2) / size


@torch.no_grad()
def loss_on(policy: Any, objective: Objective, batches: Iterable[Batch]) -> Losses:
    """Loss on held-out batches, which are where the policy is. The policy is put into evaluation mode and back."""
    sums = dict.fromkeys(objective.terms, 0.0)
    counts = dict.fromkeys(objective.terms, 0)
    training = policy.training
    policy.eval()
    try:
        if getattr(objective, "couples", False):
            batches = list(batches)
            cast(Coupled, objective).couple(policy, batches)
        parts = _parts(policy, objective, batches)
    finally:
        policy.train(training)
    for own, count in parts:
        for name, value in own.items():
            sums[name] += value
            counts[name] += count[name]
    if not any(counts.values()):
        raise LuthierError(NOTHING)
    return Losses(sums, counts, dict(objective.terms), tuple(parts))


def _parts(policy: Any, objective: Objective, batches: Iterable[Batch]) -> list[Part]:
    """The parts of those batches that have something to score, each computed on one rank."""
    place: Place | None = getattr(policy, "place", None)
    rank, size = (0, 1) if place is None else (place.rank, place.size)
    own: list[tuple[int, Part]] = []
    for i, batch in enumerate(batches):
        if i % size == rank and any(batch.units.values()):
            sums = {name: float(value) for name, value in objective.loss(policy, batch).sums.items()}
            own.append((i, (sums, {name: batch.units.get(name, 0) for name in sums})))
    told = [own] if place is None else place.gather(own, "held-out losses")
    return [part for _, part in sorted((p for some in told for p in some), key=lambda p: p[0])]


def rise(before: Losses, now: Losses) -> tuple[float, float]:
    """(how much the loss rose, its standard error) from one measurement to another of the same batches, taken as a sample of such batches.

    Of each term a ratio of sums, linearised (Cochran, 1977, Sampling Techniques, section 6.4), so batches of unlike size count as they should. The error is
    infinite where there are fewer than two batches. Raises LuthierError for measurements of different batches.
    """
    n = len(now.parts)
    if n != len(before.parts) or any(a[1] != b[1] for a, b in zip(before.parts, now.parts, strict=True)):
        raise LuthierError("two measurements of the held-out loss are of different batches")
    change = {k: (now.sums[k] - before.sums[k]) / c for k, c in now.counts.items() if c}
    if n < 2:
        return sum(now.weights[k] * d for k, d in change.items()), math.inf
    left_N = np.zeros(n)
    for k, d in change.items():
        own_N = [b[0].get(k, 0.0) - a[0].get(k, 0.0) - d * b[1].get(k, 0) for a, b in zip(before.parts, now.parts, strict=True)]
        left_N += now.weights[k] * np.array(own_N) / now.counts[k]
    return sum(now.weights[k] * d for k, d in change.items()), float(math.sqrt(n / (n - 1) * (left_N**2).sum()))


# --- the baseline that copies ----------------------------------------------------------------------------------------


def nearest_copy(train_pairs: Sequence[tuple[Any, str]], prompts: Sequence[Any]) -> list[str]:
    """Answer each prompt with the completion of the most similar training prompt (cosine of tf-idf; the first of equals).

    A model that cannot beat this has learned to look up, not to write. Prompts are texts or messages.
    """
    if not train_pairs:
        raise LuthierError("the copying baseline needs training pairs to copy from")
    bags = [Counter(_words(p)) for p, _ in train_pairs]
    found: dict[str, list[int]] = defaultdict(list)
    for i, bag in enumerate(bags):
        for word in bag:
            found[word].append(i)
    n = len(bags)
    idf = {word: math.log((1 + n) / (1 + len(where))) + 1 for word, where in found.items()}
    norm_N = np.array([math.sqrt(sum((c * idf[w]) ** 2 for w, c in bag.items())) or 1.0 for bag in bags])
    index = {word: (np.array(where), np.array([bags[i][word] * idf[word] for i in where]) / norm_N[where]) for word, where in found.items()}
    answers = []
    for prompt in prompts:
        similar_N = np.zeros(n)
        for word, count in Counter(_words(prompt)).items():
            if word in index:
                where, weight = index[word]
                similar_N[where] += count * idf[word] * weight  # the prompt's own norm changes no order
        answers.append(train_pairs[int(similar_N.argmax())][1])
    return answers


def _words(prompt: Any) -> list[str]:
    text = prompt if isinstance(prompt, str) else "\n".join(str(m["content"]) for m in prompt)
    return re.findall(r"\w+", text.lower())
