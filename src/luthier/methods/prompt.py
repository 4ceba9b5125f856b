"""Prompt tuning: trained vectors in front of the input; nothing in the model changes.

Lester et al., 2021, arXiv 2104.08691, section 2. length x width parameters. Weak on small models and strong on large ones: that is the paper's own
finding, and where it starts and how fast it learns decide more than anything else.

How it differs from the paper:
1. AdamW instead of Adafactor.
2. The start "vocabulary" samples from all tokens but the special ones, not from the 5,000 most frequent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core import Base, Delta
from ..deltas.layout import virtual
from ..deltas.prompts import Virtual, leave_room, starting_ids
from ..nn.prompts import Table


@dataclass(frozen=True, kw_only=True)
class Method(Virtual):
    """A soft prompt."""

    lr_factor: ClassVar[float] = 100.0  # ten times LoRA's, as searched on E2E

    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    """vocabulary: embeddings of sampled tokens. text: embeddings of the tokens of init_text, repeated to the length. random: small noise."""
    init_text: str = "Answer the request below clearly and correctly."
    """The text of init=text."""

    def attach(self, base: Base, name: str) -> Delta:
        """Make the prompt. Raises Incompatible where it leaves the model no room."""
        leave_room(base, self.length)
        embedding = base.model.get_input_embeddings()  # type: ignore[operator]
        made = Table(self.length, base.width, device=embedding.weight.device)
        if self.init != "random" and embedding.weight.device.type != "meta":
            ids = starting_ids(base, self.length, self.init_text if self.init == "text" else None)
            with torch.no_grad():
                made.table.copy_(embedding(ids))
        return Delta(
            {"prompt:table": made.table},
            prompt=made,
            shift=self.length,
            export=lambda: (
                virtual(base, "PROMPT_TUNING", self.length, deep=False) | {"prompt_tuning_init": "RANDOM"},
                {"prompt_embeddings": made.table.detach()},
            ),
        )

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Method, dict[str, Tensor]]:
        """A PEFT prompt-tuning directory as this method and its params."""
        table = tensors["prompt_embeddings"]
        return cls(length=len(table), init="random"), {"prompt:table": table}
