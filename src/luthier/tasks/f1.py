"""Token-overlap F1 as SQuAD scores it (Rajpurkar et al., 2016, arXiv 1606.05250, section 6.1): words that answer and reference share, best of references.

precision: the share of the answer's words that are in the reference, each as often as it stands there; recall: the other way round; F1: their harmonic mean.
Where one side has no words left after tidying, F1 is 1 if neither has and else 0 (as SQuAD 2.0 has it for questions without an answer).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .bleu import references

PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class Task:
    """F1 of the words of an answer and of the reference it is most like."""

    normalise: Literal["squad", "plain"] = "squad"
    """squad: lower case, without ASCII punctuation and the articles a, an, the; plain: words as they stand between spaces."""

    def rows(self, split: str) -> list[dict[str, Any]]:
        """None of its own: it scores the run's data."""
        return []

    def score(self, row: Mapping[str, Any], answer: str) -> dict[str, float]:
        """One row; its references are "refs" or else "completion"."""
        said = self.words(answer)
        return {"f1": max(overlap(said, self.words(r)) for r in references(row))}

    def words(self, text: str) -> list[str]:
        """What is compared."""
        if self.normalise == "plain":
            return text.split()
        return re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


def overlap(said: list[str], wanted: list[str]) -> float:
    """F1 of two bags of words."""
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))
