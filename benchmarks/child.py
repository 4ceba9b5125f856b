"""One process: one peer on one workload. ``python -m benchmarks.child JOB.json``; the job says where the results go."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from . import ours, reference, trl_peft
from .meter import Meter
from .workload import from_json

PEERS = {"ours": ours.run, "trl": trl_peft.run}


def main(job: dict[str, Any]) -> None:
    """Do it, and write down what happened."""
    work, folder = from_json(job["workload"]), Path(job["folder"])
    steps = json.loads((folder / "examples.json").read_text())[: work.steps]
    grads: dict[str, Any] = {}
    result: dict[str, Any]
    if job["peer"] == "reference":
        loss, grads = reference.first_step(work, folder, steps[0])
        result = {"loss": loss}
    elif job["peer"] == "tune":
        result = {"tried": {name: _tried(work, folder, steps, settings) for name, settings in job["candidates"].items()}}
    else:
        meter = Meter(job["started"])
        grads = PEERS[job["peer"]](work, folder, steps, job["settings"], meter, job["grads"] is not None)
        result = meter.result()
    if job["grads"] is not None:
        from safetensors.torch import save_file

        save_file({n: g.contiguous() for n, g in grads.items()}, job["grads"])
    Path(job["out"]).write_text(json.dumps(result))


def _tried(work: Any, folder: Path, steps: list[list[dict[str, Any]]], settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the steps after the first, or why it does not run: a setting that fails is a finding, not an end."""
    meter = Meter(time.time())
    try:
        trl_peft.run(work, folder, steps, settings, meter, False)
    except (ValueError, RuntimeError, TypeError) as e:
        return {"error": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}
    return {"seconds": sum(s["seconds"] for s in meter.steps[1:]), "loss": float(meter.steps[0]["loss"])}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
