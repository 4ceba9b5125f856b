"""Corpus chrF as sacrebleu computes it: F-score of character n-grams, spaces left out (Popović, 2015), with words as well chrF++ (Popović, 2017).

Precisions and recalls of the orders 1 to 6 (and of words) are averaged, then F with recall weighing beta = 2 times as much: CHRF of sacrebleu, Post, 2018,
arXiv 1804.08771. Each row gives its counts against the reference it is most like, and the score is that of their sums.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from ..nn.intervals import chrf
from ..settings.plugins import Range, within_ranges
from .bleu import references

CHARACTERS = 6


@dataclass(frozen=True, kw_only=True)
class Task:
    """chrF, 0 to 100, of answers against the references of the rows it is given."""

    words: Annotated[int, Range(0, 4)] = 0
    """Orders of words beside those of characters; 2 is chrF++."""
    lowercase: bool = False
    """Ignore case."""

    def __post_init__(self) -> None:
        within_ranges(self)

    def rows(self, split: str) -> list[dict[str, Any]]:
        """None of its own: it scores the run's data."""
        return []

    def score(self, row: Mapping[str, Any], answer: str) -> dict[str, float]:
        """chrF of one answer: a reward; over a corpus it is that of the sums."""
        return {self.name: float(chrf(self.statistics(row, answer)[None])[0])}

    def statistics(self, row: Mapping[str, Any], answer: str) -> np.ndarray:
        """(3 * orders,) n-grams of the answer, of its nearest reference, and of both, for each order; the first of equals."""
        found = np.array([self._against(answer, ref) for ref in references(row)], dtype=np.float64)
        return found[int(chrf(found).argmax())]

    def corpus(self, sums_RK: np.ndarray) -> dict[str, np.ndarray]:
        """chrF of summed statistics, for each of R resamples."""
        return {self.name: chrf(sums_RK)}

    @property
    def name(self) -> str:
        """chrf; with orders of words chrf++."""
        return "chrf++" if self.words else "chrf"

    def _against(self, answer: str, ref: str) -> list[int]:
        if self.lowercase:
            answer, ref = answer.lower(), ref.lower()
        out = []
        for said, wanted in zip(self._grams(answer), self._grams(ref), strict=True):
            out += [said.total() if wanted else 0, wanted.total(), (said & wanted).total()]  # an order that the reference is too short for does not count
        return out

    def _grams(self, text: str) -> list[Counter[Any]]:
        letters, words = "".join(text.split()), [w for word in text.split() for w in _apart(word)]
        return [_counted(letters, n) for n in range(1, CHARACTERS + 1)] + [_counted(words, n) for n in range(1, self.words + 1)]


def _counted(items: Sequence[str], n: int) -> Counter[Any]:
    return Counter(items[i : i + n] if isinstance(items, str) else tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def _apart(word: str) -> list[str]:
    """A word and the mark at its end, or else at its beginning."""
    if len(word) > 1 and word[-1] in string.punctuation:
        return [word[:-1], word[-1]]
    if len(word) > 1 and word[0] in string.punctuation:
        return [word[0], word[1:]]
    return [word]
