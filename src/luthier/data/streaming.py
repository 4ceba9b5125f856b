"""A source too large to hold: rows are rendered as they are drawn, and shuffled within a buffer of records.

The first ``buffer`` records are read, rendered and put into a seeded order; when they are used up, the next ones are, and behind the last record the source
begins again. What comes when depends on the seed, the buffer and the files, not on ranks: every rank reads the whole stream and takes its own rows of each
step. A checkpoint says at which record the buffer begins and how much of it is used, and a resumed run reads on from there.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

import numpy as np

from ..core import LuthierError, Row
from .order import Chunk
from .rows import sides, widest


class Readable(Protocol):
    """What a stream is read from: see prepare.Stream."""

    def items(self) -> Iterator[Any]: ...
    def rows(self, items: list[Any]) -> list[Row]: ...


class Streamed:
    """A source of a mixture, read as it is drawn. Draws have to be asked for in order."""

    def __init__(self, name: str, source: Readable, seed: int, *, buffer: int, rows: int | None, tokens: float, task: str = "", variants: bool = False) -> None:
        """``rows``: how many the user says it has; ``tokens``: of a row, on average; ``variants``: an epoch takes one of the rows that a record gives."""
        self.name, self.source, self.seed, self.buffer = name, source, [seed, zlib.crc32(name.encode())], buffer
        self.size, self.tokens, self.task, self.variants = rows, tokens, task, variants
        self.epoch, self.record, self.place, self.drawn = 0, 0, 0, 0  # the buffer begins at this record; so much of it is used; draws in all
        self._items: Iterator[Any] | None = None
        self._held: list[Row] = []
        self._next_record = 0

    def draw(self, first: int, n: int) -> Chunk:
        """The next n draws. Raises LuthierError where ``first`` is not the next."""
        if first != self.drawn:
            raise LuthierError(f"source {self.name}: draw {first} of a stream was asked for, and draw {self.drawn} comes next")
        rows: list[Row] = []
        visits = np.zeros((n, 2), dtype=np.int64)
        while len(rows) < n:
            if self.place == len(self._held):
                self._fill()
            take = self._held[self.place : self.place + n - len(rows)]
            visits[len(rows) : len(rows) + len(take), 0] = self.epoch
            visits[len(rows) : len(rows) + len(take), 1] = self.record + self.place + np.arange(len(take))
            rows += take
            self.place += len(take)
        self.drawn += n
        lengths = np.array([sum(sides(r)) for r in rows], dtype=np.int64)
        wide = np.array([widest(r) for r in rows], dtype=np.int64).reshape(-1, 3)
        return Chunk(visits, lengths, wide, lambda place: rows[place])

    def _fill(self) -> None:
        """The next buffer that has a row in it."""
        begun = self.epoch
        while True:
            if self._items is None:
                self._items = self.source.items()
                self._next_record = 0
            self.record = self._next_record
            items = list(islice(self._items, self.buffer))
            self._next_record += len(items)
            if not items:
                self._items, self.epoch = None, self.epoch + 1
                if self.epoch > begun + 1:
                    raise LuthierError(f"source {self.name}: no row of this stream is left to train on; look at what is held out, dropped and skipped")
                continue
            self._held, self.place = self._ordered(self.source.rows(items)), 0
            if self._held:
                return

    def _ordered(self, rows: list[Row]) -> list[Row]:
        """A buffer's rows in their seeded order; of a record's variants the one that is this epoch's turn."""
        rng = np.random.default_rng([*self.seed, self.epoch, self.record])
        if self.variants:
            of: dict[str, list[Row]] = {}
            for row in rows:
                of.setdefault(row.where, []).append(row)
            rows = [some[(zlib.crc32(where.encode()) + self.seed[0] + self.epoch) % len(some)] for where, some in of.items()]
        return [replace(rows[i], task=self.task) for i in rng.permutation(len(rows))]

    def epochs(self, n: int) -> float:
        """Epochs that n draws make; where nobody knows the size, those that are over."""
        return n / self.size if self.size else float(self.epoch)

    def fingerprint(self) -> list[Any]:
        """Its name and its buffer."""
        return [self.name, "stream", self.buffer]

    def state_dict(self) -> dict[str, Any]:
        """Where the next draw stands."""
        return {"epoch": self.epoch, "record": self.record, "place": self.place, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read on from there: what comes before in the files is passed over."""
        self.epoch, self.record, self.place, self.drawn = (state[k] for k in ("epoch", "record", "place", "drawn"))
        self._items = self.source.items()
        next(islice(self._items, self.record, self.record), None)
        items = list(islice(self._items, self.buffer))
        self._next_record = self.record + len(items)
        self._held = self._ordered(self.source.rows(items))
