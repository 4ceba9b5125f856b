"""``python -m benchmarks.multitask``: what training on 18 tasks brings on six that were never seen. Resumable: a run that has its file is not run again.

fiddle is trained on the mixture of recipes/multitask.yaml and asked the last 100 rows of six other tasks, none of which is another template of a data set it
was trained on; beside it the base, and fiddle tuned on the first 100 rows of that one task. A task with choices is scored as Sanh et al., 2021, arXiv
2110.08207, section 5.2 do: the choice with the largest log-probability is the answer. A task without is scored by the loss per token of its references, and
BLEU. Intervals are percentile bootstraps over test rows; differences are paired. Each run is a process of its own. Needs LUTHIER_DATA.

TREC's file has lost its answers: they are looked up in the data set itself by its questions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .apart import numbers_of

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "multitask"
RECIPE = ROOT / "recipes" / "multitask.yaml"
PAGE, BEGIN, END = ROOT / "docs" / "mixtures.md", "<!-- begin: benchmarks.multitask -->", "<!-- end: benchmarks.multitask -->"
UNSEEN = {
    "commonsense_qa": "commonsense_qa_question_answering",
    "paws": "paws_labeled_final_Meaning",
    "quarel": "quarel_choose_between",
    "quartz": "quartz_read_passage_below_choose",
    "samsum": "samsum_Summarize_this_dialogue_",
    "trec": "trec_which_category_best_describes",
}
TREC = ("Description", "Entity", "Abbreviation", "Person", "Quantity", "Location")  # in the order of the data set's numbers
HALF = 100  # rows for tuning on one task, and rows to score
SINGLE_STEPS, SINGLE_BATCH = 60, 2048
SEEDS = (0, 1, 2)


def data() -> Path:
    """The folder of real data."""
    return Path(os.environ["LUTHIER_DATA"]) / "data"


def rows_of(task: str) -> list[dict[str, Any]]:
    """The rows of an unseen task: prompt, completion, and the choices where it has some."""
    with (data() / "multitask" / f"{UNSEEN[task]}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    answers = trec_answers() if task == "trec" else {}
    out = []
    for row in rows:
        said = row["completion"].replace("<|endoftext|>", "").strip()
        if task == "trec":
            asked = re.search(r"the following question: (.*?)\s*\n", row["prompt"])
            said = answers.get(squeezed(asked[1]), "") if asked else ""
        choices = choices_of(task, row["prompt"])
        if said and (task == "samsum" or said in choices):  # four of quartz's prompts name their choices in another way
            out.append({"prompt": row["prompt"], "completion": said, "choices": choices})
    return out


def trec_answers() -> dict[str, str]:
    """TREC's coarse label of every question; its lines are a number, a space and the question."""
    out = {}
    for file in sorted((data() / "trec").glob("*.all")):
        for line in file.read_bytes().decode("latin-1").split("\n"):
            label, _, question = line.partition(" ")
            if label.isdigit():
                out[squeezed(question)] = TREC[int(label)]
    return out


def squeezed(text: str) -> str:
    """Without what differs between copies of a text."""
    return re.sub(r"\W+", "", text).lower()


def choices_of(task: str, prompt: str) -> list[str]:
    """What a prompt lets choose from."""
    if task == "commonsense_qa":
        return [line[2:].strip() for line in prompt.splitlines() if line.startswith("- ")]
    if task == "quarel":
        found = re.search(r'Choose between "(.*?)" and\s+"(.*?)"\.', prompt)
        return list(found.groups()) if found else []
    if task == "quartz":
        found = re.search(r"\(choices are (.*?) or (.*?) \)", prompt)
        return list(found.groups()) if found else []
    return {"paws": ["Yes", "No"], "trec": list(TREC)}.get(task, [])


# --- one run, in a process of its own -------------------------------------------------------------------------------


