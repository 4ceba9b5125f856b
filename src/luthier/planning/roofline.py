"""The time of a step's operations on a GPU that is not here, counted on the meta device: of each the longer of its arithmetic and of what it reads and writes
(a roofline: Williams, Waterman & Patterson, 2009, CACM 52(4)). Equal blocks are run once and counted as often as they stand in the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .gathers import following
from .gpus import Gpu
from .pace import FREE, PACKED, PRODUCTS
from .saved import Watch

aten = torch.ops.aten
ATTENTION = {  # forward: two products; backward: five
    aten._scaled_dot_product_flash_attention: 2,
    aten._scaled_dot_product_flash_attention_for_cpu: 2,
    aten._scaled_dot_product_efficient_attention: 2,
    aten._scaled_dot_product_flash_attention_backward: 5,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,
    aten._scaled_dot_product_efficient_attention_backward: 5,
}


class Work(Watch):
    """A watch that adds up arithmetic and time. Without a GPU only arithmetic."""

    def __init__(self, ours: Iterable[Tensor], scored: int = 0, gpu: Gpu | None = None):
        super().__init__(ours, scored)
        self.gpu, self.flops, self.total, self.forward = gpu, 0.0, 0.0, 0.0
        self.times = 1  # what runs now stands for so many

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket not in FREE and not func.is_view:
            flops = operations(func.overloadpacket, args)
            self.flops += self.times * flops
            if self.gpu is not None:
                tensors = [t for t in tree_leaves((args, kwargs or {}, out)) if isinstance(t, Tensor)]
                moved = sum(t.numel() * t.element_size() for t in tensors)
                kinds = {t.dtype for t in tensors if t.dtype.is_floating_point}
                rate = 1e12 * self.gpu.products * (self.gpu.float32 if kinds == {torch.float32} else self.gpu.bfloat16)
                self.total += self.times * max(flops / rate, moved / (1e9 * self.gpu.bandwidth * self.gpu.reached), 1e-6 * self.gpu.launch)
        return out

    def forward_done(self) -> None:
        """What comes now is the backward."""
        super().forward_done()
        self.forward = self.total

    @contextmanager
    def counting(self, kept: Sequence[tuple[nn.Module, int]]) -> Iterator[None]:
        """While blocks run that stand for others."""

        def stands(i: int | None) -> None:
            self.times = 1 if i is None else kept[i][1]

        with following([b for b, _ in kept], stands, lambda _: stands(None), stands):
            yield


class Repeated(Counter[str]):
    """A counter to which what happens in a block that stands for several is added as often."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Work | None = None

    def __setitem__(self, key: str, value: int) -> None:
        before = self.get(key, 0)
        super().__setitem__(key, before + (value - before) * (1 if self.work is None else self.work.times))


def operations(packet: Any, args: Any) -> float:
    """Floating point operations of products and of attention; of anything else none, since its memory takes longer."""
    if packet in PRODUCTS:
        a, b = (args[i] for i in PRODUCTS[packet])
        return 2.0 * math.prod(a.shape) * b.shape[-1]
    if (name := str(packet)) in PACKED:
        q, ends = PACKED[name]
        _, _, longest, seen, causal = args[ends : ends + 5]  # as if all pieces were as long as the longest
        return (2.0 if q == 0 else 5.0) * 2.0 * math.prod(args[q].shape) * seen * (0.5 if causal and longest == seen else 1.0)
    if packet not in ATTENTION:
        return 0.0
    backward = ATTENTION[packet] == 5
    q, k = args[1:3] if backward else args[:2]
    B, H, n, d = q.shape
    m = k.shape[2]
    causal = any(a is True for a in args)  # the square's upper half is left out
    return ATTENTION[packet] * 2.0 * B * H * n * m * d * (0.5 if causal and n == m else 1.0)
