"""Supervised fine-tuning on instructions: the cross-entropy of the response, given everything before it.

Wei et al., 2021, arXiv 2109.01652; Ouyang et al., 2022, arXiv 2203.02155, stage 1. Which tokens are the response is decided where the
conversation is rendered, from the template itself; the end-of-turn token is always among them. An encoder-decoder reads the conversation up to an answer as
its source and writes the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core import Base, Batch, Incompatible, Loss, Policy, Renders, Row, next_token_batch, next_token_loss, next_token_losses


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Next-token prediction on the assistant's turns only."""

    terms: ClassVar[Mapping[str, float]] = {"tokens": 1.0}
    needs: ClassVar[frozenset[str]] = frozenset()
    couples: ClassVar[bool] = False
    renders: ClassVar[Renders] = "chat"

    def serves(self, kind: str) -> None:
        """Raise Incompatible for a kind of model that cannot write."""
        if kind == "encoder":
            raise Incompatible(
                "objective sft: an encoder reads text and writes none; use objective: classify for labels, or masked_text to learn the text itself"
            )

    def heads(self, base: Base) -> dict:
        """No head of its own: the model's. Raises Incompatible for an encoder."""
        self.serves(base.anatomy.kind)
        return {}

    def collate(self, rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
        """Rows to one batch, targets shifted; untrained tokens are IGNORE."""
        return next_token_batch(rows, pad=pad, packed=packed)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Sum of -log p over the trained tokens."""
        return next_token_loss(policy, batch)

    def losses(self, policy: Policy, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """The same of each row."""
        return next_token_losses(policy, batch)
