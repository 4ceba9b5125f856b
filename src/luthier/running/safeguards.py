"""What a run watches over while it trains: that what is trained moves, and that Ctrl-C finishes the step in hand."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..core import LuthierError
from ..optim import Optimizer


class Moving:
    """After the first backward every trained tensor has a gradient; after a few steps it has moved."""

    AFTER = 3  # LoRA's A has an exactly zero gradient while B is zero, so it moves from the second step

    def __init__(self, optimizer: Optimizer, resting: Callable[[], frozenset[str]]):
        self.optimizer, self.resting = optimizer, resting
        self.start = {k: _sketch(v) for k, v in optimizer.masters().items()}
        self.done = 0

    def check(self, step: int, *, last: bool) -> None:
        self.done += 1
        if self.done == 1:
            silent = sorted(set(self.start) - self.optimizer.seen - self.resting())
            if silent:
                raise LuthierError(f"{len(silent)} trained tensors got no gradient in the first step, for example {silent[0]!r}: they would never learn")
        if self.done == self.AFTER and not last:
            still = [k for k, v in self.optimizer.masters().items() if _sketch(v) == self.start[k] and k not in self.resting()]
            if still:
                raise LuthierError(f"{len(still)} trained tensors have not moved after {self.AFTER} steps, for example {still[0]!r}; is optim.lr too small?")


def _sketch(v: torch.Tensor) -> tuple[float, float]:
    """Two numbers that change when any part moves; no copy is made."""
    return float(v.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(v, dtype=torch.float64))


@contextmanager
def interrupts(says: bool) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM are asked for, not thrown: the step in hand is finished first. A second Ctrl-C stops at once."""
    flag: list[int] = []

    def note(number: int, frame: Any) -> None:
        if flag and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.append(number)
        if says:
            print("\nfinishing this step and saving; Ctrl-C again stops at once", file=sys.stderr)

    try:
        old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals stay the caller's
        old = {}
    try:
        yield lambda: bool(flag)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
