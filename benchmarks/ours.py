"""This program's own columns: a Run as a user's file would say it, assembled and trained by the functions `luthier train` calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .examples import Row, counts
from .gradients import Sink
from .meter import Meter
from .workload import Workload

OURS = "ours"
HEAD = {"heads.label.dense": "head:dense", "heads.label.out": "head:out"}


def settings(work: Workload) -> dict[str, Any]:
    """The run as data: what a run file would hold. All else is this program's default."""
    method: dict[str, Any] = {"kind": work.method}
    if work.method == "lora":
        method |= {"rank": work.rank, "alpha": work.alpha, "targets": list(work.targets)}
    if work.method == "prefix":
        method |= {"length": work.length, "init": "random"}
    objective: dict[str, Any] = {"kind": work.kind}
    if work.kind == "classify":
        objective |= {"problem": "single", "labels": [str(i) for i in range(work.labels)]}
    if work.kind == "dpo":
        objective |= {"beta": work.beta}
    optim = {"lr": work.lr, "steps": work.steps, "batch_examples": work.examples, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}
    return {
        "method": method,
        "objective": objective,
        "precision": {"kind": "nf4", "double": True} if work.precision == "nf4" else work.precision,
        "place": {"kind": "one", "on": "cpu", "threads": work.threads},
        "optim": optim,
        "seed": work.seed,
    }


def columns(work: Workload) -> dict[str, dict[str, Any]]:
    """Settings by column: ours, and where a peer refuses something that runs here, that as well."""
    out = {OURS: settings(work)}
    if work.method == "prefix":
        out["ours, blocks recomputed"] = settings(work) | {"recompute": "blocks"}
    return out


def assembled(work: Workload, folder: Path, run: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(the Run, the policy, the objective), the trained tensors as the workload starts them."""
    import torch
    from safetensors.torch import load_file

    from luthier import build
    from luthier.settings import config

    asked = config.load_run({"model": {"id": str(folder / "model"), "cache": "no"}, **run})
    policy, objective = build.assemble(asked)
    start = load_file(folder / "start.safetensors")
    trained = named(policy)
    if work.method != "full":
        if set(start) != set(trained):
            raise ValueError(f"the trained tensors are not those of the workload: {sorted(set(start) ^ set(trained))[:3]}")
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(start[name])
    return build.resolve(asked)[0], policy, objective


def named(policy: Any) -> dict[str, Any]:
    """What is trained, under the workload's names."""
    out = {}
    for name, p in policy.trained().items():
        module, _, leaf = name.rpartition(".")
        out[f"{HEAD[module]}.{leaf}" if module in HEAD else name] = p
    return out


def rows_of(steps: Sequence[Sequence[Row]]) -> list[Any]:
    """The workload's rows as this program reads them."""
    import numpy as np

    from luthier.core import Row as OurRow
    from luthier.core import join

    def one(ids: list[int], answer: int, **extras: Any) -> Any:
        return OurRow(np.asarray(ids, dtype=np.int32), np.arange(len(ids)) >= answer, "", extras)

    out = []
    for r in (r for rows in steps for r in rows):
        if "prompt" in r:
            pair = [one(r["prompt"] + r[a], len(r["prompt"])) for a in ("chosen", "rejected")]
            out.append(join(pair, ranks=(0, 1), margin=0.0, good=None))
        elif "label" in r:
            out.append(one(r["ids"], 0, label=r["label"]))
        else:
            out.append(one(r["ids"], r["answer"]))
    return out


def fed(work: Workload, folder: Path, asked: Any, policy: Any, objective: Any, steps: Sequence[Sequence[Row]], meter: Meter) -> Any:
    """The micro-batches of the steps in the workload's order, the reference's log-probabilities with them where the objective wants those."""
    import numpy as np

    from luthier import reading, references
    from luthier.data.prepare import Prepared

    flat = rows_of(steps)
    # The feed shuffles: laid out by its own permutation, the rows come out in the workload's order. The driver checks every step's counts.
    order = np.random.default_rng([work.seed, 0]).permutation(len(flat))
    shuffled: list[Any] = [None] * len(flat)
    for row, at in zip(flat, order, strict=True):
        shuffled[at] = row
    prepared, packed = Prepared(shuffled, [], []), policy.base.packs and asked.data.pack != "no"
    with meter.reference():
        references.bring(policy, objective, prepared, folder=folder / "references", tokens=asked.optim.micro_tokens, packed=packed)
    return reading.batches_of(asked, prepared, objective, pad=0, packed=packed)


def run(work: Workload, folder: Path, steps: list[list[Row]], settings: dict[str, Any], meter: Meter, sink: Sink | None) -> None:
    """Train, marking every step; the gradients of step 1, before clipping, go into ``sink``.

    Of the settings, "deltas" is the harness' own: so many lie on the base, of which the first is trained.
    """
    import shutil

    import numpy  # noqa: F401
    import torch

    from luthier import build, reading, references  # noqa: F401
    from luthier.optim import Optimizer
    from luthier.train import train

    meter.imported()
    others = range(1, settings.get("deltas", 1))
    asked, policy, objective = assembled(work, folder, {k: v for k, v in settings.items() if k != "deltas"})
    for i in others:
        policy.add(f"other-{i}", asked.method.attach(policy.base, f"other-{i}"))
    o = asked.optim
    trained = policy.trained()
    optimizer = Optimizer(trained, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, patterns=policy.delta.optim)
    shutil.rmtree(folder / "references", ignore_errors=True)
    feed = fed(work, folder, asked, policy, objective, steps, meter)
    norm, left = optimizer.grad_norm, [sink]

    def watched() -> torch.Tensor:
        """The norm, and at its first call what it is taken over is written down."""
        if (keep := left.pop() if left else None) is not None:
            with meter.aside():
                ours = {id(p): n for n, p in named(policy).items()}
                for group in optimizer.groups:
                    for p, s in zip(group.params, group.slices, strict=True):
                        keep.add(ours[id(p)], group.grad[s])
        return norm()

    optimizer.grad_norm = watched  # type: ignore[method-assign]
    count = iter(counts(steps))
    meter.ready()
    for done in train(policy, objective, feed, optimizer, lr=lambda _: o.lr, steps=o.steps, clip=o.clip, place=asked.place):
        tokens, labelled = next(count)
        if work.kind != "dpo":
            tokens, labelled = done.tokens, next(iter(done.units.values()))
        elif done.units != {"rankings": work.examples}:
            raise ValueError(f"a step saw {done.units}, where the workload has {work.examples} pairs")
        meter.step(done.loss, tokens, labelled, done.tokens)
