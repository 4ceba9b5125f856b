"""Several sources in one order: how often each is drawn, and which of its rows comes next.

The rules are those of Raffel et al., 2020, arXiv 1910.10683, section 3.5.2, for sources of e_1, ..., e_M rows:
examples-proportional with a cap K, r_m = min(e_m, K) / sum_n min(e_n, K); temperature-scaled, these raised to 1/T and made to sum to one again; equal; or
weights of the user's own, made to sum to one.

Which source draw k takes is read off one low-discrepancy sequence: the source in whose interval of [0, 1), as long as its rate, frac(u + k phi) lies, with phi
the golden ratio's fraction and u uniform by the seed. Within a source rows are drawn without replacement: an epoch of its own in a seeded permutation, then
the next. So an order is a function of the seed and the place alone.

How we differ from the paper:
1. T5 draws the source of every example at random. Here every draw has the same probability for each source, but draws repel one another: over any stretch
   the counts are within a few rows of its length times the rate, where independent draws would be off by its square root.
2. T5 shuffles a source within a buffer; here every epoch of a source is a permutation of all of its rows (a stream's is one within its buffer).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from ..core import LuthierError, Row
from .order import Chunk, Table

CHUNK = 1024  # draws planned at a time; what is drawn does not depend on it
PHI = 0.6180339887498949  # (sqrt(5) - 1) / 2


def rates(sizes: Sequence[int], rule: str, *, temperature: float = 1.0, cap: int | None = None, weights: Sequence[float] = ()) -> np.ndarray:
    """(M,) the probability with which a draw takes each source. ``sizes``: rows of each; ``weights``: one each, for the rule of that name."""
    if rule == "equal":
        return np.full(len(sizes), 1 / len(sizes))
    if rule == "weights":
        given = np.asarray(weights, dtype=np.float64)
        return given / given.sum()
    capped = np.minimum(np.asarray(sizes, dtype=np.float64), np.inf if cap is None else cap)
    if rule == "temperature":  # of shares or of counts: the same once they sum to one
        capped = (capped / capped.sum()) ** (1 / temperature)
    return capped / capped.sum()


class Drawn(Protocol):
    """A source as a mixture draws from it. Draws are numbered from 0 and asked for in order, except after `load_state_dict`."""

    name: str

    @property
    def size(self) -> int | None: ...  # draws that make an epoch of it; None: nobody knows
    @property
    def tokens(self) -> float: ...  # of a row, on average
    def draw(self, first: int, n: int) -> Chunk: ...
    def epochs(self, n: int) -> float: ...  # epochs that n draws make
    def fingerprint(self) -> list[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...  # where the draw before the last chunk stood
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Rows:
    """A source in memory. An example may have several variants (one row for each of its templates), of which every epoch takes the next."""

    def __init__(self, name: str, rows: Sequence[Row], seed: int, *, first: int = 0, variants: bool = False) -> None:
        """``first``: the number of its first row among those of all sources; ``variants``: rows from one place in the data are variants of one example."""
        self.name, self.seed, self.first, self.table = name, [seed, zlib.crc32(name.encode())], first, Table(rows)
        changes = [i for i, (a, b) in enumerate(pairwise(rows), 1) if not variants or a.where != b.where]
        self.begin_E = np.array([0, *changes])
        self.variants_E = np.diff([*self.begin_E, len(rows)])
        self.shift_E = np.random.default_rng([*self.seed, 0, 1]).integers(0, self.variants_E)
        self._last: tuple[int, np.ndarray] | None = None

    @property
    def size(self) -> int:
        """Its examples."""
        return len(self.begin_E)

    @property
    def tokens(self) -> float:
        """Of a row, on average."""
        return float(self.table.lengths.mean())

    def draw(self, first: int, n: int) -> Chunk:
        """Draws ``first`` to ``first + n``: the rows, and the epoch of each."""
        parts = [np.zeros((0, 2), dtype=np.int64)]
        while n:
            epoch, place = divmod(first, self.size)
            some = min(n, self.size - place)
            example = self._order(epoch)[place : place + some]
            row = self.begin_E[example] + (self.shift_E[example] + epoch) % self.variants_E[example]
            parts.append(np.stack([np.full(some, epoch), row], 1))
            first, n = first + some, n - some
        own = self.table.chunk(np.concatenate(parts))
        visits = own.visits_N2 + [0, self.first]
        return Chunk(visits, own.lengths_N, own.widest_N3, own.row)

    def _order(self, epoch: int) -> np.ndarray:
        if self._last is None or self._last[0] != epoch:
            self._last = epoch, np.random.default_rng([*self.seed, epoch]).permutation(self.size)
        return self._last[1]

    def epochs(self, n: int) -> float:
        """Epochs that n draws make."""
        return n / self.size

    def fingerprint(self) -> list[Any]:
        """Its name and its size."""
        return [self.name, self.size, int(self.table.lengths.sum())]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a draw follows from its number."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to put back."""


