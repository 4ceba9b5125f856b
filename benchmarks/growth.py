"""``python -m benchmarks.growth``: how the time and the memory of a step grow with tokens, documents' length, layers, vocabulary, rank and deltas.

One process a point, one thing changed at a time around one small shape; a + b x^p is fitted to what was found, and what grows faster than it has to is
named. ``--write`` keeps the figures, draws docs/images/growth.png and puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from . import driver, kept, machine, models, ours, report
from .examples import RESERVED
from .page import tabled
from .workload import ALL, Workload

FILE = driver.ROOT / "benchmarks" / "results" / "growth.json"
PICTURE = driver.ROOT / "docs" / "images" / "growth.png"
BEGIN, END = "<!-- begin: benchmarks.growth -->", "<!-- end: benchmarks.growth -->"
BASE = Workload("growth", targets=ALL, hidden=256, layers=6, heads=4, ff=768, vocabulary=8000, examples=8, steps=6)
DOCUMENT = 128  # tokens
FLAT = 1.15  # less than so many times as much, from the first point to the last, is no growth
NOISE = 0.12  # relative: what grows with an allowed power and is nowhere further from it is no surprise
POINT_S = 7.0


@dataclass(frozen=True)
class Axis:
    """What is changed, and the powers with which time and memory may grow; 0: not at all."""

    name: str
    values: tuple[int, ...]
    time: float
    memory: float
    why: str = ""


AXES = (
    Axis("tokens of a step", (256, 512, 1024, 2048, 4096, 8192), 1.15, 1.15, f"in documents of {DOCUMENT}"),
    Axis(
        "tokens of a document",
        (64, 128, 256, 512, 1024, 2048),
        1.2,
        0.0,
        "2,048 tokens a step: attention grows with a document, a mask with its square",
    ),
    Axis("layers", (2, 4, 8, 16, 32), 1.15, 1.15),
    Axis("layers, 16 tokens a step", (2, 4, 8, 16, 32), 1.15, 1.15, "next to no products: what is left is calls"),
    Axis("vocabulary", (2_000, 8_000, 32_000, 128_000), 1.15, 1.15),
    Axis("rank", (1, 4, 16, 64, 256), 1.15, 1.15),
    Axis("deltas on the base", (1, 2, 4, 8, 16, 32), 0.0, 1.15, "one of them trained; the others are kept, and nothing is computed with them"),
)


def main(argv: list[str] | None = None) -> int:
    """Measure every point, print, and with --write keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two points an axis of a tiny shape: proves the harness, finds nothing")
    parser.add_argument("--write", action="store_true", help="keep the figures, the picture and the table")
    parser.add_argument("--only", metavar="TEXT", help="axes whose name contains this; nothing is written")
    parser.add_argument("--idle-timeout", type=float, default=60.0, metavar="S", help="how long to wait for an idle CPU before each point; default 60")
    a = parser.parse_args(argv)
    if a.write and (a.quick or a.only):
        parser.error("--write keeps all of it: leave out --quick and --only")
    axes = [x for x in AXES if (a.only or "") in x.name]
    if not axes:
        parser.error(f"--only: no axis' name contains {a.only!r}; there are {', '.join(x.name for x in AXES)}")
    console, began = Console(width=None if sys.stdout.isatty() else 160), time.monotonic()
    points = sum(2 if a.quick else len(x.values) for x in axes)
    console.print(f"{points} points" + ("" if a.quick else f", {points * POINT_S / 60:.0f} minutes where the CPU is idle"))
    found: dict[str, list[dict[str, float]]] = {}
    notes: list[str] = []
    for axis in axes:
        found[axis.name] = []
        for value in axis.values[:2] if a.quick else axis.values:
            console.print(f"[dim]{time.monotonic() - began:5.0f} s  {axis.name}: {value:,}[/dim]", highlight=False)
            if not a.quick and (note := machine.wait_idle(a.idle_timeout)) and not notes:
                notes.append(note)
            found[axis.name].append(measured(axis.name, value, quick=a.quick))
    document = {"date": time.strftime("%Y-%m-%d"), "machine": machine.describe(), "points": found, "notes": notes}
    report.table(rows(document), console)
    for line in [] if a.quick else [*surprises(document), *notes]:
        console.print(line, highlight=False)
    if a.write:
        FILE.write_text(json.dumps(document, indent=1) + "\n")
        draw(document, PICTURE)
        put(kept.PAGE, section(document))
        console.print(f"written: {', '.join(str(p.relative_to(driver.ROOT)) for p in (FILE, PICTURE, kept.PAGE))}")
    return 0


