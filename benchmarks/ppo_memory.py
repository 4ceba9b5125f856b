"""``python -m benchmarks.ppo_memory``: the peak memory of PPO, whose policy, reference, value and reward model share one base, beside supervised fine-tuning.

Two processes on a 109.5 M Llama shape with random weights, LoRA rank 8 on all linears, bfloat16, the same tokens in a micro-batch (2,048: 16 rows of 64 + 64);
the reward model is a delta with its head on the same base. Peak resident memory, less what the imports take.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .stored import SHAPE

ROWS, PROMPT, ANSWER = 16, 64, 64


def base(folder: Path) -> Path:
    """The shape, with fiddle's tokenizer and a vocabulary of its own size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.hub import FIDDLE

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=0, pad_token_id=1, bos_token_id=None)).to(torch.bfloat16).save_pretrained(folder)
    for file in [*FIDDLE.glob("tokenizer*"), *FIDDLE.glob("chat_template*")]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def one(what: str, home: Path) -> dict[str, Any]:
    """Peak bytes of a run of ``what`` ("sft", "reward", "ppo") above the imports."""
    from luthier.running.progress import Reporter
    from luthier.running.starting import execute
    from luthier.settings.config import load_run

    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shared = [f"model={home / 'base'}", "method={kind: lora, rank: 8, targets: [all]}", "precision=bfloat16", f"out={home}", f"name={what}"]
    fast = ["evaluate.samples=0", "evaluate.forgetting=no", "evaluate.best=no", "optim.micro_tokens=2048", "data.validation_rows=4"]
    goals = {
        "sft": ["objective=sft", f"data.train={home / 'text.jsonl'}", "optim.steps=4", "optim.batch_tokens=2048"],
        "reward": ["objective=reward", f"data.train={home / 'pairs.jsonl'}", "optim.steps=2", "optim.batch_examples=4"],
        "ppo": [
            f"objective={{kind: ppo, rewards: {{{home / 'reward'}: 1.0}}, check_rewards: no, max_new: {ANSWER}, prompts: {ROWS}, epochs: 1, minibatches: 1}}",
            "objective.stop_kl=0",
            f"data.train={home / 'prompts.jsonl'}",
            "optim.steps=4",
        ],
    }
    execute(load_run(None, [*shared, *fast, *goals[what]]), reporter=Reporter(quiet=True))
    return {"start": start * 1024, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def data(home: Path) -> None:
    """Random words: what is measured is memory."""
    import random

    rng = random.Random(0)
    words = lambda n: " ".join(rng.choice(("sea", "tree", "house", "the", "a", "old", "man", "went", "to", "and")) for _ in range(n))  # noqa: E731
    rows = range(8 * ROWS)
    (home / "text.jsonl").write_text("".join(json.dumps({"prompt": words(PROMPT - 12), "completion": words(ANSWER - 4)}) + "\n" for _ in rows))
    (home / "prompts.jsonl").write_text("".join(json.dumps({"prompt": words(PROMPT - 12)}) + "\n" for _ in rows))
    pair = lambda: {"prompt": words(8), "chosen": words(8), "rejected": words(9)}  # noqa: E731
    (home / "pairs.jsonl").write_text("".join(json.dumps(pair()) + "\n" for _ in range(40)))


def main() -> int:
    """Print both peaks and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], Path(args.one[1]))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        base(home / "base")
        data(home)
        found = {}
        for what in ("reward", "sft", "ppo"):
            done = subprocess.run([sys.executable, "-m", "benchmarks.ppo_memory", "--one", what, folder], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{what} failed:\n{done.stderr[-2000:]}")
            found[what] = json.loads(done.stdout.splitlines()[-1])
        above = {k: v["peak"] - v["start"] for k, v in found.items()}
        for what in ("sft", "ppo"):
            print(f"{what}: {above[what] / 1e6:,.0f} MB above the imports ({found[what]['peak'] / 1e6:,.0f} MB in all)")
        print(f"PPO takes {above['ppo'] / above['sft']:.2f} times what supervised fine-tuning takes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
