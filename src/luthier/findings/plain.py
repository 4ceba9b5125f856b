"""A report on data as plain values: what --json prints, and what the terminal and the page are made of."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import numpy as np

from ..data.inspection import Report
from ..data.quality import SHOWN, Finding

BINS = 14


def plain(report: Report) -> dict[str, Any]:
    """Numbers, names and short texts; lengths are in tokens."""
    s, lengths = report.setting, report.lengths
    tokens = int(lengths.sum(dtype=np.int64))
    counts = {severity: sum(f.severity == severity for f in report.findings) for severity in ("error", "warning", "note")}
    return {
        "verdict": {"error": "errors", "warning": "warnings"}.get(report.worst, "clean"),
        "counts": counts,
        "objective": s.objective,
        "template": s.renderer.template.name if s.renders not in ("text", "label") else None,
        "max_tokens": s.max_tokens,
        "over_length": s.over_length,
        "files": [{"file": near(f.file.name), "role": f.file.split, "rows": f.rows, "unusable": f.faults, "shape": f.shape} for f in report.files],
        "rows": len(lengths),
        "tokens": tokens,
        "trained_tokens": report.trained if s.renders in ("chat", "text", "pairs", "judged") else None,
        "lengths": _lengths(lengths),
        "histogram": histogram(lengths),
        "over_limit": {**report.policy, "said": over_limit(report)},
        "findings": [_finding(f, report) for f in report.findings],
    }


def near(where: str) -> str:
    """A path as it is written from here, where that is shorter."""
    here = os.getcwd() + os.sep
    return where.removeprefix(here)


def _lengths(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {}
    at = {"shortest": 0, "median": 50, "90%": 90, "99%": 99, "longest": 100}
    return {name: int(np.percentile(lengths, q, method="lower")) for name, q in at.items()}


def histogram(lengths: np.ndarray) -> list[dict[str, int | None]]:
    """Rows by length: bins of one round width up to the 99th percentile, and one for the rest, which has no end."""
    if not len(lengths):
        return []
    top = float(np.percentile(lengths, 99))
    least = max(1.0, top / BINS)
    unit = 10 ** math.floor(math.log10(least))
    width = next(int(max(1, m * unit)) for m in (1, 2, 2.5, 5, 10) if m * unit >= least and m * unit == int(m * unit))
    bins = int(top // width) + 1
    counts = np.bincount(np.minimum(lengths // width, bins), minlength=bins + 1)
    out: list[dict[str, int | None]] = [{"from": i * width, "to": (i + 1) * width - 1, "rows": int(counts[i])} for i in range(bins)]
    while len(out) > 1 and not out[0]["rows"]:
        out.pop(0)
    return out + ([{"from": bins * width, "to": None, "rows": int(counts[bins])}] if counts[bins] else [])


def over_limit(report: Report) -> str:
    """What the over-length policy does, and what the other would."""
    s, p, n = report.setting, report.policy, len(report.lengths)
    if not p["over"]:
        return f"no row is longer than {s.max_tokens:,} tokens"
    said = f"{p['over']:,} of {n:,} rows {'is' if p['over'] == 1 else 'are'} longer than {s.max_tokens:,} tokens"
    lost = p["tokens_over"] / max(1, int(report.lengths.sum(dtype=np.int64)))
    drop = f"drop {'leaves' if s.over_length == 'drop' else 'would leave'} them out, {lost:.1%} of the tokens"
    if s.renders == "text":
        if s.over_length == "drop":
            return f"{said}; {drop}; split would make {p['pieces']:,} pieces of them and lose nothing"
        return f"{said}; they are split into {p['pieces']:,} pieces, and nothing is lost; {drop}"
    if s.renders == "label":
        cut = f"truncate {'would cut' if s.over_length == 'drop' else 'cuts'} the end of their text"
    else:
        each = [(p["prompt_cut"], "in the prompt alone"), (p["response_cut"], "in the response too"), (p["lost"], "so that no response is left")]
        cut = f"truncate {'would cut' if s.over_length == 'drop' else 'cuts'} " + ", ".join(f"{k:,} {what}" for k, what in each if k)
    return f"{said}; {'; '.join([drop, cut] if s.over_length == 'drop' else [cut, drop])}"


def _finding(f: Finding, report: Report) -> dict[str, Any]:
    examples = []
    for i, index in enumerate(f.hits.rows[:SHOWN]):
        row, beside = report.examples.get(index), f.hits.beside[i]
        examples.append(
            {
                "where": near(report.places[index]),
                "like": near(report.places[beside]) if beside >= 0 else None,
                "found": f.hits.said[i] or None,
                "text": f.show(row) if row is not None else None,
            }
        )
    return {
        "name": f.name,
        "severity": f.severity,
        "title": f.title,
        "count": f.n,
        "unit": f.unit if f.n != 1 or f.unit.startswith("of ") else re.sub(r"s\b", "", f.unit, count=1),
        "said": f.said,
        "fix": f.fix,
        "fixable": bool(f.removes or f.mends),
        "examples": examples,
    }
