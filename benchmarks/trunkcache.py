"""What kept hidden states save where only the last two of twelve blocks train: a step of SFT on a Llama shape of 110 M, bf16 LoRA, with and without.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.trunkcache [--times 5]

One batch of packed rows of GSM8K's lengths, forward and backward, in one process; the bound is (L + m) / 2m of L blocks of which m train.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from luthier.core import Row
from luthier.methods.lora import Method as Lora
from luthier.modelling import trunkcache
from luthier.objectives.sft import Objective
from luthier.policy import Policy

from .sharing import policy_of
from .workload import Workload, examples

LAST = 2


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=5, help="steps of each way")
    asked = parser.parse_args()
    work = Workload("kept", ("all",))
    base = policy_of(work, attach=False).base
    method = Lora(targets=(rf"model\.layers\.({'|'.join(str(i) for i in range(work.layers - LAST, work.layers))})\..*_proj",), rank=work.rank)
    policy, objective = Policy(base, method.attach(base, "default"), method=method), Objective()
    made = examples(work)[0][0]
    rows = [Row(np.array(r["ids"], dtype=np.int32), np.arange(len(r["ids"])) >= r["answer"]) for r in made]
    batch = objective.collate(rows, pad=0, packed=True)
    with tempfile.TemporaryDirectory() as folder:
        cache = trunkcache.of(policy, objective, rows, how="on", ceiling=1e9, passes=asked.times, folder=Path(folder), say=print)
        found: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
        for i in range(asked.times + 2):
            for kept, steps in found.items():
                policy.trunk_cache = cache if kept else None
                policy.train()
                began, busy = time.perf_counter(), time.process_time()
                loss = objective.loss(policy, batch).sums["tokens"]
                loss.backward()
                steps += (
                    [(time.process_time() - busy, time.perf_counter() - began, loss.item())] if i > 1 else []
                )  # the first writes the states and makes kernels
    print(f"{work.parameters / 1e6:.0f} M parameters, {batch.tokens:,} tokens, {batch.units['tokens']:,} trained, {torch.get_num_threads()} thread(s)")
    for kept, steps in found.items():
        busy, wall = ([s[i] for s in steps] for i in (0, 1))
        said = f"processor: min {min(busy):5.2f} s, median {median(busy):5.2f} s    clock: min {min(wall):5.2f} s, median {median(wall):5.2f} s"
        print(f"  {'kept' if kept else 'whole':6} {said}    loss {steps[-1][2]:.6f}")
    gains = [f([s[0] for s in found[False]]) / f([s[0] for s in found[True]]) for f in (min, median)]
    print(f"  {gains[0]:.2f}x by the minimum, {gains[1]:.2f}x by the median; bound of the blocks {(work.layers + LAST) / (2 * LAST):.2f}x")


if __name__ == "__main__":
    main()
