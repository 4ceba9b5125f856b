"""The training loop. Everything that happens between two optimizer steps is on this page; what happens around it is in session.py.

It names no method, objective, precision or place. An objective returns sums; the loop counts each term's units over all micro-batches and ranks
before the first forward and divides by that, once. So batch 8 = 8 x batch 1 = 2 ranks x 4.

Several ranks meet three times a step: to count units, to add up what their passes gave, to average the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch

from .core import Batch, Coupled, Feed, Objective, Place
from .devices.device import ran_out
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
    tokens: int  # in the stream, over all ranks, padding not counted
    units: dict[str, int]  # over all ranks
    finite: bool = True  # False: the step was skipped, nothing moved
    where: tuple[str, ...] = ()  # the examples of the micro-batches that were not finite
    metrics: dict[str, float] = field(default_factory=dict)
    traffic: int = 0  # bytes that this rank handed to collectives
    signals: dict[str, float] = field(default_factory=dict)  # over all ranks


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
    signals: Callable[[], dict[str, float]] = dict,
) -> Iterator[Step]:
    """Run steps ``start`` to ``steps``, yielding after each. ``lr``: step (from 0) -> learning rate; ``clip`` 0: never.

    ``signals``: numbers of this rank's own that are added up over ranks with the step's, so that all decide alike.
    """
    delta = policy.delta
    policy.train()
    for step in range(start, steps):
        sent = sum(place.traffic.values())
        micro_batches = next(feed)
        optimizer.set_lr(lr(step))
        if delta is not None and delta.on_step is not None:
            delta.on_step(step, steps)
        counts = place.sums({k: sum(b.units.get(k, 0) for b in micro_batches) for k in objective.terms}, "units")
        units = {k: n / place.size for k, n in counts.items()}  # ranks average gradients, so each divides by the mean count
        done = _Pass({k: [] for k in objective.terms}, {k: [] for k in objective.terms}, {})
        if objective.couples:
            cast(Coupled, objective).couple(policy, [b.to(place.device) for b in micro_batches], place.mean)
        failed = _passed(policy, objective, micro_batches, units, place, done)
        own = done.told(micro_batches, failed is not None, len(optimizer.names - optimizer.fresh)) | {f"signal {k}": v for k, v in signals().items()}
        told = place.sums(own, "losses and metrics")
        if told["failed"]:
            raise failed or MemoryError("memory ran out on another rank")
        if told["silent"]:
            optimizer.learned_elsewhere(place.gather(sorted(optimizer.fresh), "names of tensors with a gradient"))
        place.average(optimizer.grads, "gradients")
        terms = {k: told[f"sum {k}"] / place.size / units[k] for k in objective.terms if f"sum {k}" in told and units[k]}
        total = sum(objective.terms[k] * v for k, v in terms.items())
        grad_norm = float(optimizer.grad_norm())
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
            tokens=round(told["tokens"]),
            units={k: round(n / place.context) for k, n in counts.items()},  # ranks that share a sequence all count it
            finite=finite,
            where=() if finite else _culprits(micro_batches, done, place),
            metrics=_means(told),
            traffic=sum(place.traffic.values()) - sent,
            signals={k.removeprefix("signal "): n for k, n in told.items() if k.startswith("signal ")},
        )
        policy.train()  # whoever read the step may have evaluated


@dataclass
class _Pass:
    """What a rank's forwards of one step gave."""

    sums: dict[str, list[torch.Tensor]]
    whose: dict[str, list[int]]  # the micro-batch of each sum: not all have every term
    seen: dict[str, list[torch.Tensor]]  # (sum, count) of each metric

    def told(self, micro_batches: list[Batch], failed: bool, silent: int) -> dict[str, float]:
        """As numbers that are added up over ranks. ``silent``: trained tensors without a gradient."""
        out = {"tokens": float(sum(b.tokens for b in micro_batches)), "failed": float(failed), "silent": float(silent)}
        out |= {f"sum {k}": float(torch.stack(s).sum()) for k, s in self.sums.items() if s}
        for k, v in self.seen.items():
            amount, count = torch.stack(v).sum(0).tolist()
            out |= {f"amount {k}": amount, f"count {k}": count}
        return out


def _passed(policy: Policy, objective: Objective, micro_batches: list[Batch], units: dict[str, float], place: Place, done: _Pass) -> BaseException | None:
    """All forwards and backwards of a step on this rank, their sums kept in ``done``. Returns what went wrong where memory ran out and others would wait."""
    delta = policy.delta
    try:
        for i, batch in enumerate(micro_batches):
            loss = objective.loss(policy, batch.to(place.device))
            parts = [w * loss.sums[k] / units[k] for k, w in objective.terms.items() if units[k] and k in loss.sums]
            torch.stack(parts).sum().backward()
            for k, s in loss.sums.items():
                done.sums[k].append(s.detach())
                done.whose[k].append(i)
            for k, (amount, count) in loss.metrics.items():
                done.seen.setdefault(k, []).append(torch.stack([amount.detach().float(), count.detach().float()]))
        if delta is not None and delta.penalty is not None:
            penalty = delta.penalty()
            done.seen["penalty"] = [torch.stack([penalty.detach().float(), torch.ones_like(penalty)])]
            if penalty.requires_grad:
                penalty.backward()
    except (RuntimeError, MemoryError) as e:
        if place.size == 1 or policy.sharded or not ran_out(e):  # where weights are gathered, the others already wait inside a forward
            raise
        return e
    return None


def _means(told: dict[str, float]) -> dict[str, float]:
    """Metrics per unit, of what all ranks told together."""
    names = [k.removeprefix("amount ") for k in told if k.startswith("amount ")]
    return {k: told[f"amount {k}"] / told[f"count {k}"] if told[f"count {k}"] else math.nan for k in names}


def _culprits(micro_batches: list[Batch], done: _Pass, place: Place) -> tuple[str, ...]:
    """Where the examples of non-finite micro-batches came from; all of the step's, if only the gradient was not finite."""
    bad = {i for k, some in done.sums.items() for i, s in zip(done.whose[k], some, strict=True) if not torch.isfinite(s)}
    of_ranks = place.gather([(i in bad, b.where) for i, b in enumerate(micro_batches)], "examples that are not finite")
    batches = [b for rank in of_ranks for b in rank]
    return tuple(w for is_bad, where in batches if is_bad or not any(b for b, _ in batches) for w in where)
