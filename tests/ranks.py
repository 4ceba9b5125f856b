"""The same run on several processes: every training method x {sft, dpo, reward, ppo, classify} x {float32, bfloat16, nf4} against one process;
and the other objectives by lora in float32.

``python -m tests.ranks`` starts 2 and then 4 processes, each launch running all combinations; the test suite runs a cover of them, on 2. Each combination
trains a model of two layers for two epochs of eleven rows, four a step: so steps are cut into uneven micro-batches, the last has two rows, and with four ranks
two of them have nothing to train. ppo in float32 samples, judges and reads its own answers; in the other precisions its answers are given, since rounding
decides now and then what is sampled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import launching
import matrix
import ranked
import sampled
import tiny
from luthier import build
from luthier.core import Incompatible, Row
from luthier.data.feed import Batches
from luthier.data.rollout import Rollouts, Sampling
from luthier.optim import Optimizer
from luthier.settings.plugins import kinds, plugin
from luthier.settings.run import Run
from luthier.train import train

Cell = tuple[str, str, str]  # method, objective, precision
OBJECTIVES = ("sft", "dpo", "reward", "ppo", "classify")
OTHERS = ("text", "orpo", "kto", "grpo", "multitask")  # by lora in float32 alone
NEAR = {"float32": 1e-6, "bfloat16": 1e-3, "nf4": 1e-3}  # relative
SLOWER = 0.2  # of the learning rate, in 16 bits: rounding that differs with the cut of micro-batches grows with every step
ROWS, A_STEP, MICRO = 11, 4, 48
FAMILY = "llama"


def cells() -> list[Cell]:
    """All combinations whose method trains something."""
    methods = [m for m in kinds("methods") if not hasattr(plugin("methods", m), "candidates")]
    return [*itertools.product(methods, OBJECTIVES, NEAR), *(("lora", objective, "float32") for objective in OTHERS)]


def cover() -> list[Cell]:
    """Every method once, objectives and precisions taking turns."""
    methods = list(dict.fromkeys(m for m, _, _ in cells()))
    return [(m, OBJECTIVES[i % 5], "float32" if m == "diff_pruning" else list(NEAR)[(i + i // 3) % 3]) for i, m in enumerate(methods)]


def rows_for(objective: str) -> list[Row]:
    """Eleven rows of different lengths."""
    if objective in matrix.PREFERENCES:
        return ranked.rows(FAMILY, matrix.PREFERENCES[objective], sizes=tuple(2 + (i % 3 == 1) for i in range(ROWS)))
    if objective == "multitask":
        return matrix.rows_for(objective, FAMILY)
    made = tiny.rows_for(FAMILY, ROWS)
    if objective == "classify":
        return [Row(r.ids, np.ones(len(r), dtype=bool), r.where, {"label": i % len(matrix.LABELS)}) for i, r in enumerate(made)]
    return [matrix._answered(r, i) for i, r in enumerate(made)] if objective in matrix.ANSWERED else made


class Answered:
    """A feed of answers that are given, as Rollouts feeds its own."""

    def __init__(self, inner: Batches, policy: Any, goal: Any):
        self.inner, self.goal, self.shared, self.steps = inner, goal, matrix.method_shares(policy), inner.steps

    def __next__(self) -> list[Any]:
        return [p for b in next(self.inner) for p in self.goal.parts(b, 9, shared=self.shared)]


def judge(answers: Any) -> None:
    """Small tokens are good."""
    for a in answers:
        a.score = float(np.mean(np.array(a.ids) < tiny.V // 2))
        a.scores["small"] = a.score


def assembled(cell: Cell, place: Any) -> tuple[Any, Any, Any]:
    """(policy, objective, feed) of a combination. Raises Incompatible where it may not be."""
    method, objective, precision = cell
    torch.manual_seed(0)
    stored = plugin("precision", precision)()
    base = tiny.in_codes(FAMILY, precision=stored) if stored.packed else tiny.base(FAMILY)
    base.model.to(stored.dtype)
    goal: Any = matrix.settings_for(objective, FAMILY)
    if objective == "ppo":
        goal = {"kind": "ppo", "prompts": 6, "samples": 2, "max_new": 5, "epochs": 1, "minibatches": 2, "value_warmup": 0}
    sources = {"mix": {"sources": dict.fromkeys(matrix.parts_for(FAMILY), "made.jsonl")}} if objective == "multitask" else {}
    policy, made = build.assemble(Run(method=method, objective=goal, precision=stored, place=place, data=sources), base)
    place.put(policy)  # in a launch of several processes, assemble has put it on all of them
    how: dict[str, Any] = {"pad": 0, "packed": base.packs, "micro_tokens": MICRO, "epochs": 2.0}
    if objective == "ppo" and precision == "float32":
        sampling = Sampling(made.max_new, 1.0, (sampled.EOS,), 0, lambda ids: " ".join(map(str, ids)), None)
        return policy, made, Rollouts(sampled.prompts(ROWS), policy, made, judge, sampling, steps=None, seed=0, **how)
    feed = Batches(rows_for(objective), made.collate, batch_examples=A_STEP, rank=place.rank, size=place.size, **how)
    return policy, made, Answered(feed, policy, made) if objective in matrix.ANSWERED else feed


def trained(cell: Cell, place: Any) -> dict[str, Any]:
    """What a run of a combination comes to: its steps, and how large its weights are in the end; or the sentence with which it is refused."""
    try:
        policy, goal, feed = assembled(cell, place)
    except Incompatible as e:
        return {"refused": str(e)}
    lr = (2e-2 if policy.method.edits == "sequence" else 5e-3) * (1.0 if cell[2] == "float32" else SLOWER)
    optimizer = Optimizer(policy.trained(), lr=lr, patterns=policy.delta.optim)
    before = sum(place.traffic.values())
    steps = list(train(policy, goal, feed, optimizer, lr=lambda _: lr, steps=feed.steps, place=place))
    numbers = sum(p.numel() for p in policy.trained().values())
    return {
        "losses": [s.loss for s in steps],
        "norms": [s.grad_norm for s in steps],
        "counts": [[s.tokens, *s.units.values()] for s in steps],
        "metrics": [s.metrics for s in steps],
        "weights": [float(v.double().norm()) for v in optimizer.masters().values()],
        "numbers": numbers,
        "gradients": place.traffic["gradients"],
        "traffic": sum(place.traffic.values()) - before,
    }


def allowed(cell: Cell | list[str]) -> float:
    """How far apart losses may be. grpo's is the sum of likely answers of which as many are praised as blamed, so it is small beside its parts."""
    return 1e-5 if cell[1] == "grpo" else NEAR[cell[2]]


