"""GPUs by their data sheets (assets/gpus.yaml), and how long collectives take between them: arithmetic, not a measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ..errors import ConfigError
from ..settings.names import nearest

TABLE = Path(__file__).parents[1] / "assets" / "gpus.yaml"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in its usual machine, and what of its data sheet a run is taken to reach."""

    name: str
    memory: float  # GB
    bfloat16: float  # 10^12 operations a second in dense products
    float32: float
    bandwidth: float  # GB/s of its memory
    link: float  # GB/s each way to the others of its machine
    network: float  # GB/s each way, its share of the machine's
    source: str = ""
    products: float = 0.65  # of the peak that large products reach
    reached: float = 0.8  # of bandwidth, link and network
    launch: float = 5.0  # microseconds that an operation takes at least
    hop: float = 8.0  # microseconds of a collective's step from rank to rank


def gpu(asked: str) -> Gpu:
    """By a name of the table, with numbers of one's own behind it: "h100,network=25,memory=94". Raises ConfigError for what is not known."""
    import yaml

    known = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    name, *changes = (part.strip() for part in asked.lower().split(","))
    if name not in known:
        near = nearest(name, known)
        raise ConfigError(f"--gpu: {name!r} is not in the table; accepted are {', '.join(known)}" + (f". Did you mean {near}?" if near else ""))
    found = Gpu(name=name, **known[name])
    numbers = [f.name for f in fields(Gpu) if f.type == "float"]
    for change in changes:
        key, _, value = change.partition("=")
        try:
            if key not in numbers or float(value) <= 0:
                raise ValueError
            found = replace(found, **{key: float(value)})  # type: ignore[arg-type]
        except ValueError:
            raise ConfigError(f"--gpu: {change!r} is no number of a GPU; accepted are {', '.join(numbers)}, for example {name},network=25") from None
    return found


@dataclass(frozen=True)
class Mesh:
    """So many ranks, a GPU each, on so many machines."""

    ranks: int
    machines: int = 1

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.machines < 1 or self.ranks % self.machines:
            raise ConfigError(f"--ranks {self.ranks} --nodes {self.machines}: every machine has as many ranks, so the first is a multiple of the second")

    @property
    def local(self) -> int:
        """Ranks of a machine."""
        return self.ranks // self.machines


@dataclass(frozen=True)
class Ring:
    """The ranks of a collective: so many of each machine, on so many machines."""

    local: int
    machines: int

    @property
    def size(self) -> int:
        """All of them."""
        return self.local * self.machines


def _speed(ring: Ring, gpu: Gpu) -> float:
    """Bytes a second that pass each rank in a ring: into a machine every byte comes once, over the network of all its ranks."""
    return 1e9 * gpu.reached * (gpu.link if ring.machines == 1 else min(gpu.link, gpu.network * ring.local))


def gathering(whole: float, ring: Ring, gpu: Gpu) -> float:
    """Seconds until every rank has ``whole`` bytes of which each had its part; as long takes adding up and scattering them. A ring: a step from rank to rank
    for each part."""
    n = ring.size
    return 0.0 if n == 1 else whole * (n - 1) / n / _speed(ring, gpu) + (n - 1) * gpu.hop * 1e-6


def adding(whole: float, ring: Ring, gpu: Gpu) -> float:
    """Seconds of an all-reduce: scattered and gathered, in trees where there are many ranks."""
    n = ring.size
    return 0.0 if n == 1 else 2 * whole * (n - 1) / n / _speed(ring, gpu) + 2 * math.ceil(math.log2(n)) * gpu.hop * 1e-6
