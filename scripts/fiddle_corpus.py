"""The text that fiddle, the embedded base model, is pretrained on: public-domain and freely licensed English, tidied, mixed and shuffled.

    python scripts/fiddle_corpus.py --data FOLDER --out FOLDER

FOLDER holds ``corpus/`` with the sources named below. Written are ``train/*.txt`` (documents separated by a line ``<|endoftext|>``, shuffled),
``heldout/<source>.txt`` (whole books and stories that train/ never sees) and ``corpus.json`` (bytes per source, for the model card).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from fiddle_drills import Drills, Words

SEPARATOR = "<|endoftext|>"
PIECE = 16_000  # characters: novels are cut into pieces of about 3,000 words, so that the order of documents mixes books
SHARD = 10_000_000
HELDOUT = 150_000  # at least so many characters per source where it is a collection of books


@dataclass(frozen=True)
class Source:
    """One file of the corpus."""

    file: str
    times: int  # how often its documents are seen
    licence: str
    articles: bool = False  # short documents: held out by number, so that versions of one article stay on one side


# Modern, simple English is scarce here and nearer to what fiddle is asked for, so it is repeated. onestop_int.txt is left out: its apostrophes,
# quotes and ligatures are lost, and the other two levels tell the same articles.
SOURCES = [
    Source("chilit.txt", 1, "public domain"),
    Source("clic_19C.txt", 1, "public domain"),
    Source("clic_DNov.txt", 1, "public domain"),
    Source("clic_ArTs.txt", 1, "public domain"),
    Source("clic_AAW.txt", 1, "public domain"),
    Source("african_storybook_en.txt", 3, "CC BY 4.0", articles=True),
    Source("onestop_ele.txt", 2, "CC BY-SA 4.0", articles=True),
    Source("onestop_adv.txt", 2, "CC BY-SA 4.0", articles=True),
    Source("tinystories_train.jsonl", 3, "CDLA-Sharing 1.0", articles=True),
    Source("tinystories_valid.txt", 3, "CDLA-Sharing 1.0", articles=True),
]
COPYING, CHAT = 0.04, 0.04  # of the characters of everything else

# ASCII punctuation: with 4,096 tokens there are none to spare for two kinds of quotes, and users type straight ones.
PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "´": "'", "—": "--", "–": "-", "…": "...", "\u00a0": " ", "ﬁ": "fi", "ﬂ": "fl", "×": "x", "\ufeff": ""}
)


def tidy(text: str) -> str:
    """Plain punctuation, one space between words, one blank line between paragraphs at most, no page junk."""
    text = text.translate(PLAIN)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    text = re.sub(r"\[(?:\d+|[A-Z]|\*|Illustration[^\]]*|Decorative[^\]]*)\]", "", text)  # footnote marks and notes on pictures
    text = re.sub(r"\b_|_\b|(?<!\w)_|_(?!\w)", "", text)  # _italics_
    text = re.sub(r"(?m)^[\s*.\-=_]+$", "", text)  # rules between sections
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" *\n *", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def documents(path: Path) -> list[str]:
    """The documents of one source, tidied: books, stories or articles."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        found = [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
    elif SEPARATOR in text:
        found = text.split(SEPARATOR)
    else:  # stories one after another; each begins in one of a few ways
        found = re.split(r"\n\n(?=(?:Once upon a time|One day|Once there|There once|Once,|In a |There was once))", text)[1:]
    return [d for d in map(tidy, found) if len(d) > 100]


def pieces(document: str) -> list[str]:
    """Cut at paragraphs into pieces of about PIECE characters."""
    cut: list[list[str]] = [[]]
    size = 0
    for paragraph in document.split("\n\n"):
        if size > PIECE:
            cut.append([])
            size = 0
        cut[-1].append(paragraph)
        size += len(paragraph) + 2
    return ["\n\n".join(c) for c in cut]


def hold_out(source: Source, found: list[str], rng: random.Random) -> set[int]:
    """The numbers of the documents that stay out of training."""
    if source.articles:
        share = 0.03 if len(found) > 1000 else 0.05
        numbers = random.Random(f"articles {len(found)}")  # the same numbers for every version of a collection
        return set(numbers.sample(range(len(found)), round(share * len(found))))
    small = sorted(range(len(found)), key=lambda i: len(found[i]))
    fitting = [i for i in small if len(found[i]) < 2 * HELDOUT] or small[:1]
    rng.shuffle(fitting)
    chosen: set[int] = set()
    for i in fitting:
        if sum(len(found[j]) for j in chosen) >= HELDOUT:
            break
        chosen.add(i)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds corpus/")
    parser.add_argument("--out", type=Path, required=True, help="where train/, heldout/ and corpus.json are written")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for folder in ("train", "heldout"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
        for old in (args.out / folder).glob("*.txt"):
            old.unlink()

    mixed: list[tuple[str, str]] = []  # (source, document)
    once: list[str] = []
    stories: list[str] = []
    report: dict[str, dict] = {}
    for source in SOURCES:
        name = source.file.split(".")[0]
        found = documents(args.data / "corpus" / source.file)
        held = hold_out(source, found, rng)
        kept = [d for i, d in enumerate(found) if i not in held]
        cut = [p for d in kept for p in pieces(d)]
        once += cut
        stories += kept if "tinystories" in name else []
        mixed += [(name, p) for p in cut for _ in range(source.times)]
        out = [p for i in sorted(held) for p in pieces(found[i])]
        (args.out / "heldout" / f"{name}.txt").write_text(f"\n{SEPARATOR}\n".join(out) + "\n", encoding="utf-8")
        report[name] = {"licence": source.licence, "documents": len(kept), "times": source.times, "heldout_bytes": sum(len(p.encode()) for p in out)}

    total = sum(len(d) for _, d in mixed)
    drills = Drills(Words.of(once, stories, rng), rng)
    for name, share, make in (("copying", COPYING, drills.copying), ("chat", CHAT, drills.chat)):
        made = 0
        while made < share * total:
            document = make()
            mixed.append((name, document))
            made += len(document)
        held_drills = [make() for _ in range(200)]
        (args.out / "heldout" / f"{name}.txt").write_text(f"\n{SEPARATOR}\n".join(held_drills) + "\n", encoding="utf-8")
        report[name] = {
            "licence": "generated",
            "documents": sum(n == name for n, _ in mixed),
            "times": 1,
            "heldout_bytes": sum(len(p.encode()) for p in held_drills),
        }

    rng.shuffle(mixed)
    for name, document in mixed:
        report[name]["train_bytes"] = report[name].get("train_bytes", 0) + len(document.encode())
    shard: list[str] = []
    number = size = 0
    for i, (_, document) in enumerate(mixed):
        shard.append(document)
        size += len(document)
        if size > SHARD or i == len(mixed) - 1:
            (args.out / "train" / f"{number:03d}.txt").write_text(f"\n{SEPARATOR}\n".join(shard) + "\n", encoding="utf-8")
            shard, number, size = [], number + 1, 0
    (args.out / "corpus.json").write_text(json.dumps({"seed": args.seed, "sources": report}, indent=1) + "\n")
    for name, facts in report.items():
        sizes = f"{facts['train_bytes'] / 1e6:7.2f} MB train   {facts['heldout_bytes'] / 1e3:6.0f} kB held out"
        print(f"{name:24} {sizes}   {facts['documents']:6d} documents x{facts['times']}")
    print(f"{'in all':24} {sum(f['train_bytes'] for f in report.values()) / 1e6:7.2f} MB in {number} files")


if __name__ == "__main__":
    main()
