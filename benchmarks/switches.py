"""Each of our own switches by itself: ours as it comes, with one switch of `speed` the other way round, and with everything in `speed` off (the plain form)."""

from __future__ import annotations

import statistics
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from rich.console import Console

from . import ours, report
from .driver import mean
from .workload import Workload

PLAIN = "ours, all of speed off"
AGAIN = "ours, once more"  # the last: how far it is from the first is what this machine's noise makes of no difference at all
OFF = ("off", "no", False)
HOW = "Ours is run first and last, and what is switched in between: what these two differ by is noise, and so are smaller differences of the others."


def variants(work: Workload) -> dict[str, dict[str, Any]]:
    """Settings of ours by column. One column where this version has no switches."""
    base = ours.settings(work)
    out = {ours.OURS: base}
    for name, (value, choices) in _fields().items():
        others = [c for c in choices if (c in OFF) != (value in OFF)]  # off for what is on, on for what is off
        if others:
            out[f"ours, speed.{name}={said(others[0])}"] = base | {"speed": {name: others[0]}}
    if (off := plain()) is not None:
        out[PLAIN] = base | {"speed": off}
    if len(out) <= 3:  # one switch: off is the plain form
        out.pop(PLAIN, None)
    return out | {AGAIN: base} if len(out) > 1 else out


def how(results: list[dict[str, Any]]) -> str:
    """What is to be known of the tables."""
    again = all(AGAIN in r["columns"] for r in results)
    return HOW if again else "Ours was run once, first: a switch that does nothing in a row shows how large the noise is, up to a fifth where steps are short."


def plain() -> dict[str, Any] | None:
    """The settings of `speed` with everything off; None where this version has no such section."""
    return {name: next((c for c in choices if c in OFF), value) for name, (value, choices) in _fields().items()} or None


def _fields() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The switches of `speed`: what each is by default, and what it may be."""
    from luthier.settings.run import Run

    speed = getattr(Run(), "speed", None)
    if not is_dataclass(speed):
        return {}
    hints = get_type_hints(type(speed))
    return {f.name: (getattr(speed, f.name), _choices(hints[f.name])) for f in fields(speed)}


def _choices(hint: Any) -> tuple[Any, ...]:
    return (True, False) if hint is bool else tuple(c for c in get_args(hint) if isinstance(c, str | bool))


def said(value: Any) -> str:
    """A setting's value as a run file has it."""
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def rows(result: dict[str, Any]) -> report.Rows:
    """Header and rows: every column against the mean of ours as it comes, first and last."""
    out = [["A/B", "step, median, s", "step, min, s", "against ours", "peak RSS, MiB", "distance", "step 1"]]
    own = statistics.mean(mean(result["columns"][c], "step_median_s") for c in (ours.OURS, AGAIN) if c in result["columns"])
    for column, c in result["columns"].items():
        s = {k: mean(c, k) for k in ("step_median_s", "step_min_s", "peak_mib", "distance")}
        against = "" if result["quick"] else f"{s['step_median_s'] / own:.2f}x the time"
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
