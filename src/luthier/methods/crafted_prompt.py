"""The crafted prompt: an instruction and worked examples in front of the input, chosen and not trained. The baseline that every method has to beat.

Brown et al., 2020, arXiv 2005.14165, section 2 (few-shot prompts). Which examples and how many decides the result (Zhao et al., 2021, arXiv 2102.09690), so
candidates are drawn from the training rows and the one that does best on held-out rows is kept. Nothing of the model changes and nothing is learned by
gradient; what is saved is the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..core import Base, Delta, Incompatible, Row
from ..deltas.prompts import leave_room
from ..settings.plugins import Range, within_ranges


@dataclass(frozen=True, kw_only=True)
class Method:
    """A fixed text before every example."""

    edits: ClassVar[Literal["sequence"]] = "sequence"
    lr_factor: ClassVar[float] = 1.0

    instructions: tuple[str, ...] = ("", "Answer as in the examples.\n")
    """Candidate texts to begin with; the empty one is the base itself where no example follows."""
    shots: tuple[Annotated[int, Range(0)], ...] = (0, 1, 2, 4, 8)
    """Candidate numbers of worked examples, taken from the training rows."""
    tries: Annotated[int, Range(1)] = 4
    """Sets of examples drawn for each number of them."""
    max_tokens: Annotated[int, Range(1)] = 512
    """Candidates longer than this are left out; they count against the model's positions."""
    choose_by: Literal["loss", "task"] = "loss"
    """What the best candidate has: the lowest held-out loss, or the best score of the run's first task."""
    ids: tuple[int, ...] = ()
    """The chosen prompt's token ids. Filled in by the run; a run that is given them chooses nothing."""

    def __post_init__(self) -> None:
        within_ranges(self)

    @property
    def shift(self) -> int:
        """Positions to keep free: the chosen prompt's, or the longest candidate's."""
        return len(self.ids) or self.max_tokens

    def attach(self, base: Base, name: str) -> Delta:
        """Put the chosen prompt before every example; none, before one has been chosen. Raises Incompatible where it leaves no room."""
        leave_room(base, len(self.ids))
        embedding: Any = base.model.get_input_embeddings()  # type: ignore[operator]
        device = next(base.model.parameters()).device
        ids = torch.tensor(self.ids, dtype=torch.long, device=device)

        def prompt() -> Tensor:
            with torch.no_grad():
                return embedding(ids)

        return Delta({}, prompt=prompt, shift=len(self.ids))

    def candidates(self, rows: Sequence[Row], tokenizer: Any, *, limit: int, seed: int) -> list[Method]:
        """This method with each prompt worth trying, seeded. Raises Incompatible where none fits ``limit`` tokens."""
        rng = np.random.default_rng(seed)
        found: dict[tuple[int, ...], Method] = {}
        for n in self.shots:
            for _ in range(self.tries if n else 1):
                chosen = [rows[i].ids for i in rng.choice(len(rows), size=min(n, len(rows)), replace=False)] if n else []
                for instruction in self.instructions:
                    lead = tokenizer(instruction, add_special_tokens=False)["input_ids"] if instruction else []
                    ids = tuple(int(i) for i in np.concatenate([np.array(lead, dtype=np.int64), *chosen]))
                    if len(ids) <= min(self.max_tokens, limit):
                        found.setdefault(ids, replace(self, ids=ids))
        if not found:
            raise Incompatible(f"method.max_tokens: no candidate prompt fits {min(self.max_tokens, limit)} tokens; allow more or fewer shots")
        return list(found.values())
