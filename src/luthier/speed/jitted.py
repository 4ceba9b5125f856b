"""The row kernels of triton_rows.py on CUDA: compiled by triton at their first call, kept in its cache, and tried against plain torch before they are used.

CUDA builds of torch bring triton. Where it is missing, or what it makes is wrong, there are no row kernels, and everything keeps its plain form.
"""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .compiled import RowKernels, wrong

log = logging.getLogger("luthier.speed")

LINES = 256  # rows that a program adds up
TILE = 4096  # numbers that a program has at hand, where rows are short


class Kernels(RowKernels):
    """The kernels of triton_rows.py. Tensors are contiguous, on one CUDA device (or on meta), of one dtype among float32 and the 16-bit ones."""

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    room = 128 << 20

    def __init__(self, source: Any, device: str = "cuda"):
        self.source, self.device = source, device

    def __reduce__(self) -> Any:
        """A copy of a model has the kernels of this process."""
        return kernels, ()

    def fits(self, *tensors: Tensor) -> bool:
        """Whether kernels take these tensors as they are."""
        return super().fits(*tensors) and len({t.device for t in tensors}) == 1

    def run(self, name: str, dtype: torch.dtype, args: tuple[Any, ...]) -> None:
        """On the device of the tensors and its current stream."""
        with _on(args[0].device):
            getattr(self, f"_{name}")(*args)

    def _miss(self, logits: Tensor, token: Tensor, logp: Tensor, n: int, width: int, scale: float, write: int) -> None:
        wide = min(TILE, _power(width))
        if n:
            self.source.miss[(n,)](logits, token, logp, scale, V=width, WRITE=bool(write), WIDE=wide, num_warps=8)

    def _rms(self, x: Tensor, w: Tensor, y: Tensor, inverse: Tensor, n: int, d: int, eps: float, plus_one: int) -> None:
        grid, how = _rows(n, d)
        if n:
            self.source.rms[grid](x, w, y, inverse, n, eps, D=d, PLUS_ONE=bool(plus_one), **how)

    def _rms_back(self, g: Tensor, x: Tensor, w: Tensor, inverse: Tensor, dx: Tensor, n: int, d: int, plus_one: int) -> None:
        grid, how = _rows(n, d)
        if n:
            self.source.rms_back[grid](g, x, w, inverse, dx, n, D=d, PLUS_ONE=bool(plus_one), **how)

    def _rms_weight(self, g: Tensor, x: Tensor, inverse: Tensor, dw: Tensor, n: int, d: int, plus_one: int) -> None:
        parts = torch.empty(-(-n // LINES), d, dtype=torch.float32, device=x.device)
        wide = min(128, _power(d))
        if n:
            grid = -(-d // wide), len(parts)
            self.source.rms_weight[grid](g, x, inverse, parts, n, D=d, PLUS_ONE=bool(plus_one), LINES=LINES, ROWS=16, WIDE=wide, num_warps=4)
        torch.sum(parts, 0, out=dw)

    def _swiglu(self, gate: Tensor, up: Tensor, h: Tensor, n: int) -> None:
        if n:
            self.source.swiglu[(-(-n // 1024),)](gate, up, h, n, WIDE=1024, num_warps=4)

    def _swiglu_back(self, g: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, h: Tensor, n: int) -> None:
        if n:
            self.source.swiglu_back[(-(-n // 1024),)](g, gate, up, dgate, dup, h, n, WIDE=1024, num_warps=4)

    def _rotate(self, x: Tensor, cosine: Tensor, sine: Tensor, y: Tensor, n: int, heads: int, d: int, sign: float) -> None:
        wide = _power(d // 2)
        rows = min(_power(heads), max(1, TILE // 2 // wide))
        if n:
            self.source.rotate[(n, -(-heads // rows))](x, cosine, sine, y, HEADS=heads, D=d, BACK=sign < 0, ROWS=rows, WIDE=wide, num_warps=4)


def _power(n: int) -> int:
    """The next power of two: what a tile's sides are."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def _rows(n: int, d: int) -> tuple[tuple[int], dict[str, int]]:
    """Programs for n rows of d numbers, and their tile: several rows where these are short (the norms of queries and keys)."""
    wide = _power(d)
    rows = max(1, min(16, TILE // wide))
    return (-(-n // rows),), {"ROWS": rows, "WIDE": wide, "num_warps": min(16, max(4, rows * wide // 1024))}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to torch's current device."""
    return torch.cuda.device(device) if device.type == "cuda" and device.index != torch.cuda.current_device() else nullcontext()


@functools.cache
def kernels() -> Kernels | None:
    """The kernels of this machine's GPU, or None."""
    if not torch.cuda.is_available():
        return None
    try:
        from . import triton_rows
    except ImportError as e:
        log.info("row kernels are not used on this GPU: %s (CUDA builds of torch bring triton; pip install triton)", e)
        return None
    return tried(Kernels(triton_rows))


def tried(found: Kernels) -> Kernels | None:
    """Kernels that are right, else None, and a line in the log."""
    try:
        failing = wrong(found)
    except Exception as e:  # a compiler of kernels has many ways to fail, each with an exception of its own
        log.warning("row kernels are not used on this GPU: triton cannot make them: %s", (str(e).strip().splitlines() or [type(e).__name__])[0])
        return None
    if failing:
        log.warning("row kernels are not used on this GPU: %s gives other numbers than torch", failing)
        return None
    return found
