"""``python -m benchmarks``: the whole set. ``--quick``: a tiny shape, to see that the harness works. ``--write``: keep the results."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from . import driver, machine, report, trl_peft, workload

ROOT = driver.ROOT


def main(argv: list[str] | None = None) -> int:
    """Run, print, and with --write keep. 1: ours was not equal to the reference; 2: a process failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, one repetition: proves the harness, measures nothing")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and benchmarks/results/DATE.json when the whole set has run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--only", metavar="TEXT", help="workloads whose name contains this; nothing is written")
    parser.add_argument("--steps", type=int, help="steps a process, at least 2; nothing is written")
    parser.add_argument("--repetitions", type=int, help="of every process; default 2")
    parser.add_argument("--idle-timeout", type=float, default=120.0, metavar="S", help="how long to wait for an idle CPU before each process; default 120")
    a = parser.parse_args(argv)
    if a.write and (a.quick or a.only or a.steps):
        parser.error("--write keeps the whole set only: leave out --quick, --only and --steps")
    if a.steps is not None and a.steps < 2:
        parser.error("--steps: at least 2, because step 1 stands apart")
    missing = machine.missing()
    if missing:
        parser.error(f"the peers are not installed: {', '.join(missing)}. pip install {' '.join(missing)}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    works = workload.quick() if a.quick else workload.full()
    works = [workload.from_json({**vars(w), "steps": a.steps or w.steps}) for w in works if (a.only or "") in w.name]
    if not works:
        parser.error(f"--only: no workload's name contains {a.only!r}")
    document: dict = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), "machine": machine.describe(), "results": []}
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:5.0f} s  {text}[/dim]", highlight=False)

    try:
        for work in works:
            few = list(trl_peft.candidates(work.examples))[:1] if a.quick else driver.shortlist(document["results"][0]) if document["results"] else None
            repetitions, idle_s = a.repetitions or (1 if a.quick else 2), 0.0 if a.quick else a.idle_timeout
            document["results"].append(driver.bench(work, repetitions=repetitions, idle_s=idle_s, say=say, try_only=few))
            document["results"][-1]["quick"] = a.quick
            report.show(document["results"][-1], console)
    except driver.ChildFailed as e:
        console.print(f"[bold red]{e}[/bold red]", markup=True, highlight=False)
        return 2
    text = json.dumps(document, indent=1) + "\n"
    if a.json:
        a.json.write_text(text)
    if a.write:
        kept = ROOT / "benchmarks" / "results" / f"{document['date'][:10]}.json"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(text)
        (ROOT / "docs" / "benchmarks.md").write_text(report.markdown(document))
        console.print(f"written: docs/benchmarks.md and {kept.relative_to(ROOT)}")
    say("done")
    return 0 if all(r["passed"] for r in document["results"]) else 1


if __name__ == "__main__":
    sys.exit(main())
