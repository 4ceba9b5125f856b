"""The contract matrix: every method x objective x precision x family is trained for some steps, or refused in a sentence.

``python -m tests.matrix`` (or ``make matrix``) runs it whole; the test suite runs a cover in which every pair of values meets. It grows by itself: kinds are
the files in methods/, objectives/ and precision/, families those of tiny.py.
"""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import ranked
import tiny
from luthier import build
from luthier.core import Incompatible, Row
from luthier.nn.corruption import Hiding
from luthier.optim import Optimizer
from luthier.settings.plugins import kinds, plugin
from luthier.settings.run import Run
from luthier.train import train

Cell = tuple[str, str, str, str]  # method, objective, precision, family
LABELS = ("bad", "fair", "good")
ANSWERED = ("ppo", "grpo")  # learn from answers of the model's own
PREFERENCES = {"reward": "ranked", "dpo": "pairs", "orpo": "pairs", "kto": "judged"}  # how their rows are rendered
STEPS = 6
SETTINGS: dict[str, dict[str, int]] = {"gptq": {"group": 8}}  # of a precision, for linears this small


def axes() -> list[list[str]]:
    """The values of each axis."""
    return [kinds("methods"), kinds("objectives"), kinds("precision"), list(tiny.MODELS)]


def rows_for(objective: str, family: str) -> list[Row]:
    """Four examples of the kind an objective trains on."""
    start = {"bart": 2}.get(family, 0)
    if objective in PREFERENCES:
        return ranked.rows(family, PREFERENCES[objective])
    if objective in ANSWERED:
        return [_answered(r, i) for i, r in enumerate(tiny.rows_for(family, 4))]
    if objective == "masked_text":
        hiding = Hiding(usual=np.arange(5, tiny.V), mask=3 if family in tiny.ENCODERS else None, sentinels=tuple(range(40, 48)), start=start, eos=2)
        return [replace(r, extras={"hiding": hiding}, train=np.ones(len(r), dtype=bool)) for r in tiny.rows(4)]
    if objective == "classify":
        out = []
        for i, r in enumerate(tiny.rows_for(family, 4)):
            extras = {"label": i % len(LABELS)} | {k: v for k, v in r.extras.items() if k == "source"}
            ids = np.array([start], dtype=np.int32) if family in tiny.SEQ2SEQ else r.ids
            out.append(Row(ids, np.ones(len(ids), dtype=bool), r.where, extras))
        return out
    if objective == "multitask":
        return [replace(r, task=name) for name, kind in parts_for(family).items() for r in rows_for(kind, family)]
    return tiny.rows_for(family, 4)


def parts_for(family: str) -> dict[str, str]:
    """What is mixed on a family: what it learns of its own language, labels, and where it can, what it is asked and what is preferred."""
    own = "masked_text" if family in tiny.ENCODERS else "sft"
    return {"own": own, "mood": "classify", "best": "reward"} | ({"text": "text"} if family not in (*tiny.ENCODERS, *tiny.SEQ2SEQ) else {})


def settings_for(objective: str, family: str) -> str | dict:
    """The objective as a run file says it."""
    labels = {"kind": "classify", "problem": "single", "labels": list(LABELS)}
    if objective == "multitask":
        return {"kind": objective, "parts": {n: labels if k == "classify" else k for n, k in parts_for(family).items()}}
    return labels if objective == "classify" else objective


def _answered(row: Row, i: int) -> Row:
    """As if it had been sampled, judged and read: half of the answers were good."""
    n = int(row.train[1:].sum())
    rng = np.random.default_rng(i)
    noisy = lambda about: (about + 0.1 * rng.normal(size=n)).astype(np.float32)  # noqa: E731
    tokens = {"old": noisy(-4.0), "reference": noisy(-4.0), "advantage": noisy(1.0 if i % 2 else -1.0), "returns": noisy(0.5), "value": noisy(0.4)}
    return replace(row, extras=dict(row.extras) | {"tokens": tokens | {"share": np.full(n, 1 / n, dtype=np.float32)}})


