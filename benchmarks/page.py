"""docs/benchmarks.md: what was aimed at and what was found in one table, then every workload in full."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import switches
from .driver import COSINE, DPO_TOLERANCE, LOSS_TOLERANCE
from .report import Rows, figures, gates, losses, says, tuning, verdicts, what

KEPT = re.compile(r"<!-- begin: (benchmarks\.[\w.]+) -->\n.*?<!-- end: \1 -->\n?", re.DOTALL)
INTRODUCTION = (
    "# Benchmarks: ours against the peers",
    "Made by `make bench` and `make bench-long`; do not edit. Every column ran in a process of its own on the same weights (stored in bfloat16), token ids, "
    "labels, order, start, optimizer and learning rate, when the CPU was idle, with the machine's own matrix-product rate taken before and after. "
    "Repetitions stand side by side, so that noise is seen. Speed is quoted only where step 1 equals a plain fp32 PyTorch reference: loss within "
    f"{LOSS_TOLERANCE:g} relative ({DPO_TOLERANCE:g} under DPO, whose loss is of a difference between sums over whole answers), cosine of all gradients above "
    f"{COSINE}.",
    "*Distance to the limit* is the time of a step over the time its useful operations take at the best rate of bfloat16 matrix products measured here: "
    "no padding, no recomputation, no unlabelled logits count as useful, a prompt that two answers share counts once, and nothing but matrix products and "
    "attention is allowed any time. The same denominator serves every column. Step 1 is left out of the other figures. A reference's log-probabilities that "
    "are computed before training count in the steps, each its share. Memory is the peak resident set of the process, model loading included.",
)


def write(path: Path, document: dict[str, Any]) -> None:
    """Write the page; sections that other commands keep in it, between markers, stay."""
    others = [m.group(0) for m in KEPT.finditer(path.read_text())] if path.is_file() else []
    path.write_text("\n\n".join([markdown(document), *_others(others)]).rstrip() + "\n")


def _others(sections: list[str]) -> list[str]:
    titles = {"benchmarks.stored": "## Bases in codes", "benchmarks.growth": "## Cost of growth"}
    out = []
    for text in sections:
        name = text.split("begin: ")[1].split(" ")[0]
        out += [titles[name]] * (name in titles) + [text.strip()]
    return out


def markdown(document: dict[str, Any]) -> str:
    """All but what other commands keep."""
    results, parts = document["results"], list(INTRODUCTION)
    if results:
        parts += ["## What was aimed at, and what was found", tabled(verdicts(results))]
    if start := document.get("start"):
        parts += ["Start, seconds from the command; medians, [least, largest]:", tabled(starts(start))]
    if checks := document.get("evaluated"):
        parts += ["A step after an evaluation, on a base in NF4, against the same step before it:", tabled(evaluated(checks))]
    if curves := document.get("curves"):
        parts += ["## Equal results", *curved(curves)]
    if tried := document.get("ab"):
        parts += [
            "## Each switch by itself",
            switches.how(tried),
            *(text for r in tried for text in (what(r), _machine(r["date"], r["machine"]), tabled(switches.rows(r)))),
        ]
    for result in results:
        parts += [f"## {result['workload']['name']}", *detailed(result)]
    return "\n\n".join(parts)


def detailed(result: dict[str, Any]) -> list[str]:
    """One workload in full."""
    m = result["machine"]
    parts = [what(result), _machine(result["date"], m), tabled(gates(result))]
    if result["passed"]:
        parts += [tabled(figures(result)), *says(result)]
        if result["tuning"]:
            parts.append(tabled(tuning(result)))
        parts.append(tabled(losses(result)))
    else:
        parts.append("Ours is not equal to the reference: no speed is quoted.")
    settings = "\n".join(f"{p}: {json.dumps(c['settings'], sort_keys=True)}" for p, c in result["columns"].items())
    return [*parts, f"<details><summary>Settings</summary>\n\n```\n{settings}\n```\n\n</details>"]


def _machine(date: str, m: dict[str, Any]) -> str:
    return (
        f"{date} · {m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB · {m['system']}, Python {m['python']} · "
        + ", ".join(f"{p} {v}" for p, v in m["packages"].items())
        + (f" · commit {m['commit']}" if m["commit"] else "")
    )


def starts(start: dict[str, Any]) -> Rows:
    """Header and rows of what `start.measure` found."""
    out = [["", "seconds", "target", ""]]
    for name, got in start.items():
        met = "met" if got["median"] <= got["target"] else f"missed: {got['median'] / got['target']:.2f} times it"
        out.append([name, f"{got['median']:.2f} [{got['least']:.2f}, {got['largest']:.2f}]", f"at most {got['target']:g}", met])
    return out


def evaluated(checks: dict[str, Any]) -> Rows:
    """Header and rows of what `evaluated.check` found."""
    out = [["", "cosine of gradients", "worst tensor", "tensors without gradient", ""]]
    for name, got in checks.items():
        if "error" in got:
            out.append([name, "", "", "", f"fails: {got['error']}"])
            continue
        same = "the same" if got["cosine"] > COSINE and not got["silent"] else "NOT THE SAME"
        out.append([name, f"{got['cosine']:.5f}", f"{got['worst']:.5f}", f"{got['silent']} of {got['of']}", same])
    return out


def curved(curves: dict[str, Any]) -> list[str]:
    """What `curves.compare` found."""
    rows = [["loss", *(f"seed {s}" for s in curves["seeds"])]]
    for column, by_seed in curves["last"].items():
        rows.append([f"{column}, mean of the last ten steps", *(f"{x:.4f}" for x in by_seed)])
    for column, by_seed in curves["furthest"].items():
        rows.append([f"{column}, furthest from ours at any step", *(f"{x:.1e}" for x in by_seed)])
    return [curves["what"], tabled(rows), curves["said"]]


def tabled(rows: Rows) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
