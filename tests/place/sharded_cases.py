"""What every rank of test_sharding.py does. Imported once, before the ranks are forked."""

from __future__ import annotations

import gc
import json
import os
import re
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from luthier import build, counts
from luthier.core import LuthierError
from luthier.devices.sharding import Sharding, sharding_of
from luthier.modelling import shards
from luthier.modelling.anatomy import numbers
from luthier.modelling.packed import packed
from luthier.optim import Optimizer
from luthier.place.fsdp import Place
from luthier.saving import adapter, checkpoint, sharded_model
from luthier.settings.plugins import plugin
from luthier.settings.run import Model, Run
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

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


def write(folder: Path) -> None:
    for family in FAMILIES:
        tiny.model(family).save_pretrained(folder / family)
    LlamaForCausalLM(LlamaConfig(**(tiny._COMMON | LARGE))).save_pretrained(folder / "large")


def run_of(folder: Path, family: str, method: str, precision: str, *, shard: str = "full", recompute: str = "none", **settings) -> Run:
    how = {"kernels": "torch", "resident": "no"} if precision == "nf4" else {}
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
    base = build.open_base(run)
    policy, objective = build.assemble(run, base)
    if run.method.edits != "weights":
        tiny.randomise(dict(policy.delta.params))
    optimizer = Optimizer(policy.trained(), lr=1e-2, weight_decay=0.1, patterns=policy.delta.optim)
    rows = tiny.rows_for(Path(run.model.id).name, ROWS)
    return policy, objective, optimizer, Same(objective, rows, run.place, base.packs)


def steps(run: Run, policy, objective, optimizer, feed, start: int = 0, stop: int = 3):
    how = {"lr": lambda _: 1e-2, "clip": 1.0, "place": run.place}
    return [[s.loss, s.grad_norm] for s in train(policy, objective, feed, optimizer, start=start, steps=stop, **how)]


# family, method, precision, settings
FEW = {
    **{f"{f} {m} float32": (f, m, "float32", {}) for f, m in [("llama", "lora"), ("gpt2", "dora"), ("llama", "prefix"), ("gpt2", "full")]},
    "llama partial float32": ("llama", "partial", "float32", {"matching": [".*proj.weight"]}),
    "llama full recomputed float32": ("llama", "full", "float32", {"recompute": "blocks"}),
    "t5 full float32": ("t5", "full", "float32", {}),
    "llama_tied full bfloat16": ("llama_tied", "full", "bfloat16", {}),
    "llama dora nf4": ("llama", "dora", "nf4", {}),
}
ON_FOUR = ("gpt2 full float32", "llama dora nf4")
METHODS = ("lora", "dora", "adapter", "prefix", "ia3", "full", "partial")
ALL = {
    f"{f} {m}{' recomputed' if r else ''} {p}": (f, m, p, {"recompute": "blocks"} if r else {})
    for f in FAMILIES
    for m in METHODS
    for p in ("float32", "bfloat16", "nf4")
    for r in ((False, True) if f == "llama" else (False,))
    if not (p == "nf4" and m in ("full", "partial"))
}


def equal(folder: Path, size: int) -> dict:
    """Losses and gradient norms of three steps by case: as it comes and, on two ranks, not sharded."""
    cases = json.loads((folder / "cases.json").read_text())
    out = {}
    for name, (family, method, precision, how) in cases.items():
        for shard in ("full", "none") if size == 2 else ("full",):
            if size == 4 and name not in ON_FOUR:
                continue
            run = run_of(folder, family, method, precision, shard=shard, **how)
            policy, objective, optimizer, feed = opened(run)
            assert policy.sharded == (size > 1 and shard == "full"), name
            stops = 3 if precision == "float32" else 1
            out[name if shard == "full" else f"{name}, replicated"] = steps(run, policy, objective, optimizer, feed, stop=stops)
    return out


