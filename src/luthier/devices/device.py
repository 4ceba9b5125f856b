"""What all places share: the settings of a device, and what ranks agree on where there is only one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..core import LuthierError

T = TypeVar("T")


class Alone:
    """One rank: what it says is what all say. The base of every place, and what a policy has that was put nowhere."""

    context: ClassVar[int] = 1  # ranks that share each sequence

    @property
    def rank(self) -> int:
        """This process's number."""
        return 0

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1

    @property
    def lane(self) -> int:
        """Which share of the data is this rank's; ranks that share each sequence have the same."""
        return self.rank // self.context

    @property
    def lanes(self) -> int:
        """How many shares there are."""
        return self.size // self.context

    @property
    def sequence(self) -> Any:
        """The ranks that share each sequence (context.Group); None: a rank has its own."""
        return None

    @property
    def leads(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

    @property
    def traffic(self) -> Counter[str]:
        """Bytes that this rank has handed to collectives so far, by what they were for."""
        return Counter()

    def start(self) -> None:
        """Join the others, once."""

    def doing(self, what: str) -> AbstractContextManager[None]:
        """While this lasts others may be waited for: what a message says of this rank."""
        return nullcontext()

    def sums(self, named: Mapping[str, float], what: str = "numbers") -> dict[str, float]:
        """The sum over ranks by name, all in one collective; a rank need not have every name."""
        return dict(named)

    def mean(self, x: float) -> float:
        """Over ranks."""
        return self.sums({"": x})[""] / self.size

    def average(self, tensors: Sequence[Tensor], what: str = "gradients") -> None:
        """Replace each by its mean over ranks."""

    def gather(self, own: T, what: str = "objects") -> list[T]:
        """What every rank has, in their order. Small things: they are pickled."""
        return [own]

    def share(self, own: T, what: str = "settings") -> T:
        """What the first rank has."""
        return own

    def wait(self, what: str = "the others") -> None:
        """Until all ranks are here."""

    def wait_for_first(self, what: str = "the first rank") -> None:
        """Until the first rank is here, however long it works before."""


class Together(Alone):
    """What a policy has whose base lies over the ranks: each forward is one of all of them, so all do all of the work and have all results. Who
    writes, and what is looked at once, is as in the launch."""

    def __init__(self, launch: Alone):
        self.launch = launch

    @property
    def leads(self) -> bool:
        return self.launch.leads

    def doing(self, what: str) -> AbstractContextManager[None]:
        return self.launch.doing(what)

    def share(self, own: T, what: str = "settings") -> T:
        return self.launch.share(own, what)

    def wait(self, what: str = "the others") -> None:
        self.launch.wait(what)


@dataclass(frozen=True, kw_only=True)
class OnDevice(Alone):
    """Settings of a place whose ranks have one device each."""

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
        self.move(policy)
        policy.place = self  # type: ignore[assignment]

    def move(self, policy: nn.Module) -> None:
        """Its tensors to the device."""
        policy.to(self.device)


SAID = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "bad allocation")


def ran_out(e: BaseException) -> bool:
    """Whether this error says that memory was not enough: on CUDA, MPS or the CPU."""
    return isinstance(e, MemoryError | torch.OutOfMemoryError) or (isinstance(e, RuntimeError) and any(s in str(e).lower() for s in SAID))
