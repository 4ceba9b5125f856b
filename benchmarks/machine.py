"""The machine: is it idle, how fast does it multiply the workload's matrices, and what is it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from .limit import Flops
from .workload import Workload

BUSY_PERCENT = 5.0  # of all cores; what idle means here
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")


def wait_idle(timeout_s: float) -> str | None:
    """Wait until the CPU is idle for 2 seconds. Returns a note where it never was."""
    end = time.monotonic() + timeout_s
    while (busy := psutil.cpu_percent(interval=2.0)) >= BUSY_PERCENT:
        if time.monotonic() > end:
            return f"the CPU was never idle in {timeout_s:.0f} s (last: {busy:.0f} % busy): these figures are disturbed"
    return None


@dataclass(frozen=True)
class Rates:
    """Measured matrix products of the workload's shapes in bfloat16, operations a second."""

    linears: float
    head: float
    weights: float = 1.0  # g' x, where weights are trained

    def seconds(self, flops: Flops) -> float:
        """Time of these operations at these rates."""
        return flops.linears / self.linears + flops.head / self.head + flops.weights / self.weights

    def best(self, other: Rates) -> Rates:
        """The faster of two measurements: a disturbed one would make every distance to the limit look smaller than it is."""
        return Rates(max(self.linears, other.linears), max(self.head, other.head), max(self.weights, other.weights))

    def moved(self, other: Rates) -> float:
        """The larger relative change from one measurement to the other."""
        return max(abs(b / a - 1) for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True))


def rates(work: Workload, tokens: int, labelled: int, repeats: int = 3) -> Rates:
    """The best this machine does: forward x W' and backward g W, plain or with weights packed beforehand, whichever is faster; g' x for trained weights."""
    import torch

    torch.set_num_threads(work.threads)
    shapes = [work.dims(name) for name in work.linears]
    linears = _rate([(tokens, k, n) for k, n in shapes], _measured, 4.0, repeats)
    vocabulary = [(labelled, work.hidden, work.vocabulary)] if work.kind != "classify" else []
    head = _rate(vocabulary, _measured, 4.0, repeats) if vocabulary else linears
    weights = _rate([(tokens, k, n) for k, n in shapes] + vocabulary, _weights, 2.0, repeats) if work.method == "full" else 1.0
    _measured.cache.clear()
    return Rates(linears, head, weights)


def _rate(shapes: list[tuple[int, int, int]], measure: Callable[[int, int, int, int], float], times: float, repeats: int) -> float:
    """Operations a second over these (T, k, n)."""
    return sum(times * T * k * n for T, k, n in shapes) / sum(measure(T, k, n, repeats) for T, k, n in shapes)


def _weights(T: int, k: int, n: int, repeats: int) -> float:
    """Seconds of the gradient of a weight, g' x."""
    import torch

    x, g = torch.randn(T, k, dtype=torch.bfloat16), torch.randn(T, n, dtype=torch.bfloat16)
    return _best(lambda: g.t() @ x, repeats)


def quick_rate(threads: int) -> float:
    """Operations a second of one bfloat16 product, for a first idea of how long all will take."""
    import torch

    torch.set_num_threads(threads)
    x, w = torch.randn(1024, 768, dtype=torch.bfloat16), torch.randn(2048, 768, dtype=torch.bfloat16)
    return 2.0 * 1024 * 768 * 2048 / _best(_plain(x, w), 5)


class _Measured:
    """Seconds of one forward and one backward product; equal shapes are measured once."""

    def __init__(self) -> None:
        self.cache: dict[tuple[int, int, int], float] = {}

    def __call__(self, T: int, k: int, n: int, repeats: int) -> float:
        import torch

        if (T, k, n) not in self.cache:
            x, w, g = (torch.randn(s, dtype=torch.bfloat16) for s in ((T, k), (n, k), (T, n)))
            ways = [(_plain(x, w), repeats), (_packed(x, w), repeats)]
            back = [(_plain(g, w.t()), repeats), (_packed(g, w.t().contiguous()), repeats)]
            self.cache[T, k, n] = min(_best(*way) for way in ways) + min(_best(*way) for way in back)
        return self.cache[T, k, n]


_measured = _Measured()


def _plain(x: Any, w: Any) -> Callable[[], Any]:
    import torch

    return lambda: torch.nn.functional.linear(x, w)


def _packed(x: Any, w: Any) -> Callable[[], Any]:
    """The same through oneDNN's own weight layout; the plain product where this build of torch has no such operator."""
    import torch

    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(w, len(x))
        product = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")  # noqa: E731
        product()
    except (RuntimeError, AttributeError):
        return _plain(x, w)
    return product


def _best(product: Callable[[], Any], repeats: int) -> float:
    product()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True)
class Machine:
    """What the figures were measured on."""

    cpu: str
    cores: int
    memory_gib: float
    system: str
    python: str
    packages: dict[str, str]
    commit: str | None


def missing() -> list[str]:
    """Packages of the peers that are not installed."""
    return [p for p in PACKAGES if importlib.util.find_spec(p) is None]


def describe() -> dict[str, Any]:
    """This machine and these versions, as JSON."""
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    except OSError:
        commit = None
    return asdict(
        Machine(
            cpu=_cpu(),
            cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
            memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            packages={p: importlib.metadata.version(p) for p in PACKAGES},
            commit=commit,
        )
    )


def _cpu() -> str:
    """The CPU's name and its units for bfloat16."""
    name, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        named = {k.strip(): v.strip() for k, v in fields.items()}
        name, flags = named.get("model name", name), named.get("flags", "")
    units = [u for u in ("amx_bf16", "avx512_bf16") if u in flags.split()]
    return f"{name} ({units[0]})" if units else name
