"""Small sums with answers that can be checked, to learn from rewards: some to begin with, some to practise, some that are never trained.

    python scripts/sums.py --out sums [--largest 50]

Written are begin.jsonl (for a short supervised start), practise.jsonl (prompts for GRPO or PPO) and test.jsonl; no pair of numbers is in two of them, in either
order.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


def row(a: int, b: int, rng: random.Random) -> dict[str, str]:
    """One sum, the numbers in either order."""
    a, b = (a, b) if rng.random() < 0.5 else (b, a)
    return {"prompt": f"{a} + {b} =", "completion": str(a + b)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--largest", type=int, default=50, help="the largest number of a sum (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    pairs = [(a, b) for a in range(args.largest + 1) for b in range(a, args.largest + 1)]
    rng.shuffle(pairs)
    two_fifths = 2 * len(pairs) // 5
    parts = {"begin": pairs[:two_fifths], "practise": pairs[two_fifths : 2 * two_fifths], "test": pairs[2 * two_fifths :]}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, some in parts.items():
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row(a, b, rng)) + "\n" for a, b in some))
        print(f"{args.out / name}.jsonl: {len(some)} sums")


if __name__ == "__main__":
    main()
