"""Continued pretraining on raw text: the cross-entropy of every next token.

Domain-adaptive pretraining (Gururangan et al., 2020, arXiv 2004.10964) and plain pretraining. Documents share rows end to end and never see one
another; a document longer than the limit is split, each piece seeing only itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core import Base, Batch, Incompatible, Loss, Policy, Renders, Row, next_token_batch, next_token_loss, next_token_losses


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Next-token prediction on all tokens."""

    terms: ClassVar[Mapping[str, float]] = {"tokens": 1.0}
    needs: ClassVar[frozenset[str]] = frozenset()
    couples: ClassVar[bool] = False
    renders: ClassVar[Renders] = "text"

    def serves(self, kind: str) -> None:
        """Raise Incompatible for a kind of model that does not read from left to right."""
        if kind == "encoder":
            raise Incompatible("objective text: an encoder sees a token's future, so there is no next one to predict; use objective: masked_text")
        if kind == "encoder_decoder":
            raise Incompatible("objective text: an encoder-decoder answers a source, and raw text has none; use objective: masked_text (span corruption)")

    def heads(self, base: Base) -> dict:
        """No head of its own: the model's. Raises Incompatible for models that are not decoders."""
        self.serves(base.anatomy.kind)
        return {}

    def collate(self, rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
        """Rows to one batch, targets shifted."""
        return next_token_batch(rows, pad=pad, packed=packed)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Sum of -log p over all tokens but each document's first."""
        return next_token_loss(policy, batch)

    def losses(self, policy: Policy, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """The same of each row."""
        return next_token_losses(policy, batch)
