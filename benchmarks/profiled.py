"""Where the time of ours' steps goes, by torch's profiler: the operations themselves, and what kinds they are of. The first step is left out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from . import driver, examples, limit, machine, models, ours, report
from .meter import Meter
from .workload import Workload

MOST = 20  # operations shown
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mkldnn", "_linear_pointwise", "reorder")


@contextmanager
def watching(meter: Meter) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Profile from the end of step 1 on; what is yielded gives, at the end, {"name", "seconds", "calls"} of every operation, its own time only."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU])
    step, running = meter.step, False

    def marked(*args: Any) -> None:
        nonlocal running
        step(*args)
        if not running:
            profiler.start()
            running = True

    meter.step = marked  # type: ignore[method-assign]

    def operations() -> list[dict[str, Any]]:
        if running:
            profiler.stop()
        found = [{"name": e.key, "seconds": e.self_cpu_time_total / 1e6, "calls": e.count} for e in profiler.key_averages()]
        return sorted(found, key=lambda o: -o["seconds"])

    yield operations


def kind(operation: str) -> str:
    """What an operation is of."""
    name = operation.rpartition("::")[2]
    if "attention" in name or "flash" in name or "softmax" in name:
        return "attention and softmax"
    if any(name == p or name.startswith(p) or name.endswith(p) for p in PRODUCTS):
        return "matrix products"
    if "adam" in name.lower() or "norm" in name:
        return "norms and optimizer"
    if name in ("copy_", "_to_copy", "clone", "cat", "contiguous", "zero_", "fill_", "empty", "index", "index_select", "gather", "embedding"):
        return "copies and look-ups"
    return "other: element by element, and calls"


def show(work: Workload, console: Console, *, here: bool) -> None:
    """Profile ours on a workload and print it."""
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        folder = Path(name)
        models.write(work, folder)
        steps = json.loads((folder / "examples.json").read_text())
        result = driver.child(folder, work, "ours", settings=ours.settings(work), profile=True, here=here)
    tokens, labelled = (round(sum(c) / len(steps)) for c in zip(*examples.counts(steps), strict=True))
    rate, later = machine.rates(work, tokens, labelled), steps[1:]
    best = sum(rate.seconds(limit.useful(work, rows)) for rows in later) / len(later)
    report.table(rows(result, len(later), best), console)


def rows(result: dict[str, Any], steps: int, best: float) -> list[list[str]]:
    """Header and rows: kinds of operations, then the operations; seconds a step."""
    operations = result["operations"]
    total = sum(o["seconds"] for o in operations)
    took = sum(s["seconds"] for s in result["steps"][1:])
    line = lambda name, seconds, calls: [name, f"{seconds / steps:.4f}", f"{seconds / total:.1%}", f"{calls / steps:,.0f}"]  # noqa: E731
    out = [["", "s a step", "share", "calls a step"]]
    out.append(["the step, under the profiler", f"{took / steps:.4f}", "", ""])
    out.append(["its limit", f"{best:.4f}", "", ""])
    kinds: dict[str, list[float]] = {}
    for o in operations:
        sums = kinds.setdefault(kind(o["name"]), [0.0, 0])
        sums[0] += o["seconds"]
        sums[1] += o["calls"]
    out += [line(name, *sums) for name, sums in sorted(kinds.items(), key=lambda k: -k[1][0])]
    out.append(["", "", "", ""])
    return out + [line(o["name"], o["seconds"], o["calls"]) for o in operations[:MOST]]
