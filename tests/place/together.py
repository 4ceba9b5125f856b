"""What ranks do together, run by each of them: `python together.py FOLDER`, started by test_fsdp.py. The first rank writes what was found."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import ranks
import sampled
import tiny
from luthier import references
from luthier.core import spread, spread_answers
from luthier.data.feed import Batches
from luthier.forgetting.divergence import Moved
from luthier.measuring import measure
from luthier.measuring.evaluate import loss_on
from luthier.optim import Optimizer
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.settings.config import load_run
from luthier.settings.plugins import plugin
from luthier.train import train

CHECKS: dict[str, Callable[[Any, Any, Path], Any]] = {}


def check(f: Callable[[Any, Any, Path], Any]) -> Callable[[Any, Any, Path], Any]:
    """To be run; what it returns on the first rank is written."""
    CHECKS[f.__name__] = f
    return f


@check
def agreeing(place: Any, alone: Any, folder: Path) -> Any:
    before = dict(place.traffic)
    first = place.sums({"both": 1.5 + place.rank, f"own {place.rank}": 10.0 + place.rank}, "a test")
    again = place.sums({"both": 1.0}, "a test")
    flat = torch.full((6,), float(place.rank + 1))
    place.average([flat], "a test's gradients")
    sent = {k: n - before.get(k, 0) for k, n in place.traffic.items() if n != before.get(k, 0)}
    shared = place.share(["of", place.rank])
    return {
        "first": first,
        "again": again,
        "mean": place.mean(place.rank),
        "flat": flat.tolist(),
        "gathered": place.gather(place.rank),
        "shared": shared,
        "sent": sent,
    }


@check
def spreading(place: Any, alone: Any, folder: Path) -> Any:
    policy, _, _ = ranks.assembled(("lora", "sft", "float32"), place)
    seen: list[int] = []
    got = spread(policy, range(5), lambda some: [seen.append(i) or 10 * i for i in some], "tens")  # type: ignore[func-returns-value]
    none = spread(policy, range(1), lambda some: [i + 1 for i in some], "one")
    return {"got": got, "seen": place.gather(seen), "fewer than ranks": none}


@check
def measuring(place: Any, alone: Any, folder: Path) -> Any:
    """Held-out loss, predictions, answers, references and divergence: on all ranks, and alone."""
    out: dict[str, Any] = {}
    for name, objective in (("sft", "sft"), ("classify", "classify"), ("kto", "kto")):
        rows = ranks.rows_for(objective) if objective != "kto" else ranks.ranked.rows("llama", "judged", sizes=(2,) * 7)
        for who, where in (("together", place), ("alone", alone)):
            cell = ("lora", objective, "float32")
            policy, goal, _ = (
                ranks.assembled(cell, where)
                if objective != "kto"
                else (*ranks.assembled(("lora", "dpo", "float32"), where)[:1], plugin("objectives", "kto")(), None)
            )
            tiny.randomise(policy.trained())
            groups = measure.group(rows, 40, packed=True)
            losses = loss_on(policy, goal, [goal.collate(g, pad=0, packed=True) for g in groups])
            found = {"loss": losses.value, "parts": losses.parts}
            if objective == "classify":
                policy.base.tokenizer = tiny.tokenizer()
                found["predicted"] = [p["probabilities"] for p in measure.predict(policy, goal, rows, tokens=40)]
            if objective == "sft":
                prompts = [p.ids.tolist() for p in sampled.prompts(5)]
                answers = spread_answers(policy, prompts, max_new=4, temperature=1.0, seed=3, samples=2, stop=[2])
                found |= {"answers": answers.ids, "logps": answers.logps}
                found["reference"] = references.logps(policy, rows, tokens=40, packed=True)
                moved = Moved(policy, lambda: iter([goal.collate(g, pad=0, packed=True) for g in groups]), started=True)  # noqa: B023
                tiny.randomise(policy.trained(), seed=5)
                found["moved"] = moved.measure()
            out.setdefault(name, {})[who] = found
    return out


@check
def going_on(place: Any, alone: Any, folder: Path) -> Any:
    """Three steps together, then the rest alone from that state; and all of it alone."""
    cell = ("lora", "sft", "float32")

    def begin(where: Any) -> tuple[Any, Any, Any, Optimizer]:
        policy, goal, feed = ranks.assembled(cell, where)
        return policy, goal, feed, Optimizer(policy.trained(), lr=1e-2, patterns=policy.delta.optim)

    whole = [s.loss for s in train(*begin(alone), lr=lambda _: 1e-2, steps=6, place=alone)]
    policy, goal, feed, optimizer = begin(place)
    half = [s.loss for s in train(policy, goal, feed, optimizer, lr=lambda _: 1e-2, steps=3, place=place)]
    other, goal, again, second = begin(alone)
    second.load_state_dict(*optimizer.state_dict())
    again.load_state_dict(json.loads(json.dumps(feed.state_dict())))
    rest = [s.loss for s in train(other, goal, again, second, lr=lambda _: 1e-2, steps=6, start=3, place=alone)]
    return {"whole": whole, "in two": half + rest}


def _broken(place: Any, what: Callable[[Any, Any], None]) -> Any:
    """One step in which rank 1 meets something: what each rank saw."""
    policy, goal, feed = ranks.assembled(("lora", "sft", "float32"), place)
    honest, calls = goal.loss, [0]

    def loss(policy: Any, batch: Any) -> Any:
        found = honest(policy, batch)
        calls[0] += 1
        if place.rank == 1 and calls[0] == 1:
            what(found, batch)
        return found

    object.__setattr__(goal, "loss", loss)
    before = [p.detach().clone() for p in policy.trained().values()]
    try:
        (step,) = train(policy, goal, feed, Optimizer(policy.trained(), lr=1e-2), lr=lambda _: 1e-2, steps=1, place=place)
        same = all(torch.equal(a, b) for a, b in zip(before, policy.trained().values(), strict=True))
        mine: Any = {"finite": step.finite, "where": step.where, "still": same}
    except MemoryError as e:
        mine = str(e)
    return place.gather(mine)


@check
def out_of_memory_on_one(place: Any, alone: Any, folder: Path) -> Any:
    def fail(found: Any, batch: Any) -> None:
        raise MemoryError("no room here")

    return _broken(place, fail)


@check
def not_finite_on_one(place: Any, alone: Any, folder: Path) -> Any:
    bad: list[str] = []

    def poison(found: Any, batch: Any) -> None:
        found.sums["tokens"] = found.sums["tokens"] * float("nan")
        bad.extend(batch.where)

    return {"told": _broken(place, poison), "bad": place.gather(bad)[1]}


@check
def a_head_of_one_rank(place: Any, alone: Any, folder: Path) -> Any:
    """A tensor that gets its gradient on rank 1 only moves on both."""
    policy, goal, feed = ranks.assembled(("lora", "sft", "float32"), place)
    extra = torch.nn.Parameter(torch.ones(3))
    honest = goal.loss

    def loss(policy: Any, batch: Any) -> Any:
        found = honest(policy, batch)
        if place.rank == 1:
            found.sums["tokens"] = found.sums["tokens"] + extra.sum()
        return found

    object.__setattr__(goal, "loss", loss)
    optimizer = Optimizer({**policy.trained(), "extra": extra}, lr=1e-2)
    list(train(policy, goal, feed, optimizer, lr=lambda _: 1e-2, steps=2, place=place))
    return place.gather(extra.tolist())


@check
def dealing(place: Any, alone: Any, folder: Path) -> Any:
    """The rows of each step on each rank, of steps with fewer rows than ranks too."""
    rows = tiny.rows(5)
    goal = plugin("objectives", "sft")()
    feed = Batches(rows, goal.collate, pad=0, packed=True, batch_examples=3, epochs=1.0, rank=place.rank, size=place.size)
    own = [[list(b.where) for b in step] for step in feed]
    whole = Batches(rows, goal.collate, pad=0, packed=True, batch_examples=3, epochs=1.0)
    return {"dealt": place.gather(own), "alone": [[list(b.where) for b in step] for step in whole]}


@check
def runs(place: Any, alone: Any, folder: Path) -> Any:
    """Whole runs, as many as there are settings in the folder."""
    done = {}
    for file in sorted(folder.glob("run-*.json")):
        result = execute(load_run(None, json.loads(file.read_text())), reporter=Reporter(quiet=True))
        done[file.stem] = {"folder": str(result.folder), "steps": result.steps, "after": result.after.numbers(), "tokens": result.tokens}
    return done


def main(folder: Path) -> None:
    """All checks, in order, in one launch."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place: Any = plugin("place", "fsdp")(on="cpu", timeout=60)
    alone = plugin("place", "one")(on="cpu")
    place.start()
    found = {name: f(place, alone, folder) for name, f in CHECKS.items()}
    if place.leads:
        (folder / "found.json").write_text(json.dumps(found))
    ranks.work(ranks.cover(), folder / "cover.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
