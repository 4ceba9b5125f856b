"""ROUGE-1, ROUGE-2 and ROUGE-L as Google's rouge-score computes them (Lin, 2004): F of shared words, of shared pairs, of the longest common subsequence.

Of several references each score takes the one it is highest with, and scores are means over rows. The package is what papers report; its words are runs of
a-z and 0-9, so that it sees nothing of other scripts: `words: any` gives it words of every script instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ..core import LuthierError
from .bleu import references

KINDS = ("rouge1", "rouge2", "rougeL")
ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han: written without spaces, so each is a word
WORD = re.compile(rf"[{ALONE}]|[^\W_{ALONE}]+")


@dataclass(frozen=True, kw_only=True)
class Task:
    """F-measures, 0 to 1, of answers against the references of the rows it is given."""

    stem: bool = False
    """Compare stems of English words (Porter, 1980), as many summarisation papers do."""
    words: Literal["english", "any"] = "english"
    """english: runs of a-z and 0-9, as rouge-score has it; any: runs of letters and digits of every script, kana and Han one by one."""

    def rows(self, split: str) -> list[dict[str, Any]]:
        """None of its own: it scores the run's data."""
        return []

    def score(self, row: Mapping[str, Any], answer: str) -> dict[str, float]:
        """One row; its references are "refs" or else "completion"."""
        refs = references(row)
        scorer = _scorer(self.stem, self.words)
        if self.words == "english" and not any(re.search("[a-z0-9]", r.lower()) for r in refs):
            raise LuthierError(f"rouge: no word of a-z or 0-9 is in the reference {refs[0][:40]!r}, so every answer would get 0; set words=any")
        return {k: float(v.fmeasure) for k, v in scorer.score_multi(refs, answer).items()}


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


@cache
def _scorer(stem: bool, words: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise LuthierError("task rouge needs the package rouge-score: pip install 'luthier[rouge]'") from None
    if words == "any" and stem:
        raise LuthierError("rouge: stem=yes is of English words; leave it out, or set words=english")
    return RougeScorer(list(KINDS), use_stemmer=stem, tokenizer=_Words() if words == "any" else None)
