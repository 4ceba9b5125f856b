"""``python -m benchmarks.difficulty``: what drawing challenging rows more often does to easy and to hard held-out rows. Prints a table.

fiddle with LoRA on restaurant data to text (E2E): the first 2,000 rows, 60 steps of 2,048 tokens, with and without ``data.sample: {by: difficulty, hard: H}``.
The same held-out rows of E2E's own development set are scored before and after, and split by the base's loss on them: its hardest fifth, and the rest. About
two minutes of one idle core. Needs LUTHIER_DATA.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

SHARES = (None, 0.3, 0.6)
ROWS, HELD, STEPS, BATCH = 2000, 300, 60, 2048


def main(argv: list[str] | None = None) -> int:
    """One run a share, and a line of the table each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.difficulty", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    a = parser.parse_args(argv)
    if "LUTHIER_DATA" not in os.environ:
        parser.error("LUTHIER_DATA does not name the folder of real data (with data/e2e in it)")
    from luthier import opening
    from luthier.forgetting.difficulty import losses
    from luthier.measuring.measure import group
    from luthier.reading import form_of, read_data
    from luthier.references import logps
    from luthier.running.progress import Reporter
    from luthier.running.starting import execute
    from luthier.settings.run import Checkpoint, Data, Evaluate, Optim, Run, Sample

    e2e = Path(os.environ["LUTHIER_DATA"]) / "data" / "e2e"
    with tempfile.TemporaryDirectory() as folder:

        def run_of(hard: float | None) -> Run:
            return Run(
                data=Data(
                    train=(str(e2e / "train.jsonl"),),
                    validation=(str(e2e / "dev.jsonl"),),
                    validation_rows=HELD,
                    limit=ROWS,
                    sample=Sample(by=None if hard is None else "difficulty", hard=hard),
                ),
                precision="bfloat16",
                optim=Optim(steps=STEPS, batch_tokens=BATCH, micro_tokens=BATCH),
                evaluate=Evaluate(every_steps=STEPS, samples=0, best=False, forgetting=False),
                checkpoint=Checkpoint(every_steps=STEPS, keep=1),
                seed=a.seed,
                name=f"hard-{hard}",
                out=folder,
            )

        policy = opening.load("fiddle", precision="bfloat16")
        held = read_data(run_of(None), policy.base.tokenizer, positions=policy.limit, say=lambda _: None, form=form_of(policy.base)).validation
        before = losses(run_of(None), policy, held, packed=True)
        hardest = before >= np.quantile(before, 0.8)
        tokens = np.array([int(r.train[1:].sum()) for r in held])
        mean = lambda loss, mask: float((loss * tokens)[mask].sum() / tokens[mask].sum())  # noqa: E731
        print(f"{len(held)} held-out rows in {len(group(held, BATCH, True))} batches; nats a token", flush=True)
        print(f"{'drawn from the hardest fifth':<30}{'all':>9}{'hardest fifth':>15}{'others':>9}")
        show = lambda name, loss: print(f"{name:<30}{mean(loss, tokens > 0):>9.4f}{mean(loss, hardest):>15.4f}{mean(loss, ~hardest):>9.4f}", flush=True)  # noqa: E731
        show("(before training)", before)
        for hard in SHARES:
            result = execute(run_of(hard), reporter=Reporter(quiet=True))
            tuned = opening.load(result.artefact, precision="bfloat16")
            after = -np.array(logps(tuned, held, tokens=BATCH, packed=True)) / tokens
            show("as they come (about 20%)" if hard is None else f"{hard:.0%}", after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
