"""Reward, KL and entropy by rollout of several runs that learned from rewards, one line a run.

python scripts/reward_curves.py runs/sea0 runs/sea1 ... --out docs/images/ppo-sea.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = (("reward", "reward"), ("kl", "KL to the start, nats an answer"), ("entropy", "entropy, nats a token"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(12, 3.4), layout="constrained")
    for run in args.runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rollouts = [x for x in lines if x["event"] == "rollout"]
        for axis, (name, _) in zip(axes, SHOWN, strict=True):
            axis.plot([x["rollout"] for x in rollouts], [x[name] for x in rollouts], color="#7a4a1e", alpha=0.6, linewidth=1.2)
    for axis, (_, label) in zip(axes, SHOWN, strict=True):
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("rollout")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
