"""One device: CPU, CUDA or Apple's MPS, by the same code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from ..core import LuthierError


@dataclass(frozen=True, kw_only=True)
class Place:
    """Everything on one device of this process."""

    rank: ClassVar[int] = 0
    size: ClassVar[int] = 1

    on: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """The device. auto: CUDA where there is one, else MPS, else CPU."""
    threads: int | None = None
    """CPU threads for tensor work. Default: one per core."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise LuthierError(f"threads: must be at least 1, found {self.threads}")
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if self.on != "auto" and not there[self.on]:
            have = ", ".join(d for d, yes in there.items() if yes)
            raise LuthierError(f"on: {self.on} was asked for, but torch finds no {self.on.upper()} device here; this machine has {have}. Use place.on=auto")

    @property
    def device(self) -> torch.device:
        """The torch device."""
        if self.on != "auto":
            return torch.device(self.on)
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")

    def put(self, policy: nn.Module) -> None:
        """Move everything there; last of all. Denormals are flushed: free, and safe for training."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.set_flush_denormal(True)
        policy.to(self.device)

    def mean(self, x: float) -> float:
        """Over ranks: there is one."""
        return x
