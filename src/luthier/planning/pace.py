"""The time of what a run computes, predicted without its weights: the operations of its own modules, counted on the meta device, times how long each of them
takes on this machine.

What is counted is what the modules really call, in the forward, the backward and recomputation (saved.py runs them), so no formula knows a family, a method or
a precision. Every operation is then run by itself on the device with tensors of the same shapes, strides and types, a few times, and the least of them counts.
A large product is run in part, and so is any other operation that goes through many numbers; their times are scaled by what was left out.

What is not seen: data that is read from a slow disk, a processor that slows down as it gets warm, and whatever else the machine is doing.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .. import speed
from ..speed import compiled
from .saved import Watch

aten = torch.ops.aten
PRODUCT = 6e9  # floating point operations of a matrix product that is run whole
NUMBERS = 1 << 22  # numbers that any other operation is run on
TIMES, BUDGET = 7, 0.06  # an operation is run so often, or until so many seconds are spent on it
COPIES, ROOM = 8, 64 << 20
BETWEEN = 10e-6  # seconds of interpreter and autograd beside each operation
# Products: where their two factors stand among the arguments.
PRODUCTS = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.addmm_: (1, 2), aten.bmm: (0, 1), aten.baddbmm: (1, 2), aten._int_mm: (0, 1)}
# Attention over packed examples: where queries and then keys stand among the arguments, and where the ends of their pieces.
PACKED = {"torch_attn._varlen_attn": (0, 3), "torch_attn._varlen_attn_backward": (1, 6)}
# Nothing is computed: memory is asked for, or a tensor gets another name.
FREE = {aten.detach, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.alias, aten._local_scalar_dense}


@dataclass(frozen=True)
class Like:
    """What stands for a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> Like:
        """The like of a tensor."""
        return cls(tuple(t.shape), tuple(t.stride()), t.dtype)

    @property
    def count(self) -> int:
        """Numbers."""
        return math.prod(self.shape)

    def made(self, device: torch.device) -> Tensor:
        """One of values that no operation is slow on; whole numbers are 0, so that they are places in anything."""
        t = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return t.fill_(0.5) if self.dtype.is_floating_point else t.fill_(True) if self.dtype == torch.bool else t.zero_()

    def cut(self, dim: int, size: int) -> Like:
        """Shorter along a dimension, in memory as before."""
        return replace(self, shape=(*self.shape[:dim], size, *self.shape[dim + 1 :]))


@dataclass(frozen=True)
class Call:
    """An operation, and what it was given."""

    func: Any
    leaves: tuple[Any, ...]  # tensors as Like
    structure: str

    @property
    def tensors(self) -> list[tuple[int, Like]]:
        """(place among the leaves, tensor)."""
        return [(i, leaf) for i, leaf in enumerate(self.leaves) if isinstance(leaf, Like)]

    def given(self, changes: Mapping[int, Like]) -> Call:
        """With other tensors at some places."""
        return replace(self, leaves=tuple(changes.get(i, leaf) for i, leaf in enumerate(self.leaves)))


@dataclass(frozen=True)
class RowKernel:
    """A kernel of speed/, which torch does not see as an operation."""

    name: str
    dtype: torch.dtype

    def __call__(self, *args: Any) -> None:
        found = speed.kernels(args[0].device.type)
        assert found is not None
        found(self.name, self.dtype, *args)


