"""Runs the columns in turn, each in a process of its own, and holds their first step against the reference."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any

from . import examples, gradients, limit, machine, models, ours, peers
from .examples import Row
from .machine import Rates
from .ours import OURS
from .workload import Workload

ROOT = Path(__file__).parents[1]
LOSS_TOLERANCE = 2e-3  # relative, of step 1
# DPO's loss is of a difference between sums over whole answers, hundreds of nats each, which in bfloat16 are off by hundredths of a nat
DPO_TOLERANCE = 1e-2
COSINE = 0.999  # at least, of all gradients of step 1
STEADY = 0.05  # the GEMM rate may move by that much around a process
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
Say = Callable[[str], None]


class ChildFailed(RuntimeError):
    """A peer's process did not end well; carries the end of what it printed."""

    def __init__(self, what: str, log: str) -> None:
        lines = [line for line in log.splitlines() if line.strip()]
        self.why = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")[:300]
        super().__init__(what + "\n" + "\n".join(lines[-25:]))


def child(folder: Path, work: Workload, peer: str, *, grads: Path | None = None, here: bool = False, **more: Any) -> dict[str, Any]:
    """Run one peer in a process of its own. Raises ChildFailed. ``here``: in this process, which is quicker where nothing is measured."""
    job, out, log = folder / "job.json", folder / "out.json", folder / "log.txt"
    out.unlink(missing_ok=True)
    fields = {"workload": asdict(work), "folder": str(folder), "peer": peer, "out": str(out), "grads": grads and str(grads), "started": time.time(), **more}
    job.write_text(json.dumps(fields))
    what = f"{peer} on {work.name!r}"
    with log.open("w") as f:
        if here:
            _here(fields, what, f)
        else:
            command = [sys.executable, "-m", "benchmarks.child", str(job)]
            done = subprocess.run(command, cwd=ROOT, env=_environment(work), stdout=f, stderr=subprocess.STDOUT, check=False)
            if done.returncode or not out.is_file():
                raise ChildFailed(f"{what} ended with {done.returncode}:", log.read_text(errors="replace"))
    return json.loads(out.read_text())


def _environment(work: Workload) -> dict[str, str]:
    path = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": str(work.threads), "CUDA_VISIBLE_DEVICES": ""} | QUIET


def _here(job: dict[str, Any], what: str, log: Any) -> None:
    from . import child

    os.environ.update(QUIET)
    with redirect_stdout(log), redirect_stderr(log), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            child.main(job)
        except Exception as e:
            raise ChildFailed(f"{what} ended:", f"{type(e).__name__}: {e}") from e


def bench(
    work: Workload,
    *,
    repetitions: int,
    idle_s: float,
    say: Say,
    quick: bool = False,
    variants: dict[str, dict[str, Any]] | None = None,
    known: dict[str, float] | None = None,
) -> dict[str, Any]:
    """One workload: reference, tuning of the peer, then every column ``repetitions`` times in alternating order, its first step gated.

    ``quick``: nothing is tuned, the first candidate stands for the best, and no column gets a process. ``variants``: of ours, by
    column, instead of the peers. ``known``: seconds of the peer's settings from before: the fastest of these are tried first.
    """
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        folder = Path(name)
        lengths = models.write(work, folder)
        steps: list[list[Row]] = json.loads((folder / "examples.json").read_text())
        notes: list[str] = []

        def idle() -> None:
            note = machine.wait_idle(idle_s) if idle_s else None
            if note and note.split("(")[0] not in (n.split("(")[0] for n in notes):
                notes.append(note)

        say(f"{work.name}: fp32 reference")
        want = folder / "reference.bin"
        loss = child(folder, work, "reference", grads=want, here=quick)["loss"]
        columns: dict[str, dict[str, Any]] = {
            c: {"kind": "ours", "settings": s, "runs": []} for c, s in (ours.columns(work) if variants is None else variants).items()
        }
        tuning = None
        if variants is None:
            idle()
            say(f"{work.name}: tuning {peers.of(work).name(work)}")
            tuning, theirs = tuned(work, folder, loss, want, quick=quick, known=known or {})
            columns |= {c: {"kind": "peer", "settings": s, "runs": []} for c, s in theirs.items()}
        for repetition in range(repetitions):
            for column in list(columns) if repetition % 2 == 0 else list(columns)[::-1]:
                c = columns[column]
                if "error" in c:
                    continue
                idle()
                say(f"{work.name}: {column}, {repetition + 1} of {repetitions}")
                grads = folder / "column.bin" if repetition == 0 else None
                try:
                    c["runs"].append(measured(folder, work, c["kind"], c["settings"], steps, grads, here=quick))
                except ChildFailed as e:
                    if c["kind"] == "ours":
                        raise
                    c["error"] = e.why  # a peer that refuses is a finding
                    continue
                if grads is not None:
                    c["gate"] = gate(c["runs"][0], loss, grads, want, tolerance=tolerance(work.kind))
        return _result(work, columns, steps, tuning, {"lengths": lengths, "reference_loss": loss, "notes": notes, "quick": quick})


