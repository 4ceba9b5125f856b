"""What the launcher (torchrun) told this process: which of how many it is. Reads the environment only."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launched:
    """One process of a launch."""

    rank: int = 0  # of all processes
    size: int = 1
    local: int = 0  # of those on this machine
    local_size: int = 1
    restarts: int = 0  # how often torchrun has started all of them again
    id: str = ""  # of the launch, the same after a restart; "" without torchrun, or where it was given none

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


def launched() -> Launched:
    """As torchrun's environment variables say it; one process without them."""
    number = lambda name, default: int(os.environ.get(name) or default)  # noqa: E731
    if not os.environ.get("WORLD_SIZE") or not os.environ.get("RANK"):
        return Launched()
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return Launched(
        number("RANK", 0),
        number("WORLD_SIZE", 1),
        number("LOCAL_RANK", 0),
        number("LOCAL_WORLD_SIZE", 1),
        number("TORCHELASTIC_RESTART_COUNT", 0),
        "" if name == "none" else name,
    )
