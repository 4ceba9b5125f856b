"""``python -m benchmarks.stored``: what computing on codes costs beside bfloat16: a LoRA step, scoring, and decoding token by token.

One process, one shape (109.5 M parameters, 2,000 tokens), all ways of storing the base in turn, round after round, so that a slow moment of the machine
meets them all; the figure is the median over rounds of the time by bfloat16's in the same round. ``--write`` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier import build
from luthier.methods.lora import Method
from luthier.modelling.packed import packed
from luthier.objectives.sft import Objective
from luthier.policy import Policy
from luthier.quantising import quantised
from luthier.settings.plugins import plugin

from . import machine

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- begin: benchmarks.stored -->", "<!-- end: benchmarks.stored -->"
SHAPE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
ROWS, LENGTH, PROMPT = 16, 125, 60  # 2,000 tokens, about half of them labelled


def ways() -> dict[str, Any]:
    """How a base is stored, by the name of its row."""
    out: dict[str, Any] = {"bfloat16": plugin("precision", "bfloat16")()}
    for kind in ("int8", "nf4", "gptq"):
        kernels = [{"kernels": "torch"}] + ([{"kernels": "bitsandbytes"}] if find_spec("bitsandbytes") else []) if kind == "nf4" else [{}]
        for how in kernels:
            for resident in ("no", "yes") if how in ({}, {"kernels": "torch"}) else ("no",):
                said = ", ".join([*how.values(), *(["values in memory"] if resident == "yes" else [])])
                out[kind + (f" ({said})" if said else "")] = plugin("precision", kind)(resident=resident, **how)
    return out


def policy_on(precision: Any) -> Policy:
    """The shape with random weights, stored this way, with LoRA on all linears."""
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    if precision.packed:
        quantised.pack(lm, precision)
        quantised.settle(lm, precision)
    base = build.adopt(lm, source="shape")
    method = Method(rank=8, alpha=16.0, targets=("all",))
    return Policy(base, method.attach(base, "default"), method=method)


def batch_of(packs: bool) -> Any:
    """16 examples of 125 tokens whose last 65 are labelled."""
    import numpy as np

    from luthier.core import Row

    rng = np.random.default_rng(0)
    rows = [Row(rng.integers(3, SHAPE["vocab_size"], LENGTH).astype(np.int32), np.arange(LENGTH) >= PROMPT) for _ in range(ROWS)]
    return Objective().collate(rows, pad=0, packed=packs)


def measures() -> dict[str, Callable[[Policy], None]]:
    """What is timed."""

    def step(policy: Policy) -> None:
        policy.train()
        batch = batch_of(policy.base.packs)
        (Objective().loss(policy, batch).sums["tokens"] / batch.units["tokens"]).backward()
        for p in policy.trained().values():
            p.grad = None

    @torch.no_grad()
    def scoring(policy: Policy) -> None:
        policy.eval()
        Objective().loss(policy, batch_of(policy.base.packs))

    def decoding(policy: Policy) -> None:
        policy.generate([[5, 6, 7, 8]], max_new=8, stop=set())

    return {"LoRA step": step, "scoring": scoring, "one token": decoding}


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and with --write keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stored", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="times every way is measured in turn, after one that does not count (default 7)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--idle-timeout", type=float, default=120.0, metavar="S", help="how long to wait for an idle CPU (default 120)")
    a = parser.parse_args(argv)
    noise = machine.wait_idle(a.idle_timeout)
    kinds = ways()
    policies = {name: policy_on(p) for name, p in kinds.items()}
    times: dict[str, dict[str, list[float]]] = {what: {name: [] for name in kinds} for what in measures()}
    for r in range(a.rounds + 1):
        for what, run in measures().items():
            for name, policy in policies.items():
                gc.collect()
                began = time.perf_counter()
                run(policy)
                took = (time.perf_counter() - began) / (8 if what == "one token" else 1)
                if r:
                    times[what][name].append(took)
        print(f"round {r} of {a.rounds}", file=sys.stderr, flush=True)
    text = table(times, policies, noise)
    print(text)
    if a.write:
        page = PAGE.read_text()
        if BEGIN not in page:
            page = page.rstrip() + f"\n\n## Bases in codes\n\n{BEGIN}\n{END}\n"
        head, tail = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(head + BEGIN + "\n\n" + text + "\n" + END + tail)
    return 0


def table(times: dict[str, dict[str, list[float]]], policies: dict[str, Policy], noise: str | None) -> str:
    """Times of bfloat16 and every other way's ratio to it: median over rounds, the least and the largest behind."""
    m = machine.describe()
    lines = [
        f"`python -m benchmarks.stored`: {SHAPE['hidden_size']} wide, {SHAPE['num_hidden_layers']} layers, {ROWS * LENGTH:,} tokens, LoRA rank 8 on all "
        f"linears; {m.get('cpu', '')}, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}. Seconds of bfloat16, and "
        "times by them: median over rounds [least, largest].",
        "",
        f"| base | bytes of its blocks' linears | {' | '.join(times)} |",
        "|---|---|" + "---|" * len(times),
    ]
    for name, policy in policies.items():
        codes = sum(t.nbytes for _, p in packed(policy.lm) for t in p.stored().values())
        size = codes or sum(p.numel() * 2 for n, p in policy.lm.named_parameters() if "layers" in n and p.ndim == 2 and "lora" not in n)
        cells = []
        for by_name in times.values():
            ratios = [x / y for x, y in zip(by_name[name], by_name["bfloat16"], strict=True)]
            plain = f"{statistics.median(by_name[name]):.3f} s, least {min(by_name[name]):.3f}"
            cells.append(plain if name == "bfloat16" else f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
        lines.append(f"| {name} | {size / 1e6:.1f} MB | {' | '.join(cells)} |")
    if noise:
        lines += ["", f"The machine was not idle: {noise}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
