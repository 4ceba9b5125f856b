"""Ours against the peers, on one machine in one run. Without options: the 100 M shapes. --long: the 0.5B shape and equal results. --ab: each of our own
switches by itself. --quick: all of it tiny, to see that the harness works."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from . import catalogue, curves, driver, kept, machine, minutes, models, ours, page, peers, profiled, report, start, switches
from .workload import Workload

PARTS = ("start", "evaluated", "curves")  # what is measured besides the workloads


def main(argv: list[str] | None = None) -> int:
    """Run, print, and with --write keep. 1: ours was not equal to the reference; 2: a process failed."""
    parser = _parser()
    a = parser.parse_args(argv)
    if a.write and (a.quick or a.steps or a.profile):
        parser.error("--write keeps what was measured in full: leave out --quick, --steps and --profile")
    if a.steps is not None and a.steps < 2:
        parser.error("--steps: at least 2, because step 1 stands apart")
    missing = machine.missing()
    if missing:
        parser.error(f"the peers are not installed: {', '.join(missing)}. pip install {' '.join(missing)}")
    works, parts = _chosen(parser, a)
    console = Console(width=None if sys.stdout.isatty() else 160)
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:5.0f} s  {text}[/dim]", highlight=False)

    repetitions = a.repetitions or 1
    _foretell(works, parts, a, repetitions, console)
    if a.plan:
        return 0
    document: dict[str, Any] = {"results": []}
    try:
        for work in works:
            if a.profile:
                say(work.name)
                profiled.show(work, console, here=a.quick)
                continue
            how = {
                "repetitions": repetitions,
                "idle_s": 0.0 if a.quick else a.idle_timeout,
                "say": say,
                "quick": a.quick,
                "known": {} if a.quick else kept.known(work.name),
            }
            result = driver.bench(work, **how, variants=switches.variants(work) if a.ab else None)
            document["results"].append(result | _stamp())
            (switches.show if a.ab else report.show)(result, console)
            _keep(a, document)
        for part in parts:
            document |= {part: _part(part, a, console, say)} | {f"{part}_measured": _stamp()}
            _keep(a, document)
    except driver.ChildFailed as e:
        console.print(f"[bold red]{e}[/bold red]", markup=True, highlight=False)
        return 2
    if not a.ab and document["results"]:
        console.print("\n[bold]What was aimed at, and what was found[/bold]")
        report.table(report.verdicts(document["results"]), console)
    if a.json:
        a.json.write_text(json.dumps(document, indent=1) + "\n")
    say("done" + (f"; written: {kept.PAGE.relative_to(driver.ROOT)} and {kept.FILE.relative_to(driver.ROOT)}" if a.write else ""))
    return 0 if all(r["passed"] for r in document["results"]) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--long", action="store_true", help="the 0.5B shape, and equal results over 50 steps and three seeds")
    parser.add_argument("--ab", action="store_true", help="ours alone: as it comes, with each switch of `speed` off by itself, and with all of them off")
    parser.add_argument("--thorough", action="store_true", help="try every setting of the peers; later runs begin with those that were fastest here")
    parser.add_argument("--profile", action="store_true", help="ours alone, with the operations in which the time of its steps goes; nothing is written")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing tuned: proves the harness, measures nothing")
    parser.add_argument("--plan", action="store_true", help="print what would run and how many minutes it is expected to take, and stop")
    parser.add_argument("--write", action="store_true", help="keep what was measured in benchmarks/results/peers.json, and write docs/benchmarks.md from it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--only", metavar="TEXT", help=f"workloads and parts ({', '.join(PARTS)}) whose name contains this")
    parser.add_argument("--steps", type=int, help="steps a process, at least 2; nothing is written")
    parser.add_argument("--repetitions", type=int, help="of every process, in alternating order; default 1")
    parser.add_argument("--idle-timeout", type=float, default=120.0, metavar="S", help="how long to wait for an idle CPU before each process; default 120")
    return parser


def _chosen(parser: argparse.ArgumentParser, a: argparse.Namespace) -> tuple[list[Workload], list[str]]:
    """The workloads to run, and the parts besides them."""
    works = catalogue.quick() if a.quick else catalogue.long() if a.long else catalogue.short()
    parts = [] if a.ab or a.profile else list(PARTS) if a.quick else ["curves"] if a.long else ["start", "evaluated"]
    wanted = (a.only or "").lower()
    change = ({"steps": a.steps} if a.steps else {}) | ({"tries": 0} if a.thorough else {})
    works = [replace(w, **change) for w in works if wanted in w.name.lower()]
    parts = [p for p in parts if wanted in p]
    if not works and not parts:
        parser.error(f"--only: no workload's name contains {a.only!r}")
    return works, parts


def _foretell(works: list[Workload], parts: list[str], a: argparse.Namespace, repetitions: int, console: Console) -> None:
    """What will run, and how long it is expected to take."""
    if a.quick:
        console.print(f"{len(works)} tiny workloads{' and ' + ', '.join(parts) if parts else ''}: about three minutes on a busy machine.")
        return
    rate = machine.quick_rate(works[0].threads if works else 2)
    rows = [["what will run", "minutes expected"]]
    total = 0.0
    for work in works:
        m = minutes.expected(work, repetitions, rate, variants=len(switches.variants(work)) if a.ab else 0)
        rows.append([work.name, f"{m:.1f}"])
        total += m
    for part in parts:
        m = {"start": 1.0, "evaluated": 0.7, "curves": curves.expected(rate)}[part]
        rows.append([part, f"{m:.1f}"])
        total += m
    report.table([*rows, [f"all, at {rate / 1e12:.2f} TF/s where the CPU is idle", f"{total:.0f}"]], console)


def _part(part: str, a: argparse.Namespace, console: Console, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure and print what is no workload."""
    say(part)
    if not a.quick:
        machine.wait_idle(a.idle_timeout)
    if part == "start":
        found = start.measure(1, warm=False) if a.quick else start.measure(3)
        report.table(page.starts(found), console)
        return found
    if part == "evaluated":
        found = _evaluated(a.quick)
        report.table(page.evaluated(found), console)
        return found
    found = curves.compare(tiny=a.quick, say=say)
    for text in page.curved(found):
        console.print(text, highlight=False)
    return found


def _evaluated(quick: bool) -> dict[str, Any]:
    """The check of evaluated.py, of ours and of the peer."""
    work = next(w for w in (catalogue.quick() if quick else catalogue.short()) if w.precision == "nf4")
    out = {}
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        folder = Path(name)
        models.write(work, folder)
        for column, of in ((ours.OURS, "ours"), (peers.of(work).name(work), "peer")):
            out[column] = driver.child(folder, work, "evaluated", settings=ours.settings(work), of=of, here=quick)
    return out


def _stamp() -> dict[str, Any]:
    return {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), "machine": machine.describe()}


def _keep(a: argparse.Namespace, document: dict[str, Any]) -> None:
    """After every workload, so that what was measured is not lost with what comes later."""
    if a.write:
        kept.keep({"ab": document["results"], "results": []} if a.ab else document)


if __name__ == "__main__":
    sys.exit(main())
