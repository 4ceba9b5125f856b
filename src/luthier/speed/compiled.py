"""The kernels of rows.cpp and attention.cpp: compiled once on a machine, kept in the cache folder, loaded in a moment, and tried against plain torch before
they are used.

Compiling takes about a second of one core with any C++ compiler that knows OpenMP, and needs nothing of torch: torch.compile makes as good code, but takes
seconds to load in every process and half a minute to compile, for each shape again. Where there is no compiler, or what it makes is wrong or cannot be loaded,
there are no row kernels, and everything keeps its plain form.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modelling.shards import is_sharded

log = logging.getLogger("luthier.speed")

FOLDER = Path(__file__).parent
# No fast-math: what is no number must stay none. Loops that sum are marked in the source.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_P, _N, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
KERNELS = {
    "miss": (_P, _P, _P, _N, _N, _F, _I, _I),
    "rms": (_P, _P, _P, _P, _N, _N, _F, _I, _I),
    "rms_back": (_P, _P, _P, _P, _P, _N, _N, _I, _I),
    "rms_weight": (_P, _P, _P, _P, _N, _N, _I, _I),
    "swiglu": (_P, _P, _P, _N, _I),
    "swiglu_back": (_P, _P, _P, _P, _P, _P, _N, _I),
    "rotate": (_P, _P, _P, _P, _N, _N, _N, _F, _I),
    "attend": (_P, _P, _N, _N, _N, _N, _I, _N, _F, _I),
    "attend_back": (_P, _P, _P, _N, _N, _N, _N, _I, _N, _F, _I),
    "collect": (_P, _P, _P, _N, _N, _N, _N, _I),
    "spread": (_P, _P, _P, _P, _P, _N, _N, _N, _I),
}
# Of bfloat16, and only where the processor has products of it.
WHOLE = {
    "attention": (_P, _P, _P, _P, _P, _N, _P, _N, _N, _N, _I, _N, _F, _I),
    "attention_back": (_P, _P, _P, _P, _P, _P, _P, _P, _P, _N, _P, _N, _N, _N, _I, _N, _F, _I),
}


class Places:
    """Whole numbers that a kernel reads, of which its work depends: equal where the numbers are."""

    def __init__(self, numbers: Tensor):
        self.numbers = numbers.contiguous()
        self.bytes = self.numbers.numpy().tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places) and self.bytes == other.bytes

    def __hash__(self) -> int:
        return hash(self.bytes)

    def data_ptr(self) -> int:
        """Where they lie."""
        return self.numbers.data_ptr()


WATCHING: list[Callable[[str, torch.dtype, tuple[Any, ...]], None]] = []  # who counts on meta what a run would compute


class RowKernels:
    """What the row kernels of every kind of device share. Called as (name, dtype, what rows.cpp has as arguments)."""

    device: str  # the kind
    dtypes: tuple[torch.dtype, ...]
    room: int  # bytes of logits that `miss` is best given at a time

    def run(self, name: str, dtype: torch.dtype, args: tuple[Any, ...]) -> None:
        """Compute."""
        raise NotImplementedError

    def __call__(self, name: str, dtype: torch.dtype, *args: Any) -> None:
        """Run a kernel. On meta nothing is run: whoever counts is told."""
        if args[0].is_meta:
            for see in WATCHING:
                see(name, dtype, args)
            return
        self.run(name, dtype, args)

    def fits(self, *tensors: Tensor) -> bool:
        """Whether kernels take these tensors as they are."""
        dtype = tensors[0].dtype
        return dtype in self.dtypes and all(
            t.device.type in (self.device, "meta") and t.dtype == dtype and t.is_contiguous() and not is_sharded(t) for t in tensors
        )


class Kernels(RowKernels):
    """The kernels of one library. Tensors are contiguous, on the CPU (or on meta, where only their shapes count), of one dtype among float32 and bfloat16."""

    device, dtypes, room = "cpu", tuple(NAMES), 32 << 20  # what stays in cache between the product and the kernel

    def __init__(self, library: Any):
        self.functions: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
        for dtype, suffix in NAMES.items():
            for name, types in KERNELS.items():
                self._add(getattr(library, f"{name}_{suffix}"), name, dtype, types)
        self.whole = bool(library.attention_is_here())  # attention in one pass
        for name, types in WHOLE.items() if self.whole else ():
            self._add(getattr(library, name), name, torch.bfloat16, types)

    def _add(self, function: Any, name: str, dtype: torch.dtype, types: tuple[Any, ...]) -> None:
        function.argtypes, function.restype = types, None
        self.functions[name, dtype] = function

    def __reduce__(self) -> Any:
        """A copy of a model has the kernels of this process."""
        return kernels, ()

    def run(self, name: str, dtype: torch.dtype, args: tuple[Any, ...]) -> None:
        """On torch's number of threads; tensors are given by where they lie."""
        self.functions[name, dtype](*(a.data_ptr() if isinstance(a, Tensor | Places) else a for a in args), torch.get_num_threads())