# --- what a rank holds --------------------------------------------------------------------------------------------------


def held(folder: Path, size: int) -> dict:
    """Bytes of weights that this rank holds between steps, and what all of them are, by case."""
    if size == 4:
        return {}
    out = {}
    for name, how in {"frozen": ("llama", "lora", "float32"), "codes": ("llama", "lora", "nf4"), "trained": ("llama", "full", "bfloat16")}.items():
        run = run_of(folder, *how)
        policy, objective, optimizer, feed = opened(run)
        steps(run, policy, objective, optimizer, feed, stop=1)
        policy.rest()
        inside = [p for n, p in policy.lm.named_parameters() if ".layers." in n and "edits" not in n]
        everything = inside if name != "trained" else list(policy.lm.parameters())
        out[name] = {"here": shards.nbytes(everything), "all": sum(p.nbytes for p in everything), "kinds": sorted({str(p.dtype) for p in inside})}
        out[name]["numbers"] = [*counts.total(policy), numbers(policy.lm)]
        if name == "codes":
            out[name]["buffers"] = sum(b.numel() for _, m in packed(policy.lm) for b in m._buffers.values() if b is not None)
        if name == "trained":
            state = [t for s in optimizer.adam.state.values() for k, t in s.items() if k != "step"]
            out[name] |= {"moments": sum(t.nbytes for t in state), "gradients": sum(g.grad.nbytes for g in optimizer.groups)}
        if name == "frozen":
            out[name]["deltas whole"] = not any(map(shards.is_sharded, policy.delta.params.values()))
    return out


LARGE = {"num_hidden_layers": 16, "hidden_size": 192, "intermediate_size": 768}  # 35 MB in float32, a block 2.2


class Peak:
    """The most memory of its own that this process took while this lasted, in bytes; what it maps of files is not its own."""

    def __enter__(self):
        self.before, self.most, self.over = self.now(), 0, False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over = True
        self.thread.join()
        self.most = max(self.most, self.now())
        self.bytes = self.most - self.before

    def watch(self):
        while not self.over:
            self.most = max(self.most, self.now())
            time.sleep(0.0005)

    @staticmethod
    def now() -> int:
        said = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", said)[1]) * 1024


def loading(folder: Path, size: int) -> dict:
    """Bytes that opening a base of some tens of MB takes, probes included."""
    if size == 2 or not Path("/proc/self/status").exists():
        return {}
    if size == 1:  # that a whole model would be seen
        base = build.open_base(run_of(folder, "large", "lora", "float32"))
        with Peak() as peak:
            copied = [p.clone() for p in base.model.parameters()]
        return {"copied": peak.bytes, "whole": sum(t.nbytes for t in copied)}
    out = {}
    build.open_base(run_of(folder, "llama", "lora", "nf4"))  # what is imported at the first use is no part of it
    for method, precision in (("lora", "nf4"), ("full", "float32")):
        gc.collect()
        with Peak() as peak:
            base = build.open_base(run_of(folder, "large", method, precision))
            with torch.no_grad():
                for p in base.model.parameters():  # what was read of a file and not written to is still the file's
                    shards.here(p).add_(0)
        out[f"{method} {precision}"] = peak.bytes
        del base
    return out


