"""One process: one peer on one workload. ``python -m benchmarks.child JOB.json``; the job says where the results go."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from . import evaluated, ours, peers, profiled, reference
from .gradients import Sink, cosines
from .meter import Meter
from .workload import Workload, from_json


def main(job: dict[str, Any]) -> None:
    """Do it, and write down what happened."""
    work, folder = from_json(job["workload"]), Path(job["folder"])
    steps = json.loads((folder / "examples.json").read_text())[: work.steps]
    result: dict[str, Any]
    with Sink(Path(job["grads"])) if job["grads"] else nullcontext() as sink:
        if job["peer"] == "reference":
            assert sink is not None
            result = {"loss": reference.first_step(work, folder, steps[0], sink)}
        elif job["peer"] == "tune":
            result = {"tried": {name: _tried(work, folder, steps, settings, Path(job["reference"])) for name, settings in job["candidates"].items()}}
        elif job["peer"] == "evaluated":
            result = evaluated.check(work, folder, steps, job["settings"], job["of"])
        else:
            meter = Meter(job["started"])
            runs = ours.run if job["peer"] == "ours" else peers.of(work).run
            with profiled.watching(meter) if job.get("profile") else nullcontext() as operations:
                runs(work, folder, steps, job["settings"], meter, sink)
            result = meter.result() | ({"operations": operations()} if operations else {})
    Path(job["out"]).write_text(json.dumps(result))


def _tried(work: Workload, folder: Path, steps: list[list[dict[str, Any]]], settings: dict[str, Any], reference: Path) -> dict[str, Any]:
    """Seconds of the steps after the first, a reference's share in them, and what step 1 came to; or why it does not run: that is a finding, not an end."""
    meter, grads = Meter(time.time()), folder / "tried.bin"
    try:
        with Sink(grads) as sink:
            peers.of(work).run(work, folder, steps, settings, meter, sink)
        cosine = cosines(grads, reference)[0]
    except Exception as e:
        return {"error": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"}
    later = meter.steps[1:]
    share = meter.reference_s / len(meter.steps) * len(later)
    return {"seconds": sum(s["seconds"] for s in later) + share, "loss": float(meter.steps[0]["loss"]), "cosine": cosine}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
