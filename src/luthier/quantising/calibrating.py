"""Quantising a base to codes that are fitted to data, block by block (GPTQ), and the rows it is fitted to.

Each block is run on the calibration rows as the blocks below it, quantised already, feed it; the second moments of its linears' inputs are summed; each
linear is solved and replaced; and the block is run once more for what it now gives. Only one block's inputs are in memory, and the second moments of its
linears. In an encoder-decoder the decoder comes after the encoder, and reads what the quantised encoder gives.

No model's code is taken apart for that: the whole model is called, and what has been run already stands in for itself by giving what it gave. So whatever a
model hands from block to block (T5's position biases, the masks of sliding windows) is what it always is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core import Base, Batch, LuthierError, Objective, Row
from ..data.codec import Codec
from ..data.encode import hiding_of
from ..data.formats import Bad
from ..data.prepare import prepare
from ..data.shapes import LOOK_AT, detect
from ..data.sources import read
from ..measuring.measure import GENERAL, group, to_device
from ..modelling.anatomy import dense_weight
from ..modelling.packed import PackedLinear, replace
from ..nn import gptq
from ..policy import Policy, real
from ..reading import form_of
from ..settings.plugins import plugin
from .quantised import empty, linears

READ_AT_MOST = 20  # records of a calibration file for each row that is taken
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class How:
    """How codes are found."""

    damp: float = 0.01  # of the mean second moment, added to each
    by_importance: bool = True  # the inputs with the largest second moments first
    search: bool = True  # narrow a group's range where that lowers its error


@dataclass(frozen=True)
class Layer:
    """One linear after it was quantised. Errors: ||(W - Q) X||^2 by ||W X||^2 over the calibration inputs X."""

    path: str
    weights: int
    error: float
    nearest: float  # of the same grid, each weight rounded by itself


@dataclass
class Done:
    """One block after it was quantised."""

    path: str
    number: int  # of all blocks, from 1
    of: int
    layers: list[Layer] = field(default_factory=list)

    def mean(self, which: str) -> float:
        """The mean of "error" or "nearest" over the block's linears, each by its number of weights."""
        return sum(getattr(x, which) * x.weights for x in self.layers) / sum(x.weights for x in self.layers)


# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Rows that codes are fitted to, others that they are judged by, and the objective that reads both."""

    fit: list[Row]
    held: list[Row]
    objective: Objective
    source: str

    @property
    def tokens(self) -> int:
        """How many tokens are fitted to."""
        return sum(len(r) for r in self.fit)


def read_rows(base: Base, sources: Sequence[str] = (), *, held: Sequence[str] = (), count: int = 128, max_tokens: int = 512, seed: int = 0) -> Rows:
    """At most ``count`` rows of the user's files, drawn by ``seed``, or of the general text that ships.

    Judged by are all rows of ``held``, else the general text; where that is fitted to as well, half of it is kept apart. Raises LuthierError for files that
    cannot be read, and for models that raw text says nothing to.
    """
    objective = _objective(base, sources)
    limit = READ_AT_MOST * count
    if sources or held:
        fit, _ = _prepare(base, sources or (str(GENERAL),), objective, max_tokens, seed, limit)
        judge, rest = held_rows(base, held, seed=seed) if held or base.anatomy.kind != "encoder_decoder" else (objective, [])
        if judge.renders != objective.renders:
            raise LuthierError("--calibrate and --data: one holds raw text and the other prompts with answers; give two of a kind")
    else:
        fit, rest = _prepare(base, (str(GENERAL),), objective, max_tokens, seed, limit, share=0.5)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(fit))[:count])
    return Rows([fit[i] for i in chosen], rest, objective, ", ".join(sources) or "the general text that ships")


def held_rows(base: Base, held: Sequence[str] = (), *, seed: int = 0) -> tuple[Objective, list[Row]]:
    """All rows of files, or of the general text that ships, and the objective that reads them."""
    objective = _objective(base, held)
    return objective, _prepare(base, held or (str(GENERAL),), objective, 2048, seed, None)[0]


