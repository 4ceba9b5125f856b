"""What every rank of test_sharding.py does. Imported once, before the ranks are forked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import tiny
from luthier import build
from luthier.optim import Optimizer
from luthier.place.fsdp import Place
from luthier.plugins import plugin
from luthier.run import Model, Run
from luthier.train import train

FAMILIES = ("llama", "llama_tied", "gpt2", "t5")
ROWS = 8


class Same:
    """The same rows at every step, dealt out to the ranks in micro-batches of two."""

    def __init__(self, objective, rows, place, packed):
        self.objective, self.packed = objective, packed
        own = rows[place.rank :: place.size]
        self.some = [own[i : i + 2] for i in range(0, len(own), 2)]

    def __next__(self):
        return [self.objective.collate(some, pad=0, packed=self.packed) for some in self.some]


def write(folder: Path) -> None:
    for family in FAMILIES:
        if not (folder / family).is_dir():
            tiny.model(family).save_pretrained(folder / family)


def run_of(folder: Path, family: str, method: str, precision: str, *, shard: str = "full", recompute: str = "none", **settings) -> Run:
    how = {"kernels": "torch"} if precision == "nf4" else {}
    return Run(
        model=Model(id=str(folder / family)),
        method=plugin("methods", method)(**settings),
        objective=plugin("objectives", "sft")(),
        precision=plugin("precision", precision)(**how),
        place=Place(on="cpu", shard=shard, timeout=60),
        recompute=recompute,
    )


def opened(run: Run):
    """(policy, objective, optimizer, feed), ready for the loop."""
    run = replace(run, precision=replace(run.precision, resident="no")) if run.precision.packed else run
    base = build.open_base(run)
    policy, objective = build.assemble(run, base)
    own = {k: p for k, p in policy.delta.params.items()} if run.method.edits != "weights" else {}
    tiny.randomise(own)
    optimizer = Optimizer(policy.trained(), lr=1e-2, weight_decay=0.1, patterns=policy.delta.optim)
    family = Path(run.model.id).name
    return policy, objective, optimizer, Same(objective, tiny.rows_for(family, ROWS), run.place, base.packs)


def trained(run: Run, steps: int = 3):
    policy, objective, optimizer, feed = opened(run)
    done = list(train(policy, objective, feed, optimizer, lr=lambda _: 1e-2, steps=steps, clip=1.0, place=run.place))
    return policy, optimizer, [[s.loss, s.grad_norm] for s in done]


CASES = {
    "llama lora float32": ("llama", "lora", "float32", {}),
    "llama full float32": ("llama", "full", "float32", {}),
    "llama full bfloat16": ("llama", "full", "bfloat16", {}),
    "gpt2 full float32": ("gpt2", "full", "float32", {}),
    "llama lora nf4": ("llama", "lora", "nf4", {}),
}


def ranks(folder: Path, size: int) -> dict:
    out = {}
    for name, (family, method, precision, how) in CASES.items():
        out[name] = trained(run_of(folder, family, method, precision, **how))[2]
    return out
