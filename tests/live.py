"""Bytes of real tensors that are alive while something runs, whoever made them: what the planner's counting on meta is compared with."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Follows every storage that an operation returns while it is on, and asks each for its size anew: FSDP empties and fills storages behind torch's back."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}
        self.peak = 0
        for t in gc.get_objects():
            if isinstance(t, Tensor):
                self._see(t)
        self.start = self.now()

    def _see(self, t: Tensor) -> None:
        inner = getattr(t, "_local_tensor", t)
        if inner.device.type != "meta" and inner.layout == torch.strided:
            storage = inner.untyped_storage()
            if storage._cdata not in self.storages:
                self.storages[storage._cdata] = weakref.ref(storage, lambda _, key=storage._cdata: self.storages.pop(key, None))

    def now(self) -> int:
        """Bytes alive."""
        alive = [s for ref in list(self.storages.values()) if (s := ref()) is not None]
        return sum(s.nbytes() for s in alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            before = len(self.storages)
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor):
                    self._see(t)
            if len(self.storages) > before:
                self.peak = max(self.peak, self.now())
        return out
