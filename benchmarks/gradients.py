"""Gradients of step 1 on disk, one tensor after the other, so that keeping them takes no memory that would be measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


class Sink:
    """A file of float32 tensors by name."""

    def __init__(self, path: Path) -> None:
        self.path, self.places = path, dict[str, int]()
        self.file = path.open("wb")

    def add(self, name: str, grad: Any) -> None:
        """Write one down."""
        self.places[name] = self.file.tell()
        grad.detach().float().contiguous().numpy().tofile(self.file)

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        end = self.file.tell()
        self.file.close()
        self.path.with_suffix(".json").write_text(json.dumps(self.places | {"": end}))


def read(path: Path) -> dict[str, np.ndarray]:
    """Flat tensors by name, mapped and not loaded."""
    places = json.loads(path.with_suffix(".json").read_text())
    ends = list(places.values())[1:]
    data = np.memmap(path, dtype=np.float32, mode="r") if path.stat().st_size else np.zeros(0, dtype=np.float32)
    return {name: data[at // 4 : end // 4] for (name, at), end in zip(list(places.items())[:-1], ends, strict=True)}


class Different(RuntimeError):
    """The two files are not of the same tensors."""


def cosines(got: Path, want: Path) -> tuple[float, float]:
    """(of all tensors together, of the worst by itself). Raises Different."""
    a, b = read(got), read(want)
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise Different(f"gradients of {len(odd)} tensors are in only one of the two, for example {odd[0]!r}")
    products = [_products(a[n], b[n]) for n in b]
    return _cosine(*(sum(p[i] for p in products) for i in range(3))), min(_cosine(*p) for p in products)


def _products(x: np.ndarray, y: np.ndarray, piece: int = 1 << 22) -> tuple[float, float, float]:
    sums = np.zeros(3)
    for some in _pieces(len(x), piece):
        u, v = x[some].astype(np.float64), y[some].astype(np.float64)
        sums += (u @ v, u @ u, v @ v)
    return tuple(sums.tolist())  # type: ignore[return-value]


def _pieces(n: int, piece: int) -> Iterator[slice]:
    return (slice(i, i + piece) for i in range(0, n, piece))


def _cosine(xy: float, xx: float, yy: float) -> float:
    """Two zeros are equal."""
    return xy / math.sqrt(xx * yy) if xx and yy else float(xx == yy)