def run(cell: Cell) -> str:
    """ "trained", "chosen" (nothing to train: a prompt is chosen), or the sentence of a refusal. Raises AssertionError where a contract is broken."""
    method, objective, precision, family = cell
    torch.manual_seed(0)
    stored = plugin("precision", precision)(**SETTINGS.get(precision, {}))
    base = tiny.in_codes(family, precision=stored) if stored.packed else tiny.base(family)
    base.model.to(stored.dtype)
    sources = {"mix": {"sources": dict.fromkeys(parts_for(family), "made.jsonl")}} if objective == "multitask" else {}
    settings = settings_for(objective, family)
    try:
        policy, goal = build.assemble(Run(method=method, objective=settings, precision=stored, place={"kind": "one", "on": "cpu"}, data=sources), base)
    except Incompatible as e:
        assert len(str(e)) > 30 and "\n" not in str(e), e
        return f"refused: {e}"
    batch = goal.collate(rows_for(objective, family), pad=0, packed=base.packs)
    if not policy.delta.params:
        assert torch.isfinite(goal.loss(policy, batch).sums[next(iter(goal.terms))])
        return "chosen"
    mine = {id(p) for p in policy.trained().values()}
    frozen = {n: p.detach().clone() for n, p in policy.lm.named_parameters() if id(p) not in mine}

    parts = goal.parts(batch, 9, shared=method_shares(policy)) if objective in ANSWERED else [batch]

    class Same:
        def __next__(self):
            return parts

    lr = 2e-2 if policy.method.edits == "sequence" else 5e-3
    optimizer = Optimizer(policy.trained(), lr=lr, patterns=policy.delta.optim)
    losses = [s.loss for s in train(policy, goal, Same(), optimizer, lr=lambda _: lr, steps=STEPS, place=plugin("place", "one")(on="cpu"))]
    assert all(np.isfinite(losses)), (cell, losses)
    assert min(losses[1:]) < losses[0], (cell, losses)
    assert optimizer.seen == set(policy.trained()), (cell, "no gradient", sorted(set(policy.trained()) - optimizer.seen)[:3])
    after = dict(policy.lm.named_parameters())
    assert all(torch.equal(v, after[n]) for n, v in frozen.items()), (cell, "something outside the delta moved")
    return "trained"


def method_shares(policy) -> bool:
    """Whether the value reads the policy's own hidden states."""
    value = policy.voices.get("value")
    return value is not None and value.route == policy.name


def cover() -> list[Cell]:
    """Cells in which every pair of values of two axes meets, chosen greedily; always the same."""
    values = axes()
    pairs = {(i, a, j, b) for i, j in itertools.combinations(range(4), 2) for a in values[i] for b in values[j]}
    rng = np.random.default_rng(0)
    out: list[Cell] = []
    longest = sorted(range(4), key=lambda i: -len(values[i]))
    while pairs:
        i, a, j, b = min(pairs)
        best: Cell | None = None
        most = -1
        for _ in range(30):
            cell = [str(rng.choice(v)) for v in values]
            cell[i], cell[j] = a, b
            for k in longest:
                if k not in (i, j):
                    gains = {v: sum(_pair(k, v, m, cell[m]) in pairs for m in range(4) if m != k) for v in values[k]}
                    cell[k] = max(gains, key=lambda v: gains[v])
            gain = sum(_pair(k, cell[k], m, cell[m]) in pairs for k, m in itertools.combinations(range(4), 2))
            if gain > most:
                best, most = (cell[0], cell[1], cell[2], cell[3]), gain
        assert best is not None
        out.append(best)
        pairs -= {_pair(k, best[k], m, best[m]) for k, m in itertools.combinations(range(4), 2)}
    return out


def _pair(i: int, a: str, j: int, b: str) -> tuple[int, str, int, str]:
    return (i, a, j, b) if i < j else (j, b, i, a)


def main() -> int:
    """Run the whole matrix and print how many cells trained and how many were refused by design."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the models are tiny
    cells: list[Cell] = list(itertools.product(*axes()))  # type: ignore[arg-type]
    counts: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    broken: list[str] = []
    began = shown = time.perf_counter()
    for i, cell in enumerate(cells):
        try:
            said = run(cell)
        except Exception as e:
            said = f"broken: {type(e).__name__}: {e}"
            broken.append(f"{' x '.join(cell)}: {type(e).__name__}: {str(e)[:200]}")
        counts[said.split(":")[0]] += 1
        if said.startswith("refused"):
            refusals[said.removeprefix("refused: ")] += 1
        now = time.perf_counter()
        if now - shown > 15 or i + 1 == len(cells):
            shown = now
            left = (now - began) / (i + 1) * (len(cells) - i - 1)
            print(f"{i + 1} of {len(cells)}: {dict(counts)}, {left:.0f} s left", flush=True)
    print("refused by design:")
    for sentence, n in refusals.most_common():
        print(f"  {n} x {sentence}")
    for line in broken:
        print("BROKEN", line)
    print(" x ".join(str(len(v)) for v in axes()), "=", len(cells), "cells:", ", ".join(f"{n} {k}" for k, n in counts.most_common()))
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
