"""What a forward and a backward keep in memory, counted on the meta device: every tensor of the real modules is made there, with its size and without its
values, and is watched from its birth to its release.

Nothing is estimated: attention, recomputation, the chunks of the log-probability head and the weights that packed linears decode are run as they are. Equal
blocks are run once: what one keeps is counted as often as it stands in the model. Attention runs by the kernel of the device that is meant (kernels.py).

What is not seen: a kernel's own scratch memory, and what an allocator rounds up, keeps back and cannot use again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core import LuthierError
from ..modelling.anatomy import modules
from ..modelling.packed import packed
from .kernels import attending

aten = torch.ops.aten
SMALL = 32 << 20  # glibc takes what is larger from the system and gives it back at once
HEAD, DECODED, OTHER = "log-probabilities", "decoded weights", "activations"


@dataclass(frozen=True)
class Peak:
    """Bytes alive at the worst moment of what was run, beside the parameters, and what they were."""

    bytes: int
    parts: dict[str, int]  # what made them: HEAD, DECODED, OTHER
    kept: int  # alive when the forward was done: what it saved for the backward
    small: int  # of the peak: in tensors of at most SMALL bytes
    freed: int = field(default=0, compare=False)  # such tensors that the forward made and let go again; decoded weights take one place


@dataclass
class _Piece:
    """One storage that is alive."""

    bytes: int  # of as many as it stands for
    times: int
    made_by: str
    number: int  # of its birth
    ref: Any = None  # tells of its death


@dataclass
class _Block:
    """A block that is running or has run: which pieces may turn out to be kept once for each block it stands for."""

    first: int  # number of the first piece that is its own
    times: int
    outputs: list[tuple[int, _Piece]] = field(default_factory=list)  # a storage's address may be another's later, so the piece is remembered too


class Watch(TorchDispatchMode):
    """Follows the storages made on the meta device while it is on. ``ours``: tensors that were there before, which are not counted.

    ``scored``: how many positions a search for trained tokens finds, which the values would tell.
    """

    def __init__(self, ours: Iterable[Tensor], scored: int = 0):
        super().__init__()
        self.before = {t.untyped_storage()._cdata for t in ours}
        self.scored = scored
        self.alive: dict[int, _Piece] = {}
        self.now, self.peak, self.kept, self.births = 0, 0, 0, 0
        self.small, self.small_at_peak = 0, 0
        self.freed, self.before_backward, self.stands_for = 0, True, 1  # in the forward; whether it is going on; how many blocks the running one stands for
        self.by_part: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self.part = OTHER
        self.answers: dict[int, bool] = {}
        self.number: float | None = None  # what is said where a number is asked for; None: it is an error
        self.waiting: list[_Block] = []  # blocks whose outputs may still be let go

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return self._answer(args[0])
        if func is aten.nonzero.default and args[0].is_meta:
            out = args[0].new_empty(self.scored, args[0].dim(), dtype=torch.long)
        else:
            out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.is_meta:
                self._born(t)
        if func.overloadpacket in (aten.all, aten.any, aten.eq) and isinstance(out, Tensor) and out.is_meta:
            self.answers[out.untyped_storage()._cdata] = func.overloadpacket is aten.any
        return out

    def _answer(self, t: Tensor) -> bool | float:
        """Questions a model asks of its masks: rows differ in length, so not all places hold a token, and some hold none."""
        key = t.untyped_storage()._cdata
        if key not in self.answers:
            if self.number is not None:
                return self.number
            raise LuthierError(
                "what this model computes depends on the values of its weights (a mixture of experts, say), so its memory cannot be counted ahead"
            )
        return self.answers[key]

    def _born(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self.alive or key in self.before:
            return
        self.births += 1
        piece = _Piece(storage.nbytes(), 1, self.part, self.births)
        piece.ref = weakref.ref(storage, lambda _: self._died(key))
        self.alive[key] = piece
        self._add(piece, piece.bytes)

    def _died(self, key: int) -> None:
        piece = self.alive.pop(key)
        self.answers.pop(key, None)
        self._add(piece, -piece.bytes * piece.times)
        if self.before_backward and piece.bytes <= SMALL and piece.made_by != DECODED:
            self.freed += piece.bytes * max(piece.times, self.stands_for)

    def _add(self, piece: _Piece, amount: int) -> None:
        self.now += amount
        self.by_part[piece.made_by] = self.by_part.get(piece.made_by, 0) + amount
        if piece.bytes <= SMALL:
            self.small += amount
        if self.now > self.peak:
            self.peak, self.at_peak, self.small_at_peak = self.now, dict(self.by_part), self.small

    @contextmanager
    def making(self, part: str) -> Iterator[None]:
        """What is made here is this part's."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def saying(self, number: float) -> Iterator[None]:
        """Whoever asks for a tensor's value here hears this number."""
        self.number = number
        try:
            yield
        finally:
            self.number = None

    # --- blocks that stand for several ------------------------------------------------------------------------------

    def enter(self, times: int) -> _Block:
        """A block begins. The outputs of the one before the last are still held only where something keeps them."""
        self.settle(leave=1)
        self.stands_for = times
        return _Block(self.births + 1, times)

    def leave(self, block: _Block, outputs: Any) -> None:
        """A block is done: what it made and is still alive is kept, once for each block it stands for; its outputs are judged later."""
        given = {t.untyped_storage()._cdata for t in (outputs if isinstance(outputs, tuple | list) else (outputs,)) if isinstance(t, Tensor)}
        for key, piece in list(self.alive.items()):
            if piece.number < block.first:
                continue
            if key in given:
                block.outputs.append((key, piece))
            else:
                self._multiply(piece, block.times)
        self.waiting.append(block)
        self.stands_for = 1

    def forward_done(self) -> None:
        """What is alive now is kept for the backward."""
        self.settle()
        self.kept, self.before_backward = self.now, False

    def settle(self, leave: int = 0) -> None:
        """Outputs that are still alive although the next block has run are kept. ``leave``: so many blocks are not judged yet."""
        while len(self.waiting) > leave:
            block = self.waiting.pop(0)
            for key, piece in block.outputs:
                if self.alive.get(key) is piece:
                    self._multiply(piece, block.times)

    def _multiply(self, piece: _Piece, times: int) -> None:
        piece.times *= times
        self._add(piece, piece.bytes * (times - 1))


