"""What every rank of test_scale.py does: steps of small models over ranks, their live tensors watched and their traffic counted."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from live import Live
from luthier import build
from luthier.modelling.context import sharing
from luthier.optim import Optimizer
from luthier.place.fsdp import Place
from luthier.planning.microbatch import made_up, shape_of
from luthier.settings.plugins import plugin
from luthier.settings.run import Data, Model, Optim, Run
from luthier.train import train

MICRO = 2  # micro-batches of a rank in a step

# name: method, precision, shard, ranks that share a sequence, recompute
CASES = {
    "lora full": ("lora", "float32", "full", 1, "none"),
    "lora full nf4": ("lora", "nf4", "full", 1, "none"),
    "full none": ("full", "bfloat16", "none", 1, "blocks"),
    "full full": ("full", "bfloat16", "full", 1, "blocks"),
    "full full shared": ("full", "float32", "full", 2, "none"),
}


def write(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=352, max_position_embeddings=512
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder / "model"


def run_of(folder: Path, name: str, size: int) -> Run:
    method, precision, shard, context, recompute = CASES[name]
    how = {"kernels": "torch", "resident": "no"} if precision == "nf4" else {}
    tokens = 256
    return Run(
        model=Model(id=str(folder / "model")),
        data=Data(max_tokens=128),
        method=plugin("methods", method)(),
        objective=plugin("objectives", "text")(),
        precision=plugin("precision", precision)(**how),
        place=Place(on="cpu", shard=shard, context=context, timeout=60),
        optim=Optim(micro_tokens=tokens, batch_tokens=tokens * MICRO * size // context),
        recompute=recompute,
    )


class Same:
    """The planner's own micro-batch, again and again."""

    def __init__(self, run, base, objective):
        self.run, self.base, self.objective = run, base, sharing(objective, run.place.sequence)

    def __next__(self):
        return [made_up(shape_of(self.run, self.base), self.base, self.objective) for _ in range(MICRO)]


def watched(folder: Path, name: str, size: int) -> dict:
    run = run_of(folder, name, size)
    run.place.start()
    base = build.open_base(run)
    policy, objective = build.assemble(run, base)
    optimizer = Optimizer(policy.trained(), lr=1e-3)
    steps = train(policy, objective, Same(run, base, objective), optimizer, lr=lambda _: 1e-3, steps=2, clip=1.0, place=run.place)
    next(steps)
    gc.collect()
    before = dict(run.place.traffic)
    with Live() as live:
        next(steps)
    traffic = {k: n - before.get(k, 0) for k, n in run.place.traffic.items() if n != before.get(k, 0)}
    return {"standing": live.start, "peak": live.peak, "traffic": traffic}


def ranks(folder: Path, size: int, turn: int) -> dict:
    out = {}
    for name in CASES:
        out[name] = watched(folder, name, size)
        gc.collect()
    return out
