"""Prefix tuning: trained keys and values in every attention, which every token sees.

Li & Liang, 2021, arXiv 2101.00190, sections 4.2 and 4.3. They enter inside attention, not as a cache: so prefixes train under gradient checkpointing and
packed, with grouped queries, in encoders and on both sides of encoder-decoders, and serve beside other deltas in one batch.

How it differs from the paper:
1. The network that makes the prefix (the paper's MLP) is a choice, ``hidden``; without it keys and values are trained directly.
2. They start as the keys and values the model computes for a text; with an MLP they are added to its output, which starts at 0.
3. The text's positions start behind the prefix, as in PEFT, where a model takes its positions from outside. A prefix is never inside a sliding window,
   and T5's relative positions do not reach it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from ..core import Base, Delta
from ..deltas.deep import attach_prefix, read_prefix
from ..deltas.prompts import Virtual
from ..settings.plugins import Range


@dataclass(frozen=True, kw_only=True)
class Method(Virtual):
    """A prefix in every attention."""

    hidden: Annotated[int | None, Range(1)] = None
    """Width of the MLP that makes the prefix during training (512 or 800 in the paper). Default: none, trained directly."""
    init: Literal["text", "random"] = "text"
    """text: the keys and values of init_text (of sampled tokens, where the model has no tokenizer). random: small noise."""
    init_text: str = "Answer the request below clearly and correctly."
    """The text of init=text, repeated to the length."""

    @property
    def lr_factor(self) -> float:
        """Four times LoRA's rate where keys and values are trained directly: a small decoder did best at far more, a small BERT at less (docs/log.md)."""
        return 40.0 if self.hidden is None else 10.0

    def attach(self, base: Base, name: str) -> Delta:
        """Make the prefix. Raises Incompatible where it leaves no room, or the model's attention is its own."""
        return attach_prefix(base, "prefix", self.length, hidden=self.hidden, text=self.init_text if self.init == "text" else None, std=0.02)

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Method, dict[str, Tensor]]:
        """A PEFT prefix-tuning directory as this method and its params."""
        length, params = read_prefix(tensors, "prefix")
        return cls(length=length, init="random"), params