def _objective(base: Base, sources: Sequence[str]) -> Objective:
    """What rows are read for: text by decoders, hidden tokens by encoders, and by encoder-decoders hidden spans or, where a file has prompts, answers."""
    if base.tokenizer is None:
        raise LuthierError(f"{base.source}: no tokenizer here, so no text can be read for this model; copy the one it was trained with into the folder")
    kind = "text" if base.anatomy.kind == "decoder" else "masked_text"
    if base.anatomy.kind == "encoder_decoder":
        records = list(islice(read(sources[0], bad=Bad()), LOOK_AT)) if sources else []
        if records and not detect(records).is_text:
            kind = "sft"
        else:
            try:
                hiding_of(Codec(base.tokenizer), form_of(base))
            except LuthierError:
                raise LuthierError(
                    f"{base.source}: its tokenizer has no sentinels to hide parts of a text by, so raw text says nothing to this encoder-decoder; "
                    "give prompts with answers: --calibrate FILE, --data FILE"
                ) from None
    return plugin("objectives", kind)()  # type: ignore[no-any-return]


def _prepare(
    base: Base, sources: Sequence[str], objective: Objective, max_tokens: int, seed: int, limit: int | None, share: float = 0.0
) -> tuple[list[Row], list[Row]]:
    prepared = prepare(
        sources,
        base.tokenizer,
        renders=objective.renders,
        form=form_of(base),
        limit=limit,
        max_tokens=min(max_tokens, base.max_positions),
        over_length="truncate" if objective.renders == "chat" else "split",
        validation_share=share,
        validation_rows=10**9,
        seed=seed,
        say=lambda _: None,
    )
    return prepared.train, prepared.validation


def batches(policy: Policy, objective: Objective, rows: Sequence[Row]) -> Iterator[Batch]:
    """Rows of like length together, where the model is."""
    for some in group(rows, BATCH_TOKENS, policy.base.packs):
        yield to_device(objective.collate(some, pad=policy.pad, packed=policy.base.packs), policy)


# --- block by block -------------------------------------------------------------------------------------------------


def calibrate(base: Base, precision: Any, rows: Rows, how: How | None = None) -> Iterator[Done]:
    """Replace the linears of all blocks by packed ones, fitted to rows; yields each block as it is done.

    ``precision``: one with a grid (gptq). What is no linear of a block (embeddings, norms, the head, a mixture's experts and router) stays as it is.
    Raises LuthierError, naming the linear, where what it sees or holds is not finite.
    """
    how = how or How()
    run = _Run(base, rows)
    made = {path: _empty(path, linear, precision) for path, linear in linears(base.model, base.anatomy).items()}  # refuses shapes before any work is done
    stacks = {name: [f"{path}.{i}" for i in range(len(base.model.get_submodule(path)))] for name, path in base.anatomy.stacks.items()}  # type: ignore[arg-type]
    order = [path for paths in stacks.values() for path in paths]
    with ExitStack() as standing:
        for name, paths in stacks.items():
            run.enter(name)
            for path in paths:
                block = base.model.get_submodule(path)
                inside = {p: m for p, m in made.items() if p.startswith(path + ".")}
                seen = run.moments(block, {p: base.model.get_submodule(p) for p in inside})
                done = Done(path, order.index(path) + 1, len(order))
                for p, linear in inside.items():
                    done.layers.append(_solve(p, base.model.get_submodule(p), linear, seen, precision, how))
                    replace(base.model, {p: linear})
                standing.enter_context(run.past(block))
                yield done
            if run.encodes:
                standing.enter_context(run.past(base.model.get_encoder()))  # type: ignore[operator]


def _empty(path: str, linear: nn.Module, precision: Any) -> PackedLinear:
    try:
        return empty(linear, precision)
    except LuthierError as e:
        raise LuthierError(f"{path}: {e}") from None


@torch.no_grad()
def _solve(path: str, linear: nn.Module, made: Any, seen: _Seen, precision: Any, how: How) -> Layer:
    """Fit one linear, and put its codes into the packed one that takes its place."""
    weight = dense_weight(linear)
    grid = dataclasses.replace(precision.grid, search=how.search)
    try:
        hessian, factor = seen.made_of(path, how)
        solved = gptq.solve(weight, factor, grid, precision.group)
    except ValueError as e:
        raise LuthierError(f"{path}: {e}") from None
    made.take(solved)
    whole = gptq.output_error(weight, hessian) or 1.0
    error, nearest = (gptq.output_error(s.values() - weight, hessian) / whole for s in (solved, gptq.nearest(weight, grid, precision.group)))
    return Layer(path, weight.numel(), error, nearest)


