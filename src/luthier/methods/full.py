"""Full fine-tuning: every weight of the base is trained.

The most capable and the most expensive choice: the optimizer holds three more numbers for every weight, the result is a whole model, and
what the base knew is the easiest to lose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..core import Base, Delta


@dataclass(frozen=True, kw_only=True)
class Method:
    """Trains all parameters of the base in place; a tied tensor once."""

    edits: ClassVar[Literal["weights"]] = "weights"
    lr_factor: ClassVar[float] = 1.0
    whole: ClassVar[bool] = True  # what is saved is a whole model

    def attach(self, base: Base, name: str) -> Delta:
        """Mark every parameter as trained. Keys are "<module path>:<leaf>"."""
        params = {}
        for full_name, p in base.model.named_parameters():  # a tied tensor comes once, under its first name
            p.requires_grad_(True)
            path, _, leaf = full_name.rpartition(".")
            params[f"{path}:{leaf}"] = p
        return Delta(params, fold=lambda: None)
