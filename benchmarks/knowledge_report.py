"""The tables and the curves of benchmarks.knowledge, from the stages that have run."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from luthier.nn import intervals, slick

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- begin: benchmarks.knowledge -->", "<!-- end: benchmarks.knowledge -->"
COLOURS = {"Unknown": "#b3462c", "Known": "#2c5f8a"}


def write(kept: Path) -> None:
    """docs/results.md between its marks, and docs/images/knowledge.png."""
    found = {f.stem: json.loads(f.read_text()) for f in sorted(kept.glob("*.json"))}
    probes = {by: found[f"probe-{by}"] for by in ("taught", "others") if f"probe-{by}" in found}
    tuned = {on: [r for name, r in found.items() if name.startswith(f"tune-{on}-")] for on in COLOURS}
    page = DOCS / "results.md"
    text = page.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(head + BEGIN + "\n" + "\n".join([*_probes(probes), *_tuned(tuned), *_dates(found)]) + "\n" + END + tail)
    print(f"written: {page}")


def auc(score_N: np.ndarray, taught_N: np.ndarray) -> intervals.Interval:
    """How often a taught fact scores above one that was not, ties half (Mann and Whitney, 1947), with the bootstrap interval over facts."""
    above_NN = (score_N[:, None] > score_N[None, :]) + 0.5 * (score_N[:, None] == score_N[None, :])
    pairs_NN = above_NN * taught_N[:, None] * ~taught_N[None, :]

    def area(counts_RN: np.ndarray) -> np.ndarray:
        return ((counts_RN @ pairs_NN) * counts_RN).sum(1) / ((counts_RN @ taught_N) * (counts_RN @ ~taught_N))

    return intervals.recounted(len(score_N), area)


def _probes(probes: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "",
        f"| asked by | facts | {' | '.join(slick.CATEGORIES)} | AUC | would change if asked again |",
        "|---|---|" + "---|" * (len(slick.CATEGORIES) + 2),
    ]
    for by, run in probes.items():
        rows = run["rows"]
        taught_N = np.array([r["taught"] for r in rows])
        score_N = np.array([r["greedy_right"] / r["greedy_asked"] + r["sampled_right"] / r["sampled_asked"] for r in rows])
        area = auc(score_N, taught_N)
        for name, is_taught in (("taught", True), ("not taught", False)):
            counts = Counter(r["knowledge"] for r in rows if r["taught"] is is_taught)
            cells = " | ".join(str(counts[c]) for c in slick.CATEGORIES)
            pattern = "the taught pattern" if by == "taught" else "other patterns"
            shown = f"{area.value:.3f} [{area.low:.3f}, {area.high:.3f}] | {run['changes']:.1%}" if is_taught else " | "
            lines.append(f"| {pattern} | {name} | {cells} | {shown} |")
    return lines


def _tuned(tuned: dict[str, list[dict[str, Any]]]) -> list[str]:
    if not any(tuned.values()):
        return []
    lines = [
        "",
        "| trained on | runs | epochs until half of it is right | nine tenths | other known facts: right before | best | after | as taught: before | after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for on, runs in tuned.items():
        if runs:
            held = [[p["held_out_exact_match"] for p in r["curve"]] for r in runs]
            cells = [
                " / ".join(_reached(r, 0.5) for r in runs),
                " / ".join(_reached(r, 0.9) for r in runs),
                _mean([h[0] for h in held]),
                _mean([max(h) for h in held]),
                _mean([h[-1] for h in held]),
                _mean([r["as_taught_before"] for r in runs]),
                _mean([r["as_taught_after"] for r in runs]),
            ]
            lines.append(f"| {runs[0]['rows']} {on} rows | {len(runs)} | {' | '.join(cells)} |")
    return [*lines, "", *_draw(tuned)]


def _reached(run: dict[str, Any], share: float) -> str:
    """The first epoch at which so much of the trained rows is right."""
    return next((f"{p['epoch']:g}" for p in run["curve"] if p["trained_exact_match"] >= share), "never")


def _mean(values: list[float]) -> str:
    """Mean, and half the range over runs."""
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _draw(tuned: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Fit of the trained rows and right answers to known facts, epoch by epoch; a thin line a run, a thick one their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.4), layout="constrained")
    panels = (
        ("trained_exact_match", "trained rows: right", "epoch"),
        ("held_out_exact_match", "other known facts: right", "epoch"),
        ("", "other known facts, as the trained rows are fitted", "trained rows: right"),
    )
    for ax, (what, title, below) in zip(axes, panels, strict=True):
        for on, runs in tuned.items():
            for r in runs:
                x = [p["epoch" if what else "trained_exact_match"] for p in r["curve"]]
                ax.plot(x, [p[what or "held_out_exact_match"] for p in r["curve"]], color=COLOURS[on], alpha=0.35, linewidth=1, marker=None if what else ".")
            if what and runs:
                mean = np.mean([[p[what] for p in r["curve"]] for r in runs], axis=0)
                ax.plot([p["epoch"] for p in runs[0]["curve"]], mean, color=COLOURS[on], linewidth=2.2, label=f"trained on {on}")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(below, fontsize=9)
        ax.set_ylim(-0.02, 1.03)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    (DOCS / "images").mkdir(exist_ok=True)
    figure.savefig(DOCS / "images" / "knowledge.png", dpi=110)
    plt.close(figure)
    return ["![By epoch: how many trained rows, and how many other known facts, are answered rightly](images/knowledge.png)", ""]


def _dates(found: dict[str, dict[str, Any]]) -> list[str]:
    seconds = sum(r["seconds"] for r in found.values())
    return [f"Runs of {', '.join(sorted({r['date'] for r in found.values()}))}, {seconds / 60:.0f} minutes in all on a shared machine, one thread.", ""]
