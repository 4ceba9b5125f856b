"""The memory of a run, predicted without its weights: the run's own modules on the meta device, its own optimizer, and one micro-batch as its settings give it.

What is there all the time is counted tensor by tensor: frozen weights as they are stored, what trains, gradients, moments. What comes and goes is counted by
running it (saved.py): a training step, and answering sample prompts; the larger counts. An evaluation takes the same batches without what a backward needs.

The micro-batch is the worst that the settings allow: full examples of data.max_tokens tokens, every token trained. Data of shorter examples takes less.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import build, counts, speed
from ..core import Batch
from ..generating import prepacked
from ..generating.decoding import DecoderSteps, Seq2SeqSteps
from ..measuring.measure import ANSWER_ROWS
from ..modelling.anatomy import numbers
from ..modelling.context import Group, sharing
from ..modelling.packed import packed
from ..modelling.recompute import blocks_of, recomputing
from ..optim import SMALL, Optimizer
from ..policy import Policy
from ..settings.run import Run
from . import saved
from .microbatch import Shape, batch_of, lacks_labels, parts_of, shape_of, with_labels
from .saved import Peak

CUDA_CONTEXT = 700_000_000  # bytes a process takes on a GPU before its first tensor: the context, cuBLAS and its workspaces
CUDA_ALLOCATOR = 0.04  # of working memory: what torch's allocator on a GPU rounds up and cannot use again
# Before glibc 2.38, aligned blocks that are freed hardly ever fit again: most of what a forward lets go stays as holes between what it keeps, up to nearly as
# much again. What blocks take that are computed a second time in the backward does not fit the room of the block before either: about half of what they
# would have kept. Fitted to the runs of benchmarks/planner.py (glibc 2.36); docs/results.md has what is left.
GLIBC_FREED, GLIBC_MOST, GLIBC_RECOMPUTED = 0.62, 0.8, 0.45
MORE_LIBRARIES = 20_000_000  # what a run takes on a CPU beyond a process that has loaded the libraries: reading data, generated code
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"  # glibc's: from how many bytes on a block is given back when it is freed


@dataclass(frozen=True)
class Prediction:
    """Bytes that a run takes."""

    device: str  # the kind of device: cpu, cuda, mps
    shape: Shape
    trained: int  # numbers
    whole: int
    standing: dict[str, int]  # there all the time
    moments: dict[str, Peak]  # on top of it: training, evaluation, answers
    loading: int  # while random weights are made, in float32; 0 where weights are read
    decodable: int  # bytes that the weights in codes would take beside them, if they were kept decoded where there is room; 0: they are not

    @property
    def worst(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=lambda m: self.moments[m].bytes)

    @property
    def total(self) -> int:
        """The peak of the whole run."""
        return max(self.standing["program"] + self.loading, sum(self.standing.values()) + self.moments[self.worst].bytes)

    def kept_decoded(self, room: int) -> int:
        """What decoded weights take besides on a device with so much room: nothing, or all of it where that is less than a third of what is free."""
        there = sum(n for name, n in self.standing.items() if name == "program" or name.startswith("frozen"))
        return self.decodable if self.decodable < (room - there) / 3 else 0

    def here(self, device: torch.device) -> Prediction:
        """With the decoded weights that a run keeps beside its codes where this machine has room for them."""
        kept = self.kept_decoded(machine(device)[1])
        return replace(self, standing=self.standing | {"frozen weights kept decoded": kept}) if kept else self


class Plan:
    """A run's modules on the meta device, which several predictions share: those that differ only in data, batches and recomputation."""

    def __init__(self, run: Run):
        self.run, _ = build.resolve(run)
        trains_base = self.run.method.edits == "weights"
        base = build.load(self.run.model, precision=self.run.precision, device="meta", weights=False, trains_base=trains_base)
        if lacks_labels(self.run.objective):
            self.run = replace(self.run, objective=with_labels(self.run.objective))
        if getattr(self.run.precision, "resident", "no") == "yes":
            for _, module in packed(base.model):
                module.keep(self.run.precision.dtype)
        self.policy, self.objective = build.assemble(replace(self.run, recompute="none"), base)
        self.meant = self.run.place.device.type  # the kind of device that its faster forms are for
        self.optimizer = Optimizer(self.policy.trained(), lr=1e-3) if self.policy.trained() else None
        self.trained, self.whole = counts.total(self.policy)
        self.stacks = saved.stacks(self.policy.lm, base.anatomy.stacks.values())
        self.blocks = len(blocks_of(self.policy.lm, base.anatomy.stacks.values()))

    def means(self, device: str) -> None:
        """Give the modules the faster forms of this kind of device: what serves on one is not what serves on another."""
        if device != self.meant:
            speed.install(self.policy, self.run.speed, device)
            self.meant = device

    def predict(self, run: Run, device: str, *, program: int | None = None) -> Prediction:
        """For this run, which shares the modules, on this kind of device. ``program``: bytes that the process took before it loaded a model; default: now."""
        base, lm = self.policy.base, self.policy.lm
        self.means(device)
        shape = shape_of(run, base)
        with recomputing(lm, base.anatomy.stacks.values(), run.recompute):
            kept, self.stacks = self.stacks, saved.stacks(lm, base.anatomy.stacks.values()) if isinstance(run.recompute, int) else self.stacks
            try:
                moments = self._moments(run, shape, device)
            finally:
                self.stacks = kept
        standing = {"program": _program(device, program)} | _standing(self.policy, self.optimizer, run.optim.state if device == "cuda" else "float32")
        worst = max(moments.values(), key=lambda p: p.bytes)
        share = run.recompute / self.blocks if isinstance(run.recompute, int) else float(run.recompute == "blocks")
        again = share and "training" in moments and device == "cpu"
        standing["allocator"] = _allocator(device, worst, kept=round(share * self._training(run, shape, device).small) if again else 0)
        linears = [m for _, m in packed(lm)]
        auto = getattr(self.run.precision, "resident", "no") == "auto"
        return Prediction(
            device,
            shape,
            self.trained,
            self.whole,
            standing,
            moments,
            loading=4 * numbers(lm) if run.model.random else 0,  # made in float32, then rounded or packed
            decodable=sum(m.count for m in linears) * self.run.precision.dtype.itemsize if auto else 0,
        )

    def _training(self, run: Run, shape: Shape, device: str) -> Peak:
        """A micro-batch, forward and backward, recomputed or not as the model is set now."""
        policy = self.policy
        shared = run.place.context
        batch, scored = batch_of(shape, policy.base, sharing(self.objective, Group(0, shared) if shared > 1 else None))
        ours = list(tensors_of(policy, self.optimizer))
        policy.train()
        return saved.count(policy, ours, device, lambda w: stepping(policy, self.objective, batch, w), scored=scored, once=self.stacks)

    def _moments(self, run: Run, shape: Shape, device: str) -> dict[str, Peak]:
        policy, ours = self.policy, list(tensors_of(self.policy, self.optimizer))
        out = {}
        if self.optimizer is not None:
            out["training"] = self._training(run, shape, device)
        policy.eval()
        if not out:
            batch, scored = batch_of(shape, policy.base, self.objective)
            how: dict[str, Any] = {"scored": scored, "once": self.stacks}
            out["evaluation"] = saved.count(policy, ours, device, lambda w: evaluating(policy, self.objective, batch, w), **how)
        rows = ANSWER_ROWS if run.evaluate.tasks else run.evaluate.samples
        writes = {p.renders for p in parts_of(self.objective).values()} & {"chat", "text"}
        if rows and writes and policy.base.anatomy.kind != "encoder":
            peak = saved.count(policy, ours, device, lambda _: _answer(policy, rows, max(shape.lengths)), once=self.stacks)
            more = prepacked.size(policy.lm) if device == "cpu" else 0
            out["answers"] = replace(peak, bytes=peak.bytes + more, parts=peak.parts | ({"weights laid out": more} if more else {}))
        return out