def measured(axis: str, value: int, *, quick: bool) -> dict[str, float]:
    """{"x", "step_s" (the least of those after the first), "median_s", "mib" above imports} of one point."""
    work, document, tokens, deltas = _at(axis, value, quick)
    rng = np.random.default_rng(0)
    row = lambda: {"ids": rng.integers(RESERVED, work.vocabulary, document).tolist(), "answer": document // 2}  # noqa: E731
    work = replace(work, examples=max(1, tokens // document))
    run = ours.settings(work)
    run["optim"]["micro_tokens"] = 1 << 20  # one micro-batch, whatever its size
    with tempfile.TemporaryDirectory(prefix="luthier-growth-") as name:
        folder = Path(name)
        models.write(replace(work, examples=1), folder)
        (folder / "examples.json").write_text(json.dumps([[row() for _ in range(work.examples)] for _ in range(work.steps)]))
        result = driver.child(folder, work, "ours", settings=run | {"deltas": deltas}, here=quick)
    seconds = [s["seconds"] for s in result["steps"]][1:]
    return {"x": value, "step_s": min(seconds), "median_s": float(np.median(seconds)), "mib": (result["peak_rss"] - result["base_rss"]) / 2**20}


def _at(axis: str, value: int, quick: bool) -> tuple[Workload, int, int, int]:
    """(shape, tokens of a document, of a step, deltas)."""
    work = replace(BASE, hidden=32, layers=2, heads=2, ff=64, vocabulary=128, steps=3, threads=1) if quick else BASE
    document, tokens, deltas = DOCUMENT, 1024, 1
    if axis == "tokens of a step":
        tokens = value
    elif axis == "tokens of a document":
        document, tokens = value, 2048
    elif axis.startswith("layers"):
        work = replace(work, layers=value)
        if axis.endswith("16 tokens a step"):
            document = tokens = 16
    elif axis == "vocabulary":
        work = replace(work, vocabulary=value)
    elif axis == "rank":
        work = replace(work, rank=value)
    else:
        deltas = value
    return work, document, tokens, deltas


# --- what it comes to ------------------------------------------------------------------------------------------------


def fitted(x: Sequence[float], y: Sequence[float], most: float = 3.0) -> tuple[float, float, float]:
    """(a, b, p) of y = a + b x^p, a and b not negative, p from 0.1 to ``most``: least squares of relative errors."""
    u, v = np.asarray(x, dtype=float) / x[0], np.asarray(y, dtype=float)
    best = (float("inf"), 0.0, 0.0, 0.0)
    for p in np.arange(0.1, most + 0.01, 0.02):
        columns = np.stack([np.ones_like(u), u**p], 1) / v[:, None]
        for use in ([0, 1], [1]):
            found, *_ = np.linalg.lstsq(columns[:, use], np.ones_like(v), rcond=None)
            if (found < 0).any():
                continue
            a, b = (found[0], found[1]) if len(use) == 2 else (0.0, found[0])
            error = float(((columns @ np.array([a, b]) - 1) ** 2).sum())
            if error < best[0] - 1e-12:
                best = (error, float(a), float(b), float(p))
    return best[1:]


def power(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The power with which y grows with x beyond what is always there; None where it does not."""
    return None if y[-1] < FLAT * y[0] else fitted(x, y)[2]


def explained(x: Sequence[float], y: Sequence[float], most: float) -> bool:
    """Whether growth with a power of at most ``most`` is nowhere further from what was found than noise is."""
    if (got := power(x, y)) is None or got <= most:
        return True
    if not most:
        return False
    a, b, p = fitted(x, y, most)
    return all(abs((a + b * (u / x[0]) ** p) / v - 1) <= NOISE for u, v in zip(x, y, strict=True))


def rows(document: dict[str, Any]) -> list[list[str]]:
    """Header and rows: what every axis was found to cost, and the power."""
    out = [["what grows", "points", "step, least, s", "power", "memory above imports, MiB", "power"]]
    for name, points in document["points"].items():
        x, seconds, mib = ([p[k] for p in points] for k in ("x", "step_s", "mib"))
        powers = ["flat" if q is None else f"{q:.2f}" for q in (power(x, seconds), power(x, mib))]
        shown = [", ".join(f"{v:,}" for v in x), ", ".join(f"{s:.3f}" for s in seconds), ", ".join(f"{m:,.0f}" for m in mib)]
        out.append([name, shown[0], shown[1], powers[0], shown[2], powers[1]])
    return out


def surprises(document: dict[str, Any]) -> list[str]:
    """What grows faster than it has to, in sentences; or that nothing does."""
    out = []
    axes = {a.name: a for a in AXES}
    for name, points in document["points"].items():
        axis, x = axes[name], [p["x"] for p in points]
        for what, key, most in (("the time of a step", "step_s", axis.time), ("memory", "mib", axis.memory)):
            y = [p[key] for p in points]
            if not explained(x, y, most):
                got = power(x, y)
                limit = f"a power of {most:g} was expected at most" if most else "no growth was expected"
                out.append(f"Surprise: {what} grows with {name} to the power of {got:.2f}, where {limit}" + (f" ({axis.why})." if axis.why else "."))
    if (calls := document["points"].get("layers, 16 tokens a step")) and len(calls) > 2:
        slope = np.polyfit([p["x"] for p in calls], [1000 * p["step_s"] for p in calls], 1)[0]
        out.append(f"With 16 tokens a step a layer costs {slope:.2f} ms: that is what calls cost, whatever there is to multiply.")
    return out if any(s.startswith("Surprise") for s in out) else ["Nothing grows faster than it has to.", *out]


def draw(document: dict[str, Any], path: Path) -> None:
    """The picture: time above, memory below, an axis a column."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(document["points"])
    figure, grid = pyplot.subplots(2, len(names), figsize=(2.6 * len(names), 5.2), constrained_layout=True)
    for column, name in enumerate(names):
        points = document["points"][name]
        x = [p["x"] for p in points]
        for plot, key, label in ((grid[0][column], "step_s", "step, s"), (grid[1][column], "mib", "memory, MiB")):
            y = [p[key] for p in points]
            plot.set(xscale="log", yscale="log", ylim=(min(y) / 2, max(y) * 2))
            plot.plot(x, y, "o", color="#1f4e79", markersize=4)
            a, b, p = fitted(x, y)
            fine = np.geomspace(x[0], x[-1], 60)
            grows = power(x, y)
            plot.plot(fine, a + b * (fine / x[0]) ** p, color="#c55a11", linewidth=1, label="flat" if grows is None else f"power {grows:.2f}")
            plot.legend(fontsize=7, frameon=False)
            plot.minorticks_off()
            plot.set_xticks(x, [f"{v:,}" for v in x], rotation=60)
            ends = [min(y), max(y)] if max(y) >= FLAT * min(y) else [y[-1]]
            plot.set_yticks(ends, [f"{v:.3g}" if v < 100 else f"{v:,.0f}" for v in ends])
            plot.tick_params(labelsize=7)
            plot.set_ylabel(label if column == 0 else "", fontsize=8)
        grid[0][column].set_title(name, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def section(document: dict[str, Any]) -> str:
    """What stands between the markers of the page."""
    m = document["machine"]
    shape = (
        f"hidden {BASE.hidden}, {BASE.layers} layers, ff {BASE.ff}, vocabulary {BASE.vocabulary:,}, LoRA rank {BASE.rank} on all linears, 1,024 tokens a step"
    )
    said = (
        f"`python -m benchmarks.growth`: {shape}, one thing changed at a time; {m['cpu']}, {BASE.threads} threads, torch {m['packages']['torch']}, "
        f"{document['date']}. Fitted: a + b x^p, the power p of what grows beyond what is always there; flat: less than {FLAT:g} times as much at the end. "
        f"A surprise is what no allowed power explains within {NOISE:.0%} at every point."
    )
    return "\n\n".join([said, tabled(rows(document)), *surprises(document), *document["notes"], "![Cost of growth](images/growth.png)"])


def put(page: Path, text: str) -> None:
    """Write the section into the page, in the place of what stood there."""
    whole = page.read_text()
    new = f"{BEGIN}\n\n{text}\n\n{END}"
    if BEGIN in whole:
        before, rest = whole.split(BEGIN, 1)
        page.write_text(before + new + rest.split(END, 1)[1])
    else:
        page.write_text(f"{whole.rstrip()}\n\n## Cost of growth\n\n{new}\n")


if __name__ == "__main__":
    sys.exit(main())
