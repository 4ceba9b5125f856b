"""Pairs for a reward model, made from demonstrations: a restaurant's description against the same one with a single wrong fact, or one that leaves a fact out.

    python scripts/e2e_pairs.py e2e/train.jsonl --out pairs.jsonl [--rows 4000] [--omit 0.5] [--seed 0]

A fact is wrong when one value (a name, a kind, a food, an area, a place nearby) is replaced by another that the file gives for it. It is left out
together with the sentence that states it. Where all pairs are of the first kind, saying less is never punished.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from pathlib import Path

SLOTS = ("name", "eatType", "food", "area", "near")


def slots(mr: str) -> dict[str, str]:
    """name[The Eagle], food[Japanese] as a dictionary."""
    return {k.strip(): v for k, v in re.findall(r"([\w ]+)\[([^\]]*)\]", mr)}


def wrong(mr: str, ref: str, values: dict[str, list[str]], rng: random.Random) -> str | None:
    """The description with one fact replaced; None where no fact stands in it word for word."""
    said = slots(mr)
    able = [k for k in SLOTS if k in said and re.search(re.escape(said[k]), ref, re.IGNORECASE)]
    if not able:
        return None
    slot = rng.choice(able)
    other = rng.choice([v for v in values[slot] if v.lower() != said[slot].lower()])
    return re.sub(re.escape(said[slot]), lambda _: other, ref, flags=re.IGNORECASE)


def omitting(mr: str, ref: str, rng: random.Random) -> str | None:
    """The description without one of its sentences that states a fact word for word; None where it has no other sentence."""
    sentences = re.split(r"(?<=[.!?])\s+", ref.strip())
    said = [v.lower() for k, v in slots(mr).items() if k in SLOTS]
    able = [i for i, s in enumerate(sentences) if any(v in s.lower() for v in said)] if len(sentences) > 1 else []
    if not able:
        return None
    left_out = rng.choice(able)
    return " ".join(s for i, s in enumerate(sentences) if i != left_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="rows with mr and ref")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4000, help="pairs to make (default 4000)")
    parser.add_argument("--skip", type=int, default=0, help="of the shuffled rows, leave out so many: for a second file that shares none with a first")
    parser.add_argument("--omit", type=float, default=0.5, help="share of pairs whose worse side leaves a fact out (default 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows = [json.loads(line) for line in args.file.read_text(encoding="utf-8").splitlines()]
    values: dict[str, list[str]] = defaultdict(list)
    for k, v in sorted({(k, v) for r in rows for k, v in slots(r["mr"]).items() if k in SLOTS}):
        values[k].append(v)
    rng.shuffle(rows)
    made = omitted = 0
    with args.out.open("w", encoding="utf-8") as out:
        for r in rows[args.skip :]:
            if made == args.rows:
                break
            bad = omitting(r["mr"], r["ref"], rng) if omitted < args.omit * (made + 1) else None
            omitted += bad is not None
            bad = bad if bad is not None else wrong(r["mr"], r["ref"], values, rng)
            if bad is not None:
                out.write(json.dumps({"prompt": r["mr"], "chosen": r["ref"], "rejected": bad}, ensure_ascii=False) + "\n")
                made += 1
    print(f"{args.out}: {made} pairs, {omitted} of them with a fact left out")


if __name__ == "__main__":
    main()