class Ops(Watch):
    """A watch that also counts the operations that compute something."""

    def __init__(self, ours: Iterable[Tensor], scored: int = 0):
        super().__init__(ours, scored)
        self.calls: dict[Call, int] = {}
        self.specs: dict[str, TreeSpec] = {}

    def __enter__(self) -> Any:
        compiled.WATCHING.append(self._kernel)
        return super().__enter__()

    def __exit__(self, *how: Any) -> None:
        compiled.WATCHING.remove(self._kernel)
        super().__exit__(*how)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in FREE and not func.is_view:
            self._called(func, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _kernel(self, name: str, dtype: torch.dtype, args: tuple[Any, ...]) -> None:
        self._called(RowKernel(name, dtype), args, None)

    def _called(self, func: Any, args: Any, kwargs: Any) -> None:
        leaves, spec = tree_flatten((args, kwargs or {}))
        call = Call(func, tuple(Like.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves), str(spec))
        self.specs.setdefault(call.structure, spec)
        self.calls[call] = self.calls.get(call, 0) + 1


@dataclass(frozen=True)
class Timed:
    """One kind of call and what it takes."""

    call: Call
    times: int
    seconds: float  # of one; nan: it could not be run by itself
    part: float  # of it that was run

    @property
    def total(self) -> float:
        """Seconds of all of them."""
        return self.times * self.seconds


class Machine:
    """How long operations take here, each measured once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.known: dict[Call, tuple[float, float]] = {}

    def time(self, ops: Ops) -> list[Timed]:
        """Every call of a recording, the dearest first."""
        with torch.no_grad():
            out = [Timed(call, n, *self._known(call, ops.specs[call.structure])) for call, n in ops.calls.items()]
        return sorted(out, key=lambda t: -t.total if t.total == t.total else 0.0)

    def _known(self, call: Call, spec: TreeSpec) -> tuple[float, float]:
        if call not in self.known:
            self.known[call] = self._measure(call, spec)
        return self.known[call]

    def _measure(self, call: Call, spec: TreeSpec) -> tuple[float, float]:
        """(seconds, part that was run)."""
        smaller, part = part_of(call)
        for tried, share in dict.fromkeys([(smaller, part), (call, 1.0), (of_one_type(call), 1.0)]):
            try:
                return usual(self._runs(tried, spec), self.device) / share, share
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):  # it takes no other shape, or asks for what only a run has
                continue
        return math.nan, 0.0

    def _runs(self, call: Call, spec: TreeSpec) -> Callable[[], Any]:
        """The call, each time with other tensors: what an operation reads in a run has mostly left the fastest caches since it was made."""
        size = sum(t.count * t.dtype.itemsize for _, t in call.tensors)
        sets = []
        for _ in range(max(1, min(COPIES, ROOM // max(1, size)))):
            leaves: list[Any] = [
                leaf.made(self.device) if isinstance(leaf, Like) else self.device if isinstance(leaf, torch.device) else leaf for leaf in call.leaves
            ]
            if (found := PACKED.get(_name(call))) is not None:  # ends that are zero would be pieces of nothing
                for x, ends in zip(leaves[found[0] : found[0] + 2], leaves[found[1] : found[1] + 2], strict=True):
                    ends.copy_(torch.linspace(0, len(x), len(ends), device=self.device).round())
            sets.append(tree_unflatten(leaves, spec))
        turn = itertools.cycle(sets)

        def run() -> Any:
            args, kwargs = next(turn)
            return call.func(*args, **kwargs)

        return run


def _name(call: Call) -> str:
    return call.func.name if isinstance(call.func, RowKernel) else str(call.func.overloadpacket)


def usual(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a run, after one that does not count: the lower quartile of a few, as others may be using the machine."""
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.mps.synchronize if device.type == "mps" else lambda: None
    began = time.perf_counter()
    run()
    wait()
    took: list[float] = []
    while len(took) < TIMES and (len(took) < 2 or time.perf_counter() - began < BUDGET):
        start = time.perf_counter()
        run()
        wait()
        took.append(time.perf_counter() - start)
    return sorted(took)[(len(took) - 1) // 4]


def of_one_type(call: Call) -> Call:
    """All numbers of the type of the first: what a kernel saves for its backward may be of another type on the meta device than it is here."""
    floats = [(i, t) for i, t in call.tensors if t.dtype.is_floating_point]
    return call.given({i: replace(t, dtype=floats[0][1].dtype) for i, t in floats})


def part_of(call: Call) -> tuple[Call, float]:
    """A smaller call of the same kind, and its share of the work; the call itself where it is small."""
    tensors = dict(call.tensors)
    if isinstance(call.func, RowKernel) or _name(call) in PACKED:  # it is told how many rows there are
        return call, 1.0
    if call.func.overloadpacket in PRODUCTS:
        return _smaller_product(call, tensors)
    most = max((t.count for t in tensors.values()), default=0)
    if most <= NUMBERS:
        return call, 1.0
    return _shorter(call, tensors, most)


def _smaller_product(call: Call, tensors: dict[int, Like]) -> tuple[Call, float]:
    """Of a product (..., M, K) x (..., K, N): fewer rows or columns or less between them, whichever is most, by halves."""
    places = list(tensors)
    first, second = (places[i] for i in PRODUCTS[call.func.overloadpacket])
    a, b = tensors[first], tensors[second]
    m, k, n, batch = a.shape[-2], a.shape[-1], b.shape[-1], math.prod(a.shape[:-2])
    whole = 2.0 * m * k * n * batch
    while 2.0 * m * k * n * batch > PRODUCT and max(m, k, n) > 64:
        if batch > 1:
            batch //= 2
        elif m >= max(k, n):
            m //= 2
        elif k >= n:
            k //= 2
        else:
            n //= 2
    lead = (batch,) if len(a.shape) == 3 else ()
    changes = {first: replace(a, shape=(*lead, m, k)), second: replace(b, shape=(*lead, k, n))}
    for place, bias in tensors.items():
        if place not in changes and bias.count > 1:
            shape = (*lead, m, n)[-len(bias.shape) :]
            changes[place] = replace(bias, shape=tuple(1 if old == 1 else new for old, new in zip(bias.shape, shape, strict=True)))
    return call.given(changes), 2.0 * m * k * n * batch / whole


def _shorter(call: Call, tensors: dict[int, Like], most: int) -> tuple[Call, float]:
    """Every tensor cut along the longest dimension of the largest, where they share it at the same place from the right or the left."""
    largest = next(t for t in tensors.values() if t.count == most)
    dim = max(range(len(largest.shape)), key=lambda d: largest.shape[d] if d < len(largest.shape) - 1 else 0)
    size = largest.shape[dim]
    short = max(1, size * NUMBERS // most)
    if short == size:
        return call, 1.0
    changes = {i: t.cut(dim, short) for i, t in tensors.items() if len(t.shape) == len(largest.shape) and t.shape[dim] == size}
    return call.given(changes), short / size