def predict(run: Run, device: str | None = None) -> Prediction:
    """Predict the memory of a run on a kind of device (cpu, cuda, mps; default: where it would run). A model folder needs no more than config.json.

    Raises LuthierError where the run cannot be assembled or counted.
    """
    return Plan(run).predict(run, device or run.place.device.type)


def machine(device: torch.device) -> tuple[int, int]:
    """(all, free) bytes of memory that a run on this device may have here; what this process holds already counts as free."""
    if device.type == "cuda":
        free, everything = torch.cuda.mem_get_info(device)
        return everything, free
    import psutil

    memory = psutil.virtual_memory()
    everything, free = memory.total, memory.available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # a container's own; psutil sees the whole machine
    if limit.is_file() and (text := limit.read_text().strip()).isdigit() and int(text) < everything:
        everything = int(text)
        free = min(free, everything - (int(used.read_text()) if used.is_file() else 0))
    return everything, min(everything, free + _program(device.type))


# --- what is there all the time ---------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory that this process takes now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _program(device: str, taken: int | None = None) -> int:
    """Python and the libraries: on a GPU what the driver takes, else what a process that has loaded them takes (default: this one, now), and a little more."""
    if device == "cuda":
        return CUDA_CONTEXT
    return (resident() if taken is None else taken) + MORE_LIBRARIES


