"""What was measured last, by workload: a set that is run in parts, at several times, still makes one page."""

from __future__ import annotations

import json
from typing import Any

from . import catalogue, page
from .driver import ROOT

FILE = ROOT / "benchmarks" / "results" / "peers.json"
PAGE = ROOT / "docs" / "benchmarks.md"


def read() -> dict[str, Any]:
    """{"results": [...], "start", "evaluated", "curves", "ab"}, as far as they were measured."""
    return json.loads(FILE.read_text()) if FILE.is_file() else {"results": []}


def known(name: str) -> dict[str, float]:
    """Seconds of the peer's settings on this workload, as they were found by earlier runs too."""
    return next((r["tuning"].get("known", {}) for r in read()["results"] if r["workload"]["name"] == name and r["tuning"]), {})


def keep(document: dict[str, Any]) -> None:
    """Put what was measured in the place of what stood there, and write the page."""
    now = read()
    fresh = {r["workload"]["name"]: r for r in document["results"]}
    all_of = {r["workload"]["name"]: r for r in now["results"]} | fresh
    order = [w.name for w in (*catalogue.short(), *catalogue.long())]
    now = now | {k: v for k, v in document.items() if k != "results"}
    now["results"] = [all_of[n] for n in order if n in all_of]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(now, indent=1) + "\n")
    page.write(PAGE, now)
