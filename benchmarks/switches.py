"""Each of our own switches by itself: ours as it comes, with one switch of `speed` the other way round, and with everything in `speed` off (the plain form)."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from rich.console import Console

from . import ours, report
from .driver import mean
from .workload import Workload

PLAIN = "ours, all of speed off"


def variants(work: Workload) -> dict[str, dict[str, Any]]:
    """Settings of ours by column. One column where this version has no switches."""
    base = ours.settings(work)
    out = {ours.OURS: base}
    default = _defaults()
    for name, value in default.items():
        for other in _others(value):
            out[f"ours, speed.{name}={_said(other)}"] = base | {"speed": {name: other}}
    if (off := plain()) is not None:
        out[PLAIN] = base | {"speed": off}
    return out


def plain() -> dict[str, Any] | None:
    """The settings of `speed` with everything off; None where this version has no such section."""
    default = _defaults()
    return {name: _off(value) for name, value in default.items()} or None


def _defaults() -> dict[str, Any]:
    from luthier.run import Run

    speed = getattr(Run(), "speed", None)
    return {f.name: getattr(speed, f.name) for f in fields(speed)} if is_dataclass(speed) else {}


def _off(value: Any) -> Any:
    return False if isinstance(value, bool) else "no" if isinstance(value, str) else value


def _others(value: Any) -> list[Any]:
    """The other way round: off for what is on (or left to the program), on for what is off."""
    if isinstance(value, bool):
        return [not value]
    return ["no"] if value in ("auto", "yes") else ["yes"] if value == "no" else []


def _said(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def rows(result: dict[str, Any]) -> report.Rows:
    """Header and rows: every column against ours as it comes."""
    out = [["A/B", "step, median, s", "step, min, s", "against ours as it comes", "peak RSS, MiB", "distance", "step 1"]]
    own = mean(result["columns"][ours.OURS], "step_median_s")
    for column, c in result["columns"].items():
        s = {k: mean(c, k) for k in ("step_median_s", "step_min_s", "peak_mib", "distance")}
        against = "" if column == ours.OURS or result["quick"] else f"{s['step_median_s'] / own:.2f}x the time"
        verdict = "equal" if c["gate"]["passed"] else "NOT EQUAL"
        out.append([column, f"{s['step_median_s']:.3f}", f"{s['step_min_s']:.3f}", against, f"{s['peak_mib']:,.0f}", f"{s['distance']:.2f}", verdict])
    return out


def show(result: dict[str, Any], console: Console) -> None:
    """Print one workload."""
    console.print(f"\n[bold]{result['workload']['name']}[/bold]  {report.what(result)}", highlight=False)
    report.table(rows(result), console)
    if len(result["columns"]) == 1:
        console.print("This version has no section `speed`, so there is nothing to switch.")
    for line in result["notes"]:
        console.print(line, highlight=False)