def choices(folder: Path, size: int) -> dict:
    """What `shard: auto` makes of it, and what is refused."""
    if size != 2:
        return {}
    out = {}
    for name, how, place in (
        ("fits", ("llama", "lora", "float32"), {}),
        ("does not fit", ("llama", "lora", "float32"), {"memory": "0.0001GB"}),
        ("its codes fit", ("llama", "lora", "nf4"), {"memory": "0.0001GB"}),
        ("all trains", ("llama", "full", "float32"), {}),
        ("all trains beside a copy", ("llama", "full", "float32"), {}),
    ):
        run = run_of(folder, *how, shard="auto")
        run = replace(run, data=replace(run.data, replay=replace(run.data.replay, kl=0.1))) if "copy" in name else run
        base = build.open_base(replace(run, place=replace(run.place, **place)))
        out[name] = base.storage if sharding_of(base.model) is not None else "whole"
    for name, how, place in (
        ("offload", ("llama", "full", "float32"), {"offload": True}),
        ("hybrid", ("llama", "full", "float32"), {"shard": "hybrid"}),
        ("resident", ("llama", "lora", "nf4"), {}),
    ):
        run = run_of(folder, *how)
        try:
            run = replace(run, place=replace(run.place, **place))
            build.open_base(replace(run, precision=replace(run.precision, resident="yes")) if name == "resident" else run)
        except LuthierError as e:
            out[name] = str(e)
    return out


def offload(folder: Path, size: int) -> dict:
    """Parts kept apart from where they are computed, as on a CUDA device: what of it can be seen on a CPU."""
    if size == 4:
        return {}
    run = run_of(folder, "llama", "full", "float32")
    if size == 1:
        return {"steps": steps(run, *opened(run), stop=2)}
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("parts",))
    laid = Sharding(mesh, trains=True, compute=torch.float32, offload=True, place=run.place)
    base = build.load(run.model, precision=run.precision, trains_base=True, sharding=laid)
    policy, objective = build.assemble(run, base)
    optimizer = Optimizer(policy.trained(), lr=1e-2, weight_decay=0.1)
    return {"steps": steps(run, policy, objective, optimizer, Same(objective, tiny.rows_for("llama", ROWS), run.place, base.packs), stop=2)}


