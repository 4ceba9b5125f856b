"""Several processes with one device each, as torchrun starts them: the same run as on one, its batches dealt out.

The process group is PyTorch's: gloo between CPUs, NCCL between CUDA devices, with numbers and objects on gloo there too. Every rank holds the base; deltas and
their gradients are the same everywhere, by one all-reduce of the optimizer's flat fp32 buffer a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..core import LuthierError
from ..devices.device import OnDevice, Together
from ..devices.launched import launched
from ..devices.ranks import Group, joined
from ..devices.sharding import Sharding, choose, sharding_of
from ..modelling.context import Group as Sharers
from ..modelling.context import joined as sharers
from ..settings.plugins import Range, within_ranges

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Place(OnDevice):
    """All processes of a launch."""

    shard: Literal["auto", "full", "hybrid", "none"] = "auto"
    """What of the weights each rank holds. none: all of them; full: a part of each; hybrid: a part, of which the machine's ranks have all together. auto: none
    where they fit into half of a device's memory and are not trained, else hybrid or full."""
    offload: bool = False
    """Keep what is sharded in the CPU's memory while it is not computed with."""
    context: Annotated[int, Range(1)] = 1  # type: ignore[misc]
    """Neighbouring ranks that share each sequence, every one keeping some of its positions, for sequences that one device does not hold."""
    timeout: Annotated[float, Range(1)] = 600.0
    """Seconds that a rank waits for the others before the run is ended, with the name of the rank that is missing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within_ranges(self)
        if self.offload and (self.shard == "none" or self.device.type != "cuda"):
            why = "every rank holds the whole base" if self.shard == "none" else "what is sharded already lies in the CPU's memory here"
            raise LuthierError(f"offload: {why}, so there is nothing to offload; leave it out")
        here = launched()
        if self.device.type == "mps" and here.size > 1:
            raise LuthierError("several processes do not share an MPS device; start one, or set place.on=cpu")
        if self.device.type == "cuda" and here.local >= torch.cuda.device_count():
            raise LuthierError(
                f"this machine has {torch.cuda.device_count()} CUDA devices and {here.local_size} processes were started on it; say "
                f"torchrun --nproc-per-node {torch.cuda.device_count()}, or place.on=cpu"
            )

    @property
    def rank(self) -> int:
        return launched().rank

    @property
    def size(self) -> int:
        return launched().size

    @property
    def device(self) -> torch.device:
        """This rank's own."""
        device = super().device
        return torch.device("cuda", launched().local) if device.type == "cuda" else device

    @property
    def group(self) -> Group:
        """The processes, joined at the first use."""
        return joined(self.device, self.timeout)

    @property
    def traffic(self) -> Counter[str]:
        return self.group.traffic if self.size > 1 else Counter()

    @property
    def sequence(self) -> Sharers | None:
        return sharers(self)

    def start(self) -> None:
        if self.size % self.context:
            raise LuthierError(
                f"place.context: {self.context} ranks are to share each sequence, and {self.size} process{'es were' if self.size > 1 else ' was'} started; "
                f"start a multiple of {self.context} with torchrun, or set place.context=1"
            )
        if self.size > 1:
            _ = self.group

    def doing(self, what: str) -> AbstractContextManager[None]:
        return self.group.doing(what) if self.size > 1 else super().doing(what)

    def sums(self, named: Mapping[str, float], what: str = "numbers") -> dict[str, float]:
        return self.group.sums(named, what) if self.size > 1 else super().sums(named, what)

    def average(self, tensors: Sequence[Tensor], what: str = "gradients") -> None:
        if self.size > 1:
            self.group.average(tensors, what)

    def gather(self, own: T, what: str = "objects") -> list[T]:
        return self.group.gather(own, what) if self.size > 1 else [own]

    def share(self, own: T, what: str = "settings") -> T:
        return self.group.share(own, what) if self.size > 1 else own

    def wait(self, what: str = "the others") -> None:
        if self.size > 1:
            self.group.wait(what)

    def wait_for_first(self, what: str = "the first rank") -> None:
        if self.size > 1:
            self.group.wait_for_first(what)

    def sharding(self, on_meta: Callable[[], nn.Module], *, trains: bool, needs_whole: bool, compute: torch.dtype) -> Sharding | None:
        """How a base (made on the meta device by ``on_meta``) is laid out over the ranks; None: each holds all of it.

        ``needs_whole``: something of the run wants weights that a rank has not, so it is done only where that is asked for, and then refused by who wants them.
        """
        found = None
        if self.size > 1 and self.shard != "none" and not (self.shard == "auto" and needs_whole):
            self.start()
            found = choose(on_meta(), trains=trains, compute=compute, place=self, local_size=launched().local_size)
        if found is None and self.offload:
            raise LuthierError(
                "place.offload: this base is not sharded here, so there is nothing to offload; leave it out, or set place.shard=full on several devices"
            )
        return found

    def put(self, policy: nn.Module) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        super().put(policy)
        if sharding_of(policy.lm) is not None:  # type: ignore[arg-type]
            policy.place = Together(self)  # type: ignore[assignment]

    def move(self, policy: nn.Module) -> None:
        laid_out = sharding_of(policy.lm)  # type: ignore[arg-type]
        if laid_out is None:
            super().move(policy)
        else:
            laid_out.move(policy)
