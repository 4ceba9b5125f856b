"""The training loop. Everything that happens between two optimizer steps is on this page; what happens around it is in session.py.

It names no method, objective, precision or place. An objective returns sums; the loop counts each term's units over all micro-batches and ranks
before the first forward and divides by that, once. So batch 8 = 8 x batch 1 = 2 ranks x 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch

from .core import Coupled, Feed, Objective, Place
from .optim import Optimizer
from .policy import Policy


@dataclass
class Step:
    """What one optimizer step did."""

    step: int  # counts from 1: how many have been done
    lr: float
    loss: float  # the weighted sum of the terms, each per unit
    terms: dict[str, float]  # per unit, before weights
    grad_norm: float  # before clipping
    tokens: int  # in the stream, padding not counted
    units: dict[str, int]
    finite: bool = True  # False: the step was skipped, nothing moved
    where: tuple[str, ...] = ()  # the examples of the micro-batches that were not finite
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    policy: Policy,
    objective: Objective,
    feed: Feed,
    optimizer: Optimizer,
    *,
    lr: Callable[[int], float],
    steps: int,
    start: int = 0,
    clip: float = 1.0,
    place: Place,
) -> Iterator[Step]:
    """Run steps ``start`` to ``steps``, yielding after each. ``lr``: step (from 0) -> learning rate; ``clip`` 0: never."""
    delta = policy.delta
    policy.train()
    for step in range(start, steps):
        micro_batches = next(feed)
        optimizer.set_lr(lr(step))
        if delta is not None and delta.on_step is not None:
            delta.on_step(step, steps)
        counts = {k: sum(b.units.get(k, 0) for b in micro_batches) for k in objective.terms}
        units = {k: place.mean(n) for k, n in counts.items()}  # ranks average gradients, so each divides by the mean count
        sums: dict[str, list[torch.Tensor]] = {k: [] for k in objective.terms}
        whose: dict[str, list[int]] = {k: [] for k in objective.terms}  # the micro-batch of each sum: not all have every term
        seen: dict[str, list[torch.Tensor]] = {}
        if objective.couples:
            cast(Coupled, objective).couple(policy, [b.to(place.device) for b in micro_batches], place.mean)
        for i, batch in enumerate(micro_batches):
            loss = objective.loss(policy, batch.to(place.device))
            parts = [w * loss.sums[k] / units[k] for k, w in objective.terms.items() if units[k] and k in loss.sums]
            torch.stack(parts).sum().backward()
            for k, s in loss.sums.items():
                sums[k].append(s.detach())
                whose[k].append(i)
            for k, (amount, count) in loss.metrics.items():
                seen.setdefault(k, []).append(torch.stack([amount.detach().float(), count.detach().float()]))
        if delta is not None and delta.penalty is not None:
            penalty = delta.penalty()
            seen["penalty"] = [torch.stack([penalty.detach().float(), torch.ones_like(penalty)])]
            if penalty.requires_grad:
                penalty.backward()
        norm = optimizer.grad_norm()
        terms = {k: place.mean(float(torch.stack(s).sum())) / units[k] for k, s in sums.items() if s and units[k]}
        total = sum(objective.terms[k] * v for k, v in terms.items())
        grad_norm = float(norm)
        finite = math.isfinite(total) and math.isfinite(grad_norm)
        if finite:
            if clip and grad_norm > clip:
                optimizer.scale_grads(clip / grad_norm)
            optimizer.step()
        optimizer.zero_grad()
        yield Step(
            step=step + 1,
            lr=lr(step),
            loss=total,
            terms=terms,
            grad_norm=grad_norm,
            tokens=sum(b.tokens for b in micro_batches),
            units=counts,
            finite=finite,
            where=() if finite else _culprits(micro_batches, sums, whose),
            metrics={k: float(m[0] / m[1]) for k, v in seen.items() for m in [torch.stack(v).sum(0)]},
        )
        policy.train()  # whoever read the step may have evaluated


def _culprits(micro_batches: list, sums: dict[str, list[torch.Tensor]], whose: dict[str, list[int]]) -> tuple[str, ...]:
    """Where the examples of non-finite micro-batches came from; all of the step's, if only the gradient was not finite."""
    bad = {i for k, some in sums.items() for i, s in zip(whose[k], some, strict=True) if not torch.isfinite(s)}
    return tuple(w for i, b in enumerate(micro_batches) if i in bad or not bad for w in b.where)