def run_of(task: dict[str, Any], folder: str) -> Any:
    """The settings of a run: the recipe's mixture, or the first half of one task."""
    from luthier.settings.config import load_run
    from luthier.settings.run import Checkpoint, Data

    run = load_run(str(RECIPE), [f"seed={task['seed']}", f"out={folder}"])
    assert run.data.mix is not None
    sources = {n: replace(s, files=tuple(str(data() / f) for f in s.files)) for n, s in run.data.mix.sources.items()}
    steps = task["steps"] or (run.optim.steps if task["name"] == "multitask" else SINGLE_STEPS)
    run = replace(run, data=replace(run.data, mix=replace(run.data.mix, sources=sources)), optim=replace(run.optim, steps=steps))
    run = replace(run, evaluate=replace(run.evaluate, every_steps=max(1, steps // 5)), checkpoint=Checkpoint(every_steps=steps, keep=1))
    if task["name"] == "multitask":
        return run
    file = Path(folder) / "train.jsonl"
    with file.open("w", encoding="utf-8") as f:
        for row in rows_of(task["name"].removeprefix("single "))[:HALF]:
            f.write(json.dumps({k: row[k] for k in ("prompt", "completion")}) + "\n")
    single = Data(train=(str(file),), validation_share=0.2)
    return replace(run, data=single, optim=replace(run.optim, batch_tokens=SINGLE_BATCH), name="single")


def one(task: dict[str, Any]) -> dict[str, Any]:
    """Train as told, reload what was saved, score the unseen rows; the base is only scored."""
    from luthier import opening
    from luthier.running.progress import Reporter
    from luthier.running.starting import execute

    began = time.perf_counter()
    out: dict[str, Any] = dict(task)
    asked = [task["name"].removeprefix("single ")] if task["name"].startswith("single ") else list(UNSEEN)
    if task["name"] == "base":
        policy = opening.load("fiddle", precision="bfloat16")
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = execute(run_of(task, folder), reporter=Reporter(quiet=True))
            policy = opening.load(result.artefact)
            out |= {"tokens": result.tokens, "train_seconds": round(result.seconds, 1), "best_step": result.best_step, "after": result.after.numbers()}
    out["scores"] = {name: scored(policy, name, task["rows"]) for name in asked}
    return out | {"seconds": round(time.perf_counter() - began, 1)}


def scored(policy: Any, name: str, limit: int | None) -> dict[str, list[float]]:
    """Of every test row: the log-probability and the tokens of its reference; whether the right choice was the likeliest; its answer's BLEU statistics."""
    from luthier.measuring.measure import answer_rows
    from luthier.references import logps
    from luthier.settings.plugins import plugin

    rows = rows_of(name)[HALF : HALF + (limit or HALF)]
    examples, place = [], []
    for i, row in enumerate(rows):
        for said in dict.fromkeys([row["completion"], *row["choices"]]):
            examples.append(rendered(policy, row["prompt"], said))
            place.append((i, said))
    found = dict(zip(place, logps(policy.eval(), examples, tokens=8192, packed=policy.base.packs), strict=True))
    size = {key: float(e.train[1:].sum()) for key, e in zip(place, examples, strict=True)}
    right = [(i, row["completion"]) for i, row in enumerate(rows)]
    out: dict[str, Any] = {"logp": [found[k] for k in right], "tokens": [size[k] for k in right]}
    if rows[0]["choices"]:
        out["right"] = [float(max(row["choices"], key=lambda c: found[i, c]) == row["completion"]) for i, row in enumerate(rows)]
    else:
        bleu: Any = plugin("tasks", "bleu")()
        asked = [{"prompt": r["prompt"], "refs": [r["completion"]]} for r in rows]
        answers = [a["answer"] for a in answer_rows(policy, asked, template=None, max_new=48)]
        out["bleu"] = [list(map(float, bleu.statistics(r, a))) for r, a in zip(asked, answers, strict=True)]
    return out


def rendered(policy: Any, prompt: str, completion: str) -> Any:
    """A row as training renders it."""
    from luthier.data.render import render_chat
    from luthier.data.shapes import Chat

    chat = Chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])
    return render_chat(chat, policy.base.tokenizer, None, max_tokens=policy.limit)


def run(task: dict[str, Any], kept: Path, threads: int) -> dict[str, Any]:
    """The numbers of a task: from its file, or from a run that then writes it."""
    file = kept / f"{task['name'].replace(' ', '-')}-{task['seed']}.json"
    if file.is_file():
        return json.loads(file.read_text())
    began = time.perf_counter()
    numbers = numbers_of("benchmarks.multitask", task, f"{task['name']}, seed {task['seed']}", threads) | {"threads": threads}
    kept.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(numbers) + "\n")
    print(f"{time.strftime('%H:%M')} {task['name']}, seed {task['seed']}: {time.perf_counter() - began:.0f} s", flush=True)
    return numbers