class Heard(TorchDispatchMode):
    """Bytes that this process hands to each kind of collective."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("c10d::"):
            kind = "weights" if "allgather_base" in name or "all_gather" in name else "gradients" if "reduce_scatter" in name else "sums"
            given = args[1] if kind != "sums" else args[0]
            self.bytes[kind] += sum(t.nbytes for t in (given if isinstance(given, list | tuple) else [given]))
        return func(*args, **(kwargs or {}))


def traffic(folder: Path, size: int) -> dict:
    """What torch was heard to send in one micro-batch, what the place counted, and what the formula says."""
    out = {}
    if size == 1:
        return {}
    for method, precision, reached in (("lora", "nf4", None), ("full", "bfloat16", None), ("partial", "float32", 1))[: 3 if size == 2 else 2]:
        run = run_of(folder, "llama", method, precision)
        policy, objective, _, feed = opened(run)
        batch, laid = next(feed)[0], sharding_of(policy.lm)
        policy.train(), policy.rest()
        before = Counter(run.place.traffic)
        with Heard() as heard:
            objective.loss(policy, batch).sums["tokens"].backward()
        counted = {k: run.place.traffic[k] - before[k] for k in ("weights", "gradients of weights")}
        said = laid.traffic(policy.lm, reached=reached)
        out[f"{method} {precision}"] = {"heard": [heard.bytes["weights"], heard.bytes["gradients"]], "counted": [*counted.values()], "said": [*said.values()]}
    return out


def hybrid(folder: Path, size: int) -> dict:
    """Two machines of two ranks each, as far as the launcher says."""
    if size == 2:
        return {}
    own = os.environ["LOCAL_WORLD_SIZE"]
    os.environ["LOCAL_WORLD_SIZE"] = str(min(size, 2))
    try:
        out = {}
        for method, precision in (("full", "float32"), ("lora", "nf4")):
            run = run_of(folder, "llama", method, precision, shard="hybrid")
            policy, *rest = opened(run)
            out[f"llama {method} {precision}"] = steps(run, policy, *rest, stop=2)
            if size == 1:
                continue
            out[f"parts {method}"] = list(sharding_of(policy.lm).part)
            p = next(p for p in policy.lm.parameters() if shards.is_sharded(p))
            out[f"held {method}"] = [shards.here(p).numel(), p.numel()]
        return out
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = own


# --- checkpoints --------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path, size: int) -> dict:
    """Train two steps, save, train two more; and go on from what other numbers of ranks saved."""
    run = run_of(folder, "gpt2", "full", "float32")
    policy, objective, optimizer, feed = opened(run)
    steps(run, policy, objective, optimizer, feed, stop=2)
    where = folder / f"saved by {size}"
    checkpoint.save(where, 2, policy, optimizer, feed, keep=1, facts={})
    checkpoint.keep_best(where, policy, optimizer)
    further = steps(run, policy, objective, optimizer, feed, start=2, stop=4)  # while it is being written
    checkpoint.settle()
    run.place.wait("a test")
    files = sorted(str(p.relative_to(where)) for p in where.rglob("*") if p.is_file())
    policy.eval()
    with torch.no_grad():
        objective.loss(policy, next(feed)[0])  # leaves the head's weight gathered
    checkpoint.take_best(where, policy, optimizer)
    out = {"further": further, "files": files, "best": steps(run, policy, objective, optimizer, feed, start=2, stop=3), "on": {}}
    for other in (1,) if size == 1 else (1, 2) if size == 2 else (2,):
        if (folder / f"saved by {other}").is_dir():
            policy, objective, optimizer, feed = opened(run)
            checkpoint.restore(checkpoint.newest(folder / f"saved by {other}"), policy, optimizer, feed)
            out["on"][str(other)] = steps(run, policy, objective, optimizer, feed, start=2, stop=4)
    return out


def made(folder: Path, size: int) -> dict:
    """The whole model as files, one of them or several, opened again and compared with what the ranks hold."""
    out = {}
    for family in ("gpt2", "llama_tied") if size == 2 else ("gpt2",):
        policy, *_ = opened(run_of(folder, family, "full", "bfloat16"))
        with torch.no_grad():
            for p in policy.trained().values():
                shards.here(p).add_(0.01)
        whole = folder / f"{family} made by {size}"
        adapter.save(policy, whole)
        several = folder / f"{family} in files by {size}"
        if sharding_of(policy.lm) is not None:
            several.mkdir(exist_ok=True)
            sharded_model.write(policy.lm, several, leads=policy.place.leads, file_bytes=10_000)
        policy.place.wait("the files")
        held = {k: shards.whole(p).to(torch.bfloat16) for k, p in policy.lm.named_parameters()}
        for path in (whole, several) if policy.place.leads and size > 1 else (whole,):
            again = build.load(Model(id=str(path)), precision=plugin("precision", "bfloat16")()).model
            there = dict(again.named_parameters())
            same = set(there) == set(held) and all(torch.equal(there[k], held[k]) for k in held)
            out[path.name] = [same, sorted(p.name for p in path.iterdir()), again.config.architectures, str(again.config.dtype)]
    return out


def answers(folder: Path, size: int) -> dict:
    """Greedy answers of a sharded base, with codes and with trained weights."""
    if size == 4:
        return {}
    out = {}
    for method, precision in (("lora", "nf4"), ("full", "float32")):
        policy, *_ = opened(run_of(folder, "llama", method, precision))
        out[f"{method} {precision}"] = policy.generate([[3, 4, 5], [6, 7, 8, 9]], max_new=6, temperature=0.0).ids
    return out


PARTS = (loading, choices, offload, equal, held, traffic, hybrid, checkpoints, made, answers)


def ranks(folder: Path, size: int, turn: int) -> dict:
    if turn == 3:  # one process once more, after the others
        run = run_of(folder, "gpt2", "full", "float32")
        policy, objective, optimizer, feed = opened(run)
        checkpoint.restore(checkpoint.newest(folder / "saved by 2"), policy, optimizer, feed)
        return {"on 2": steps(run, policy, objective, optimizer, feed, start=2, stop=4)}
    return {part.__name__: part(folder, size) for part in PARTS}
