"""Tensors of which every rank holds a part: PyTorch's DTensor, which is what sharded parameters are between forwards.

What is sharded is cut along its first dimension as torch.chunk cuts: the last ranks may hold less, or nothing. Any other tensor is a whole of its own here, so
callers need not ask which they have.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(t: Tensor) -> bool:
    """Whether other ranks may hold other parts of it."""
    return "torch.distributed.tensor" in sys.modules and isinstance(t, sys.modules["torch.distributed.tensor"].DTensor)


def here(t: Tensor) -> Tensor:
    """This rank's part, in place and without a gradient."""
    return t._local_tensor.detach() if is_sharded(t) else t.detach()  # type: ignore[attr-defined]


def whole(t: Tensor) -> Tensor:
    """All of it, without a gradient. Every rank calls this, in the same order; each gets all."""
    out: Tensor = t.detach().full_tensor() if is_sharded(t) else t.detach()  # type: ignore[attr-defined]
    return out


def let_go(tensors: Iterable[Tensor]) -> None:
    """Make each part a tensor of its own, where reading left it as a piece of the whole one, which then stays in memory. Before the first forward."""
    for t in tensors:
        if is_sharded(t):
            part = t._local_tensor  # type: ignore[attr-defined]
            if part.device.type != "meta" and part.untyped_storage().nbytes() > part.nbytes:
                t._local_tensor = part.clone()  # type: ignore[attr-defined]


def like(part: Tensor, t: Any) -> Tensor:
    """A tensor of which this rank holds ``part`` and which lies over the ranks as ``t`` does; the part itself where ``t`` is not sharded."""
    if not is_sharded(t):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor(part, t._spec, requires_grad=False)  # from_local would move it to the mesh's device, and parts may lie on the CPU


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """While this lasts a module's own parameters are whole, for one who reads them outside of a forward. Every rank does it, in the same order."""
    own = {n: p for n, p in module._parameters.items() if p is not None and is_sharded(p)}
    for name, p in own.items():
        module._parameters[name] = nn.Parameter(whole(p), requires_grad=False)
    try:
        yield
    finally:
        module._parameters.update(own)


def summed(x: Tensor, t: Any) -> Tensor:
    """The sum of a number over the ranks that hold the other parts of ``t``."""
    import torch.distributed as dist

    x = x.clone()
    for dim, placement in enumerate(t.placements):
        if placement.is_shard():
            dist.all_reduce(x, group=t.device_mesh.get_group(dim))
    return x


def part_of(t: Any) -> tuple[int, int]:
    """(which, of how many) parts of ``t`` this rank holds."""
    index, count = 0, 1
    for dim, placement in enumerate(t.placements):
        if placement.is_shard():
            index, count = index * t.device_mesh.size(dim) + t.device_mesh.get_local_rank(dim), count * t.device_mesh.size(dim)
    return index, count


def cut(t: Tensor, index: int, count: int) -> Tensor:
    """A copy of one part of a tensor; empty where there are fewer rows than ranks."""
    pieces = torch.chunk(t, count)
    return pieces[index].clone() if index < len(pieces) else t[:0].clone()


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that this rank holds of them."""
    return sum(p.numel() * p.element_size() for t in tensors for p in [here(t)])
