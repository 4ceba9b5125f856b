"""The table of methods and the plots of the sweeps, from the runs that are there."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- begin: make results -->", "<!-- end: make results -->"
CODES_BEGIN, CODES_END = "<!-- begin: make results, codes -->", "<!-- end: make results, codes -->"
# part -> (label, the beginning of its entries' names, the entry of the table that is one more point of it, and where)
SWEEPS = {
    "rank": ("LoRA rank", "lora rank ", "lora", 16),
    "bottleneck": ("bottleneck width", "adapter width ", "adapter", 64),
    "prefix": ("prefix length", "prefix length ", "prefix", 20),
}


def write(kept: Path, entries: Sequence[Any], timed: int) -> None:
    """docs/results.md between its marks, and docs/images/*.png."""
    found = [json.loads(f.read_text()) for f in sorted(kept.glob("*.json"))]
    clocked = {r["name"]: r["step"] for r in found if r["steps"] == timed}  # alone, with all cores
    tested: dict[str, list[dict[str, Any]]] = {e.name: [r | {"step": clocked.get(e.name)} for r in found if r["name"] == e.name and r["test"]] for e in entries}
    page = DOCS / "results.md"
    text = page.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(head + BEGIN + "\n" + table(tested, entries) + plots(tested, entries) + END + tail)
    text = page.read_text()
    if CODES_BEGIN in text:
        head, tail = text.split(CODES_BEGIN)[0], text.split(CODES_END)[1]
        page.write_text(head + CODES_BEGIN + "\n" + codes(tested) + CODES_END + tail)
    print(f"written: {page}")


def table(tested: dict[str, list[dict[str, Any]]], entries: Sequence[Any]) -> str:
    """One row an entry that has runs."""
    lines = [
        "",
        "| method | learning rate | n | test BLEU | held-out loss | trained | file | s a step | peak memory | general text |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        runs = tested[e.name]
        if runs and e.part != "precision":
            lines.append(_row(e.name, runs))
    dates = sorted({r["date"] for runs in tested.values() for r in runs})
    lines += ["", f"Runs of {', '.join(dates)}. BLEU: mean over n seeds, ± half their range (n > 1), or the 95 % interval over test rows (n = 1).", ""]
    return "\n".join(lines)


def _row(name: str, runs: list[dict[str, Any]]) -> str:
    mean = lambda key: statistics.mean(r[key] for r in runs)  # noqa: E731
    bleus = [r["bleu"]["value"] for r in runs]
    first = runs[0]["bleu"]
    spread = f"± {(max(bleus) - min(bleus)) / 2:.1f}" if len(runs) > 1 else f"[{first['low']:.1f}, {first['high']:.1f}]"
    start = "".join(f", {k} {v}" for k, v in runs[0]["start"].items())
    cells = [
        name,
        (f"{runs[0]['lr']:g}" if runs[0]["lr"] is not None else "-") + start,
        str(len(runs)),
        f"{statistics.mean(bleus):.1f} {spread}",
        f"{mean('loss'):.3f}",
        _share(runs[0]),
        f"{runs[0]['file'] / 1e6:.2f} MB",
        "-" if runs[0]["step"] is None else f"{runs[0]['step']:.2f}",
        f"{mean('peak') / 1e9:.2f} GB",
        f"{runs[0]['general_before']:.3f} to {mean('general'):.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


def codes(tested: dict[str, list[dict[str, Any]]]) -> str:
    """The same LoRA on bfloat16 and on codes, a column a seed; and what the two ways of merging give."""
    lines = [
        "",
        "| base of the same LoRA | n | test BLEU, each seed | mean | held-out loss | general text | base in memory |",
        "|---|---|---|---|---|---|---|",
    ]
    ways = [
        "",
        "| merged | n | logits, largest difference | held-out loss | general text |",
        "|---|---|---|---|---|",
    ]
    for name in ("lora", "lora on int8", "lora on nf4", "lora on gptq"):
        runs = sorted(tested.get(name, []), key=lambda r: r["seed"])
        if not runs:
            continue
        mean = lambda key: statistics.mean(r[key] for r in runs)  # noqa: B023, E731
        bleus = [r["bleu"]["value"] for r in runs]
        size = next((f"{r['base_bytes'] / 1e6:.1f} MB" for r in runs if "base_bytes" in r), "14.7 MB")
        label = name.removeprefix("lora on ") if name != "lora" else "bfloat16"
        each = " / ".join(f"{b:.1f}" for b in bleus)
        lines.append(f"| {label} | {len(runs)} | {each} | {statistics.mean(bleus):.1f} | {mean('loss'):.3f} | {mean('general'):.3f} | {size} |")
        merged = [r["merged"] for r in runs if "merged" in r]
        for way, said in (
            (("trained", f"{label}, as trained"), ("codes", f"{label}, into its codes' values"), ("float", f"{label}, into float")) if merged else ()
        ):
            value = lambda key: statistics.mean(m[way][key] for m in merged)  # noqa: B023, E731
            ways.append(f"| {said} | {len(merged)} | {value('difference'):.1e} | {value('loss'):.4f} | {value('general_loss'):.4f} |")
    return "\n".join(lines + (ways if len(ways) > 3 else [])) + "\n\n"


def _share(run: dict[str, Any]) -> str:
    """Trained numbers and their share of the base; and what of them is kept, where that is less."""
    kept = run.get("kept", run["trained"])
    said = f"{run['trained']:,} ({run['trained'] / run['whole']:.2%})"
    return said if kept >= run["trained"] else f"{said}, kept {kept:,} ({kept / run['whole']:.2%})"


def plots(tested: dict[str, list[dict[str, Any]]], entries: Sequence[Any]) -> str:
    """A figure a sweep that has at least two points: quality, memory, step time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out = ""
    for part, (label, prefix, also, at) in SWEEPS.items():
        points = sorted((int(e.name.removeprefix(prefix)), tested[e.name]) for e in entries if e.part == part and tested[e.name])
        points += [(at, tested[also])] if tested[also] else []
        points.sort(key=lambda p: p[0])
        if len(points) < 2:
            continue
        x = [p for p, _ in points]
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.1), layout="constrained")
        panels = [
            ("test BLEU", [statistics.mean(r["bleu"]["value"] for r in runs) for _, runs in points]),
            ("peak memory, GB", [statistics.mean(r["peak"] for r in runs) / 1e9 for _, runs in points]),
            ("seconds a step", [runs[0]["step"] or float("nan") for _, runs in points]),
        ]
        for ax, (what, y) in zip(axes, panels, strict=True):
            ax.plot(x, y, marker="o", color="#7a4a21")
            ax.set_xscale("log", base=2)
            ax.set_xticks(x, [str(v) for v in x])
            ax.minorticks_off()
            ax.set_xlabel(label)
            ax.set_title(what, fontsize=10)
            ax.set_ylim(0, max([v for v in y if v == v], default=1.0) * 1.15)  # not yet timed: nan
            ax.spines[["top", "right"]].set_visible(False)
        low = [statistics.mean(r["bleu"]["low"] for r in runs) for _, runs in points]
        high = [statistics.mean(r["bleu"]["high"] for r in runs) for _, runs in points]
        axes[0].fill_between(x, low, high, alpha=0.15, color="#7a4a21")
        (DOCS / "images").mkdir(exist_ok=True)
        figure.savefig(DOCS / "images" / f"sweep-{part}.png", dpi=110)
        plt.close(figure)
        out += f"\n![{label}: test BLEU with its 95 % interval, peak memory and step time](images/sweep-{part}.png)\n"
    return out + "\n" if out else ""
