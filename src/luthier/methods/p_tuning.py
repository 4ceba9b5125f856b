"""P-tuning: a soft prompt that an encoder makes from trained vectors.

Liu et al., 2021, arXiv 2103.10385, section 3.2. The encoder (MLP or two-way LSTM) ties the prompt's vectors to one another while they are trained; it
is kept in checkpoints so that training can go on, and dropped on export: what serves is its output.

How it differs from the paper:
1. The whole prompt stands in front of the input, as in PEFT, not between its parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from ..core import Base, Delta
from ..deltas.layout import virtual
from ..deltas.prompts import Virtual, leave_room
from ..nn.prompts import Encoded
from ..settings.plugins import Range


@dataclass(frozen=True, kw_only=True)
class Method(Virtual):
    """A soft prompt made by an encoder."""

    lr_factor: ClassVar[float] = 10.0  # LoRA's, as searched on E2E

    encoder: Literal["mlp", "lstm"] = "mlp"
    """What makes the prompt from the trained vectors."""
    hidden: Annotated[int | None, Range(1)] = None
    """Width of the encoder. Default: the model's."""
    layers: Annotated[int, Range(1)] = 2
    """Layers of the LSTM; the MLP always has three linears."""
    dropout: Annotated[float, Range(0, 0.99)] = 0.0
    """Dropout between the LSTM's layers."""

    def attach(self, base: Base, name: str) -> Delta:
        """Make the encoder. Raises Incompatible where the prompt leaves the model no room."""
        leave_room(base, self.length)
        device = next(base.model.parameters()).device
        made = Encoded(self.length, base.width, self.hidden or base.width, kind=self.encoder, layers=self.layers, dropout=self.dropout, device=device)
        # PEFT's "hidden size" is ours; a directory holds the prompt, not the encoder, so its reading back is a plain soft prompt.
        kind = {"encoder_reparameterization_type": self.encoder.upper(), "encoder_hidden_size": self.hidden or base.width}
        return Delta(
            {f"prompt:{n}": p for n, p in made.named_parameters()},
            prompt=lambda: made.train(base.model.training)(),
            shift=self.length,
            export=lambda: (virtual(base, "P_TUNING", self.length, deep=False) | kind, {"prompt_embeddings": made().detach()}),
        )

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """A PEFT P-tuning directory: the encoder is not in it, so it reads back as the soft prompt it made."""
        from .prompt import Method as Prompt

        table = tensors["prompt_embeddings"]
        return Prompt(length=len(table), init="random"), {"prompt:table": table}
