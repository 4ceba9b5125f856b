"""How long a run will take on this machine, before its weights are loaded: its own micro-batches on the meta device, operation by operation (pace.py).

A step is its micro-batches, forward and backward, and what the optimizer does; an evaluation is a forward over the held-out rows. What answers cost, to sample
prompts and to tasks, is their prefill and their tokens, one after another. Not counted: reading the data, loading the model, writing checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Batch, LuthierError
from ..modelling.recompute import recomputing
from ..optim import Optimizer
from ..settings.run import Run
from . import saved
from .memory import Plan, evaluating, stepping, tensors_of
from .microbatch import batch_of, on_meta, shape_of
from .pace import BETWEEN, Machine, Ops

Micro = tuple[Batch, int]  # a micro-batch on the meta device, and how many of its positions are scored
UPDATED = 1 << 22  # trained numbers that the optimizer is timed on


@dataclass(frozen=True)
class Pace:
    """What a micro-batch takes: seconds = start + each x positions, padding included."""

    start: float
    each: float

    def __call__(self, positions: float) -> float:
        """Seconds of a micro-batch of so many positions."""
        return self.start + self.each * positions

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> Pace:
        """Through the smallest and the largest of a few (positions, seconds); in proportion where there is one size."""
        (n, a), (m, b) = min(points), max(points)
        slope = (b - a) / (m - n) if m > 1.3 * n else b / m
        return cls(max(0.0, b - slope * m), slope) if slope > 0 else cls(0.0, b / m)


@dataclass(frozen=True)
class Forecast:
    """Seconds that a run takes, and of what."""

    step: float  # one optimizer step
    tokens: float  # trained on in a step, padding not counted
    steps: int | None  # None: nobody knows without the data
    evaluations: int
    evaluation: float  # one visit to the held-out rows and the general text

    @property
    def training(self) -> float | None:
        """All steps."""
        return None if self.steps is None else self.steps * self.step

    @property
    def total(self) -> float | None:
        """Steps and evaluations."""
        return None if self.training is None else self.training + self.evaluations * self.evaluation


class Clock:
    """Forecasts for one device of this machine; operations that runs share are timed once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.machine = Machine(device)

    def forecast(self, plan: Plan, run: Run, steps: Sequence[Sequence[Batch]] = (), *, held_out: int = 0, total_steps: int | None = None) -> Forecast:
        """Of a run whose modules ``plan`` has.

        ``steps``: some of its optimizer steps, each its micro-batches, which lose their values, where its data has been read; else the largest micro-batch that
        its settings allow stands for all. ``held_out``: positions of the held-out rows. Raises LuthierError where operations cannot be counted, and for a run
        without training steps.
        """
        if plan.optimizer is None:
            raise LuthierError("nothing is trained, so there are no steps to time")
        if "rollouts" in run.objective.needs:
            raise LuthierError("the model learns from its own answers, whose lengths nobody knows ahead, so its time is not predicted")
        plan.means(self.device.type)
        made = [[on_meta(b) for b in step] for step in steps] or [self._usual(plan, run)]
        every = [micro for step in made for micro in step]
        chosen = _typical(every)
        pace = Pace.through([(_positions(m), self._training(plan, run, m)) for m in chosen])
        reading = Pace.through([(_positions(m), self._reading(plan, m)) for m in chosen[-1:]])
        seconds = sum(pace(_positions(m)) for m in every) / len(made) + self._update(plan)
        visits = run.evaluate.every_steps or (max(1, round(total_steps / 10)) if total_steps else 1)
        return Forecast(
            step=seconds,
            tokens=sum(b.tokens for b, _ in every) / len(made),
            steps=total_steps,
            evaluations=0 if not total_steps else 2 + -(-total_steps // visits),
            evaluation=reading(held_out),
        )

    def _usual(self, plan: Plan, run: Run) -> list[Micro]:
        """The micro-batches of a step where nothing is known of the data: full ones."""
        shape, o = shape_of(run, plan.policy.base), run.optim
        micro = batch_of(shape, plan.policy.base, plan.objective)
        whole = o.batch_tokens if o.batch_examples is None else o.batch_examples * max(shape.lengths) * shape.texts
        return [micro] * max(1, round(whole / shape.tokens))

    def _training(self, plan: Plan, run: Run, micro: Micro) -> float:
        """Seconds of a forward and a backward."""
        policy = plan.policy
        policy.train()
        with recomputing(policy.lm, policy.base.anatomy.stacks.values(), run.recompute):
            return self._timed(plan, micro, lambda watch, b: stepping(policy, plan.objective, b, watch))

    def _reading(self, plan: Plan, micro: Micro) -> float:
        """Seconds of a forward alone."""
        plan.policy.eval()
        return self._timed(plan, micro, lambda watch, b: evaluating(plan.policy, plan.objective, b, watch))

    def _timed(self, plan: Plan, micro: Micro, run: Any) -> float:
        batch, scored = micro
        found: list[Ops] = []

        def watching(ours: Iterable[Tensor], scored: int) -> Ops:
            found.append(Ops(ours, scored))
            return found[0]

        ours = list(tensors_of(plan.policy, plan.optimizer))
        saved.count(plan.policy, ours, self.device.type, lambda watch: run(watch, batch), scored=scored, watching=watching)
        timed = self.machine.time(found[0])
        return sum(t.total for t in timed if t.seconds == t.seconds) + BETWEEN * sum(t.times for t in timed)

    def _update(self, plan: Plan) -> float:
        """Seconds of the gradient's norm and of AdamW, by its time on some numbers."""
        count = sum(p.numel() for p in plan.policy.trained().values())
        tried = min(count, UPDATED)
        parameter = nn.Parameter(torch.zeros(tried, device=self.device))
        optimizer = Optimizer({"timed": parameter}, lr=1e-3)
        took = []
        for _ in range(4):
            began = time.perf_counter()
            float(optimizer.grad_norm())
            optimizer.step()
            optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - began)
        return min(took[1:]) * count / tried


def _positions(micro: Micro) -> int:
    """Of all its streams, padding included."""
    batch = micro[0]
    return sum(int(s.ids.numel()) for s in (batch, batch.source, batch.beside) if s is not None)


def _typical(batches: Sequence[Micro]) -> list[Micro]:
    """A small and a large one of them: a tenth of the way from either end."""
    ordered = sorted(batches, key=_positions)
    edge = len(ordered) // 10
    first, last = ordered[edge], ordered[-1 - edge]
    return [first] if _positions(first) == _positions(last) else [first, last]
