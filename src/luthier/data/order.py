"""In which order rows are trained: places in chunks, each a function of the seed and its number alone.

`feed.Batches` fills optimizer steps from an order and knows nothing else of where rows come from. `Epochs` is the order of one set of rows; `mixing.Mixture`
that of several sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..core import LuthierError, Row
from .rows import sides, widest

Draw = Callable[[np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Chunk:
    """N places of an order, one after the other."""

    visits_N2: np.ndarray  # (N, 2): the epoch of what the row is drawn from, and the row's number: what chance in collating depends on
    lengths_N: np.ndarray  # tokens of each row, both sides together
    widest_N3: np.ndarray  # see rows.widest
    row: Callable[[int], Row]  # the row at a place

    def __len__(self) -> int:
        return len(self.lengths_N)


class Order(Protocol):
    """An endless order of rows."""

    @property
    def epoch_rows(self) -> int | None: ...  # how many places count as one epoch; None: nobody knows (a stream)
    def chunk(self, number: int) -> Chunk: ...  # all of one order that has a length in rows hold equally many places
    def fingerprint(self) -> dict[str, Any]: ...  # what must be the same where a run goes on
    def state_dict(self) -> dict[str, Any]: ...  # what the last chunk does not follow from by its number alone; {} for most
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Table:
    """Rows in memory, measured once."""

    def __init__(self, rows: Sequence[Row]) -> None:
        if not rows:
            raise LuthierError("there is no row to train on. Check data.train and the counts of dropped rows.")
        self.rows = rows
        self.lengths = np.fromiter((sum(sides(r)) for r in rows), dtype=np.int64, count=len(rows))
        self.widest = np.array([widest(r) for r in rows], dtype=np.int64)

    def chunk(self, visits_N2: np.ndarray) -> Chunk:
        """These (epoch, row) pairs as a chunk."""
        number_N = visits_N2[:, 1]
        return Chunk(visits_N2, self.lengths[number_N], self.widest[number_N], lambda place: self.rows[int(number_N[place])])


class Epochs:
    """One set of rows, in another seeded permutation every epoch. A chunk is an epoch."""

    def __init__(self, rows: Sequence[Row], seed: int, draw: Draw | None = None) -> None:
        """``draw``: the rows of an epoch, drawn with this generator, always equally many; default: all of them, shuffled."""
        self.table, self.seed, self.draw = Table(rows), seed, draw
        self._n = len(self._order(0))

    @property
    def epoch_rows(self) -> int:
        """All of them, or as many as are drawn."""
        return self._n

    def _order(self, number: int) -> np.ndarray:
        chance = np.random.default_rng([self.seed, number])
        return chance.permutation(len(self.table.rows)) if self.draw is None else self.draw(chance)

    def chunk(self, number: int) -> Chunk:
        """The epoch of this number."""
        order = self._order(number)
        return self.table.chunk(np.stack([np.full(len(order), number), order], 1))

    def fingerprint(self) -> dict[str, Any]:
        """The data, by its size, and the seed."""
        return {"rows": self.epoch_rows, "tokens": int(self.table.lengths.sum()), "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: an epoch follows from its number."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to put back."""