# --- the table ------------------------------------------------------------------------------------------------------


def table(kept: Path) -> str:
    """One row for each unseen task and measure: base, single-task, mixture, and the mixture's paired difference from the base."""
    found = [json.loads(f.read_text()) for f in sorted(kept.glob("*.json"))]
    lines = ["", "| unseen task | measure | n | base | tuned on it alone | 18 other tasks | 18 others less base |", "|---|---|---|---|---|---|---|"]
    together: dict[str, list[np.ndarray]] = {}
    for name in UNSEEN:
        by = {label: [r["scores"][name] for r in found if r["name"] == label] for label in ("base", f"single {name}", "multitask")}
        for key in ("right", "bleu", "logp"):
            sides = [stats(runs, key) for runs in by.values()]
            if all(s is None for s in sides):
                continue
            if key == "right" and sides[0] is not None and sides[2] is not None:
                for label, side in zip(("base", "single", "multitask"), sides, strict=True):
                    together.setdefault(label, []).append(np.zeros((0, 2)) if side is None else side)
            lines.append(_line(name, key, sides))
    if together:
        lines.append(_line("all with choices", "right", [np.concatenate(together[k]) for k in ("base", "single", "multitask")]))
    return "\n".join(lines) + "\n"


def stats(runs: Sequence[dict[str, Any]], key: str) -> np.ndarray | None:
    """(N, K) statistics of the test rows, the mean over seeds; None where there are none."""
    if not runs or key not in runs[0]:
        return None
    if key == "bleu":
        return np.mean([r[key] for r in runs], 0)
    top = np.mean([r[key] for r in runs], 0)
    return np.stack([-top, np.array(runs[0]["tokens"])] if key == "logp" else [100 * top, np.ones_like(top)], 1)


def _line(name: str, key: str, sides: Sequence[np.ndarray | None]) -> str:
    from luthier.nn import intervals

    statistic = intervals.bleu if key == "bleu" else intervals.ratio_of_sums
    digits = 2 if key == "logp" else 1

    def cell(side: np.ndarray | None) -> str:
        if side is None or not len(side):
            return "-"
        i = intervals.bootstrap(side, statistic)
        return f"{i.value:.{digits}f} [{i.low:.{digits}f}, {i.high:.{digits}f}]"

    base, _, mixed = sides
    gain = "-"
    if base is not None and mixed is not None:
        d = intervals.paired(base, mixed, statistic)
        gain = f"{d.value:+.{digits}f} [{d.low:+.{digits}f}, {d.high:+.{digits}f}]"
    n = max(0 if s is None else len(s) for s in sides)
    what = {"right": "accuracy, %", "bleu": "BLEU", "logp": "loss per token"}[key]
    return f"| {name} | {what} | {n} | {cell(base)} | {cell(sides[1])} | {cell(mixed)} | {gain} |"


def main() -> int:
    """Run what has no file yet, print the table, and put it into docs/mixtures.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0].replace("``", ""))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="so many seeds of each (default 3)")
    parser.add_argument("--quick", action="store_true", help="two steps, eight rows and one seed of each, into a folder that is thrown away: does it run?")
    parser.add_argument("--report", action="store_true", help="only the table, from the runs that are there")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one(json.loads(asked.one))))
        return 0
    if not asked.report and not os.environ.get("LUTHIER_DATA"):
        parser.error("set LUTHIER_DATA to the folder that holds data/multitask and data/trec")
    with tempfile.TemporaryDirectory() as thrown_away:
        kept = Path(thrown_away) if asked.quick else KEPT
        few: dict[str, Any] = {"steps": 2, "rows": 8} if asked.quick else {"steps": None, "rows": None}
        tasks = [{"name": "base", "seed": 0}]
        for seed in SEEDS[: 1 if asked.quick else asked.seeds]:
            tasks += [{"name": name, "seed": seed} for name in ("multitask", *(f"single {n}" for n in UNSEEN))]
        for task in [] if asked.report else tasks:
            run(task | few, kept, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
        if not list(kept.glob("*.json")):
            print(f"no run is kept in {kept} yet; say python -m benchmarks.multitask")
            return 1
        print(table(kept))
        if not asked.quick:
            head, tail = PAGE.read_text().split(BEGIN)[0], PAGE.read_text().split(END)[1]
            PAGE.write_text(head + BEGIN + "\n" + table(kept) + END + tail)
            print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
