"""Labels against labels: accuracy, macro-F1 and Matthews' correlation; for numbers Pearson's and Spearman's correlation and the mean squared error.

It scores what a classification head says, and as well what a model writes as its answer: an answer that is no label of the rows is wrong. The GLUE
benchmark's measures (Wang et al., 2018, arXiv 1804.07461, table 1), as scikit-learn computes them, but that a label which is neither given nor said
is left out of the macro average where several labels may be right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from ..core import LuthierError
from ..nn import agreement


@dataclass(frozen=True, kw_only=True)
class Task:
    """Agreement of answers with the one reference of each row."""

    lower_is_better: ClassVar[frozenset[str]] = frozenset({"squared_error"})
    problem: Literal["single", "multiple", "regression"] = "single"
    """single: one label a row; multiple: a JSON list of labels; regression: a number."""

    def rows(self, split: str) -> list[dict[str, Any]]:
        """None of its own: it scores the run's data."""
        return []

    def score(self, row: Mapping[str, Any], answer: str) -> dict[str, float]:
        """accuracy: 1 where all labels are right. Regression: the squared error; of an answer that is no number, of 0."""
        if self.problem == "regression":
            return {"squared_error": (self._number(answer) - self._number(reference(row))) ** 2}
        return {"accuracy": float(self._labels(answer) == self._labels(reference(row)))}

    def whole(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """The scores that are of all rows together."""
        if self.problem == "regression":
            given_N, said_N = (np.array([self._number(t) for t in texts]) for texts in ([reference(r) for r in rows], answers))
            return {"pearson": agreement.pearson(given_N, said_N), "spearman": agreement.spearman(given_N, said_N)}
        given, said = [self._labels(reference(r)) for r in rows], [self._labels(a) for a in answers]
        names = sorted(set().union(*given, *said))
        given_NK, said_NK = (np.array([[float(n in labels) for n in names] for labels in side]) for side in (given, said))
        if self.problem == "multiple":
            return {"macro_f1": agreement.macro_f1(given_NK, said_NK), "micro_f1": agreement.micro_f1(given_NK, said_NK)}
        return {"macro_f1": agreement.macro_f1(given_NK, said_NK), "matthews": agreement.matthews(given_NK, said_NK)}

    def pair(self, row: Mapping[str, Any], answer: str) -> tuple[frozenset[str], frozenset[str]]:
        """The labels that a row has, and those that an answer gives."""
        return self._labels(reference(row)), self._labels(answer)

    def _labels(self, text: str) -> frozenset[str]:
        if self.problem == "single":
            return frozenset({text.strip()})
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = text
        return frozenset(map(str, found)) if isinstance(found, list) else frozenset({text.strip()})

    def _number(self, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        return number if math.isfinite(number) else 0.0


def reference(row: Mapping[str, Any]) -> str:
    """A row's label: the first of "refs", or else "completion"."""
    refs = row.get("refs") or ([row["completion"]] if "completion" in row else [])
    if not refs:
        raise LuthierError(f"a row to be scored needs its label in refs (a list of one text) or completion; this one has {', '.join(row) or 'nothing'}")
    return refs if isinstance(refs, str) else refs[0]
