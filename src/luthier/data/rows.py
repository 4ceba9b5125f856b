"""What rendering gives besides rows, and how a stream of tokens is cut into rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..core import LuthierError, Row, examples_of

Kind = Literal["decoder", "encoder", "encoder_decoder"]
OverLength = Literal["drop", "truncate", "split"]
Progress = Callable[[int], None]  # records done


@dataclass(frozen=True, slots=True)
class Form:
    """What kind of model the rows are for."""

    kind: Kind = "decoder"
    start: int = 0  # the token an encoder-decoder's answer begins with
    token_types: bool = False  # it is told which of two texts a token belongs to (BERT)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that gives no row, and why. ``bad``: the record or the template is at fault, not its length."""

    reason: str
    where: str
    bad: bool = False


@dataclass
class Counts:
    """What happened to the records on the way to rows."""

    dropped_long: int = 0
    split: int = 0
    truncated: int = 0
    cut_responses: int = 0
    notes: dict[str, int] = field(default_factory=dict)  # a sentence: in how many rows it is so

    def note(self, text: str) -> None:
        self.notes[text] = self.notes.get(text, 0) + 1

    def add_notes(self, other: Counts) -> None:
        for text, n in other.notes.items():
            self.notes[text] = self.notes.get(text, 0) + n


def sides(row: Row) -> tuple[int, int]:
    """Tokens of a row's own side, and of its source (0 but for encoder-decoders): both take memory and time."""
    source = row.extras.get("source")
    return len(row), len(source) if isinstance(source, np.ndarray) else 0


def widest(row: Row) -> tuple[int, int, int]:
    """(examples, the longest one's own tokens, the longest source): what padding a row to a rectangle takes."""
    found = [sides(e) for e in examples_of(row)]
    return len(found), max(own for own, _ in found), max(source for _, source in found)


def by_beginning(rows: Sequence[Row]) -> list[int]:
    """An order in which rows that begin alike stand side by side, so that they may share a packed row and what they begin with is computed once."""
    return sorted(range(len(rows)), key=lambda i: rows[i].ids.astype(">u4").tobytes())


def text_rows(ids: np.ndarray, where: str, max_tokens: int, over_length: OverLength, counts: Counts) -> list[Row]:
    """Pieces of at most ``max_tokens``. A piece starts with the last token of the one before, so that every token is a target once."""
    if max_tokens < 2:
        raise LuthierError(f"max_tokens is {max_tokens}; at least 2 are needed: one to read and one to predict.")
    if len(ids) > max_tokens:
        if over_length == "drop":
            counts.dropped_long += 1
            return []
        counts.split += 1
    rows = []
    for start in range(0, max(len(ids) - 1, 0), max_tokens - 1):
        piece = ids[start : start + max_tokens]
        train = np.ones(len(piece), dtype=bool)
        train[0] = False
        rows.append(Row(piece, train, where))
    return rows
