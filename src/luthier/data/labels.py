"""Labelled texts: which columns hold them, what kind of labels they are, and the numbers the labels become.

A label is a name, several names, or a number; which of these a file means is told from all its labels and said. Names are sorted, so that the
same data always gives the same numbers.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..core import LuthierError, Row
from .formats import Bad, Record
from .shapes import Shape

Problem = Literal["auto", "single", "multiple", "regression"]
Label = str | float | tuple[str, ...]

PARTS = ("text", "pair", "label")
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"), ("question", "passage"),
    ("query", "passage"), ("text1", "text2"), ("text_a", "text_b"), ("sentence_A", "sentence_B"), ("text", "pair"),
)  # fmt: skip
TEXTS = ("text", "sentence", "question", "review", "content", "comment", "utterance", "tweet", "title", "document")
LABELS = ("label", "labels", "category", "class", "intent", "sentiment", "emotion", "target", "score", "similarity_score", "gold_label")
SHOWN = 12  # labels named in a message


@dataclass(frozen=True, slots=True)
class Labelled:
    """One text or two, and what they are labelled with; None: nothing, they are to be predicted."""

    texts: tuple[str, ...]
    label: Label | None
    where: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)  # the record as it was written


# --- columns --------------------------------------------------------------------------------------------------------


def detect_labelled(records: Sequence[Record], *, columns: Mapping[str, str] | None = None, labelled: bool = True) -> Shape:
    """Which columns hold the text, the second text and the label. ``columns`` (ours: yours) decides first; ``labelled``: there has to be a label.

    Raises LuthierError where a part is missing or several columns could be it.
    """
    first, there = records[0], {key for r in records for key in r.fields}
    columns = dict(columns or {})
    for ours, yours in columns.items():
        if ours not in PARTS:
            raise LuthierError(f"data.columns: labelled texts have no part {ours!r}. They have: {', '.join(PARTS)}.")
        if yours not in there:
            near = difflib.get_close_matches(yours, there, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise LuthierError(f"{first.where}: no column {yours!r} (wanted for {ours!r}). Columns found: {', '.join(first.fields)}.{hint}")
    taken = set(columns.values())
    found: dict[str, str] = dict(columns)
    if "text" not in found:
        pairs = [p for p in PAIRS if set(p) <= there - taken] if "pair" not in found else []
        if len(pairs) == 1:
            found["text"], found["pair"] = pairs[0]
        else:
            found["text"] = _the_one(TEXTS, there - taken, "text", first, [f"{a} / {b}" for a, b in pairs])
    if labelled and "label" not in found:
        found["label"] = _the_one(LABELS, there - taken - {found["text"]}, "label", first)
    return Shape("label", {ours: found[ours] for ours in PARTS if ours in found and (labelled or ours != "label")})


def _the_one(names: Sequence[str], there: set[str], part: str, first: Record, pairs: Sequence[str] = ()) -> str:
    """The only column of these names; the first name wins, because it says what it is."""
    candidates = [n for n in names if n in there]
    if candidates and not pairs and (len(candidates) == 1 or candidates[0] == names[0]):
        return candidates[0]
    several = [*pairs, *candidates]
    which = f"several columns could be its {part}: {', '.join(several)}" if several else f"no column is called what a {part} is called ({', '.join(names)})"
    raise LuthierError(
        f"{first.where}: a row to classify has a text and a label, and {which}. Columns found: {', '.join(first.fields)}. "
        f"Say which is which, for example data.columns={{text: {next(iter(first.fields))}, label: YOUR_COLUMN}}, with pair for a second text."
    )


# --- records --------------------------------------------------------------------------------------------------------


def convert_labelled(record: Record, shape: Shape, bad: Bad) -> list[Labelled]:
    """The record as labelled texts; a bad row is reported and gives none."""
    texts = []
    for part in ("text", "pair"):
        if part not in shape.columns:
            continue
        column = shape.columns[part]
        value = record.fields.get(column)
        if not isinstance(value, str) or not value.strip():
            found = "empty" if isinstance(value, str) else "null" if value is None else f"of the type {type(value).__name__}; text is accepted"
            bad.add(record.where, f"column {column!r} is {found}")
            return []
        texts.append(value.strip())
    if "label" not in shape.columns:
        return [Labelled(tuple(texts), None, record.where, record.fields)]
    column = shape.columns["label"]
    try:
        label = _label(record.fields.get(column))
    except ValueError as e:
        bad.add(record.where, f"column {column!r} {e}; accepted: a name, a number or a list of names")
        return []
    return [Labelled(tuple(texts), label, record.where, record.fields)]


def _label(value: Any) -> Label:
    """A label as names or a number. Raises ValueError saying what it is instead."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"is {value}")
        return value
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("is empty")
        return value.strip()
    if isinstance(value, list):
        names = [_label(v) for v in value]
        if any(isinstance(n, tuple) for n in names):
            raise ValueError("is a list of lists")
        return tuple(dict.fromkeys(name_of(n) for n in names))
    raise ValueError("is null" if value is None else f"is of the type {type(value).__name__}")


def name_of(label: Label) -> str:
    """A label as text: a number that is whole without its point, several names as a JSON list."""
    if isinstance(label, tuple):
        return json.dumps(list(label), ensure_ascii=False)
    if isinstance(label, float):
        return str(int(label)) if label.is_integer() else repr(label)
    return label


