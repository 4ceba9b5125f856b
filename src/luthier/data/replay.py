"""Text learned beside the data: so many of each step's tokens, whatever the ranks and the size of a micro-batch.

Replay against forgetting (Robins, 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal"; on language models Scialom et al., 2022, arXiv 2205.12393,
Ibrahim et al., 2024, arXiv 2403.08763). The data's own rows are those of the same run without replay, in the same steps; what is replayed comes on top.

By tokens: with R(t) = share / (1 - share) * (tokens of the data up to step t), rows are drawn in step t for as long as one more brings the replayed total
closer to R(t). So the total is never further from R(t) than half the longest row, at any step, and the share is exact on average.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

from ..core import IGNORE, Batch, LuthierError
from .feed import Batches
from .order import Chunk, Epochs

KL, REPLAY = "kl", "replay"  # units of batches: tokens whose divergence is taken, replayed tokens that are learned
SEED = 700_001  # the order of what is replayed is another than that of the data


class Counted(Protocol):
    """A feed that says how many tokens its last step had, over all ranks."""

    steps: int
    taken: int

    def __next__(self) -> list[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Replayed(Batches):
    """Rows in seeded order, epoch after epoch, drawn by tokens."""

    def draw(self, budget: float) -> list[Batch]:
        """This rank's micro-batches of the next rows: as many as bring their tokens closest to ``budget``; none where the next row is twice as long."""
        parts: list[tuple[Chunk, int, int]] = []
        tokens = 0
        while True:
            if self.offset == len(self._now[0]):
                self.number, self.offset = self.number + 1, 0
                self._now = self._plan(self.number)
            chunk, first = self._now[0], self.offset
            while self.offset < len(chunk) and tokens + int(chunk.lengths_N[self.offset]) / 2 <= budget:
                tokens += int(chunk.lengths_N[self.offset])
                self.offset += 1
            if self.offset > first:
                parts.append((chunk, first, self.offset))
            if self.offset < len(chunk):
                break
        self.step += 1
        self.taken = 0
        return self._dealt(parts) if parts else []

    @property
    def whole(self) -> int:
        """Tokens of one pass."""
        return int(cast(Epochs, self.order).table.lengths.sum())


class Beside:
    """The feed of a run with what is learned beside its data. Batches of the text carry the unit "replay", and those whose divergence is taken "kl"."""

    def __init__(self, main: Counted, replayed: Replayed | None, *, share: float = 0.0, kl_on: str | None = None):
        self.main, self.replayed, self.share, self.kl_on = main, replayed, share, kl_on
        self.read = self.tokens = 0  # tokens of the data so far, tokens replayed so far

    @property
    def steps(self) -> int:
        """Optimizer steps: those of the data."""
        return self.main.steps

    @property
    def passes(self) -> float:
        """Passes over what is replayed so far."""
        return 0.0 if self.replayed is None else self.tokens / self.replayed.whole

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __len__(self) -> int:
        return self.steps

    def __next__(self) -> list[Batch]:
        batches = next(self.main)
        for batch in batches if self.kl_on == "trained" else ():
            assert batch.targets is not None
            batch.units[KL] = int((batch.targets != IGNORE).sum())
        if self.replayed is None:
            return batches
        self.read += self.main.taken
        again = counted_as(self.replayed.draw(self.share / (1 - self.share) * self.read - self.tokens), REPLAY)
        self.tokens += self.replayed.taken
        for batch in again if self.kl_on == "replay" else ():
            batch.units[KL] = batch.units[REPLAY]
        return batches + again

    def state_dict(self) -> dict[str, Any]:
        """Where the next step begins."""
        out = self.main.state_dict()
        return out if self.replayed is None else out | {"replay": self.replayed.state_dict() | {"share": self.share, "data": self.read, "drawn": self.tokens}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises LuthierError where other text is replayed, or another share of it."""
        self.main.load_state_dict(state)
        if (known := state.get("replay")) is None or self.replayed is None:
            if (known is None) != (self.replayed is None):
                was, now = ("nothing", "something") if known is None else ("something", "nothing")
                raise LuthierError(f"cannot resume: {was} was replayed when the checkpoint was written and {now} is now; resume with the same data.replay")
            return
        if known["share"] != self.share:
            raise LuthierError(f"cannot resume: data.replay.share was {known['share']} when the checkpoint was written and is {self.share} now; keep it")
        try:
            self.replayed.load_state_dict(known)
        except LuthierError as e:
            raise LuthierError(f"data.replay: {e}") from None
        self.read, self.tokens = known["data"], known["drawn"]


def counted_as(batches: list[Batch], unit: str) -> list[Batch]:
    """Batches of ordinary text whose loss is a term of its own, counted in tokens."""
    for batch in batches:
        batch.units = {unit: batch.units["tokens"]}
    return batches
