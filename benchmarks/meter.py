"""What one process writes down about itself: seconds, memory, and the loss of every step."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


def peak_rss() -> int:
    """Bytes. From the kernel's high-water mark of this program where it has one: ru_maxrss may count the parent that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Meter:
    """Call `imported` after the imports, `ready` before step 1, `step` after each."""

    def __init__(self, started: float) -> None:
        self.started = started  # time.time() when the driver asked for this process
        self.steps: list[dict[str, Any]] = []
        self.import_s = self.startup_s = self.mark = 0.0
        self.base_rss = 0
        self.reference_s = 0.0  # of a reference's log-probabilities, where they are computed before training

    def imported(self) -> None:
        """The libraries are in memory, the model is not."""
        self.import_s = time.time() - self.started
        self.base_rss = psutil.Process().memory_info().rss

    def ready(self) -> None:
        """Everything is in place for step 1."""
        self.startup_s = time.time() - self.started
        self.mark = time.perf_counter()

    def step(self, loss: Any, tokens: int, labelled: int, positions: int) -> None:
        """A step has ended. ``loss``: a number, or a tensor that is read when all is over; ``positions``: tokens and padding."""
        now = time.perf_counter()
        self.steps.append({"seconds": now - self.mark, "loss": loss, "tokens": tokens, "labelled": labelled, "positions": positions})
        self.mark = now

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens meanwhile is the harness' own, and no part of the step."""
        began = time.perf_counter()
        yield
        self.mark += time.perf_counter() - began

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Meanwhile a reference's log-probabilities are computed: work of the steps, done before them."""
        began = time.perf_counter()
        yield
        self.reference_s += time.perf_counter() - began

    def result(self) -> dict[str, Any]:
        """As JSON."""
        for s in self.steps:
            s["loss"] = float(s["loss"])
        return {
            "import_s": self.import_s,
            "startup_s": self.startup_s - self.reference_s,
            "reference_s": self.reference_s,
            "base_rss": self.base_rss,
            "peak_rss": peak_rss(),
            "steps": self.steps,
        }
