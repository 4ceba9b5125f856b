"""What FSDP2 has in memory beside the parts while a step runs, on the meta device: blocks as they arrive and as they are used, and their gradients.

The order is FSDP2's (torch/distributed/fsdp/_fully_shard, torch 2.13). Forward: a block's parts arrive in one buffer and are copied out of it; the copies go
when the block is done, the buffer when the next block's has arrived. Backward: the block before is asked for while this one computes; its gradients, as wide
as it is computed in, are added up over ranks in float32, and that buffer stays until the next block's is made. What is outside the blocks is there from the
first block on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .saved import Watch, _Piece

GATHERED, REDUCED = "gathered weights", "gradients on their way"


class Holding(Watch):
    """A watch that is told of memory which no operation makes on meta."""

    def __init__(self, ours: Iterable[Tensor], scored: int = 0):
        super().__init__(ours, scored)
        self.held: dict[str, _Piece] = {}

    def hold(self, name: str, n: int, part: str = GATHERED) -> None:
        """So many bytes are there under this name, instead of those before; 0: none."""
        if name in self.held:
            before = self.held.pop(name)
            self._add(before, -before.bytes)
        if n:
            self.held[name] = piece = _Piece(n, 1, part, 0)
            self._add(piece, n)


@contextmanager
def following(blocks: Sequence[nn.Module], before: Callable[[int], Any], after: Callable[[int], Any], begin: Callable[[int], Any]) -> Iterator[None]:
    """Call ``before`` and ``after`` a block's forward, and at the ``begin`` of its backward; not where a forward is computed again in the backward."""
    backward = False

    def starting(i: int) -> None:
        nonlocal backward
        backward = True
        begin(i)

    def hooked(i: int) -> tuple[Callable[..., None], Callable[..., None]]:
        def pre(*_: Any) -> None:
            if not backward:
                before(i)

        def post(_: Any, __: Any, out: Any) -> None:
            if backward:
                return
            after(i)
            states = out[0] if isinstance(out, tuple) else out
            if states.requires_grad:
                states.register_hook(lambda _: starting(i))

        return pre, post

    hooks: list[Any] = []
    for i, block in enumerate(blocks):
        pre, post = hooked(i)
        hooks += [block.register_forward_pre_hook(pre), block.register_forward_hook(post)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Gathers:
    """Tells a watch what is gathered as blocks run. ``blocks``: in model order, each with its bytes as gathered and the float32 bytes of its gradients
    (0: frozen); ``outside``: the same of what is not in a block."""

    def __init__(self, watch: Holding, blocks: list[tuple[nn.Module, int, int]], outside: tuple[int, int]):
        self.watch, self.blocks, self.outside = watch, blocks, outside
        self.backward = -1  # the block that computes its backward

    @contextmanager
    def following(self) -> Iterator[None]:
        """While a step runs."""
        self.watch.hold("outside", self.outside[0])
        with following([b for b, _, _ in self.blocks], self._arrive, lambda _: self.watch.hold("block", 0), self._begin):
            yield
        if self.backward >= 0:
            self._done(self.backward)

    def _arrive(self, i: int) -> None:
        size = self.blocks[i][1]
        self.watch.hold("next", size)  # beside the buffer of the block before
        self.watch.hold("buffer", 0)
        self.watch.hold("block", size)
        self.watch.hold("buffer", size)
        self.watch.hold("next", 0)

    def _begin(self, i: int) -> None:
        if self.backward >= 0:
            self._done(self.backward)
        elif self.outside[1]:  # the head has its gradient
            self.watch.hold("outside gradients", self.outside[0], REDUCED)
        self.backward = i
        size = self.blocks[i][1]
        self.watch.hold("buffer", size)
        self.watch.hold("block", size)
        self.watch.hold("buffer", self.blocks[i - 1][1] if i else 0)

    def _done(self, i: int) -> None:
        _, size, reduced = self.blocks[i]
        if reduced:
            self.watch.hold("gradients", size, REDUCED)
            self.watch.hold("added up", 0)
            self.watch.hold("block", 0)
            self.watch.hold("added up", reduced, REDUCED)
            self.watch.hold("gradients", 0)
        self.watch.hold("block", 0)
