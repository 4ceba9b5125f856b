"""Corpus BLEU as sacrebleu computes it (Post, 2018, arXiv 1804.08771): 13a words, several references, case matters.

Papineni et al., 2002. Sentences have no BLEU worth averaging, so each row gives its sufficient statistics and the score is that of their sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..core import LuthierError
from ..nn.intervals import bleu


@dataclass(frozen=True, kw_only=True)
class Task:
    """BLEU of answers against the references of the rows it is given."""

    lowercase: bool = False
    """Ignore case, as some benchmarks do."""

    def rows(self, split: str) -> list[dict[str, Any]]:
        """None of its own: it scores the run's data."""
        return []

    def score(self, row: Mapping[str, Any], answer: str) -> dict[str, float]:
        """Sentence BLEU, 0 to 100, orders beyond the answer's length left out: a reward, not what is reported."""
        return {"bleu": _metric(self.lowercase).sentence_score(answer, references(row)).score}

    def statistics(self, row: Mapping[str, Any], answer: str) -> np.ndarray:
        """(10,) answer length, length of the nearest reference, matches of 1 to 4 words, totals of 1 to 4 words."""
        s = _metric(self.lowercase).sentence_score(answer, references(row))
        return np.array([s.sys_len, s.ref_len, *s.counts, *s.totals], dtype=np.float64)

    def corpus(self, sums_RK: np.ndarray) -> dict[str, np.ndarray]:
        """BLEU of summed statistics, for each of R resamples."""
        return {"bleu": bleu(sums_RK)}


def references(row: Mapping[str, Any]) -> list[str]:
    """What a row says a right answer is: "refs", or else its one "completion"."""
    refs = row.get("refs") or ([row["completion"]] if "completion" in row else [])
    if not refs:
        raise LuthierError(f"a row to be scored needs refs (a list of texts) or completion (one text); this one has {', '.join(row) or 'nothing'}")
    return [refs] if isinstance(refs, str) else list(refs)


@cache
def _metric(lowercase: bool) -> Any:
    from sacrebleu.metrics import BLEU  # slow to import

    return BLEU(lowercase=lowercase, effective_order=True)