@dataclass(frozen=True)
class Share:
    """How much of a mixture one source is, or has been."""

    rows: int | None  # that it has; None: a stream of unknown length
    rate: float  # probability of a draw
    tokens: float  # expected share of the tokens
    drawn: int
    epochs: float


class Mixture:
    """The order of several sources."""

    def __init__(self, sources: Sequence[Drawn], rate_M: np.ndarray, seed: int, *, epoch_rows: int | None = None) -> None:
        """``rate_M``: the probability of each, see `rates`; ``epoch_rows``: draws that count as one epoch of the whole."""
        if not len(sources) == len(rate_M) > 0 or not np.isclose(rate_M.sum(), 1.0):
            raise LuthierError(f"a mixture of {len(sources)} sources has {len(rate_M)} rates that sum to {rate_M.sum():g}; one for each, 1 together")
        self.sources, self.rate_M, self.seed, self._rows = list(sources), np.asarray(rate_M, dtype=np.float64), seed, epoch_rows
        self.edge_M = np.cumsum(self.rate_M)[:-1]
        self.start = float(np.random.default_rng([seed, 0x6D6978]).random())
        self._before_CM = [np.zeros(len(sources), dtype=np.int64)]  # draws of each source before each chunk
        self._state: dict[str, Any] = {}

    @property
    def epoch_rows(self) -> int | None:
        """Draws that count as one epoch."""
        return self._rows

    def sources_of(self, first: int, n: int) -> np.ndarray:
        """(n,) which source each of these draws takes."""
        return np.searchsorted(self.edge_M, (self.start + np.arange(first, first + n) * PHI) % 1.0, side="right")

    def _before(self, number: int) -> np.ndarray:
        while len(self._before_CM) <= number:
            at = len(self._before_CM) - 1
            took = np.bincount(self.sources_of(at * CHUNK, CHUNK), minlength=len(self.sources))
            self._before_CM.append(self._before_CM[at] + took)
        return self._before_CM[number]

    def chunk(self, number: int) -> Chunk:
        """Draws number x CHUNK to (number + 1) x CHUNK."""
        source_N = self.sources_of(number * CHUNK, CHUNK)
        before_M = self._before(number)
        self._state = {s.name: state for s in self.sources if (state := s.state_dict())}
        visits, lengths, wide = np.zeros((CHUNK, 2), np.int64), np.zeros(CHUNK, np.int64), np.zeros((CHUNK, 3), np.int64)
        where: list[tuple[Chunk, int]] = [None] * CHUNK  # type: ignore[list-item]
        for m, source in enumerate(self.sources):
            places = np.flatnonzero(source_N == m)
            own = source.draw(int(before_M[m]), len(places))
            visits[places], lengths[places], wide[places] = own.visits_N2, own.lengths_N, own.widest_N3
            for i, place in enumerate(places.tolist()):
                where[place] = (own, i)
        return Chunk(visits, lengths, wide, lambda place: where[place][0].row(where[place][1]))

    def drawn(self, number: int, offset: int) -> np.ndarray:
        """(M,) draws of each source before a place: the offset in the chunk of that number."""
        return self._before(number) + np.bincount(self.sources_of(number * CHUNK, offset), minlength=len(self.sources))

    def shares(self, number: int, offset: int) -> dict[str, Share]:
        """What every source has given before a place, by name."""
        drawn = self.drawn(number, offset)
        tokens = np.array([s.tokens for s in self.sources]) * self.rate_M
        told = zip(self.sources, self.rate_M.tolist(), (tokens / tokens.sum()).tolist(), drawn.tolist(), strict=True)
        return {s.name: Share(s.size, rate, share, n, s.epochs(n)) for s, rate, share, n in told}

    def fingerprint(self) -> dict[str, Any]:
        """The sources, how often each is drawn, and the seed."""
        return {"mixture": [[*s.fingerprint(), round(r, 9)] for s, r in zip(self.sources, self.rate_M.tolist(), strict=True)], "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """Where streams stood before the last chunk; {} where there is none."""
        return {"streams": self._state} if self._state else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put streams back."""
        for source in self.sources:
            if source.name in state.get("streams", {}):
                source.load_state_dict(state["streams"][source.name])
