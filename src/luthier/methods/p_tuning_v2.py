"""P-tuning v2: deep prompts, trained keys and values in every layer, with a head for the task.

Liu et al., 2021, arXiv 2110.07602, section 3.2: prefix tuning made for understanding tasks - without the MLP by default, from random values, with dropout,
and with a classification head (objective: classify) instead of a verbaliser.

How it differs from the paper:
1. Values start as noise of standard deviation 0.02 and not 1 where they are trained directly; the authors' embedding table starts at 1.
2. As in prefix tuning here, they enter inside attention and not as a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from ..core import Base, Delta
from ..deltas.deep import attach_prefix, read_prefix
from ..deltas.prompts import Virtual
from ..settings.plugins import Range


@dataclass(frozen=True, kw_only=True)
class Method(Virtual):
    """Deep prompts."""

    hidden: Annotated[int | None, Range(1)] = None
    """Width of the MLP that makes the prompts during training. Default: none."""
    dropout: Annotated[float, Range(0, 0.99)] = 0.0
    """Dropout on the prompts' keys and values."""

    @property
    def lr_factor(self) -> float:
        """Four times LoRA's rate where keys and values are trained directly: a small decoder did best at far more, a small BERT at less (docs/log.md)."""
        return 40.0 if self.hidden is None else 10.0

    def attach(self, base: Base, name: str) -> Delta:
        """Make the prompts. Raises Incompatible where they leave no room, or the model's attention is its own."""
        return attach_prefix(base, "prompts", self.length, hidden=self.hidden, text=None, std=0.02, dropout=self.dropout)

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Method, dict[str, Tensor]]:
        """A PEFT prefix-tuning directory as this method and its params."""
        length, params = read_prefix(tensors, "prompts")
        return cls(length=length), params
