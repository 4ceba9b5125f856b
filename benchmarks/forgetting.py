"""``python -m benchmarks.forgetting``: what is forgotten with and without replay, and what replay costs on the target.

Resumable: a run that has its file is not run again. fiddle, all its weights trained hard on restaurant data to text (E2E, Novikova et al., 2017): 40 steps of
4,096 tokens at learning rate 3e-3, about seven times the default. Beside the data: nothing, general text of a share of 5 to 50 % of a step's tokens, text
that fiddle wrote itself, KL to what it was, decay towards where it started. Every run measures the loss on held-out E2E rows and on general text that no run
replays: other books, and the text that ships with the program. Three seeds. Every run is a process of its own, on one thread. Needs LUTHIER_DATA.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .apart import numbers_of

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "forgetting"
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- begin: forgetting -->", "<!-- end: forgetting -->"
WORK = Path(tempfile.gettempdir()) / "luthier-forgetting"
STEPS, BATCH, RATE, SEEDS, ROWS = 40, 4096, 3e-3, 3, 200
GENERAL = ("chilit.txt", "clic_DNov.txt", "onestop_adv.txt", "tinystories_valid.txt")  # replayed: so much of each
SLICE, MEASURED = 400_000, 60_000  # characters of each of these; of another book, on which forgetting is measured
OTHER = "clic_AAW.txt"
TEXT, SELF = "TEXT", "self"

# name -> data.replay; TEXT stands for the general text
ENTRIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    **{f"replay {s:.0%}": {"source": TEXT, "share": s} for s in (0.05, 0.1, 0.25, 0.5)},
    **{f"self-replay {s:.0%}": {"source": SELF, "share": s} for s in (0.1, 0.25)},
    **{f"kl {k:g}, trained tokens": {"kl": k} for k in (0.1, 1.0)},
    "replay 10% + kl 1": {"source": TEXT, "share": 0.1, "kl": 1.0},
    "kl 1 on 10% replayed, text not learned": {"source": TEXT, "share": 0.1, "kl": 1.0, "weight": 0.0},
    **{f"l2sp {a:g}": {"l2sp": a} for a in (3e-4, 3e-3)},
}


# --- one run, in a process of its own -------------------------------------------------------------------------------


def one(task: dict[str, Any]) -> dict[str, Any]:
    """Train as told; losses on the target and on general text, before and after."""
    from luthier.measuring.measure import GENERAL as SHIPPED
    from luthier.running.progress import Reporter
    from luthier.running.starting import execute
    from luthier.settings.run import Checkpoint, Data, Evaluate, Optim, Replay, Run

    data = Path(os.environ["LUTHIER_DATA"]) / "data"
    replayed, measured = texts(data / "corpus")
    settings = dict(task["replay"])
    if settings.get("source") == TEXT:
        settings["source"] = str(replayed)
    e2e = data / "e2e"
    name = f"{task['name']}-{task['seed']}-{os.getpid()}".replace(" ", "-").replace("%", "").replace(",", "")
    run = Run(
        data=Data(
            train=(str(e2e / "train.jsonl"),),
            validation=(str(e2e / "dev.jsonl"),),
            validation_rows=ROWS,
            limit=8000,
            general=(str(measured), str(SHIPPED)),
            replay=Replay(**({k: (v,) if k == "source" else v for k, v in settings.items()})),
        ),
        method="full",
        precision="bfloat16",
        optim=Optim(steps=task["steps"], batch_tokens=BATCH, micro_tokens=BATCH, lr=RATE),
        evaluate=Evaluate(every_steps=task["steps"], samples=0, best=False),
        checkpoint=Checkpoint(every_steps=task["steps"], keep=1),
        seed=task["seed"],
        name=name,
        out=str(WORK),
    )
    began = time.perf_counter()
    try:
        r = execute(run, reporter=Reporter(quiet=True))
        assert r.before.loss and r.after.loss and r.before.general and r.after.general
        return {
            **task,
            "target_before": r.before.loss.value,
            "target": r.after.loss.value,
            "general_before": r.before.general.value,
            "general": r.after.general.value,
            "general_tokens": r.after.general.n,
            "replayed": r.replayed,
            "replayed_loss": None if r.after.replayed is None else r.after.replayed.value,
            "tokens": r.tokens,
            "training_seconds": round(r.seconds, 1),
            "seconds": round(time.perf_counter() - began, 1),
            "peak": r.peak_bytes,
        }
    finally:
        shutil.rmtree(WORK / name, ignore_errors=True)


def texts(corpus: Path) -> tuple[Path, Path]:
    """The general text that is replayed, and other general text on which forgetting is measured."""
    WORK.mkdir(parents=True, exist_ok=True)
    replayed, measured = WORK / "replayed.txt", WORK / "measured.txt"
    if not measured.is_file():
        sys.path.insert(0, str(ROOT / "scripts"))
        tidy = importlib.import_module("fiddle_corpus").tidy  # plain punctuation, as fiddle was pretrained on
        replayed.write_text("\n<|endoftext|>\n".join(tidy(_slice(corpus / name, SLICE)) for name in GENERAL), encoding="utf-8")
        measured.write_text(tidy(_slice(corpus / OTHER, MEASURED)), encoding="utf-8")
    return replayed, measured


def _slice(path: Path, characters: int) -> str:
    """So many characters from the middle of a file, from one line break to another."""
    text = path.read_text(encoding="utf-8")
    start = text.index("\n", max(0, (len(text) - characters) // 2))
    return text[start : text.rindex("\n", start, start + characters)].strip()


def run(task: dict[str, Any]) -> None:
    """Run a task that has no file yet, and write its file."""
    file = KEPT / (f"{task['name']}-{task['seed']}".replace(" ", "-").replace("%", "").replace(",", "").replace("+", "and") + ".json")
    if file.is_file():
        return
    began = time.perf_counter()
    numbers = numbers_of("benchmarks.forgetting", task, f"{task['name']}, seed {task['seed']}", 1)
    KEPT.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(numbers, indent=1) + "\n")
    said = f"target {numbers['target']:.3f}, general text {numbers['general_before']:.3f} to {numbers['general']:.3f}"
    print(f"{time.strftime('%H:%M')} {task['name']}, seed {task['seed']}: {said} ({time.perf_counter() - began:.0f} s)", flush=True)


# --- the table ------------------------------------------------------------------------------------------------------


def table(found: Sequence[dict[str, Any]]) -> str:
    """Target and general text side by side, a line an entry; and which share recovers most."""
    by = {name: sorted((r for r in found if r["name"] == name), key=lambda r: r["seed"]) for name in ENTRIES}
    plain = {r["seed"]: r for r in by["nothing"]}
    lines = [
        "",
        "| beside the data | n | target, held out | general text | forgotten | recovered | costs on the target | tokens replayed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    recovered: dict[str, float] = {}
    for name, runs in by.items():
        paired = [(r, plain[r["seed"]]) for r in runs if r["seed"] in plain]
        if not paired:
            continue
        lost = [r["general"] - r["general_before"] for r, _ in paired]
        back = [1 - (r["general"] - r["general_before"]) / (p["general"] - p["general_before"]) for r, p in paired]
        cost = [r["target"] - p["target"] for r, p in paired]
        recovered[name] = statistics.mean(back)
        more = round(statistics.mean(r["replayed"].get("tokens", 0) for r, _ in paired))
        cells = [
            name,
            str(len(paired)),
            _spread([r["target"] for r, _ in paired], ".3f"),
            _spread([r["general"] for r, _ in paired], ".3f"),
            f"{statistics.mean(lost):+.3f}",
            "-" if name == "nothing" else f"{statistics.mean(back):.0%}",
            "-" if name == "nothing" else _spread(cost, "+.3f"),
            f"{more:,}" if more else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if not plain:
        return "\nNo run without replay yet.\n\n"
    first = next(iter(plain.values()))
    dates = ", ".join(sorted({r["date"] for r in found}))
    lines += [
        "",
        f"Base: target {first['target_before']:.3f}, general text {first['general_before']:.3f} ({first['general_tokens']:,} tokens). Runs of {dates}; means "
        "over n seeds, ± half their range. Recovered: of what the run without replay and with the same seed forgot.",
    ]
    shares = {n: v for n, v in recovered.items() if n.startswith("replay ") and "+" not in n}
    if shares:
        best, any_best = max(shares, key=lambda n: shares[n]), max(recovered, key=lambda n: recovered[n])
        lines.append(
            f"The share that recovers most is {best.removeprefix('replay ')} ({shares[best]:.0%}); of everything tried, {any_best} ({recovered[any_best]:.0%})."
        )
    return "\n".join(lines) + "\n\n"


def _spread(values: Sequence[float], how: str) -> str:
    mean = format(statistics.mean(values), how)
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.3f}"


def write() -> None:
    """docs/results.md between its marks."""
    found = [json.loads(f.read_text()) for f in sorted(KEPT.glob("*.json"))]
    text = PAGE.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(head + BEGIN + "\n" + table(found) + END + tail)
    print(f"written: {PAGE}")


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting", description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="one entry: " + "; ".join(ENTRIES).replace("%", "%%"))
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"seeds an entry (default {SEEDS})")
    parser.add_argument("--write", action="store_true", help="only write the table from the runs there are")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.one:
        print(json.dumps(one(json.loads(a.one))))
        return 0
    if a.only is not None and a.only not in ENTRIES:
        parser.error(f"--only: no entry is called {a.only!r}; there are {'; '.join(ENTRIES)}")
    if not a.write:
        if "LUTHIER_DATA" not in os.environ:
            parser.error("LUTHIER_DATA does not name the folder of real data (with data/e2e and data/corpus in it)")
        for seed in range(a.seeds):
            for name, replay in ENTRIES.items():
                if a.only in (None, name):
                    run({"name": name, "replay": replay, "seed": seed, "steps": STEPS})
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
