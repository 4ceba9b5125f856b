"""Film reviews (SST-2, Socher et al., 2013) divided for learning from a sentiment: rows for a judge, others for a second judge, sentences to go on from.

    python scripts/sentiment.py sst2/train.tsv --out sentiment

Written are judge.tsv and second.tsv (labelled phrases; none of them is in both), text.txt and begin.txt (sentences of eight words and more, without labels,
that are in neither: to read, and whose beginnings the policy goes on from). Phrases of one sentence stay on one side as far as they contain one another.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

WORDS = 8  # of a sentence to read, at least


def parted(rows: list[tuple[str, str]], seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]:
    """Rows in three parts: for the judge, for the second, and long ones to read. SST-2 lists phrases; one that lies in a longer goes with it."""
    rng = random.Random(seed)
    longest = sorted({t for t, _ in rows}, key=lambda t: (-len(t.split()), t))
    home: dict[str, int] = {}  # every run of four words -> the part it was seen in first
    parts: tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]] = ([], [], [])
    label = dict(rows)
    for text in longest:
        words = text.split()
        runs = [" ".join(words[i : i + 4]) for i in range(max(1, len(words) - 3))]
        part = next((home[r] for r in runs if r in home), None)
        if part is None:
            part = rng.choices((0, 1, 2), (2, 2, 1))[0]
        for r in runs:
            home.setdefault(r, part)
        if part == 2:
            if len(words) >= WORDS:
                parts[2].append(text)
        else:
            parts[part].append((text, label[text]))
    for p in parts:
        rng.shuffle(p)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="train.tsv with the columns sentence and label")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--begin", type=int, default=600, help="sentences to go on from; the rest is to read (default 600)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines = [line.rsplit("\t", 1) for line in args.file.read_text(encoding="utf-8").splitlines()[1:]]
    judge, second, text = parted([(t.strip(), x) for t, x in lines], args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("judge", judge), ("second", second)):
        (args.out / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(f"{t}\t{'good' if x == '1' else 'bad'}\n" for t, x in rows), encoding="utf-8")
        print(f"{args.out / name}.tsv: {len(rows)} phrases")
    for name, some in (("begin", text[: args.begin]), ("text", text[args.begin :])):
        (args.out / f"{name}.txt").write_text("\n\n".join(some) + "\n", encoding="utf-8")
        print(f"{args.out / name}.txt: {len(some)} sentences")


if __name__ == "__main__":
    main()
