"""Luthier fine-tunes language models: model x method x objective x precision x place.

The names below are imported when they are first used, so that `import luthier` and `luthier --help` cost nothing.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Batch", "Loss", "Policy", "Run", "__version__", "assemble", "load", "load_stages", "train", "train_stages"]

if TYPE_CHECKING:
    from .build import assemble
    from .core import Batch, Loss
    from .opening import load
    from .policy import Policy
    from .running.starting import execute as train
    from .settings.run import Run
    from .staging.relay import train_stages
    from .staging.stages import load_stages

_HOME = {
    "Batch": ("core", "Batch"),
    "Loss": ("core", "Loss"),
    "Policy": ("policy", "Policy"),
    "Run": ("settings.run", "Run"),
    "assemble": ("build", "assemble"),
    "load": ("opening", "load"),
    "load_stages": ("staging.stages", "load_stages"),
    "train": ("running.starting", "execute"),
    "train_stages": ("staging.relay", "train_stages"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    from .heap import loading

    module, attribute = _HOME[name]
    with loading():
        home = import_module(f"{__name__}.{module}")
    globals()[name] = found = getattr(home, attribute)
    return found


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing train.py would put the module where the function `luthier.train` is; inside, write `from .train import ...`.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