def tuned(
    work: Workload, folder: Path, loss: float, want: Path, *, quick: bool, known: dict[str, float], here: bool = False
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What was tried, held against the reference's loss and its gradients in ``want``, and the settings of the peer's two columns.

    Raises ChildFailed where none of them does equal work.
    """
    peer = peers.of(work)
    choices = promising(peer.candidates(work), known, work.tries)
    few = replace(work, steps=min(work.tune_steps, work.steps))
    tried = {} if quick else child(folder, few, "tune", candidates=choices, reference=str(want), here=here)["tried"]
    best = next(iter(choices)) if quick else fastest(tried, choices, loss, tolerance(work.kind))
    columns = {f"{peer.name(work)} as it comes": peer.AS_IT_COMES, f"{peer.name(work)} tuned": choices[best]}
    unequal = {c: s["why"] for c, s in peer.candidates(work).items() if not s.get("equal", True)}
    known = known | {c: t["seconds"] / max(1, few.steps - 1) for c, t in tried.items() if not unlike(t, loss, tolerance(work.kind))}
    return {"steps": few.steps, "tried": tried, "chosen": best, "unequal": unequal, "known": known}, columns


def promising(choices: dict[str, dict[str, Any]], known: dict[str, float], tries: int) -> dict[str, dict[str, Any]]:
    """So many of the candidates: those that were found fastest first, then in their own order; all of them where ``tries`` is 0."""
    equal = lambda name: choices[name].get("equal", True)  # noqa: E731
    order = sorted((n for n in choices if n in known and equal(n)), key=known.__getitem__)
    order += [n for n in choices if n not in order]
    return {n: choices[n] for n in order[: tries or None]}


def fastest(tried: dict[str, dict[str, Any]], choices: dict[str, dict[str, Any]], reference_loss: float, most: float = LOSS_TOLERANCE) -> str:
    """The candidate of least time that does equal work. Raises ChildFailed where none runs."""
    fit = {name: t["seconds"] for name, t in tried.items() if choices[name].get("equal", True) and not unlike(t, reference_loss, most)}
    if not fit:
        raise ChildFailed("no setting of the peer ran with the reference's loss and gradients:", json.dumps(tried))
    return min(fit, key=fit.__getitem__)


def unlike(tried: dict[str, Any], reference_loss: float, most: float) -> str:
    """What a candidate does otherwise than the reference; "" where it is the same. ``most``: that its loss may be off by."""
    if "error" in tried:
        return tried["error"]
    if abs(error := tried["loss"] / reference_loss - 1) > most:
        return f"the loss of step 1 is off by {error:+.1%}"
    return f"the cosine of its gradients is {tried['cosine']:.3f}" if tried["cosine"] <= COSINE else ""


def _result(work: Workload, columns: dict[str, dict[str, Any]], steps: list[list[Row]], tuning: Any, more: dict[str, Any]) -> dict[str, Any]:
    """As JSON: what was run, and its figures over one rate of the machine for all columns."""
    rate = reduce(Rates.best, (Rates(**g) for c in columns.values() for run in c["runs"] for g in run["gemm"]))
    for c in columns.values():
        for run in c["runs"]:
            run["summary"] = summary(work, run, steps, rate)
        if c["kind"] == "peer":
            c["settings"] = {**c["settings"], "configuration": peers.of(work).configuration(work, c["settings"])}
    return {
        "workload": {**asdict(work), "parameters": work.parameters, "counts": examples.counts(steps)},
        "rate": asdict(rate),
        "tuning": tuning,
        "columns": columns,
        "passed": all(c["gate"]["passed"] for c in columns.values() if c["kind"] == "ours"),
        "loss_band": band(columns),
        **more,
    }


def measured(folder: Path, work: Workload, kind: str, settings: dict[str, Any], steps: list[list[Row]], grads: Path | None, here: bool) -> dict[str, Any]:
    """One process, between two measurements of the machine. Raises ChildFailed where it did not do the work it was given."""
    counts = examples.counts(steps)
    tokens, labelled = (round(statistics.mean(c)) for c in zip(*counts, strict=True))
    before = machine.rates(work, tokens, labelled)
    result = child(folder, work, kind, settings=settings, grads=grads, here=here)
    after = machine.rates(work, tokens, labelled)
    did = [(s["tokens"], s["labelled"]) for s in result["steps"]]
    if did != counts:
        raise ChildFailed(f"{kind} on {work.name!r}:", f"CountError: it saw (tokens, labelled) {did[:3]}... where the workload has {counts[:3]}...")
    return result | {"gemm": [asdict(before), asdict(after)], "moved": before.moved(after)}


def summary(work: Workload, result: dict[str, Any], steps: list[list[Row]], rate: Rates) -> dict[str, float]:
    """The figures of one process. Step 1 stands apart; the others count, each with its share of a reference that was computed before them."""
    share = result["reference_s"] / len(steps)
    later = list(zip(result["steps"], steps, strict=True))[1:]
    seconds = [s["seconds"] + share for s, _ in later]
    limits = [rate.seconds(limit.useful(work, rows)) for _, rows in later]
    per_second = lambda key: statistics.median(s[key] / t for (s, _), t in zip(later, seconds, strict=True))  # noqa: E731
    return {
        "step_min_s": min(seconds),
        "step_median_s": statistics.median(seconds),
        "reference_share_s": share,
        "tokens_per_s": per_second("tokens"),
        "labelled_per_s": per_second("labelled"),
        "positions_per_token": sum(s["positions"] for s, _ in later) / sum(s["tokens"] for s, _ in later),
        "distance": statistics.median(t / best for t, best in zip(seconds, limits, strict=True)),
        "limit_median_s": statistics.median(limits),
        "startup_s": result["startup_s"],
        "import_s": result["import_s"],
        "first_step_s": result["steps"][0]["seconds"],
        "peak_mib": result["peak_rss"] / 2**20,
        "above_imports_mib": (result["peak_rss"] - result["base_rss"]) / 2**20,
    }


# --- is it the same work --------------------------------------------------------------------------------------------


def tolerance(kind: str) -> float:
    """How far the loss of step 1 may be from the reference's, relative."""
    return DPO_TOLERANCE if kind == "dpo" else LOSS_TOLERANCE


def gate(result: dict[str, Any], reference_loss: float, grads: Path, reference_grads: Path, *, tolerance: float = LOSS_TOLERANCE) -> dict[str, Any]:
    """Step 1 against the fp32 reference: relative error of the loss, cosine of all gradients, and the worst tensor's."""
    error = abs(result["steps"][0]["loss"] / reference_loss - 1)
    try:
        cosine, worst = gradients.cosines(grads, reference_grads)
        odd = ""
    except gradients.Different as e:
        cosine, worst, odd = 0.0, 0.0, str(e)
    passed = error <= tolerance and cosine > COSINE
    return {"loss": result["steps"][0]["loss"], "loss_error": error, "cosine": cosine, "worst_cosine": worst, "passed": passed, "odd": odd}


def band(columns: dict[str, dict[str, Any]]) -> float:
    """The largest relative distance between ours and any other column's loss at any step."""
    curves = [[s["loss"] for s in c["runs"][0]["steps"]] for c in columns.values() if c["runs"]]
    return max((abs(a / b - 1) for curve in curves[1:] for a, b in zip(curves[0], curve, strict=True)), default=0.0)


def faster(result: dict[str, Any], column: str) -> float:
    """Real tokens a second of ours over a column's, means of the repetitions."""
    return mean(result["columns"][OURS], "tokens_per_s") / mean(result["columns"][column], "tokens_per_s")


def mean(column: dict[str, Any], key: str) -> float:
    """A figure over the repetitions."""
    return statistics.mean(run["summary"][key] for run in column["runs"])