def _allocator(device: str, peak: Peak, *, kept: int) -> int:
    """What is freed and not given back, or does not fit again. ``kept``: what blocks that are recomputed would have kept in small pieces."""
    if device == "cuda":
        return round(CUDA_ALLOCATOR * peak.bytes)
    library, version = platform.libc_ver()
    old = library == "glibc" and tuple(map(int, version.split(".")[:2])) < (2, 38)
    return round(max(min(GLIBC_FREED * peak.freed, GLIBC_MOST * peak.small), GLIBC_RECOMPUTED * kept)) if old and THRESHOLD not in os.environ else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _moments(numbers: int, state: str) -> int:
    """Bytes of the two moments of a tensor: fp32, or codes with the largest of each block."""
    return 8 * numbers if state == "float32" or numbers < SMALL else 2 * numbers + 8 * -(-numbers // 256)


def _standing(policy: Policy, optimizer: Optimizer | None, state: str) -> dict[str, int]:
    """Bytes by what they are; a tensor that is held twice counts once. ``state``: how moments are kept."""
    out: dict[str, int] = {}
    trained = {id(p): p for p in policy.trained().values()}
    seen: set[int] = set(trained)

    def add(name: str, tensors: Iterable[Tensor | None]) -> None:
        for t in tensors:
            if t is not None and id(t) not in seen and t.numel():
                seen.add(id(t))
                out[name] = out.get(name, 0) + t.nbytes

    for _, linear in packed(policy.lm):
        add("frozen weights in codes", linear.stored().values())
        add("frozen weights kept decoded", [linear.resident])
    own = [*policy.lm.parameters(), *policy.heads.parameters()]
    for dtype in dict.fromkeys(p.dtype for p in own):
        add(f"frozen weights in {_name(dtype)}", (p for p in own if p.dtype == dtype))
    delta = policy.delta
    add("buffers", [*policy.lm.buffers(), *policy.heads.buffers(), *(delta.buffers.values() if delta is not None else ())])
    if optimizer is not None:
        halves = [p for p in trained.values() if p.dtype != torch.float32]  # float32 ones are views of the masters
        if halves:
            out[f"trained weights in {_name(halves[0].dtype)}"] = sum(p.nbytes for p in halves)
        out["trained weights in float32"] = sum(g.master.nbytes for g in optimizer.groups)
        out["gradients in float32"] = sum(g.grad.nbytes for g in optimizer.groups)
        out["moments of AdamW"] = sum(_moments(p.numel(), state) for p in trained.values())
    return out


def tensors_of(policy: Policy, optimizer: Optimizer | None) -> Iterable[Tensor]:
    """Everything that counts as standing, or as there before."""
    yield from policy.parameters()
    yield from policy.buffers()
    if policy.delta is not None:
        yield from policy.delta.params.values()
        yield from policy.delta.buffers.values()
    for g in optimizer.groups if optimizer is not None else ():
        yield from (g.master, g.grad)


# --- what comes and goes ----------------------------------------------------------------------------------------------


def stepping(policy: Policy, objective: Any, batch: Batch, watch: saved.Watch) -> None:
    """A micro-batch, as train.py runs it."""
    delta = policy.delta
    if delta is not None and delta.on_step is not None:
        delta.on_step(0, 2)
    if objective.couples:
        with watch.saying(0.0):
            objective.couple(policy, [batch])
    loss = objective.loss(policy, batch)
    parts = [w * loss.sums[k] / batch.units[k] for k, w in objective.terms.items() if batch.units.get(k) and k in loss.sums]
    total = torch.stack(parts).sum()
    watch.forward_done()
    total.backward()
    if delta is not None and delta.penalty is not None:
        penalty = delta.penalty()
        if penalty.requires_grad:
            penalty.backward()


@torch.no_grad()
def evaluating(policy: Policy, objective: Any, batch: Batch, watch: saved.Watch) -> None:
    if objective.couples:
        with watch.saying(0.0):
            objective.couple(policy, [batch])
    objective.loss(policy, batch)


@torch.no_grad()
def _answer(policy: Policy, rows: int, tokens: int) -> None:
    """The first step of answering prompts that leave room for one token, where the cache is as large as it gets."""
    steps = (Seq2SeqSteps if policy.base.anatomy.kind == "encoder_decoder" else DecoderSteps)(policy, [policy.active] * rows)
    steps.logits(steps.begin([[0] * (tokens - 1)] * rows)).log_softmax(-1)