@functools.cache
def kernels() -> Kernels | None:
    """The kernels of this machine, or None; compiled where they are not in the cache yet."""
    try:
        found = _loaded()
        if found is None:
            return None
        failing = wrong(found)
    except (OSError, subprocess.SubprocessError, AttributeError) as e:
        log.info("row kernels are not used: %s", str(e).splitlines()[0] if str(e) else type(e).__name__)
        return None
    if failing:
        log.warning("row kernels are not used: %s gives other numbers than torch on this machine", failing)
        return None
    return found


def _loaded() -> Kernels | None:
    """The library, loaded; one in the cache that cannot be is made anew, once."""
    for last in (False, True):
        library = _library()
        if library is None:
            return None
        try:
            return Kernels(ctypes.CDLL(str(library)))
        except (OSError, AttributeError):
            if last:
                raise
            library.unlink(missing_ok=True)
    raise AssertionError


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next((found for c in ((named,) if named else ("g++", "c++", "clang++")) if (found := shutil.which(c))), None)


def _library() -> Path | None:
    """The compiled library, from the cache or made now; None where there is no compiler."""
    if (compiler := _compiler()) is None:
        log.info("row kernels are not used: there is no C++ compiler (g++, c++ or clang++, or what CXX names)")
        return None
    sources = sorted(FOLDER.glob("*.[ch]pp"))
    key = hashlib.sha256("\n".join([*(s.read_text() for s in sources), compiler, *FLAGS, _cpu()]).encode()).hexdigest()[:16]
    root = Path(os.environ.get("LUTHIER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier") / "kernels"
    library = root / f"rows-{key}.so"
    if library.is_file():
        return library
    root.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=root)
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, *FLAGS, *(str(s) for s in sources if s.suffix == ".cpp"), "-o", temporary], capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            log.info("row kernels are not used: %s cannot compile them: %s", compiler, (done.stderr.strip().splitlines() or ["no reason given"])[0])
            return None
        os.replace(temporary, library)  # whole or not at all: another process may be looking
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


