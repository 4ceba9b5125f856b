"""Prompt templates of a task: a pattern for the prompt and one for the completion, filled from a record's columns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..core import LuthierError
from .convert import RowError, answer, string
from .formats import Bad, Record
from .shapes import Chat

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Pattern:
    """A text in which {column} stands for what a record has there, {{ and }} for braces."""

    def __init__(self, text: str) -> None:
        """Raises LuthierError for a brace that stands alone and for {} without a name."""
        self.text = text
        self.pieces: list[tuple[str, bool]] = []  # (literal text, False) or (column, True)
        at = 0
        for found in _PIECE.finditer(text):
            self.pieces.append((text[at : found.start()], False))
            column, whole = found[1], found[0]
            if whole in ("{{", "}}"):
                self.pieces.append((whole[0], False))
            elif column is None or not column.strip():
                raise LuthierError(f"data.mix: the template {text[:60]!r} has {whole!r} in it; a column is written {{name}}, a brace {{{{ or }}}}")
            else:
                self.pieces.append((column.strip(), True))
            at = found.end()
        self.pieces.append((text[at:], False))

    @property
    def columns(self) -> list[str]:
        """The columns it names."""
        return [piece for piece, is_column in self.pieces if is_column]

    def fill(self, fields: Mapping[str, Any]) -> str:
        """With a record's values. Raises RowError where one is missing or no text."""
        return "".join(self._value(fields, piece) if is_column else piece for piece, is_column in self.pieces)

    def _value(self, fields: Mapping[str, Any], column: str) -> str:
        if fields.get(column) is None:
            raise RowError(f"column {column!r}, which a template names, is {'null' if column in fields else 'missing'}")
        return string(fields[column], f"column {column!r}")


Pair = tuple[Pattern, Pattern]  # prompt, completion


def check(pairs: Sequence[Pair], first: Sequence[Record], name: str) -> None:
    """Raise LuthierError for a column that no record of a file has."""
    there = {key for r in first for key in r.fields}
    for column in (c for pair in pairs for pattern in pair for c in pattern.columns):
        if column not in there:
            near = difflib.get_close_matches(column, there, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise LuthierError(f"{name}: a template names the column {column!r}, and there is none. Columns found: {', '.join(first[0].fields)}.{hint}")


def convert_patterned(record: Record, pairs: Sequence[Pair], bad: Bad) -> list[Chat]:
    """The record under every template, one chat each; a bad row is reported and gives none."""
    try:
        out = []
        for prompt, completion in pairs:
            asked = {"role": "user", "content": prompt.fill(record.fields)}
            out.append(
                Chat(
                    [asked, {"role": "assistant", "content": answer(completion.fill(record.fields), "the completion")}],
                    None,
                    record.where,
                    extras=record.fields,
                )
            )
        return out
    except RowError as e:
        bad.add(record.where, str(e))
        return []
