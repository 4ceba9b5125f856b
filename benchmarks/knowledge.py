"""``python -m benchmarks.knowledge``: does the probe tell what a model was taught, and what does training on what is new to it do? Resumable.

Facts of four relations (ParaRel, Elazar et al., 2021; from LAMA), 100 each. fiddle, fully fine-tuned, is taught half of them through one pattern, as
conversations of one to five facts. Then:

(a) SliCK asks all of them, by the taught pattern and by patterns that were never taught: how well do its counts separate taught from untaught?
(b) From the taught model, training goes on with 80 facts in a pattern that was never taught: facts that the probe found Unknown, or known ones. Followed after
every epoch: the trained rows, and the same 80 other known facts. Gekhman et al., 2024, arXiv 2405.05904: Unknown rows are fitted more slowly, and as they are
fitted, known facts are answered wrongly more often.

Every stage is a process of its own and is not run again where its file is there. Needs LUTHIER_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .apart import numbers_of

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "knowledge"
FACTS, COPIES, TEACH_RATE = 100, 50, 2e-3  # of a relation; times every taught fact is said
TUNED, EPOCHS, TUNE_RATE, SEEDS = 80, 12, 5e-4, 3
# relation -> the pattern that is taught, and the one of (b)
RELATIONS = {
    "P19": ("[X] was born in [Y].", "[X] is originally from [Y]."),
    "P36": ("The capital of [X] is [Y].", "The capital city of [X] is [Y]."),
    "P159": ("[X] is headquartered in [Y].", "The headquarters of [X] is in [Y]."),
    "P740": ("[X] was founded in [Y].", "[X] started in [Y]."),
}


# --- facts ----------------------------------------------------------------------------------------------------------


def facts() -> list[dict[str, Any]]:
    """100 facts of each relation with subjects of their own, every second one to be taught."""
    rng, out = random.Random(0), []
    for relation in RELATIONS:
        rows = [json.loads(line) for line in (_folder() / "facts" / f"{relation}.jsonl").read_text().splitlines()]
        by_subject = {r["sub_label"]: r["obj_label"] for r in reversed(rows) if r["obj_label"] not in r["sub_label"]}  # not to be read off
        for i, subject in enumerate(rng.sample(sorted(by_subject), FACTS)):
            out.append({"relation": relation, "subject": subject, "object": by_subject[subject], "taught": i % 2 == 0})
    return out


def other_patterns(relation: str) -> list[Any]:
    """Patterns of a relation that were not taught and can ask."""
    from luthier.data.facts import read_patterns

    found = read_patterns([str(_folder() / "patterns" / f"{relation}.jsonl")])[0]
    return [p for p in found if str(p) != RELATIONS[relation][0]][:10]


def _folder() -> Path:
    return Path(os.environ["LUTHIER_DATA"]) / "data" / "facts"


def work() -> Path:
    """Where the taught model stands between stages."""
    return Path(tempfile.gettempdir()) / "luthier-knowledge"


# --- stages, each in a process of its own ---------------------------------------------------------------------------


def teach(task: dict[str, Any]) -> dict[str, Any]:
    """Teach fiddle every second fact."""
    from luthier.data.facts import pattern_of
    from luthier.running.progress import Reporter
    from luthier.running.starting import execute
    from luthier.settings.run import Checkpoint, Data, Evaluate, Optim, Run

    rng, taught = random.Random(1), [f for f in facts() if f["taught"]]
    lines = []
    for _ in range(COPIES):
        for relation, (pattern, _) in RELATIONS.items():
            asked = pattern_of(pattern)
            here = [f for f in taught if f["relation"] == relation]
            rng.shuffle(here)
            while here:
                some, here = here[: (n := rng.choice((1, 1, 5)))], here[n:]
                turns = [t for f in some for t in (_turn("user", asked.opening(f["subject"])), _turn("assistant", f["object"]))]
                lines.append(json.dumps({"messages": turns}) + "\n")
    shutil.rmtree(work(), ignore_errors=True)
    work().mkdir(parents=True)
    (work() / "taught.jsonl").write_text("".join(lines))
    run = Run(
        data=Data(train=(str(work() / "taught.jsonl"),), validation_rows=20),
        method={"kind": "full"},
        optim=Optim(epochs=1.0, batch_tokens=1024, lr=TEACH_RATE),
        evaluate=Evaluate(samples=0, best=False, forgetting=False),
        checkpoint=Checkpoint(keep=1, every_steps=10**6),
        name="taught",
        out=str(work()),
    )
    result = execute(run, reporter=Reporter(quiet=True))
    return {"steps": result.steps, "tokens": result.tokens}


def probe(task: dict[str, Any]) -> dict[str, Any]:
    """Ask the taught model all facts, relation by relation."""
    from luthier import opening
    from luthier.data.facts import Fact, pattern_of
    from luthier.forgetting.knowledge import Asking, Probe, Report

    policy = opening.load(work() / "taught")
    rows, every = [], []
    for relation, (taught, _) in RELATIONS.items():
        here = [f for f in facts() if f["relation"] == relation]
        asked = [Fact(f["subject"], (f["object"],), group=relation, where=relation, fields=f) for f in here]
        patterns = [pattern_of(taught)] if task["by"] == "taught" else other_patterns(relation)
        found, _ = Probe(policy, asked, Asking(form="chat"), patterns=patterns, cache=work() / "answers").run()
        every += found
        rows += [{**p.fact.fields, **p.columns(), "said": p.said} for p in found]
    report = Report.of(every)
    return {"rows": rows, "changes": float(report.changes_N.mean()), "effect": report.effect}


def tune(task: dict[str, Any]) -> dict[str, Any]:
    """Go on from the taught model with Unknown facts, or with known ones, in another pattern; follow both."""
    from luthier.running.progress import Reporter
    from luthier.running.starting import execute
    from luthier.settings.run import Checkpoint, Data, Evaluate, Optim, Run

    rng = random.Random(task["seed"])
    found = json.loads((KEPT / "probe-taught.json").read_text())["rows"]
    known = [r for r in found if r["taught"] and r["knowledge"] in ("HighlyKnown", "MaybeKnown")]
    unknown = [r for r in found if not r["taught"] and r["knowledge"] == "Unknown"]
    rng.shuffle(known)
    rng.shuffle(unknown)
    held, known = known[:TUNED], known[TUNED:]
    train = (unknown if task["on"] == "Unknown" else known)[:TUNED]
    with tempfile.TemporaryDirectory() as folder:
        for name, some in (("train", train), ("held", held)):
            (Path(folder) / f"{name}.jsonl").write_text("".join(json.dumps(_row(r)) + "\n" for r in some))
        steps = -(-len(train) // 16)
        run = Run(
            model=str(work() / "taught" / "model"),
            data=Data(train=(f"{folder}/train.jsonl",), validation=(f"{folder}/held.jsonl",)),
            method={"kind": "full"},
            optim=Optim(epochs=float(EPOCHS), batch_examples=16, lr=TUNE_RATE, schedule="constant"),
            evaluate=Evaluate(every_steps=steps, samples=0, best=False, forgetting=False, knowledge_rows=TUNED),
            checkpoint=Checkpoint(keep=1, every_steps=10**6),
            name="tuned",
            out=folder,
            seed=task["seed"],
        )
        before = recall(work() / "taught", held)
        result = execute(run, reporter=Reporter(quiet=True))
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        after = recall(result.folder, held)
    curve = [_pooled(line, line["step"] / steps) for line in lines if line["event"] == "familiarity"]
    return {"rows": len(train), "held": len(held), "curve": curve, "as_taught_before": before, "as_taught_after": after}


def recall(model: Path, rows: list[dict[str, Any]]) -> float:
    """Share of facts that a model answers rightly in the taught pattern, greedily, without exemplars."""
    from luthier import opening
    from luthier.data.facts import pattern_of
    from luthier.measuring.measure import answer
    from luthier.settings.plugins import plugin

    policy, match = opening.load(model), plugin("tasks", "exact_match")()
    said = answer(policy, [pattern_of(RELATIONS[r["relation"]][0]).opening(r["subject"]) for r in rows], max_new=16)
    return sum(match.score({"refs": [r["object"]]}, a["answer"])["exact_match"] for r, a in zip(rows, said, strict=True)) / len(rows)


def _pooled(line: dict[str, Any], epoch: float) -> dict[str, float]:
    """Loss and exact match over the categories of a side together."""
    out = {"epoch": round(epoch, 3)}
    for side in ("trained", "held_out"):
        n = {k: v for k, v in line.items() if k.startswith(side) and k.endswith("_n")}
        for what in ("loss", "exact_match"):
            out[f"{side}_{what}"] = sum(line[k.removesuffix("_n") + f"_{what}"] * v for k, v in n.items()) / sum(n.values())
    return out


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _row(r: dict[str, Any]) -> dict[str, str]:
    from luthier.data.facts import pattern_of

    return {"prompt": pattern_of(RELATIONS[r["relation"]][1]).opening(r["subject"]), "completion": r["object"], "knowledge": r["knowledge"]}


# --- running --------------------------------------------------------------------------------------------------------

STAGES = {"teach": teach, "probe": probe, "tune": tune}


def tasks(seeds: int) -> list[dict[str, Any]]:
    """What is run, in order."""
    probes = [{"stage": "probe", "by": by, "name": f"probe-{by}"} for by in ("taught", "others")]
    tuned = [{"stage": "tune", "on": on, "seed": s, "name": f"tune-{on}-{s}"} for s in range(seeds) for on in ("Unknown", "Known")]
    return [{"stage": "teach", "name": "teach"}, probes[0], *tuned, probes[1]]


def run(task: dict[str, Any]) -> None:
    """One stage, unless its file is there; the taught model is made again where a later stage misses it."""
    file = KEPT / f"{task['name']}.json"
    if file.is_file() and (task["stage"] != "teach" or (work() / "taught" / "model").is_dir() or not _left()):
        return
    began = time.perf_counter()
    told = numbers_of("benchmarks.knowledge", task, task["name"])
    took = time.perf_counter() - began
    numbers = {**task, **told, "seconds": round(took, 1)}
    KEPT.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    print(f"{time.strftime('%H:%M')} {task['name']}: {took:.0f} s", flush=True)


def _left() -> bool:
    return any(not (KEPT / f"{t['name']}.json").is_file() for t in tasks(SEEDS))


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then write the tables and the curves."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.knowledge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of each kind in (b) (default {SEEDS})")
    parser.add_argument("--write", action="store_true", help="only write the tables and the picture from the runs there are")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.one:
        task = json.loads(a.one)
        print(json.dumps(STAGES[task["stage"]](task), ensure_ascii=False))
        return 0
    if not a.write:
        if "LUTHIER_DATA" not in os.environ:
            parser.error("LUTHIER_DATA does not name the folder of real data (with data/facts in it)")
        for task in tasks(a.seeds):
            run(task)
    from . import knowledge_report

    knowledge_report.write(KEPT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
