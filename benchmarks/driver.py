"""Runs the peers in turn, each in a process of its own, and holds their first step against the reference."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any

from . import machine, ours, trl_peft, workload
from .machine import Rates
from .workload import Workload

ROOT = Path(__file__).parents[1]
LOSS_TOLERANCE = 2e-3  # relative, of step 1
COSINE = 0.999  # at least, of all adapter gradients of step 1
STEADY = 0.05  # the GEMM rate may move by that much around a process
TUNE_STEPS = 3
Say = Callable[[str], None]


class ChildFailed(RuntimeError):
    """A peer's process did not end well; carries the end of what it printed."""


def child(folder: Path, work: Workload, peer: str, *, grads: Path | None = None, **more: Any) -> dict[str, Any]:
    """Run one peer in a process of its own. Raises ChildFailed."""
    job, out, log = folder / "job.json", folder / "out.json", folder / "log.txt"
    out.unlink(missing_ok=True)
    path = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": str(work.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    fields = {"workload": asdict(work), "folder": str(folder), "peer": peer, "out": str(out), "grads": grads and str(grads), "started": time.time(), **more}
    job.write_text(json.dumps(fields))
    with log.open("w") as f:
        done = subprocess.run([sys.executable, "-m", "benchmarks.child", str(job)], cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT, check=False)
    if done.returncode or not out.is_file():
        raise ChildFailed(f"{peer} on {work.name!r} ended with {done.returncode}:\n" + "\n".join(log.read_text().splitlines()[-25:]))
    return json.loads(out.read_text())


def bench(work: Workload, *, repetitions: int, idle_s: float, say: Say, try_only: Collection[str] | None = None) -> dict[str, Any]:
    """One workload: reference, tuning of the peer, then every peer ``repetitions`` times in alternating order, its first step gated.

    ``try_only``: the tuning candidates, where not all.
    """
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        folder = Path(name)
        lengths = workload.write(work, folder)
        steps = json.loads((folder / "examples.json").read_text())
        counts = workload.counts(steps)
        notes: list[str] = []

        def idle() -> None:
            note = machine.wait_idle(idle_s)
            if note and note.split("(")[0] not in (n.split("(")[0] for n in notes):
                notes.append(note)

        say(f"{work.name}: fp32 reference")
        reference = child(folder, work, "reference", grads=folder / "reference.safetensors")
        idle()
        say(f"{work.name}: tuning TRL + PEFT")
        few = replace(work, steps=min(TUNE_STEPS, work.steps))
        choices = {name: s for name, s in trl_peft.candidates(work.examples).items() if try_only is None or name in try_only}
        tried = child(folder, few, "tune", candidates=choices)["tried"]
        best = fastest(tried, choices, reference["loss"])
        peers = {
            "ours": ("ours", ours.SETTINGS),
            "TRL + PEFT as it comes": ("trl", trl_peft.AS_IT_COMES),
            "TRL + PEFT tuned": ("trl", choices[best]),
        }
        columns: dict[str, dict[str, Any]] = {p: {"runs": []} for p in peers}
        for repetition in range(repetitions):
            for peer in list(peers) if repetition % 2 == 0 else list(peers)[::-1]:
                kind, settings = peers[peer]
                idle()
                say(f"{work.name}: {peer}, {repetition + 1} of {repetitions}")
                grads = folder / f"{list(peers).index(peer)}.safetensors" if repetition == 0 else None
                columns[peer]["runs"].append(measured(folder, work, kind, settings, steps, grads))
                if grads is not None:
                    columns[peer]["gate"] = gate(columns[peer]["runs"][0], reference["loss"], grads, folder / "reference.safetensors")
        runs = [run for column in columns.values() for run in column["runs"]]
        rate = reduce(Rates.best, (Rates(**g) for run in runs for g in run["gemm"]))  # one for all columns
        for run in runs:
            run["summary"] = summary(work, run, steps, rate)
        columns["ours"]["settings"] = {**ours.SETTINGS, "optimizer": f"AdamW, lr {work.lr:g}, flat fp32 buffers"}
        for peer in list(peers)[1:]:
            columns[peer]["settings"] = {**peers[peer][1], "SFTConfig": trl_peft.configuration(work, peers[peer][1])}
        return {
            "workload": {**asdict(work), "parameters": work.parameters, "lengths": lengths, "counts": counts},
            "reference_loss": reference["loss"],
            "rate": asdict(rate),
            "tuning": {"steps": few.steps, "tried": tried, "chosen": best, "unequal": [c for c, s in choices.items() if not s.get("equal", True)]},
            "columns": columns,
            "passed": columns["ours"]["gate"]["passed"],
            "loss_band": band(columns),
            "notes": notes,
        }