# --- all of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """What the labels of a data set are: the problem, and the names in the order of the head's outputs."""

    problem: Literal["single", "multiple", "regression"]
    names: tuple[str, ...] = ()

    def number(self, label: Label) -> int | float | list[float]:
        """What the loss reads. Raises KeyError for a name that is not there, ValueError for what is no number."""
        if self.problem == "regression":
            return float(label)  # type: ignore[arg-type]
        if self.problem == "single":
            return self.names.index(name_of(label)) if name_of(label) in self.names else _raise(name_of(label))
        given = set(_names(label))
        if given - set(self.names):
            _raise(sorted(given - set(self.names))[0])
        return [float(name in given) for name in self.names]


def _raise(name: str) -> int:
    raise KeyError(name)


def _names(label: Label) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else (name_of(label),)


def fit(labels: Iterable[Label], *, problem: Problem = "auto", names: Sequence[str] = ()) -> Labels:
    """Which problem these labels pose, and their names. Given names stay as they are.

    auto: lists are several labels; numbers of which one is not whole are regression; anything else is one name each.
    """
    labels = list(labels)
    if problem == "auto":
        if any(isinstance(x, tuple) for x in labels):
            problem = "multiple"
        else:
            numbers = [_number(x) for x in labels]
            fractions = all(n is not None for n in numbers) and any(not n.is_integer() for n in numbers if n is not None)
            problem = "regression" if fractions and not names else "single"
    if problem == "regression":
        return Labels(problem)
    if problem == "single" and (several := next((x for x in labels if isinstance(x, tuple)), None)) is not None:
        raise LuthierError(f"objective.problem=single: a row has the list of labels {name_of(several)}; set objective.problem=multiple")
    found = {n for x in labels for n in _names(x)}
    if not names and problem == "single" and len(found) < 2:
        raise LuthierError(f"all labels are {next(iter(found), 'missing')!r}: there is nothing to tell apart. Check data.columns and data.limit.")
    if not names and problem == "single" and len(found) > max(1000, len(labels) // 2):
        raise LuthierError(
            f"{len(found)} different labels in {len(labels)} rows, such as {sorted(found)[0][:40]!r}: is that the label's column? See data.columns."
        )
    return Labels(problem, tuple(names) or tuple(_ordered(found)))


def _number(label: Label) -> float | None:
    try:
        number = float(label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _ordered(names: Iterable[str]) -> list[str]:
    """Numbers by size, words by their letters."""
    names = sorted(names)
    return sorted(names, key=float) if all(_number(n) is not None for n in names) else names


def numbered(rows: Iterable[Row], labels: Labels, of: str) -> Iterator[Row]:
    """Rows whose ``extras["label"]`` is a label, with its number instead. Raises LuthierError naming the first row that none fits, and how many."""
    wrong: list[tuple[Row, str]] = []
    for row in rows:
        if row.extras["label"] is None:
            yield row
            continue
        try:
            yield replace(row, extras={**row.extras, "label": labels.number(row.extras["label"])})
        except KeyError as e:
            wrong.append((row, str(e.args[0])))
        except (TypeError, ValueError):
            raise LuthierError(
                f"{row.where}: the label {name_of(row.extras['label'])!r} is no number, and objective.problem is regression; correct the row, or set single"
            ) from None
    if wrong:
        row, name = wrong[0]
        raise LuthierError(
            f"{row.where}: the label {name!r} is not one of {of} ({_few(labels.names)}); {len(wrong)} rows have such labels. "
            "Correct them, or name all labels in objective.labels."
        )


def counted(labels: Sequence[Label], fitted: Labels) -> dict[str, Any]:
    """What ``facts`` say of the labels: the problem, the names, how many rows have each; for numbers their range."""
    if fitted.problem == "regression":
        numbers = [float(x) for x in labels]  # type: ignore[arg-type]
        return {"problem": fitted.problem, "labels": [], "label_range": [min(numbers), sum(numbers) / len(numbers), max(numbers)]}
    counts = Counter(n for x in labels for n in _names(x))
    return {"problem": fitted.problem, "labels": list(fitted.names), "label_counts": {n: counts[n] for n in fitted.names}}


def said(facts: Mapping[str, Any], rows: int) -> Iterator[str]:
    """Lines about the labels: their names with counts, and how uneven they are."""
    if facts["problem"] == "regression":
        low, mean, high = facts["label_range"]
        yield f"labels are numbers from {low:g} to {high:g}, {mean:.4g} on average: regression (objective.problem=single to take each as a name)"
        return
    counts: dict[str, int] = facts["label_counts"]
    kind = "one a row" if facts["problem"] == "single" else "any number a row"
    yield f"{len(counts)} labels, {kind}: {_few([f'{n} {c:,}' for n, c in counts.items()])}"
    if facts["problem"] == "single" and counts:
        most, least = max(counts, key=lambda n: counts[n]), min(counts, key=lambda n: counts[n])
        yield f"always answering {most!r} would be right on {counts[most] / max(rows, 1):.1%} of the training rows"
        if counts[most] >= 10 * max(counts[least], 1):
            yield f"the labels are uneven: {most!r} is {counts[most] / max(counts[least], 1):.0f} times as frequent as {least!r}; look at macro-F1 too"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
