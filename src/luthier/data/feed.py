"""The order of training: which rows make each optimizer step, and how a step is cut into micro-batches.

A step's rows depend on the seed and the data only: not on the number of ranks, nor on the size of a micro-batch. So what is learned does
not change with the machine, and a run goes on after an interruption as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..core import Batch, LuthierError, Row
from .rows import sides, widest

Collate = Callable[..., Batch]  # (rows, *, pad, packed)
Order = Callable[[np.random.Generator], np.ndarray]


class Batches:
    """The micro-batches of one optimizer step at a time, over seeded permutations of the rows."""

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Collate,
        *,
        pad: int,
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
        order: Order | None = None,
    ) -> None:
        """``order``: the rows of an epoch, drawn with this generator, always equally many; default: all of them, shuffled."""
        if not rows:
            raise LuthierError("there is no row to train on. Check data.train and the counts of dropped rows.")
        self.rows, self.collate, self.pad, self.packed = rows, collate, pad, packed
        self.batch_tokens, self.batch_examples, self.micro_tokens = batch_tokens, batch_examples, micro_tokens
        self.seed, self.rank, self.size, self.device = seed, rank, size, device
        self.sides = np.fromiter((n for r in rows for n in sides(r)), dtype=np.int64, count=2 * len(rows)).reshape(-1, 2)
        self.lengths = self.sides.sum(1)
        self.widest = np.array([widest(r) for r in rows], dtype=np.int64)
        self.order = order
        self.epoch, self.offset, self.step = 0, 0, 0  # where the next step begins
        self.taken = 0  # tokens of the last step, over all ranks
        self._order, self._sums = self._plan(0)
        self.total_rows = None if steps is not None else max(1, round(epochs * len(self._order)))
        self.steps: int = steps if steps is not None else self._count()

    # --- the plan ---

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the rows in an epoch, and the tokens before each place in it."""
        chance = np.random.default_rng([self.seed, epoch])
        order = chance.permutation(len(self.rows)) if self.order is None else self.order(chance)
        return order, np.concatenate([[0], np.cumsum(self.lengths[order])])

    def _end(self, sums: np.ndarray, offset: int, budget: int) -> int:
        """The place after the last row that fits the budget from ``offset`` on."""
        return max(offset, int(np.searchsorted(sums, sums[offset] + budget, side="right")) - 1)

    def _take(self, epoch: int, offset: int, order: np.ndarray, sums: np.ndarray) -> tuple[list[np.ndarray], int, int, np.ndarray, np.ndarray]:
        """The (epoch, row) pairs of the step that begins here, across the end of an epoch where it falls, and where the next one begins."""
        n, taken, tokens = len(order), 0, 0
        parts: list[np.ndarray] = []
        while True:
            if offset == n:
                epoch, offset = epoch + 1, 0
                order, sums = self._plan(epoch)
            left = n if self.total_rows is None else self.total_rows - epoch * n - offset
            if self.batch_examples is not None:
                end = min(n, offset + self.batch_examples - taken)
            else:
                end = self._end(sums, offset, self.batch_tokens - tokens)
                if not parts:
                    end = max(end, offset + 1)  # a row longer than the budget is a step of its own
            end = min(end, offset + left)
            if end > offset:
                parts.append(np.stack([np.full(end - offset, epoch), order[offset:end]], 1))
                taken, tokens = taken + end - offset, tokens + int(sums[end] - sums[offset])
            full, offset = end < n, end
            done = self.batch_examples is not None and taken >= self.batch_examples
            if full or done or (self.total_rows is not None and epoch * n + offset >= self.total_rows):
                return parts, epoch, offset, order, sums

    def _count(self) -> int:
        """How many steps the epochs hold, by the same rule, without touching a row."""
        epoch, offset, order, sums, steps = 0, 0, self._order, self._sums, 0
        assert self.total_rows is not None
        while epoch * len(order) + offset < self.total_rows:
            _, epoch, offset, order, sums = self._take(epoch, offset, order, sums)
            steps += 1
        return steps

    # --- the steps ---

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __len__(self) -> int:
        return self.steps

    def __next__(self) -> list[Batch]:
        if self.step >= self.steps:
            raise StopIteration
        parts, self.epoch, self.offset, self._order, self._sums = self._take(self.epoch, self.offset, self._order, self._sums)
        self.step += 1
        return self._dealt(np.concatenate(parts))

    def _dealt(self, chosen: np.ndarray) -> list[Batch]:
        """This rank's micro-batches of (epoch, row) pairs."""
        self.taken = int(self.lengths[chosen[:, 1]].sum())
        batches = [self.collate(rows, pad=self.pad, packed=self.packed) for rows in self._mine(chosen)]
        return batches if self.device is None else [b.to(self.device) for b in batches]

    def _mine(self, chosen: np.ndarray) -> list[list[Row]]:
        """This rank's micro-batches of (epoch, row) pairs. They are dealt by length, and every rank gets as many micro-batches as the one that needs most."""
        by_length = chosen[np.argsort(self.lengths[chosen[:, 1]], kind="stable")]
        hands = [self._cut(by_length[rank :: self.size]) for rank in range(self.size)]
        wanted = max(len(hand) for hand in hands)
        mine = hands[self.rank]
        while len(mine) < wanted and any(len(m) > 1 for m in mine):
            biggest = max(range(len(mine)), key=lambda i: len(mine[i]))
            half = len(mine[biggest]) // 2
            mine[biggest : biggest + 1] = [mine[biggest][:half], mine[biggest][half:]]
        batches = [[replace(self.rows[i], visit=(self.seed, epoch, i)) for epoch, i in micro.tolist()] for micro in mine]
        # A step of fewer rows than ranks: the others run the shortest row with nothing trained, because ranks must call the model equally often.
        shortest = self.rows[by_length[0, 1]]
        idle = Row(shortest.ids, np.zeros(len(shortest), dtype=bool), "(nothing: fewer rows than ranks)", shortest.extras)
        return batches + [[idle] for _ in range(wanted - len(batches))]

    def _cut(self, pairs: np.ndarray) -> list[np.ndarray]:
        """Cut rows sorted by length into micro-batches of at most ``micro_tokens`` positions, padding to the longest included, on both sides."""
        cuts, start, total, examples, longest = [], 0, 0, 0, (0, 0)
        for i, row in enumerate(pairs[:, 1].tolist()):
            n, own, source = self.widest[row].tolist()
            examples, longest = examples + n, (max(longest[0], own), max(longest[1], source))
            width = total + int(self.lengths[row]) if self.packed else examples * sum(longest)
            if i > start and width > self.micro_tokens:
                cuts.append(pairs[start:i])
                start, total, examples, longest = i, 0, n, (own, source)
            total += int(self.lengths[row])
        return [*cuts, pairs[start:]] if len(pairs) else []

    # --- going on ---

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "rows": len(self._order),
            "tokens": int(self.lengths.sum()),
            "seed": self.seed,
            "batch_tokens": None if self.batch_examples is not None else self.batch_tokens,
            "batch_examples": self.batch_examples,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the next step begins: as of the last step consumed."""
        return {"step": self.step, "epoch": self.epoch, "offset": self.offset, **self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Other data or another batch size would give another run under the same name, so they are refused."""
        for key, now in self._fingerprint().items():
            if state[key] != now:
                raise LuthierError(
                    f"cannot resume: {key} was {state[key]} when the checkpoint was written and is {now} now. Resume with the same data, seed and batch size, "
                    "or start a new run."
                )
        self.step, self.epoch, self.offset = state["step"], state["epoch"], state["offset"]
        self._order, self._sums = self._plan(self.epoch)
