"""A faster forward that stands in for a module's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Form:
    """Stands in for a module's forward: the faster one where it serves, else that of the module's class."""

    def __init__(self, module: Any):
        self.module, self.kind = module, type(module)

    def faster(self, *args: Any, **kwargs: Any) -> Any:
        """The output, or None where the module's own forward is asked for."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        done = self.faster(*args, **kwargs) if torch.is_grad_enabled() else None  # what is not learned from is computed plainly
        return self.kind.forward(self.module, *args, **kwargs) if done is None else done

    def put(self) -> None:
        """Let it stand in from now on."""
        self.module.__dict__["forward"] = self


def remove(lm: nn.Module) -> None:
    """Give every module its own forward back."""
    for module in lm.modules():
        if isinstance(module.__dict__.get("forward"), Form):
            del module.__dict__["forward"]
