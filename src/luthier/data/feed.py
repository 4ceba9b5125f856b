"""The order of training: which rows make each optimizer step, and how a step is cut into micro-batches.

A step's rows depend on the seed and the data only: not on the number of ranks, nor on the size of a micro-batch. So what is learned does
not change with the machine, and a run goes on after an interruption as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..core import Batch, LuthierError, Row
from .order import Chunk, Epochs, Order

IDLE = "(nothing: fewer rows than ranks)"
Collate = Callable[..., Batch]  # (rows, *, pad, packed)


class Batches:
    """The micro-batches of one optimizer step at a time, over an order of rows: of one set its seeded permutations, unless another is given."""

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Collate,
        *,
        pad: int,
        order: Order | None = None,
        packed: bool = False,
        batch_tokens: int = 8192,
        batch_examples: int | None = None,
        micro_tokens: int = 8192,
        epochs: float = 1.0,
        steps: int | None = None,
        seed: int = 0,
        rank: int = 0,
        size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """``order``: instead of ``rows``, which are then not looked at. Raises LuthierError without rows, and without ``steps`` for an order of no length."""
        self.order: Order = Epochs(rows, seed) if order is None else order
        self.collate, self.pad, self.packed = collate, pad, packed
        self.batch_tokens, self.batch_examples, self.micro_tokens = batch_tokens, batch_examples, micro_tokens
        self.seed, self.rank, self.size, self.device = seed, rank, size, device
        if steps is None and self.order.epoch_rows is None:
            raise LuthierError("optim.steps: must be given: a stream is read as it is drawn, so nobody knows how many steps an epoch of it has")
        self.total_rows = None if steps is not None else max(1, round(epochs * (self.order.epoch_rows or 0)))
        self.number, self.offset, self.step = 0, 0, 0  # where the next step begins: a chunk of the order, a place in it
        self.taken = 0  # tokens of the last step, over all ranks
        self.steps: int = steps if steps is not None else self._count()
        self._now = self._plan(0)

    # --- the plan ---

    def _plan(self, number: int) -> _Planned:
        """A chunk of the order, and the tokens before each place in it."""
        chunk = self.order.chunk(number)
        return chunk, np.concatenate([[0], np.cumsum(chunk.lengths_N)])

    def _end(self, sums: np.ndarray, offset: int, budget: int) -> int:
        """The place after the last row that fits the budget from ``offset`` on."""
        return max(offset, int(np.searchsorted(sums, sums[offset] + budget, side="right")) - 1)

    def _take(self, number: int, offset: int, now: _Planned) -> tuple[list[tuple[Chunk, int, int]], int, int, _Planned]:
        """The (chunk, first, end) of the step that begins here, across the end of a chunk where it falls, and where the next one begins."""
        taken, tokens = 0, 0
        parts: list[tuple[Chunk, int, int]] = []
        while True:
            if offset == len(now[0]):
                number, offset = number + 1, 0
                now = self._plan(number)
            chunk, sums = now
            n = len(chunk)
            left = n if self.total_rows is None else self.total_rows - number * n - offset
            if self.batch_examples is not None:
                end = min(n, offset + self.batch_examples - taken)
            else:
                end = self._end(sums, offset, self.batch_tokens - tokens)
                if not parts:
                    end = max(end, offset + 1)  # a row longer than the budget is a step of its own
            end = min(end, offset + left)
            if end > offset:
                parts.append((chunk, offset, end))
                taken, tokens = taken + end - offset, tokens + int(sums[end] - sums[offset])
            full, offset = end < n, end
            done = self.batch_examples is not None and taken >= self.batch_examples
            if full or done or (self.total_rows is not None and number * n + offset >= self.total_rows):
                return parts, number, offset, now

    def _count(self) -> int:
        """How many steps the epochs hold, by the same rule, without touching a row."""
        number, offset, now, steps = 0, 0, self._plan(0), 0
        assert self.total_rows is not None
        while number * len(now[0]) + offset < self.total_rows:
            _, number, offset, now = self._take(number, offset, now)
            steps += 1
        return steps

    @property
    def rows_per_step(self) -> float:
        """On average, by the rows that come first."""
        if self.batch_examples is not None:
            return float(self.batch_examples)
        return max(1.0, self.batch_tokens / float(self._now[0].lengths_N.mean()))

    # --- the steps ---

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __len__(self) -> int:
        return self.steps

    def __next__(self) -> list[Batch]:
        if self.step >= self.steps:
            raise StopIteration
        parts, self.number, self.offset, self._now = self._take(self.number, self.offset, self._now)
        self.step += 1
        return self._dealt(parts)

    def _dealt(self, parts: Sequence[tuple[Chunk, int, int]]) -> list[Batch]:
        """This rank's micro-batches of slices of chunks."""
        chosen = _Chosen.of(parts)
        self.taken = int(chosen.lengths.sum())
        micro_batches = self._mine(chosen)
        batches = [self.collate(rows, pad=self.pad, packed=self.packed) for rows in micro_batches]
        for rows, batch in zip(micro_batches, batches, strict=True):
            batch.idle = rows[0].where == IDLE
        return batches if self.device is None else [b.to(self.device) for b in batches]

    def _mine(self, step: _Chosen) -> list[list[Row]]:
        """This rank's micro-batches of a step. They are dealt by length, and every rank gets as many micro-batches as the one that needs most."""
        by_length = np.argsort(step.lengths, kind="stable")
        hands = [self._cut(by_length[rank :: self.size], step) for rank in range(self.size)]
        wanted = max(len(hand) for hand in hands)
        mine = hands[self.rank]
        while len(mine) < wanted and any(len(m) > 1 for m in mine):
            biggest = max(range(len(mine)), key=lambda i: len(mine[i]))
            half = len(mine[biggest]) // 2
            mine[biggest : biggest + 1] = [mine[biggest][:half], mine[biggest][half:]]
        batches = [[replace(step.row(i), visit=(self.seed, *step.visits[i].tolist())) for i in micro.tolist()] for micro in mine]
        # A step of fewer rows than ranks: the others run the shortest row with nothing trained, because ranks must call the model equally often.
        shortest = step.row(int(by_length[0]))
        idle = replace(shortest, train=np.zeros(len(shortest), dtype=bool), where=IDLE)
        return batches + [[idle] for _ in range(wanted - len(batches))]

    def _cut(self, places: np.ndarray, step: _Chosen) -> list[np.ndarray]:
        """Cut rows of a step, sorted by length, into micro-batches of at most ``micro_tokens`` positions, padding to the longest included, on both sides."""
        cuts, start, total, examples, longest = [], 0, 0, 0, (0, 0)
        for i, place in enumerate(places.tolist()):
            n, own, source = step.widest[place].tolist()
            examples, longest = examples + n, (max(longest[0], own), max(longest[1], source))
            width = total + int(step.lengths[place]) if self.packed else examples * sum(longest)
            if i > start and width > self.micro_tokens:
                cuts.append(places[start:i])
                start, total, examples, longest = i, 0, n, (own, source)
            total += int(step.lengths[place])
        return [*cuts, places[start:]] if len(places) else []

    # --- going on ---

    def _fingerprint(self) -> dict[str, Any]:
        return {
            **self.order.fingerprint(),
            "batch_tokens": None if self.batch_examples is not None else self.batch_tokens,
            "batch_examples": self.batch_examples,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the next step begins: as of the last step consumed."""
        return {"step": self.step, "epoch": self.number, "offset": self.offset, "order": self.order.state_dict(), **self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Other data or another batch size would give another run under the same name, so they are refused."""
        for key, now in self._fingerprint().items():
            if state.get(key) != now:
                raise LuthierError(
                    f"cannot resume: {key} was {state.get(key)} when the checkpoint was written and is {now} now. Resume with the same data, seed and batch "
                    "size, or start a new run."
                )
        self.step, self.number, self.offset = state["step"], state["epoch"], state["offset"]
        self.order.load_state_dict(state.get("order", {}))
        self._now = self._plan(self.number)


_Planned = tuple[Chunk, np.ndarray]  # a chunk, and the tokens before each of its places


@dataclass(frozen=True)
class _Chosen:
    """The rows of one step, at places 0, 1, ..."""

    visits: np.ndarray  # (n, 2)
    lengths: np.ndarray  # (n,)
    widest: np.ndarray  # (n, 3)
    parts: list[tuple[Chunk, int]]  # the chunk of each place, and the place in it

    @classmethod
    def of(cls, parts: Sequence[tuple[Chunk, int, int]]) -> _Chosen:
        """Of slices of chunks."""
        visits, lengths, wide = (np.concatenate([getattr(c, name)[a:b] for c, a, b in parts]) for name in ("visits_N2", "lengths_N", "widest_N3"))
        return cls(visits, lengths, wide, [(c, i) for c, a, b in parts for i in range(a, b)])

    def row(self, place: int) -> Row:
        """The row at a place."""
        chunk, i = self.parts[place]
        return chunk.row(i)