def measured(folder: Path, work: Workload, kind: str, settings: dict[str, Any], steps: list[list[dict[str, Any]]], grads: Path | None) -> dict[str, Any]:
    """One process, between two measurements of the machine. Raises ChildFailed where it did not do the work it was given."""
    counts = workload.counts(steps)
    tokens, labelled = (round(statistics.mean(c)) for c in zip(*counts, strict=True))
    before = machine.rates(work, tokens, labelled)
    result = child(folder, work, kind, settings=settings, grads=grads)
    after = machine.rates(work, tokens, labelled)
    did = [(s["tokens"], s["labelled"]) for s in result["steps"]]
    if did != counts:
        raise ChildFailed(f"{kind} on {work.name!r} saw (tokens, labelled) {did[:3]}... where the workload has {counts[:3]}...")
    return result | {"gemm": [asdict(before), asdict(after)], "moved": before.moved(after)}


def summary(work: Workload, result: dict[str, Any], steps: list[list[dict[str, Any]]], rate: Rates) -> dict[str, float]:
    """The figures of one process. Step 1 stands apart; the others count."""
    later = list(zip(result["steps"], steps, strict=True))[1:]
    seconds = [s["seconds"] for s, _ in later]
    limits = []
    for s, rows in later:
        flops = workload.useful(work, [len(r["ids"]) for r in rows], s["labelled"])
        limits.append(rate.seconds(flops.linears, flops.head))
    return {
        "step_min_s": min(seconds),
        "step_median_s": statistics.median(seconds),
        "tokens_per_s": statistics.median(s["tokens"] / s["seconds"] for s, _ in later),
        "labelled_per_s": statistics.median(s["labelled"] / s["seconds"] for s, _ in later),
        "positions_per_token": sum(s["positions"] for s, _ in later) / sum(s["tokens"] for s, _ in later),
        "distance": statistics.median(t / limit for t, limit in zip(seconds, limits, strict=True)),
        "limit_median_s": statistics.median(limits),
        "startup_s": result["startup_s"],
        "import_s": result["import_s"],
        "first_step_s": result["steps"][0]["seconds"],
        "peak_mib": result["peak_rss"] / 2**20,
        "above_imports_mib": (result["peak_rss"] - result["base_rss"]) / 2**20,
    }


# --- is it the same work --------------------------------------------------------------------------------------------


def gate(result: dict[str, Any], reference_loss: float, grads: Path, reference_grads: Path) -> dict[str, Any]:
    """Step 1 against the fp32 reference: relative error of the loss, cosine of all adapter gradients, and the worst tensor's."""
    from safetensors.torch import load_file

    got, want = load_file(grads), load_file(reference_grads)
    if set(got) != set(want):
        raise ChildFailed(f"gradients are missing for {len(set(want) - set(got))} adapter tensors, for example {sorted(set(want) ^ set(got))[0]}")
    error = abs(result["steps"][0]["loss"] / reference_loss - 1)
    products = {n: [float((x.double() * y.double()).sum()) for x, y in ((got[n], want[n]), (got[n], got[n]), (want[n], want[n]))] for n in want}
    together = [sum(p[i] for p in products.values()) for i in range(3)]
    cosine = _cosine(*together)
    return {
        "loss": result["steps"][0]["loss"],
        "loss_error": error,
        "cosine": cosine,
        "worst_cosine": min(_cosine(*p) for p in products.values()),
        "passed": error <= LOSS_TOLERANCE and cosine > COSINE,
    }


def _cosine(xy: float, xx: float, yy: float) -> float:
    return xy / math.sqrt(xx * yy) if xx and yy else 0.0


def band(columns: dict[str, dict[str, Any]]) -> float:
    """The largest relative distance between ours and any peer's loss at any step."""
    curves = {p: [s["loss"] for s in c["runs"][0]["steps"]] for p, c in columns.items()}
    return max(abs(a / b - 1) for p, curve in curves.items() if p != "ours" for a, b in zip(curves["ours"], curve, strict=True))


def shortlist(result: dict[str, Any], n: int = 3) -> list[str]:
    """The fastest candidates of one workload, to be tried on the next: what is added to the linears does not turn their order round."""
    t = result["tuning"]
    fit = {name: got["seconds"] for name, got in t["tried"].items() if "seconds" in got and name not in t["unequal"]}
    return sorted(fit, key=fit.__getitem__)[:n]


def fastest(tried: dict[str, dict[str, Any]], choices: dict[str, dict[str, Any]], reference_loss: float) -> str:
    """The candidate of least time that does equal work, its loss included. Raises ChildFailed where none runs."""
    fit = {
        name: t["seconds"]
        for name, t in tried.items()
        if "seconds" in t and choices[name].get("equal", True) and abs(t["loss"] / reference_loss - 1) <= LOSS_TOLERANCE
    }
    if not fit:
        raise ChildFailed(f"no setting of TRL + PEFT ran with the reference's loss: {json.dumps(tried)}")
    return min(fit, key=fit.__getitem__)
