"""One device: CPU, CUDA or Apple's MPS, by the same code."""

from __future__ import annotations

import re
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
    memory: str = "auto"
    """How much memory the run may take, for example 24GB: micro-batches are made smaller and blocks recomputed until its prediction holds that, with the same
    results, or the run is refused. auto: the same with what is free, and it is not refused; off: the settings stay as they are."""

    def __post_init__(self) -> None:
        if self.memory not in ("auto", "off") and self.ceiling is None:
            raise LuthierError(f"memory: {self.memory!r} is no size of memory; accepted are auto, off, or a size such as 24GB or 800MB")
        if self.threads is not None and self.threads < 1:
            raise LuthierError(f"threads: must be at least 1, found {self.threads}")
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if self.on != "auto" and not there[self.on]:
            have = ", ".join(d for d, yes in there.items() if yes)
            raise LuthierError(f"on: {self.on} was asked for, but torch finds no {self.on.upper()} device here; this machine has {have}. Use place.on=auto")

    @property
    def ceiling(self) -> int | None:
        """Bytes that the run may take; None where no size was given."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM])B?", self.memory.strip(), re.IGNORECASE)
        return int(float(found[1]) * (1e9 if found[2] in "Gg" else 1e6)) or None if found else None

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
