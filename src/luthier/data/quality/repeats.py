"""Rows that are there twice: exactly, nearly, or with another answer.

Near duplicates: Jaccard similarity of the sets of three words in a row (shingles; Broder, 1997), by MinHash and banding (Leskovec, Rajaraman and Ullman,
*Mining of Massive Datasets*, chapter 3). 126 hashes in 21 bands of 6 propose a pair of similarity 0.8 with probability 0.998 and one of 0.3 with 0.015; every
pair that is proposed is read again and compared by its shingles, so none is reported on chance. Shingles that stand in many rows (a template's words) do not
count in that comparison, since they say nothing about what a row is about.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..preferences import Judged
from ..words import grams, number, numbers, words
from . import Again, Check, Finding, Hits, Seen, Setting

SHINGLE, BANDS, DEEP = 3, 21, 6
BATCH = 1000
KEPT = 512  # smallest hashes of a longer text that stand for it when two are compared
SAMPLE, OFTEN = 3000, 0.01  # among the first so many rows, a shingle of this share of them is the template's
FEW = 4  # a text of fewer shingles has no near duplicates: one word more or less is another text
ROUNDS = 8  # rows of one bucket that a later one is compared with


class Repeats(Check):
    """Exact duplicates, near duplicates, and one question with several answers."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.index, self.whole, self.asked = array("q"), array("Q"), array("Q")
        self.answered, self.label = array("Q"), array("Q")
        self.bands: list[np.ndarray] = []  # (rows, BANDS) uint32
        self.waiting: list[np.ndarray] = []
        self.often: Counter[int] = Counter()

    def row(self, row: Seen) -> None:
        if row.split != "train":
            return
        said = "\x1e".join((row.system, row.prompt, *row.answers, row.label))
        self.index.append(row.index)
        self.whole.append(number(said))
        self.asked.append(number(" ".join(words(row.prompt)) + "\x1e" + row.system) if row.prompt.strip() else 0)
        self.answered.append(number("\x1e".join(sorted(row.answers))))
        self.label.append(number(row.label))
        self.waiting.append(shingles(row))
        if len(self.index) <= SAMPLE:
            self.often.update(self.waiting[-1].tolist())
        if len(self.waiting) == BATCH:
            self._sketch()

    def _sketch(self) -> None:
        import rensa

        flat, ends = np.concatenate([*self.waiting, np.zeros(0, np.uint64)]), np.cumsum([0, *map(len, self.waiting)])
        made = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, ends.astype(np.uint64), BANDS * DEEP, 1)
        signs = np.array(made.to_rows(), dtype=np.uint64).reshape(len(self.waiting), BANDS, DEEP)
        mixed = signs[:, :, 0] + np.arange(BANDS, dtype=np.uint64)
        for k in range(1, DEEP):
            mixed = (mixed * np.uint64(0x9E3779B97F4A7C15)) ^ (mixed >> np.uint64(31)) ^ signs[:, :, k]
        self.bands.append((mixed ^ (mixed >> np.uint64(32))).astype(np.uint32))
        self.waiting.clear()

    def findings(self, again: Again) -> Iterator[Finding]:
        if not self.index:
            return
        self._sketch()
        index, whole = np.asarray(self.index), np.asarray(self.whole)
        exact, first = same(whole)
        hits = Hits()
        for later, earlier in exact:
            hits.add(int(index[later]), beside=int(index[earlier]))
        if hits:
            yield Finding(
                name="exact_duplicates",
                severity="warning",
                title="Rows that are there more than once",
                said="they repeat an earlier row to the letter, and count double in training",
                fix="--fix keeps the first of each",
                hits=hits,
                removes=hits,
            )
        near = self._near(first, again)
        judged = self.setting.renders in ("judged", "pairs", "ranked")  # where one prompt may well have several rows
        if near:
            yield Finding(
                name="near_duplicates",
                severity="warning" if len(near) > max(10, 0.01 * len(index)) and not judged else "note",
                title="Rows that are almost the same as an earlier one",
                said=f"at least {self.setting.near:.0%} of their runs of three words are the same (Jaccard)",
                fix="--fix keeps the first of each; --keep near_duplicates leaves them; --near 0.9 calls fewer rows alike",
                hits=near,
                removes=near,
            )
        yield from self._answers(first)

    # --- near ---

    def _near(self, first: np.ndarray, again: Again) -> Hits:
        """Rows (the first of each that are exactly the same) that are nearly the same as an earlier one, which itself is like none before it."""
        buckets = list(_buckets(np.concatenate(self.bands)[first]))
        wanted = {int(self.index[first[i]]): int(i) for bucket in buckets for i in bucket}
        many = max(OFTEN * min(SAMPLE, len(self.index)), 10)
        often = np.array(sorted(h for h, n in self.often.items() if n > many), dtype=np.uint64)
        sets: dict[int, np.ndarray] = {}
        for index, row in again(wanted):
            found = shingles(row)
            sets[wanted[index]] = found[~np.isin(found, often)][:KEPT]
        hits = Hits()
        label = np.asarray(self.label)[first]
        for later, earlier, alike in _alike(buckets, sets, label, self.setting.near):
            hits.add(int(self.index[first[later]]), f"{alike:.0%} the same", int(self.index[first[earlier]]))
        return hits

    # --- one question, several answers ---

    def _answers(self, first: np.ndarray) -> Iterator[Finding]:
        index, asked, answered, label = (np.asarray(x)[first] for x in (self.index, self.asked, self.answered, self.label))
        judged = self.setting.renders in ("judged", "pairs", "ranked")
        key = np.where(asked == 0, asked, asked ^ answered) if judged else asked
        known = np.flatnonzero(key)
        hits, differs = Hits(), label if self.setting.renders in ("label", "judged") else np.asarray(self.whole)[first] if judged else answered
        for b, a in same(key[known])[0]:
            if differs[known[b]] != differs[known[a]]:
                hits.add(int(index[known[b]]), beside=int(index[known[a]]))
        if hits and (judged or self.setting.renders == "label"):
            yield Finding(
                name="label_conflicts",
                severity="warning",
                title="The same text, judged differently",
                said="the rows contradict one another, so that no model can be right on all of them",
                fix="decide which is right and correct the file; --fix leaves them, since it cannot know",
                hits=hits,
            )
        elif hits:
            yield Finding(
                name="several_answers",
                severity="note",
                title="One question with several answers",
                said="their prompts are the same (case and punctuation aside), their answers differ; rows are held out by prompt, so none is on both sides",
                fix="nothing, where the answers are all good",
                hits=hits,
            )


