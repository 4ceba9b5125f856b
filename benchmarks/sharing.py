"""What prompts that are computed once save: a step of DPO (two answers) and of GRPO (eight) on a Llama shape of 110 M, bf16 LoRA, shared and whole in turn.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.sharing [--times 5] [--answer 96]

Both ways take the same batch in one process, one after the other, forward and backward, so that what else the machine does meets both; on a busy machine
the time of the processor says more than the clock's. Memory is the peak of a step in a process of its own, less what that took before it. Nothing here
reads data: token ids are random, prompts are three times as long as answers.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier import build
from luthier.core import Batch, Row, join
from luthier.methods.lora import Method as Lora
from luthier.objectives.dpo import Objective as Dpo
from luthier.objectives.grpo import Objective as Grpo
from luthier.policy import Policy

from .workload import Workload

PROMPT = 3  # times the answer


def policy_of(work: Workload, *, attach: bool = True) -> Policy:
    """The shape with random weights in bf16 and, where it is to be attached, a LoRA on all linears."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=work.ff,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    base = build.adopt(LlamaForCausalLM(config).to(torch.bfloat16))
    if not attach:
        return Policy(base)
    method = Lora(targets=("all",), rank=work.rank)
    return Policy(base, method.attach(base, "default"), method=method)


def rows_of(work: Workload, prompts: int, answers: int, answer: int) -> list[list[Row]]:
    """So many answers to each prompt, of lengths within a third of ``answer``."""
    rng = np.random.default_rng(work.seed)
    some = lambda n: rng.integers(3, work.vocabulary, n).astype(np.int32)  # noqa: E731
    out = []
    for _ in range(prompts):
        lengths = rng.integers(2 * answer // 3, 4 * answer // 3, answers).tolist()
        prompt = some(PROMPT * sum(lengths) // answers)
        out.append([Row(np.concatenate([prompt, some(n)]), np.arange(len(prompt) + n) >= len(prompt)) for n in lengths])
    return out


def dpo(work: Workload, answer: int) -> tuple[Any, Batch]:
    """Four pairs."""
    objective = Dpo()
    rows = [join(pair, ranks=(0, 1), reference=np.zeros(2, dtype=np.float32)) for pair in rows_of(work, 4, 2, answer)]
    return objective, objective.collate(rows, pad=0, packed=True)


def grpo(work: Workload, answer: int) -> tuple[Any, Batch]:
    """A group of eight."""
    objective, rows = Grpo(rewards={"made": 1.0}), []
    for group in rows_of(work, 1, 8, answer):
        for r in group:
            n = int(r.train.sum())
            tokens = {"old": np.full(n, -10.0), "reference": np.full(n, -10.0), "advantage": np.ones(n), "share": np.full(n, 1 / n)}
            rows.append(Row(r.ids, r.train, "", {"tokens": {k: v.astype(np.float32) for k, v in tokens.items()}}))
    return objective, objective.collate(rows, pad=0, packed=True)


def step(policy: Policy, objective: Any, batch: Batch, how: str) -> tuple[float, float, float, torch.Tensor]:
    """Seconds, and seconds of the processor, of a forward and a backward; the loss and the gradients."""
    policy.share_prompts = how  # type: ignore[assignment]
    for p in policy.trained().values():
        p.grad = None
    policy.train()
    began, busy = time.perf_counter(), time.process_time()
    loss = objective.loss(policy, batch)
    sum(loss.sums.values()).backward()  # type: ignore[union-attr]
    took = time.perf_counter() - began, time.process_time() - busy
    grads = torch.cat([p.grad.flatten().float() for p in policy.trained().values() if p.grad is not None])
    return *took, sum(v.item() for v in loss.sums.values()), grads


def timed(work: Workload, name: str, answer: int, times: int) -> None:
    """Print the steps of both ways."""
    policy, (objective, batch) = policy_of(work), BATCHES[name](work, answer)
    saved = sum((g.examples - 1) * g.tokens for g in batch.segments.alike)
    found: dict[str, list[tuple[float, float, float, torch.Tensor]]] = {"off": [], "on": []}
    for i in range(times + 1):
        for how, steps in found.items():
            one = step(policy, objective, batch, how)
            steps += [one] if i else []  # the first makes the kernels
    cosine = torch.cosine_similarity(found["on"][0][3].double(), found["off"][0][3].double(), 0)
    print(f"{name}: {batch.tokens:,} tokens, {batch.tokens - saved:,} computed when shared (bound {batch.tokens / (batch.tokens - saved):.2f}x)")
    for how, steps in found.items():
        wall, busy = ([s[i] for s in steps] for i in (0, 1))
        said = f"processor: min {min(busy):6.2f} s, median {median(busy):6.2f} s    clock: min {min(wall):6.2f} s, median {median(wall):6.2f} s"
        print(f"  {'shared' if how == 'on' else 'whole ':6}  {said}")
    gains = [f([s[i] for s in found["off"]]) / f([s[i] for s in found["on"]]) for i in (1, 0) for f in (min, median)]
    print(f"  gain    processor: {gains[0]:.2f}x by the minimum, {gains[1]:.2f}x by the median    clock: {gains[2]:.2f}x, {gains[3]:.2f}x")
    print(f"  loss {found['on'][0][2]:.5f} shared, {found['off'][0][2]:.5f} whole; cosine of the gradients {cosine:.6f}", flush=True)


def memory(work: Workload, name: str, answer: int, how: str) -> None:
    """Print what a step takes at most, above what the process took before it."""
    known = lambda key: int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]  # noqa: E731
    policy, (objective, batch) = policy_of(work), BATCHES[name](work, answer)
    before = known("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    step(policy, objective, batch, how)
    print(known("VmHWM") - before)


BATCHES = {"DPO, 4 pairs": dpo, "GRPO, 8 answers": grpo}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=5, help="steps of each way")
    parser.add_argument("--answer", type=int, default=96, help="mean tokens of an answer")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model")
    parser.add_argument("--only", choices=BATCHES, help="one of the two")
    parser.add_argument("--memory", choices=["on", "off"], help="the peak of one step, in a process of its own")
    asked = parser.parse_args()
    work = Workload("sharing", ("all",), layers=asked.layers)
    if asked.memory:
        return memory(work, asked.only, asked.answer, asked.memory)
    print(f"{work.parameters / 1e6:.0f} M parameters, bf16, LoRA rank {work.rank} on all linears, {torch.get_num_threads()} thread(s)")
    for name in [asked.only] if asked.only else BATCHES:
        timed(work, name, asked.answer, asked.times)
        command = [sys.executable, "-m", "benchmarks.sharing", "--only", name, "--answer", str(asked.answer), "--layers", str(asked.layers), "--memory"]
        # The threshold lets glibc give back what is freed, so that the peak of the process is the peak of its tensors.
        peaks = [int(subprocess.check_output([*command, how], env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"})) for how in ("off", "on")]
        print(f"  peak memory of a step: {peaks[0] / 1e6:,.0f} MB whole, {peaks[1] / 1e6:,.0f} MB shared ({peaks[0] / peaks[1]:.2f}x)", flush=True)


if __name__ == "__main__":
    main()
