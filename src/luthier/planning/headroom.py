"""What becomes of a run that memory does not hold: its longest micro-batch is tried before the first step, and where memory runs out the micro-batches are
halved, once. Loss terms are counted over the whole step, so a step in smaller pieces is the same step."""

from __future__ import annotations

from typing import Any

import torch

from ..core import LuthierError
from ..data.replay import Beside
from ..modelling.context import sharing
from ..optim import Optimizer
from ..policy import Policy
from ..settings.run import Run
from .foresight import as_long
from .microbatch import made_up, shape_of


def halve(feed: Any, e: BaseException | None = None) -> str:
    """Halve a feed's micro-batches, from its next step on, and say so. Raises LuthierError where it has none that can be smaller."""
    parts = [p for p in ((feed.main, feed.replayed) if isinstance(feed, Beside) else (feed,)) if hasattr(p, "micro_tokens")]
    if not parts or parts[0].micro_tokens < 2:
        raise LuthierError("memory ran out, and the micro-batches of this run cannot be smaller; set recompute=blocks, or see luthier plan") from e
    before = parts[0].micro_tokens
    for part in parts:
        part.micro_tokens = max(1, part.micro_tokens // 2)
    return f"micro-batches are of {parts[0].micro_tokens:,} tokens from now on, no more of {before:,}, with the same results; this is done once in a run"


def try_longest(run: Run, policy: Policy, objective: Any, optimizer: Optimizer, longest: int | None, steps: int) -> None:
    """Run the longest micro-batch that this run's data and settings allow, forward and backward, and leave nothing of it. What goes
    wrong is raised as it is. An evaluation takes the same micro-batches, without a backward."""
    if "rollouts" in objective.needs or objective.couples:
        return
    batch = made_up(shape_of(as_long(run, longest), policy.base), policy.base, sharing(objective, run.place.sequence)).to(policy.device)
    delta = policy.delta
    policy.train()
    try:
        with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
            if delta is not None and delta.on_step is not None:
                delta.on_step(0, steps)
            torch.stack(list(objective.loss(policy, batch).sums.values())).sum().backward()
    finally:
        optimizer.zero_grad()
        optimizer.seen.clear()
