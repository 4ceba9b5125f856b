"""Exact match: the share of answers equal to a reference, after tidying what does not matter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core import LuthierError


@dataclass(frozen=True, kw_only=True)
class Task:
    """1 where the answer equals one of the references, else 0. Spaces, a final full stop and commas inside numbers do not count."""

    after: str = ""
    """Compare only what follows the last of these marks, on both sides (GSM8K writes "#### 72"). An answer without one is wrong."""
    lowercase: bool = True
    """Ignore case."""

    def rows(self, split: str) -> list[dict[str, Any]]:
        """None of its own: it scores the run's data."""
        return []

    def score(self, row: Mapping[str, Any], answer: str) -> dict[str, float]:
        """One row; its references are "refs" or else "completion"."""
        refs = row.get("refs") or ([row["completion"]] if "completion" in row else [])
        if not refs:
            raise LuthierError(f"a row to be scored needs refs (a list of texts) or completion (one text); this one has {', '.join(row) or 'nothing'}")
        said = self.tidy(answer)
        return {"exact_match": float(said is not None and said in {self.tidy(r) for r in refs})}

    def tidy(self, text: str) -> str | None:
        """What is compared; None where the mark is missing."""
        if self.after:
            if self.after not in text:
                return None
            text = text.rpartition(self.after)[2]
        text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", " ".join(text.split())).removesuffix(".")
        return text.casefold() if self.lowercase else text
