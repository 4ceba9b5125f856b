"""``python -m benchmarks.e2e``: every method on the same task, data, base and budget. Resumable: a run that has its file is not run again.

Restaurant data to text (E2E, Novikova et al., 2017) with fiddle: 100 steps of 8,192 tokens, greedy answers to all 630 test inputs, all references,
sacrebleu. Each method first searches its learning rate (and, where it has a choice, its start) on a third of the steps by held-out loss; the chosen one
then runs in full, once a seed. Every run is a process of its own, so that its peak memory is its own. Needs LUTHIER_DATA.

``--jobs N`` runs N entries side by side, each with its share of the cores; seconds a step are therefore not read from these runs but measured at the
end, one entry at a time with all cores (``--time`` does only that: wait until the machine is idle).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .apart import numbers_of

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "e2e"
MOST_RATES = 7  # of one start
STEPS, SEARCH_STEPS, TIMED_STEPS, BATCH = 100, 33, 9, 8192
LOCKS: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


@dataclass(frozen=True)
class Entry:
    """A method with its settings, and what is searched for it."""

    name: str
    method: dict[str, Any]
    lrs: tuple[float, ...] = ()  # searched; empty: nothing is trained
    starts: tuple[dict[str, Any], ...] = ({},)  # other settings searched beside the learning rate
    seeds: int = 3
    part: str = "methods"  # or the sweep it belongs to
    like: str = ""  # take the search of this entry
    precision: dict[str, Any] = field(default_factory=dict)  # how the base is stored; empty: bfloat16


def _lora(rank: int, **how: Any) -> dict[str, Any]:
    return {"kind": "lora", "rank": rank, "alpha": 2.0 * rank, "targets": ["all"]} | how


LOW = (1e-3, 3e-3, 1e-2)
HIGH = (1e-2, 3e-2, 1e-1)
ENTRIES = [
    Entry("crafted_prompt", {"kind": "crafted_prompt", "choose_by": "loss"}, seeds=3),
    Entry("full", {"kind": "full"}, (3e-4, 1e-3, 3e-3)),
    Entry("lora", _lora(16), LOW),
    Entry("adapter", {"kind": "adapter", "bottleneck": 64}, LOW),
    Entry("prefix", {"kind": "prefix", "length": 20}, HIGH),
    Entry("prompt", {"kind": "prompt", "length": 20}, HIGH, ({"init": "vocabulary"}, {"init": "text"})),
    Entry("dora", {"kind": "dora", "rank": 16, "alpha": 32.0, "targets": ["all"]}, LOW, seeds=1),
    Entry("ia3", {"kind": "ia3"}, (1e-2, 3e-2, 1e-1), seeds=1),
    Entry("p_tuning", {"kind": "p_tuning", "length": 20}, (1e-3, 3e-3, 1e-2), seeds=1),
    Entry("p_tuning_v2", {"kind": "p_tuning_v2", "length": 20}, HIGH, seeds=1),
    Entry("partial: last 2 blocks", {"kind": "partial", "last_blocks": 2}, (1e-3, 3e-3), seeds=1),
    Entry("diff_pruning", {"kind": "diff_pruning"}, (1e-3, 3e-3), seeds=1),
    Entry("adapter: pfeiffer", {"kind": "adapter", "bottleneck": 64, "placement": "pfeiffer"}, seeds=1, like="adapter"),
    Entry("adapter: block", {"kind": "adapter", "bottleneck": 64, "placement": "block"}, seeds=1, like="adapter"),
    Entry("adapter: parallel", {"kind": "adapter", "bottleneck": 64, "placement": "parallel"}, seeds=1, like="adapter"),
    *[Entry(f"lora rank {r}", _lora(r), seeds=1, like="lora", part="rank") for r in (1, 4, 8, 64)],
    *[Entry(f"adapter width {w}", {"kind": "adapter", "bottleneck": w}, seeds=1, like="adapter", part="bottleneck") for w in (8,)],
    *[Entry(f"lora on {k}", _lora(16), like="lora", part="precision", precision={"kind": k, "resident": "no"}) for k in ("int8", "nf4", "gptq")],
    *[Entry(f"prefix length {p}", {"kind": "prefix", "length": p}, seeds=1, like="prefix", part="prefix") for p in (1, 5, 100)],
]


# --- one run, in a process of its own -------------------------------------------------------------------------------


def one(task: dict[str, Any]) -> dict[str, Any]:
    """Train as told, reload what was saved, answer the test inputs: the numbers of a row."""
    from luthier import opening
    from luthier.comparing.files import own_bytes
    from luthier.data.prepare import prepare
    from luthier.measuring.evaluate import score
    from luthier.measuring.measure import answer_rows, task_rows
    from luthier.running.progress import Reporter
    from luthier.running.starting import execute
    from luthier.settings.plugins import plugin
    from luthier.settings.run import Checkpoint, Data, Evaluate, Optim, Run

    e2e = Path(os.environ["LUTHIER_DATA"]) / "data" / "e2e"
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            data=Data(train=(str(e2e / "train.jsonl"),), validation=(str(e2e / "dev.jsonl"),), validation_rows=400),
            model=_model(task.get("precision") or {}),
            method=task["method"],
            precision=task.get("precision") or "bfloat16",
            optim=Optim(steps=task["steps"], batch_tokens=BATCH, lr=task["lr"]),
            evaluate=Evaluate(every_steps=task["steps"], samples=0),
            checkpoint=Checkpoint(every_steps=task["steps"], keep=1),
            seed=task["seed"],
            out=folder,
        )
        began = time.perf_counter()
        result = execute(run, reporter=Reporter(quiet=True))
        took = time.perf_counter() - began
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [line["seconds"] for line in lines if line["event"] == "train"][1:]
        assert result.after.loss is not None and result.after.general is not None and result.before.general is not None
        out: dict[str, Any] = {
            **task,
            "trained": result.trained,
            "kept": kept(result.artefact),
            "whole": result.total,
            "tokens": result.tokens,
            "loss": result.after.loss.value,
            "general": result.after.general.value,
            "general_before": result.before.general.value,
            "step": statistics.median(steps) if steps else None,
            "peak": result.peak_bytes,
            "file": own_bytes(result.artefact),
            "seconds": round(took, 1),
        }
        if task["test"]:
            policy = opening.load(result.artefact)
            out["base_bytes"] = base_bytes(policy.lm)
            if task.get("precision"):
                out["merged"] = merges(policy, result.artefact, run)
            prepared = prepare(
                [str(e2e / "test_multiref.jsonl")],
                policy.base.tokenizer,
                renders="chat",
                template=None,
                max_tokens=policy.limit,
                on_bad_row="stop",
                validation=[str(e2e / "test_multiref.jsonl")],
                validation_rows=10**9,
                say=lambda _: None,
            )
            rows = task_rows(prepared.validation_records)
            answers = [a["answer"] for a in answer_rows(policy, rows, template=None, max_new=80)]
            out["bleu"] = vars(score(lambda _: answers, plugin("tasks", "bleu")(), rows, seed=0)["bleu"])
        return out


def merges(policy: Any, artefact: Path, run: Any) -> dict[str, dict[str, float]]:
    """What the two ways of merging into a base in codes give: losses, and the largest difference of the logits from the model that was trained."""
    import torch

    from luthier.measuring.measure import once
    from luthier.opening import load, on_floats
    from luthier.saving.merging import compare, merge

    out = {"trained": {"difference": 0.0} | once(policy, run).numbers()}
    floats = on_floats(policy, artefact, precision="float32")
    out["float"] = {"difference": compare(policy, floats)[0]} | once(floats, run).numbers()
    with tempfile.TemporaryDirectory() as folder:
        done = merge(load(artefact), Path(folder) / "m", dtype=torch.float32)
        merged = load(Path(folder) / "m", precision="float32")
        out["codes"] = {"difference": compare(policy, merged)[0], "folded": done.folded, "reopened": done.reopened} | once(merged, run).numbers()
    return out


def kept(artefact: Path) -> int:
    """Numbers of a saved delta: fewer than were trained where a network is dropped or differences are pruned."""
    from safetensors.torch import load_file

    from luthier.comparing.files import own_files

    return sum(t.numel() for f in own_files(artefact) for t in load_file(f).values() if t.is_floating_point())


def base_bytes(lm: Any) -> int:
    """What a base takes in memory: codes, constants and floats, without what a delta added, and without decoded values that may be kept as well."""
    from luthier.modelling.anatomy import modules

    parts = [m for _, m in modules(lm)]
    held = {id(t): t.nbytes for m in parts for n, t in [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)] if n != "resident"}
    return sum(held.values())


def _model(precision: dict[str, Any]) -> str:
    """The base: for GPTQ a folder of codes, made once from general text that is no part of the task."""
    if precision.get("kind") != "gptq":
        return "fiddle"
    folder = Path(tempfile.gettempdir()) / "luthier-e2e-gptq"
    if not (folder / "config.json").is_file():
        subprocess.run([sys.executable, "-m", "luthier", "quantize", "fiddle", "--output", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return str(folder)


def run(task: dict[str, Any], label: str, threads: int) -> dict[str, Any]:
    """The numbers of a task: from its file, or from a run that then writes it."""
    name = "-".join(str(task[k]) for k in ("name", "seed", "lr", "steps")) + "".join(f"-{v}" for v in task["start"].values())
    file = KEPT / (name.replace(": ", "-").replace(" ", "-") + ".json")
    with LOCKS[file]:  # entries that share a search wait for it
        if file.is_file():
            return json.loads(file.read_text())
        began = time.perf_counter()
        numbers = numbers_of("benchmarks.e2e", task, label, threads) | {"threads": threads}
        KEPT.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(numbers, indent=1) + "\n")
    bleu = f", BLEU {numbers['bleu']['value']:.1f}" if "bleu" in numbers else ""
    print(f"{time.strftime('%H:%M')} {label}: loss {numbers['loss']:.3f}{bleu} ({time.perf_counter() - began:.0f} s)", flush=True)
    return numbers


# --- search, then seeds ---------------------------------------------------------------------------------------------


def settings(entry: Entry, threads: int) -> tuple[float | None, dict[str, Any]]:
    """(learning rate, start) with the lowest held-out loss on a third of the steps; more rates beyond an end that won."""
    if entry.like:
        return settings(next(e for e in ENTRIES if e.name == entry.like), threads)
    if not entry.lrs:
        return None, {}
    found: dict[tuple[float, int], float] = {}

    def attempt(lr: float, i: int) -> None:
        task = {
            "name": entry.name,
            "method": entry.method | entry.starts[i],
            "precision": entry.precision,
            "start": entry.starts[i],
            "lr": lr,
            "seed": 0,
            "steps": SEARCH_STEPS,
            "test": False,
        }
        found[lr, i] = run(task, f"search {entry.name}, learning rate {lr:g} {entry.starts[i] or ''}", threads)["loss"]

    for i in range(len(entry.starts)):
        for lr in entry.lrs:
            attempt(lr, i)
    while True:  # until a rate between two others is the best
        lr, i = min(found, key=lambda k: found[k])
        tried = [rate for rate, start in found if start == i]
        beyond = lr / 3 if lr == min(tried) else lr * 3 if lr == max(tried) else None
        if beyond is None or beyond > 1 or len(tried) >= MOST_RATES:  # optim.lr is at most 1
            return lr, entry.starts[i]
        attempt(float(f"{beyond:.0e}"), i)


def rows(entry: Entry, seeds: int, threads: int) -> None:
    """One row a seed."""
    lr, start = settings(entry, threads)
    task = {"name": entry.name, "method": entry.method | start, "precision": entry.precision, "start": start, "lr": lr, "steps": STEPS, "test": True}
    for s in range(seeds):
        run(task | {"seed": s}, f"{entry.name}, seed {s}", threads)


def clock(entry: Entry, cores: int) -> None:
    """Seconds a step with all cores and nothing else running."""
    lr, start = settings(entry, cores)
    if lr is not None:
        task = {"name": entry.name, "method": entry.method | start, "precision": entry.precision, "start": start, "lr": lr, "steps": TIMED_STEPS}
        run(task | {"seed": 0, "test": False}, f"timing {entry.name}", cores)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then write the table and the plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.e2e", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", help="entries whose name contains this")
    parser.add_argument("--seeds", type=int, help="at most so many seeds an entry")
    parser.add_argument("--jobs", type=int, default=1, help="entries side by side, each with its share of the cores (default 1)")
    parser.add_argument("--time", action="store_true", help="only measure seconds a step, of the entries that have runs")
    parser.add_argument("--write", action="store_true", help="only write the table and the plots from the runs there are")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.one:
        print(json.dumps(one(json.loads(a.one))))
        return 0
    if not a.write:
        if "LUTHIER_DATA" not in os.environ:
            parser.error("LUTHIER_DATA does not name the folder of real data (with data/e2e in it)")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        chosen = [e for e in ENTRIES if (a.only or "") in e.name]
        for first in () if a.time else (True, False):  # one seed of everything before the others
            with ThreadPoolExecutor(a.jobs) as pool:
                work = [pool.submit(rows, e, 1 if first else min(e.seeds, a.seeds or e.seeds), max(1, cores // a.jobs)) for e in chosen]
                for done in work:
                    done.result()
        for entry in chosen:
            clock(entry, cores)
    from . import e2e_report

    e2e_report.write(KEPT, ENTRIES, TIMED_STEPS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
