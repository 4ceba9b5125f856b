"""This program's own column: the parts `luthier train` assembles, with its defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .meter import Meter
from .workload import Workload

ROLES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
SETTINGS = {
    "precision": "bfloat16",
    "adapters": "fp32, computed in bfloat16",
    "pack": True,
    "micro_tokens": 8192,
    "recompute": "none",
    "clip": 1.0,
}


def run(work: Workload, folder: Path, steps: list[list[dict[str, Any]]], settings: dict[str, Any], meter: Meter, keep_grads: bool) -> dict[str, Any]:
    """Train; returns the adapter gradients of step 1 by "path:leaf" where asked for."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from luthier import build
    from luthier.core import Row
    from luthier.data.feed import Batches
    from luthier.methods.lora import Method
    from luthier.objectives.sft import Objective
    from luthier.optim import Optimizer
    from luthier.place.one import Place
    from luthier.policy import Policy
    from luthier.precision.bfloat16 import Precision
    from luthier.train import train

    meter.imported()
    place = Place(on="cpu", threads=work.threads)
    base = build.load(str(folder / "model"), precision=Precision(), device="cpu")
    method = Method(rank=work.rank, alpha=work.alpha, targets=tuple(ROLES[t] for t in work.targets))
    policy, objective = Policy(base, method.attach(base, "default"), method=method), Objective()
    start = load_file(folder / "adapter.safetensors")
    trained = policy.trained()
    if set(start) != set(trained):
        raise ValueError(f"the adapter's tensors are not those of the workload: {sorted(set(start) ^ set(trained))[:3]}")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(start[name])
    place.put(policy)
    optimizer = Optimizer(trained, lr=work.lr)
    taken: dict[str, torch.Tensor] = {}
    norm = optimizer.grad_norm

    def watched() -> torch.Tensor:
        """The norm, and at its first call, before clipping, a copy of what it is taken over."""
        if keep_grads and not taken:
            taken.update({n: p.grad.clone() for n, p in trained.items() if p.grad is not None})
        return norm()

    optimizer.grad_norm = watched  # type: ignore[method-assign]
    flat = [Row(np.asarray(r["ids"], dtype=np.int32), np.arange(len(r["ids"])) >= r["answer"]) for rows in steps for r in rows]
    # The feed shuffles: laid out by its own permutation, the rows come out in the workload's order. The driver checks every step's counts.
    order = np.random.default_rng([work.seed, 0]).permutation(len(flat))
    shuffled: list[Any] = [None] * len(flat)
    for row, at in zip(flat, order, strict=True):
        shuffled[at] = row
    feed = Batches(
        shuffled,
        objective.collate,
        pad=0,
        packed=base.packs,
        batch_examples=work.examples,
        micro_tokens=settings["micro_tokens"],
        steps=work.steps,
        seed=work.seed,
    )
    meter.ready()
    for done in train(policy, objective, feed, optimizer, lr=lambda _: work.lr, steps=work.steps, clip=settings["clip"], place=place):
        meter.step(done.loss, done.tokens, done.units["tokens"], done.tokens)
    return taken