class _Standing(nn.Module):
    """One block in place of several equal ones."""

    def __init__(self, block: nn.Module, times: int, watch: Watch):
        super().__init__()
        self.block, self.times, self.watch = block, times, watch

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        here = self.watch.enter(self.times)
        out = self.block(*args, **kwargs)
        self.watch.leave(here, out)
        return out


Stacks = list[tuple[Any, list[tuple[nn.Module, int]]]]


def stacks(lm: Any, paths: Iterable[str]) -> Stacks:
    """For each list of blocks at these paths, one block of each kind with the number it stands for. The first of a stack keeps less (nothing before it trains),
    and the last ends it: those stand alone."""
    found: Any = dict(modules(lm))
    out: Stacks = []
    for path in paths:
        own = list(found[path])
        standing: dict[Any, int] = {}  # kind -> its place in kept
        first: set[Any] = set()
        kept: list[tuple[nn.Module, int]] = []
        for block in own:
            kind = _kind(block)
            if kind in standing and block is not own[-1]:
                kept[standing[kind]] = (kept[standing[kind]][0], kept[standing[kind]][1] + 1)
                continue
            if kind in first:
                standing.setdefault(kind, len(kept))
            first.add(kind)
            kept.append((block, 1))
        out.append((found[path], kept))
    return out


@contextmanager
def _each_block_once(stacks: Stacks, watch: Watch) -> Iterator[None]:
    """Run one block of each kind for all of them."""
    whole = [dict(blocks._modules) for blocks, _ in stacks]
    try:
        for blocks, kept in stacks:
            blocks._modules = {str(i): _Standing(b, n, watch) for i, (b, n) in enumerate(kept)}
        yield
    finally:
        for (blocks, _), own in zip(stacks, whole, strict=True):
            blocks._modules = own


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What two blocks must share to keep the same: modules, settings, shapes and what trains; not their place in the stack."""
    out: list[Any] = []
    for name, module in block.named_modules():
        tensors = [(n, t) for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]
        settings = sorted((k, v) for k, v in vars(module).items() if isinstance(v, int | float | str) and not k.endswith(("layer_idx", "layer_id")))
        changed = tuple(sorted((leaf, *names) for leaf, names in vars(module).get("_stand_ins", {}).items()))
        out.append((name, type(module).__name__, str(settings), changed, tuple((n, t.shape, t.dtype, t.requires_grad) for n, t in tensors)))
    return tuple(out)


# --- running ----------------------------------------------------------------------------------------------------------


def count(
    policy: Any,
    ours: Iterable[Tensor],
    device: str,
    run: Callable[[Watch], Any],
    *,
    scored: int = 0,
    once: Stacks | None = None,
    watching: Callable[[Iterable[Tensor], int], Watch] = Watch,
) -> Peak:
    """Run something of a policy that lies on the meta device as on this kind of device (cpu, cuda, mps), and count.

    ``ours``: what is not counted, because it is there before. ``run`` gets the watch, and tells it when a forward is done. ``once``: the blocks that stand for
    others (`stacks`); None: every block is run. ``watching``: makes the watch.

    Raises LuthierError for a model that asks for values.
    """
    watch = watching(ours, scored)
    with ExitStack() as on:
        on.enter_context(_parts(policy, watch))
        if once is not None:
            on.enter_context(_each_block_once(once, watch))
        on.enter_context(attending(policy.lm, device))
        on.enter_context(watch)
        try:
            run(watch)
        except LuthierError:
            raise
        except (RuntimeError, NotImplementedError, LookupError) as e:
            said = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
            raise LuthierError(f"the memory of this run cannot be counted without its weights: {said}") from e
    return Peak(watch.peak, watch.at_peak, watch.kept, watch.small_at_peak, watch.freed)


@contextmanager
def _parts(policy: Any, watch: Watch) -> Iterator[None]:
    """Say what is the head's and what is decoded, while it runs."""
    linears = [m for _, m in packed(policy.lm)]
    score = policy.score

    def scoring(*args: Any, **kwargs: Any) -> Any:
        watch.settle()
        with watch.making(HEAD):
            return score(*args, **kwargs)

    def decoding(own: Callable[[torch.dtype], Tensor]) -> Callable[[torch.dtype], Tensor]:
        def values(dtype: torch.dtype) -> Tensor:
            with watch.making(DECODED):
                return own(dtype)

        return values

    policy.score = scoring
    for linear in linears:
        linear.values = decoding(linear.values)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del policy.score
        for linear in linears:
            del linear.values