class _Seen:
    """Second moments of what the linears of a block saw. Linears that read the same tensor (query, key and value) share one sum, and what is made of it."""

    def __init__(self) -> None:
        self.leader: dict[str, str] = {}  # path -> the first linear that reads the same tensor
        self.sums: dict[str, gptq.Hessian] = {}
        self.now: list[tuple[Tensor, str]] = []  # what was read in the forward that is running
        self.last: tuple[str, Tensor, gptq.Factor] | None = None

    def add(self, path: str, x: Tensor, real_BT: Tensor) -> None:
        """What a linear is given; ``real_BT`` (B, T): where it is no padding."""
        if path not in self.leader:
            self.leader[path] = next((p for t, p in self.now if t is x), path)
        if self.leader[path] != path:
            return
        self.now.append((x, path))
        if path not in self.sums:
            self.sums[path] = gptq.Hessian(x.shape[-1], x.device)
        x_NI = x.flatten(0, -2)
        self.sums[path].add(x_NI[real_BT.flatten()] if real_BT.numel() == len(x_NI) else x_NI)

    def made_of(self, path: str, how: How) -> tuple[Tensor, gptq.Factor]:
        """(H, its factor) for one linear; those of the last one are kept, for the next that shares them."""
        if path not in self.leader:
            raise ValueError("no calibration row reached this linear, so there is nothing to fit it to")
        leader = self.leader[path]
        if self.last is None or self.last[0] != leader:
            self.last = None  # one at a time
            hessian = self.sums[leader].value()
            self.last = (leader, hessian, gptq.factor(hessian, damp=how.damp, by_importance=how.by_importance))
        return self.last[1:]


class _Reached(Exception):
    """The module that was waited for has given its output."""


class _Run:
    """The model on every batch, up to one module; what was passed already stands in for itself by giving what it gave."""

    def __init__(self, base: Base, rows: Rows):
        self.policy = Policy(base).eval()
        self.batches = list(batches(self.policy, rows.objective, rows.fit))
        self.seq2seq = base.anatomy.kind == "encoder_decoder"
        self.given: list[Any] = []  # by the last block that was passed, for each batch; the blocks before it only have to give something
        self.now = 0  # the batch that is running

    def enter(self, stack: str) -> None:
        """Begin a stack."""
        self.encodes = self.seq2seq and stack == "encoder"
        self.encoded, self.given = self.given, [None] * len(self.batches)

    def moments(self, block: nn.Module, inside: dict[str, nn.Module]) -> _Seen:
        """Run to the end of a block, summing up what its linears see."""
        seen = _Seen()
        with ExitStack() as hooks:
            for path, linear in inside.items():
                handle = linear.register_forward_pre_hook(lambda _, args, path=path: seen.add(path, args[0], self._real(args[0])))
                hooks.callback(handle.remove)
            for _ in self._outputs(block):
                seen.now = []
        return seen

    def past(self, module: nn.Module) -> AbstractContextManager[None]:
        """Run to the end of a module; inside what is returned it gives that without running."""
        for i, output in enumerate(self._outputs(module)):
            self.given[i] = output
        given = self.given
        return _standing_in(module, lambda: given[self.now])

    def _outputs(self, module: nn.Module) -> Iterator[Any]:
        """What a module gives for each batch; nothing behind it runs."""

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            raise _Reached(output)

        for number, batch in enumerate(self.batches):
            self.now = number
            handle = module.register_forward_hook(stop)
            try:
                with torch.no_grad():
                    self.policy.hidden(batch)
            except _Reached as e:
                yield e.args[0]
            finally:
                handle.remove()

    def _real(self, x: Tensor) -> Tensor:
        """(B, T): where what a linear reads is no padding. A decoder's cross-attention reads the source."""
        batch = self.batches[self.now]
        source = self.encodes or (self.seq2seq and x is self.encoded[self.now].last_hidden_state)
        stream = batch.source if source and batch.source is not None else batch
        return real(stream).to(x.device)


@contextmanager
def _standing_in(module: nn.Module, give: Callable[[], Any]) -> Iterator[None]:
    """Call ``give`` in place of a module's forward."""
    module.forward = lambda *_, **__: give()  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward  # the class's own is seen again