def shingles(row: Seen) -> np.ndarray:
    """The different runs of three words of a row, as sorted hashes: of what is asked and of every answer by itself.

    Of answers that are compared their places count too: a pair the other way round is not the same.
    """
    parts = [grams(numbers(words(t)), SHINGLE) for t in (row.prompt, *row.answers)]
    if isinstance(row.item, Judged):
        parts = [p + np.uint64(place) for place, p in enumerate(parts)]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))


def same(keys: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray]:
    """(later, first) of every key that came before, and the places of the first of each, in order."""
    if not len(keys):
        return [], np.zeros(0, np.int64)
    _, firsts, which = np.unique(keys, return_index=True, return_inverse=True)
    origin = firsts[which]
    later = np.flatnonzero(origin != np.arange(len(keys)))
    return [(int(i), int(origin[i])) for i in later], np.sort(firsts)


def _buckets(bands: np.ndarray) -> Iterator[np.ndarray]:
    """The rows that share a band with another, in order, for each band."""
    for k in range(bands.shape[1]):
        order = np.argsort(bands[:, k], kind="stable")
        edges = np.flatnonzero(np.diff(bands[order, k])) + 1
        starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(order)]])
        for i in np.flatnonzero(ends - starts > 1):
            yield order[starts[i] : ends[i]]


def _alike(buckets: Sequence[np.ndarray], sets: Mapping[int, np.ndarray], label: np.ndarray, near: float) -> Iterator[tuple[int, int, float]]:
    """(row, earlier row, similarity) of every row that is nearly the same as one before it that is kept. Under another label it is no duplicate."""
    of: dict[int, list[int]] = {}
    for b, bucket in enumerate(buckets):
        for i in bucket.tolist():
            of.setdefault(i, []).append(b)
    kept: list[list[int]] = [[] for _ in buckets]
    for i in sorted(of):
        for earlier in sorted({e for b in of[i] for e in kept[b][:ROUNDS]}):
            alike = jaccard(sets[earlier], sets[i]) if label[earlier] == label[i] else 0.0
            if alike >= near:
                yield i, earlier, alike
                break
        else:
            for b in of[i]:
                kept[b].append(i)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sorted sets of hashes; 0 where one says too little. Of sets cut to KEPT hashes, the estimate that their smallest give (Broder, 1997)."""
    if min(len(a), len(b)) < FEW:
        return 0.0
    union = np.union1d(a, b)
    if max(len(a), len(b)) == KEPT:
        union = union[:KEPT]
    both = np.intersect1d(np.intersect1d(a, union, assume_unique=True), b, assume_unique=True)
    return len(both) / len(union)
