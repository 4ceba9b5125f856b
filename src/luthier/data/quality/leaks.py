"""Held-out and benchmark rows that stand in the training data.

Of every held-out row the runs of 13 words (Brown et al., 2020, arXiv 2005.14165, appendix C) are indexed before the training rows come; a training row that
holds half of those of one question or one answer has that row in it. Texts of fewer words leak where the whole prompt is the same. Differences from the
paper: (1) a row counts from half of its runs on, since one alone is often a turn of phrase; (2) runs that stand in many held-out rows are a template's and do
not count; (3) words as words.py has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..words import grams, number, numbers, words
from . import Again, Check, Finding, Hits, Seen, Setting, Split

HALF = 0.5  # of a part's runs in one training row: the part is in it
OFTEN, MANY = 0.01, 5  # a run that stands in more of the held-out rows (share, and number) is a template's
LEAST = 3  # words of a prompt that is compared as a whole
_NEVER = 1 << 40
NAMES: dict[Split, str] = {"validation": "validation rows", "test": "test rows", "against": "rows of the benchmark"}


@dataclass
class _Index:
    """The runs of the held-out parts: sorted, with the parts that hold each."""

    runs: np.ndarray  # (n,) uint64, different ones
    start: np.ndarray  # (n + 1,)
    part: np.ndarray  # of each place
    size: np.ndarray  # runs of each part that count


class Leaks(Check):
    """Training rows against validation, test and benchmark rows."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.owner: list[int] = []  # of each part: the held-out row
        self.runs: list[np.ndarray] = []
        self.split: dict[int, Split] = {}
        self.prompts: dict[int, list[int]] = {}  # hash of a whole prompt: the rows that have it
        self.wholes: dict[int, int] = {}  # of each of these rows: the hash of all of it
        self.index: _Index | None = None
        self.found: dict[int, tuple[int, str, bool]] = {}  # held-out row: (training row, what is said of it, answer too)
        self.trained: dict[int, int] = {}  # training row: the held-out row in it

    def held(self, row: Seen) -> None:
        self.split[row.index] = row.split
        asked, whole = _keys(row)
        if asked is not None:
            self.prompts.setdefault(asked, []).append(row.index)
            self.wholes[row.index] = whole
        for part in (row.prompt, *row.answers):
            found = words(part)
            if len(found) >= self.setting.ngram:
                self.owner.append(row.index)
                self.runs.append(np.unique(grams(numbers(found), self.setting.ngram)))

    def row(self, row: Seen) -> None:
        if row.split != "train" or not self.split:
            return
        if self.index is None:
            self.index = _indexed(self.runs, len(self.split))
            self.runs = []
        asked, whole = _keys(row)
        for held in self.prompts.get(asked, ()) if asked is not None else ():
            same = self.wholes[held] == whole
            self._note(held, row.index, "word for word" if same else "the same prompt", same)
        for part in (row.prompt, *row.answers):
            found = words(part)
            if len(found) >= self.setting.ngram:
                self._overlap(np.unique(grams(numbers(found), self.setting.ngram)), row.index)

    def _overlap(self, runs: np.ndarray, trained: int) -> None:
        index = self.index
        assert index is not None
        if not len(index.runs):
            return
        at = np.searchsorted(index.runs, runs)
        at = at[(at < len(index.runs)) & (index.runs[np.minimum(at, len(index.runs) - 1)] == runs)]
        if not len(at):
            return
        counts = Counter(int(p) for i in at for p in index.part[index.start[i] : index.start[i + 1]])
        for part, n in counts.items():
            if n >= HALF * index.size[part]:
                said = f"{n / index.size[part]:.0%} of its runs of {self.setting.ngram} words"
                self._note(self.owner[part], trained, said, n == index.size[part])

    def _note(self, held: int, trained: int, said: str, whole: bool) -> None:
        before = self.found.get(held)
        if before is None or (whole and not before[2]):
            self.found[held] = (trained, said, whole)
        self.trained.setdefault(trained, held)

    def findings(self, again: Again) -> Iterator[Finding]:
        total = Counter(self.split.values())
        for split, name in NAMES.items():
            held = sorted(h for h in self.found if self.split[h] == split)
            if not held:
                continue
            hits, removes = Hits(), Hits()
            for h in sorted(held, key=lambda h: (not self.found[h][2], h)):
                hits.add(h, self.found[h][1], self.found[h][0])
            for t, h in sorted(self.trained.items()):
                if self.split[h] == split:
                    removes.add(t, beside=h)
            yield Finding(
                name=f"leak_{split}",
                severity="error" if any(self.found[h][2] for h in held) else "warning",
                title=f"{name[0].upper()}{name[1:]} in the training data",
                said=f"{len(held):,} of {total[split]:,} {name} are found in {len(removes):,} training rows: scores on them say what was learned by heart",
                fix="--fix takes them out of the training data",
                hits=hits,
                unit=name,
                removes=removes,
            )


def _keys(row: Seen) -> tuple[int | None, int]:
    """Hashes of the prompt and of the whole, case and punctuation aside; no prompt where it is too short to tell rows apart."""
    asked = words(row.prompt or "\n".join(row.answers))
    rest = "\x1e".join(" ".join(words(a)) for a in (row.answers if row.prompt else ()))
    prompt = " ".join(asked)
    return number(prompt) if len(asked) >= LEAST else None, number(f"{prompt}\x1e{rest}")


def _indexed(runs: Sequence[np.ndarray], rows: int) -> _Index:
    size = np.array([len(r) for r in runs], dtype=np.int64)
    part = np.repeat(np.arange(len(runs)), size)
    flat = np.concatenate([np.zeros(0, np.uint64), *runs])
    order = np.argsort(flat, kind="stable")
    flat, part = flat[order], part[order]
    found, start, counts = np.unique(flat, return_index=True, return_counts=True)
    template = counts > max(MANY, OFTEN * rows)
    if template.any():
        keep = ~np.repeat(template, counts)
        left = np.bincount(part[keep], minlength=len(runs)).astype(np.int64)
        size = np.where(2 * left >= size, left, _NEVER)  # what little is left of a part that is mostly template says nothing
        flat, part = flat[keep], part[keep]
        found, start, counts = np.unique(flat, return_index=True, return_counts=True)
    return _Index(found, np.concatenate([start, [len(flat)]]), part, size)
