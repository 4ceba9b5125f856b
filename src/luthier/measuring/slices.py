"""Scores by slice: by the length of prompt or answer, by label, by file, by any column of the data; and which slice is worst, if any is.

The slice that looks worst of many has been chosen by chance too, so it is called worse only where the interval of its difference from all other rows excludes
0 at a level of 1 - 0.05 / (number of slices) (Bonferroni). The two are different rows: their intervals are put together in quadrature (Newcombe, 1998, method
10, for shares; Zou & Donner, 2008, for others). Slices of fewer than 10 rows are shown and never called the
worst.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core import LuthierError, Row
from ..data.rows import sides
from ..nn.intervals import Interval
from ..settings.names import nearest
from .marks import Mark, Score, digits_of

OURS = ("length", "answer_length", "label", "source")
BINS, FEW = 4, 8  # numbers of more different values than FEW are put into BINS of like size
LEAST = 10  # rows of a slice that may be called the worst
NONE = "(none)"


@dataclass(frozen=True)
class Slicing:
    """Records by what they have in common: for each slice the places of its records."""

    by: str
    places: dict[str, np.ndarray]

    def marks(self, mark: Mark) -> dict[str, Mark]:
        """A mark on each slice that it says something of. It may be of the first records only."""
        cut = {name: mark.of(places) for name, places in self.places.items()}
        return {name: m for name, m in cut.items() if m.rows}


def slicing(by: str, records: Sequence[Any], rows: Sequence[Row], *, answers: bool) -> Slicing:
    """Records sliced by ``by``: length, answer_length, label, source, or a column of the data (column:NAME where it is called like one of these).

    Of raw text, which has no records, rows are sliced. A record with several answers has the length of its first. ``answers``: what is learned of a row is an
    answer to the rest of it. Raises LuthierError where there is no such column, and where it makes no slices.
    """
    first = {r: i for i, r in reversed(list(enumerate(record_of(records, rows))))}
    values = _values(by, records, [rows[first[i]] for i in sorted(first)], answers)
    names = list(dict.fromkeys(_ordered(values)))
    if len(names) < 2:
        raise LuthierError(f"--by {by}: all rows are alike in it ({names[0]}), so there is nothing to slice; {_accepted(records)}")
    if len(names) > max(20, len(values) // 2):
        raise LuthierError(f"--by {by}: {len(names):,} different values in {len(values):,} rows; slices need rows in common; {_accepted(records)}")
    return Slicing(by, {name: np.array([i for i, v in enumerate(values) if v == name], dtype=np.int64) for name in names})


def record_of(records: Sequence[Any], rows: Sequence[Row]) -> list[int]:
    """The record of each row: that whose place in its file is the row's. Of raw text, which has none, each row is one."""
    if not records or len(records) == len(rows):  # one for each, in the same order
        return list(range(len(rows)))
    known = {where: i for i, record in enumerate(records) for where in (record.places or [record.where])}
    return [known[row.where] for row in rows]


def _values(by: str, records: Sequence[Any], rows: Sequence[Row], answers: bool) -> list[str]:
    """The slice of each record; ``rows``: the first row of each."""
    if by == "answer_length" and not answers:
        raise LuthierError("--by answer_length: there are no answers in these rows; slice by length")
    if by in ("length", "answer_length"):
        learned = [int(row.train.sum()) if answers else 0 for row in rows]
        whole = [sum(sides(row)) for row in rows]
        return _binned([n if by == "answer_length" else all_ - n for n, all_ in zip(learned, whole, strict=True)], " tokens")
    if by == "source":
        return [row.where.rpartition(":")[0] or row.where for row in rows]
    if by == "label":
        return [(r.references or [NONE])[0] for r in records] or [NONE]
    column = by.removeprefix("column:")
    known = dict.fromkeys(k for record in records for k in record.extras)
    if column not in known:
        guess = nearest(column, [*OURS, *known])
        raise LuthierError(f"--by {by}: the data has no column {column!r}; " + (f"did you mean {guess}?" if guess else _accepted(records)))
    values = [record.extras.get(column) for record in records]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values) and len(set(numbers)) > FEW:
        return _binned(numbers)
    return [NONE if v is None else str(v) for v in values]


def _binned(values: Sequence[float], unit: str = "") -> list[str]:
    """Quantile bins, each named by its least and its largest value."""
    x = np.array(values)
    if len(np.unique(x)) <= FEW:
        return [f"{v:g}{unit}" for v in x]
    cuts = np.unique(np.quantile(x, np.arange(1, BINS) / BINS))
    number = np.searchsorted(cuts, x, side="left")
    names = {k: f"{x[number == k].min():g} to {x[number == k].max():g}{unit}" for k in np.unique(number)}
    return [names[k] for k in number]


def _ordered(values: Sequence[str]) -> list[str]:
    """Numbers by their size, words by the alphabet."""

    def key(text: str) -> tuple[int, float, str]:
        try:
            return 0, float(text.split()[0]), text
        except (ValueError, IndexError):
            return 1, 0.0, text

    return sorted(values, key=key)


def _accepted(records: Sequence[Any]) -> str:
    columns = [k for k in dict.fromkeys(k for r in records for k in r.extras) if k not in OURS]
    return f"accepted are {', '.join(OURS)}" + (f", and the columns {', '.join(columns[:20])}" if columns else "")


# --- the worst -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worst:
    """The slice with the worst value of a measure, beside all other rows."""

    measure: str
    slice: str
    score: Score
    rest: Score
    difference: Interval  # of the slice from the rest, at a level corrected for the number of slices
    slices: int
    is_clear: bool
    lower_is_better: bool = False

    def said(self, by: str) -> str:
        """In a sentence."""
        digits = digits_of(self.measure)
        here, rest = (f"{s.numbers(digits=digits)} n={s.n:,}" for s in (self.score, self.rest))
        return f"worst by {by}: {self.slice}, {self.measure} {here} against {rest} in the rest ({self.gap})"

    @property
    def gap(self) -> str:
        """How far it is from the rest."""
        d = self.difference
        return Score(d.value, d.low, d.high, 0).numbers("+", digits_of(self.measure))


def worst(mark: Mark, slices: Mapping[str, Mark], *, seed: int = 0) -> Worst | None:
    """The slice with the worst value; None where none has enough rows, or neither way is worse."""
    able = {name: m for name, m in slices.items() if m.rows >= LEAST and mark.rows - m.rows >= LEAST}
    if not able or mark.lower_is_better is None:
        return None
    sign = -1 if mark.lower_is_better else 1
    name = min(able, key=lambda n: sign * able[n].value)
    here, rest = able[name], mark.of(np.setdiff1d(mark.places, able[name].places))
    level, times = 1 - 0.05 / len(able), min(20_000, max(2_000, 400 * len(able)))
    a, b = (m.interval(seed=seed + i, level=level, times=times) for i, m in enumerate((here, rest)))
    value = a.value - b.value
    low = value - float(np.hypot(a.value - a.low, b.high - b.value))
    high = value + float(np.hypot(a.high - a.value, b.value - b.low))
    is_clear = high < 0 if sign > 0 else low > 0
    return Worst(
        mark.name, name, here.score(seed=seed), rest.score(seed=seed), Interval(value, low, high, here.rows), len(able), is_clear, mark.lower_is_better
    )
