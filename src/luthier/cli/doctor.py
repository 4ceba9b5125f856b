"""luthier doctor: whether this machine and its packages are fit, measured."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    import torch

NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "yaml", "rich", "typer", "sacrebleu", "jinja2", "psutil")
PACKAGE = {"yaml": "pyyaml"}  # import name -> name on the index
OPTIONAL = {
    "bitsandbytes": "quant",
    "tensorboard": "loggers",
    "wandb": "loggers",
    "trackio": "loggers",
}


@dataclass(frozen=True)
class Finding:
    """One line."""

    state: Literal["ok", "warn", "bad"]
    name: str
    text: str


def command() -> None:
    """Check Python, packages, CPU, memory, disk and devices, and measure matrix products. Exit code 1 if something needed is broken."""
    broken = 0
    for finding in findings():
        broken += finding.state == "bad"
        typer.echo(f"{finding.state:<5} {finding.name:<16} {finding.text}")
    if broken:
        typer.echo(f"\n{broken} of what luthier needs {'is' if broken == 1 else 'are'} broken: the lines marked bad")
        raise typer.Exit(1)


def findings() -> Iterator[Finding]:
    """All checks, cheap ones first; each is yielded as soon as it is known."""
    good = sys.version_info >= (3, 11)
    yield Finding("ok" if good else "bad", "python", f"{platform.python_version()} (3.11 or newer is needed)")
    wanted = ranges()
    if not wanted:
        yield Finding("warn", "luthier", "not installed as a package, so versions are not compared with the supported ranges; pip install -e .")
    works = True
    for module in NEEDED:
        finding = package(module, wanted)
        works &= finding.state != "bad"
        yield finding
    yield from (optional(module, extra) for module, extra in OPTIONAL.items())
    yield base()
    yield memory()
    yield disk(Path.cwd())
    yield compiler()
    if works:
        yield cache()
        yield from torch_findings()


def ranges() -> dict[str, str]:
    """Package -> supported range, as luthier was installed; empty where it runs from a folder."""
    try:
        from packaging.requirements import Requirement

        needs = [Requirement(r) for r in metadata.requires("luthier") or []]
    except (metadata.PackageNotFoundError, ImportError):
        return {}
    return {r.name.lower(): str(r.specifier) for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})}


def package(module: str, wanted: dict[str, str]) -> Finding:
    """A package that luthier needs: it imports, and its version is in the range."""
    name = PACKAGE.get(module, module)
    try:
        import_module(module)
        version = metadata.version(name)
    except Exception as e:  # a broken binary raises anything
        return Finding("bad", name, f"does not import: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
    supported = wanted.get(name.lower(), "")
    if not supported:
        return Finding("ok", name, version)
    from packaging.specifiers import SpecifierSet

    fits = SpecifierSet(supported).contains(version, prereleases=True)
    return Finding("ok" if fits else "bad", name, f"{version} (supported: {supported})")


def optional(module: str, extra: str) -> Finding:
    """A package of an extra. Missing is no fault."""
    name = PACKAGE.get(module, module)
    try:
        return Finding("ok", name, f"{metadata.version(name)} (optional)")
    except metadata.PackageNotFoundError:
        there = "present without a version" if find_spec(module) else f"not installed; optional: pip install 'luthier[{extra}]'"
        return Finding("ok", name, there)


def base() -> Finding:
    """The embedded model."""
    folder = Path(__file__).parent.parent / "assets" / "fiddle"
    files = sorted(folder.glob("*.safetensors")) if (folder / "config.json").is_file() else []
    size = sum(f.stat().st_size for f in files)
    if not files:
        return Finding("bad", "fiddle", f"the embedded base is missing from {folder}")
    return Finding("ok", "fiddle", f"the embedded base, {size / 1e6:.1f} MB")


def memory() -> Finding:
    """Main memory, as far as this process may have it."""
    try:
        import psutil
    except ImportError:
        return Finding("warn", "memory", "unknown: psutil is missing")
    m = psutil.virtual_memory()
    total, free = m.total, m.available
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own limit; psutil sees the whole machine
    if limit.is_file() and (text := limit.read_text().strip()).isdigit() and int(text) < total:
        used = Path("/sys/fs/cgroup/memory.current")
        total = int(text)
        free = min(free, total - int(used.read_text()) if used.is_file() else total)
    return Finding("ok" if free > 2e9 else "warn", "memory", f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB")


def disk(folder: Path) -> Finding:
    """Room where runs are written."""
    usage = shutil.disk_usage(folder)
    denied = "" if os.access(folder, os.W_OK) else ", which cannot be written"
    return Finding("warn" if denied or usage.free < 5e9 else "ok", "disk", f"{usage.free / 1e9:.1f} GB free at {folder}{denied}")


def compiler() -> Finding:
    """A C++ compiler, which torch.compile calls."""
    found = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++", "cl") if c and shutil.which(c)), None)
    return Finding("ok", "compiler", found) if found else Finding("warn", "compiler", "no C++ compiler found; torch.compile needs one, nothing else does")


def cache() -> Finding:
    """Where models from the Hub are kept."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    models = len(list(folder.glob("models--*"))) if folder.is_dir() else 0
    offline = "; HF_HUB_OFFLINE is set, so nothing is fetched" if constants.HF_HUB_OFFLINE else ""
    return Finding("ok", "hub cache", f"{folder}, {models} models{offline}")


def torch_findings() -> Iterator[Finding]:
    """CPU features, speed and devices, as torch sees them."""
    import torch

    from ..build import fast_precision
    from ..settings.plugins import plugin

    here = torch.device("cpu")
    yield Finding("ok", "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    speeds = {d: gemm(getattr(torch, d), here) for d in ("float32", "bfloat16")}
    said = ", ".join(f"{d} {v / 1e9:,.0f} GFLOP/s" for d, v in speeds.items())
    best, why = fast_precision(here)
    # precision: auto decides by the CPU's features; say so where the measurement disagrees
    odd = speeds[best] < 0.8 * max(speeds.values())
    slower = ", which is slower here" if odd else ""
    yield Finding("warn" if odd else "ok", "speed", f"1024 x 1024 x 1024: {said}; precision: auto takes {best} ({why}){slower}")
    for i in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(i)
        name = f"cuda:{i}"
        yield Finding("ok", name, f"{props.name}, {props.total_memory / 1e9:.0f} GB, bfloat16 {gemm(torch.bfloat16, torch.device(name)) / 1e12:,.0f} TFLOP/s")
    if torch.backends.mps.is_available():
        yield Finding("ok", "mps", f"Apple GPU, float32 {gemm(torch.float32, torch.device('mps')) / 1e9:,.0f} GFLOP/s")
    device = plugin("place", "one")().device
    yield Finding("ok", "place", f"place: one runs on {device}")


def gemm(dtype: torch.dtype, device: torch.device, *, size: int = 1024, seconds: float = 0.2) -> float:
    """Floating-point operations per second of a square matrix product: the best of what fits into ``seconds``."""
    import torch

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    best, end = float("inf"), time.perf_counter() + seconds
    a @ b  # the first one pays for the setup
    wait()
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