def apart(one: dict[str, Any], many: dict[str, Any]) -> tuple[float, str]:
    """(the largest relative difference of a step's loss, what else is not the same)."""
    if "refused" in one or "refused" in many:
        return 0.0, "" if one == many else "refused by one and not by the other"
    a, b = np.array(one["losses"]), np.array(many["losses"])
    if len(a) != len(b) or one["counts"] != many["counts"]:
        return float("inf"), f"steps count {one['counts']} and {many['counts']}"
    if [sorted(m) for m in one["metrics"]] != [sorted(m) for m in many["metrics"]]:
        return float("inf"), "other metrics"
    return float((np.abs(a - b) / np.maximum(np.abs(a), 0.1 * np.abs(a).max())).max()), ""


def work(which: list[Cell], out: Path) -> None:
    """One rank: all combinations on all ranks, and this rank's share of them alone; the first rank writes both, as JSON lines."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place: Any = plugin("place", "fsdp")(on="cpu", timeout=120)
    place.start()
    alone = plugin("place", "one")(on="cpu")
    began = time.perf_counter()
    mine = {i: trained(cell, alone) for i, cell in enumerate(which) if i % place.size == place.rank}
    one = {i: found for some in place.gather(mine) for i, found in some.items()}
    half = time.perf_counter()
    with out.open("a") as f:
        for i, cell in enumerate(which):
            many = trained(cell, place)
            if place.leads:
                f.write(json.dumps({"cell": cell, "one": one[i], "many": many}) + "\n")
    if place.leads:
        print(f"{len(which)} combinations: alone {half - began:.0f} s shared by {place.size}, together {time.perf_counter() - half:.0f} s", flush=True)


def run(size: int, which: list[Cell], timeout: float = 600) -> list[dict[str, Any]]:
    """One launch of so many ranks over combinations. Raises AssertionError where a rank fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.jsonl"
        (Path(folder) / "cells.json").write_text(json.dumps(which))
        started = launching.start(size, [str(Path(__file__)), "--work", folder])
        done = launching.finish(started, timeout)
        assert all(code == 0 for code, _, _ in done), "\n".join(f"rank {r}: {code}\n{said}{wrong[-3000:]}" for r, (code, said, wrong) in enumerate(done))
        print(done[0][1], end="", flush=True)
        return [json.loads(line) for line in out.read_text().splitlines()]


def main() -> int:
    """All combinations on 2 and 4 ranks, and what was found."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="how many processes, one launch each")
    ask.add_argument("--cover", action="store_true", help="only the combinations that the test suite runs")
    ask.add_argument("--methods", nargs="*", help="only these methods")
    ask.add_argument("--objectives", nargs="*", help="only these objectives")
    ask.add_argument("--precisions", nargs="*", default=list(NEAR), help="only these precisions")
    ask.add_argument("--elastic", action="store_true", help="instead: whole runs under torchrun in which a rank is killed, or stopped")
    ask.add_argument("--work", help=argparse.SUPPRESS)
    asked = ask.parse_args()
    if asked.work:
        work([tuple(c) for c in json.loads((Path(asked.work) / "cells.json").read_text())], Path(asked.work) / "found.jsonl")
        return 0
    if asked.elastic:
        os.environ["LUTHIER_LAUNCHES"] = "1"
        return int(pytest.main(["-v", str(Path(__file__).parent / "place" / "test_elastic.py")]))
    wrong = 0
    for size in asked.ranks:
        which = [c for c in (cover() if asked.cover else cells()) if c[2] in asked.precisions and (not asked.methods or c[0] in asked.methods)]
        which = [c for c in which if not asked.objectives or c[1] in asked.objectives]
        began = time.perf_counter()
        found = run(size, which)
        refused = sum("refused" in f["one"] for f in found)
        for precision, near in NEAR.items():
            told = [(apart(f["one"], f["many"]), f["cell"]) for f in found if f["cell"][2] == precision]
            worst = max(((d, c) for (d, _), c in told), default=(0.0, None))
            if told:
                most = f"largest difference of a loss {worst[0]:.1e} ({' x '.join(worst[1] or [])}), allowed {near:g}"
                print(f"{size} ranks, {precision}: {len(told)} combinations, {most}")
            for (difference, why), cell in told:
                if difference > allowed(cell) or why:
                    wrong += 1
                    print(f"  NOT THE SAME: {' x '.join(cell)}: {difference:.1e} {why}")
        print(f"{size} ranks: {len(found)} combinations, {refused} refused by design, {time.perf_counter() - began:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