def _cpu() -> str:
    """What this machine's processor can do: a home folder may be shared by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [str(torch.backends.cpu.get_cpu_capability())]
    return next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])


# --- tried against torch ------------------------------------------------------------------------------------------------


MOST = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # distance from float64 that rounding explains


def wrong(run: RowKernels) -> str | None:
    """The first kernel that is further from torch in float64 than rounding explains."""
    g = torch.Generator().manual_seed(0)
    for dtype in run.dtypes:
        for name, (got, wanted) in tried(run, dtype, g).items():
            if not all(bool(((a.double() - b).abs() <= MOST[dtype] * (1 + b.abs())).all()) for a, b in zip(got, wanted, strict=True)):
                return f"{name} ({str(dtype).removeprefix('torch.')})"
    return None


def tried(run: RowKernels, dtype: torch.dtype, g: torch.Generator, n: int = 5, d: int = 38) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """What each kernel gives for n rows of d numbers (no multiple of a vector's width), and what it should, in float64."""
    at = torch.device(run.device)
    x, up, grad, w = (torch.randn(s, d, generator=g).mul(2).to(at, dtype) for s in (n, n, n, 1))
    exact = [t.double().requires_grad_() for t in (x, up)]
    out = {}
    token = torch.randint(d, (n,), generator=g).to(at)
    logits, logp = x.clone(), torch.empty(n, device=at)
    run("miss", dtype, logits, token, logp, n, d, 0.5, 1)
    logp_nV = (0.5 * exact[0]).log_softmax(-1)
    out["miss"] = ([logp, logits], [(own := logp_nV.gather(1, token[:, None])[:, 0]), torch.autograd.grad(-own.sum(), exact[0])[0]])
    for plus_one in (0, 1):
        y, dx, inverse = torch.empty_like(x), torch.empty_like(x), torch.empty(n, device=at)
        run("rms", dtype, x, w, y, inverse, n, d, 1e-5, plus_one)
        run("rms_back", dtype, grad, x, w, inverse, dx, n, d, plus_one)
        dw = torch.empty(d, device=at)
        run("rms_weight", dtype, grad, x, inverse, dw, n, d, plus_one)
        weight = w.double().requires_grad_()
        z = (weight + plus_one) * exact[0] / (exact[0].square().mean(-1, keepdim=True) + 1e-5).sqrt()
        out[f"rms {plus_one}"] = ([y, dx, dw[None]], [z, *torch.autograd.grad(z, (exact[0], weight), grad.double())])
    h, again, dgate, dup = (torch.empty_like(x) for _ in range(4))
    run("swiglu", dtype, x, up, h, n * d)
    run("swiglu_back", dtype, grad, x, up, dgate, dup, again, n * d)
    z = torch.nn.functional.silu(exact[0]) * exact[1]
    out["swiglu"] = ([h, again, dgate, dup], [z, z, *torch.autograd.grad(z, exact, grad.double())])
    heads, e = 2, d // 4 * 2  # an even width
    q, cosine, sine = (t[:, :k].contiguous() for t, k in ((x, heads * e), (up, e), (grad, e)))
    turned, back = torch.empty_like(q), torch.empty_like(q)
    run("rotate", dtype, q, cosine, sine, turned, n, heads, e, 1.0)
    run("rotate", dtype, turned, cosine, sine, back, n, heads, e, -1.0)
    leaf = q.double().view(n, heads, e).requires_grad_()
    z = leaf * cosine.double()[:, None] + torch.cat([-leaf[..., e // 2 :], leaf[..., : e // 2]], -1) * sine.double()[:, None]
    out["rotate"] = ([turned, back], [z.flatten(1), torch.autograd.grad(z, leaf, turned.double().view(n, heads, e))[0].flatten(1)])
    if isinstance(run, Kernels):
        out |= _attention_tried(run, x, grad)
    return out


def _attention_tried(run: Kernels, x: Tensor, grad: Tensor) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """The kernels of attention: two pieces of two heads of three queries over five keys."""
    dtype, rows, n, m, out = x.dtype, 12, 3, 5, {}
    spans = torch.tensor([[0, 2, 5, 3], [1, 2, 4, 2]])
    at, key = torch.arange(n)[:, None], torch.arange(m)
    for causal, window in ((1, 0), (0, 0), (1, 2), (0, 2)):
        p, dp = (t.flatten()[: rows * m].clone() for t in (x, grad))
        leaf, upstream = p.double().view(2, 2, n, m).requires_grad_(), dp.double().view(2, 2, n, m)
        run("attend", dtype, p, Places(spans), rows, 2 * n, n, m, causal, window, 0.6)
        run("attend_back", dtype, dp, p, Places(spans), rows, 2 * n, n, m, causal, window, 0.6)
        seen = []
        for begin, own, end, queries in spans.tolist():
            near = ((own + at - key).abs() < window) if window else torch.ones(n, m, dtype=torch.bool)
            seen.append((key >= begin) & (key < end) & (at < queries) & near & ((key <= own + at) if causal else True))
        hidden = ~torch.stack(seen)[:, None].expand(2, 2, n, m)
        z = (0.6 * leaf).masked_fill(hidden, -1e30).softmax(-1).masked_fill(hidden, 0.0)
        out[f"attend {causal} {window}"] = ([p, dp], [z.flatten(), torch.autograd.grad(z, leaf, upstream)[0].flatten()])
    place, d = torch.tensor([4, 2, 2, 0]), 19  # of five positions of two heads; position 2 twice, 1 and 3 not at all
    pieces, back = x.new_empty(2, 2, 2, d), torch.empty_like(x)
    run("collect", dtype, x, Places(place), pieces, 2, 2, 2, d)
    first, start = torch.tensor([0, 1, 1, 3, 3, 4]), torch.tensor([5, 1, 4, 0])
    run("spread", dtype, pieces, Places(first), Places(start), Places(torch.full_like(start, 2)), back, 5, 2, d)
    times = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0])[:, None]
    out["collect"] = ([pieces], [x.double().view(5, 2, d)[place].view(2, 2, 2, d).transpose(1, 2)])
    out["spread"] = ([back], [x.double() * times])
    return out
