"""What a run takes of each of many ranks: memory, traffic and time, predicted from its own modules on the meta device.

Memory is the planner's (memory.py) with every tensor that FSDP2 cuts counted as the first rank's part, and what FSDP2 gathers counted as the working memory
that it is. Traffic is what a rank hands to collectives in a step: its part of each all-gather, all of what a reduce-scatter or an all-reduce adds up. It is
what `place.traffic` counts in a run, to the byte. Time is a roofline: every operation takes as long as its arithmetic or its memory traffic, whichever is
longer; what FSDP2 gathers while it computes costs what is longer than the computing. Nothing of the time has been measured on such machines.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..amounts import size as amount
from ..core import Base, Batch
from ..devices.sharding import ROOM, blocks_of
from ..errors import LuthierError
from ..modelling.context import KEYS, SUMS, Group, sharing
from ..modelling.packed import packed
from ..modelling.site import restoring
from ..policy import Policy
from ..settings.run import Run
from . import memory, saved
from .gathers import Gathers, Holding
from .gpus import Gpu, Mesh, Ring, adding, gathering
from .memory import Plan
from .microbatch import Shape, batch_of, shape_of
from .roofline import Repeated, Work
from .saved import Peak

WEIGHTS, OF_WEIGHTS, GRADIENTS = "weights", "gradients of weights", "gradients"  # in place.traffic
NCCL = 800_000_000  # bytes of a GPU that NCCL's communicators take: taken, not measured


@dataclass(frozen=True)
class Layout:
    """How the base lies over the ranks."""

    shard: str  # none, hybrid, full
    parts: int  # a copy is cut into so many
    why: str = ""

    def ring(self, mesh: Mesh) -> Ring:
        """The ranks that hold one copy."""
        return Ring(mesh.local, 1) if self.shard == "hybrid" else Ring(mesh.local, mesh.machines)


def layouts(mesh: Mesh) -> list[Layout]:
    """All there are on this mesh."""
    if mesh.ranks == 1:
        return [Layout("none", 1)]
    hybrid = [Layout("hybrid", mesh.local)] if mesh.machines > 1 and mesh.local > 1 else []
    return [Layout("none", 1), *hybrid, Layout("full", mesh.ranks)]


@dataclass(frozen=True)
class Outlook:
    """What one rank takes, and a step of all."""

    layout: Layout
    mesh: Mesh
    standing: dict[str, int]  # bytes, there all the time
    working: dict[str, int]  # at the worst moment on top of it
    shape: Shape  # a micro-batch of the ranks that share it
    micro_batches: int  # of a rank, in a step
    idle: int  # ranks without a row in a step
    traffic: dict[str, int]  # bytes that a rank hands to collectives in a step
    tokens: int  # of a step, over all ranks
    seconds: dict[str, float]  # of a step, by what takes them

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.standing.values()) + sum(self.working.values())

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())


class Scale:
    """Outlooks of one run on several meshes; what they share is counted once."""

    def __init__(self, run: Run, gpu: Gpu | None = None, *, device: str = "cuda"):
        self.plan, self.gpu, self.device = Plan(run), gpu, device
        self.plan.means(device)
        self.trains = bool(getattr(run.method, "whole", False))
        self.of_lm = {id(p) for p in self.plan.policy.lm.parameters()}
        self.cut = {id(t): t for t in self._cut(self.plan.policy)}
        self.said = Repeated()  # what ranks that share a sequence hand one another, as it is counted
        self.counted: dict[Any, tuple[Work, dict[str, int]]] = {}
        self.peaks: dict[Any, dict[str, int]] = {}
        if self.plan.optimizer is None:
            raise LuthierError("nothing is trained, so there is nothing to spread over ranks")

    def outlook(self, run: Run, mesh: Mesh, layout: Layout) -> Outlook:
        """Of a run that shares the modules. Raises LuthierError where the ranks do not divide by those that share a sequence."""
        shared = run.place.context
        if mesh.ranks % shared:
            raise LuthierError(f"place.context: {shared} ranks are to share each sequence, and there are {mesh.ranks}; use a number that divides them")
        run, lanes = _of_lane(run, mesh.ranks // shared), mesh.ranks // shared
        work, said = self._counted(run)
        o, shape = run.optim, shape_of(run, self.plan.policy.base)
        whole = o.batch_tokens if o.batch_examples is None else o.batch_examples * max(shape.lengths) * shape.texts
        micro = max(1, round(whole / shape.tokens))
        rows = max(1, round(whole * lanes / (max(shape.lengths) * shape.texts)))
        traffic = {k: n * micro for k, n in (said | self._weights(layout)).items() if n}
        if mesh.ranks > 1:
            traffic |= {k: n for k, n in {GRADIENTS: 4 * self._replicated(layout)}.items() if n}
        return Outlook(
            layout,
            mesh,
            self._standing(run, layout),
            self._working(run, layout),
            shape,
            micro,
            max(0, lanes - rows) * shared,
            traffic,
            shape.tokens * micro * min(lanes, rows),
            {} if self.gpu is None else self._seconds(run, mesh, layout, work, said, micro),
        )

    def waiting(self, run: Run, mesh: Mesh, layout: Layout) -> float:
        """Share of a step in which a rank of it neither computes nor updates, by the time alone."""
        run = _of_lane(run, mesh.ranks // run.place.context)
        work, said = self._counted(run)
        found = self._seconds(run, mesh, layout, work, said, 1)
        return 1.0 - (found["computing"] + found["updating"]) / sum(found.values())

    def auto(self, mesh: Mesh, room: float) -> Layout:
        """What place.shard=auto chooses where a device has so many bytes; the rule is sharding.choose's."""
        every = {found.shard: found for found in layouts(mesh)}
        if mesh.ranks == 1 or self.trains:
            return replace(every.get("full", every["none"]), why="every weight trains")
        whole = sum(t.nbytes for t in _unique([*self.plan.policy.base.model.parameters(), *_codes(self.plan.policy.base)]))
        if whole <= ROOM * room:
            return replace(every["none"], why=f"its {amount(whole)} are less than half of a device")
        kind = "hybrid" if "hybrid" in every and whole / mesh.local <= ROOM * room else "full"
        return replace(every[kind], why=f"its {amount(whole)} are more than half of a device")

    # --- memory -------------------------------------------------------------------------------------------------------

    def _standing(self, run: Run, layout: Layout) -> dict[str, int]:
        policy, optimizer = self.plan.policy, self.plan.optimizer
        assert optimizer is not None
        state = run.optim.state if self.device == "cuda" else "float32"
        program = {"program": memory.CUDA_CONTEXT + (NCCL if layout.parts > 1 else 0)} if self.device == "cuda" else {}
        if layout.parts == 1:
            return program | memory._standing(policy, optimizer, state)
        whole = memory._standing(policy, optimizer, state)
        cut = self._cut(policy)
        out = {k: n for k, n in whole.items() if not k.startswith(("trained", "gradients", "moments"))} if not self.trains else {}
        own = sum(p.numel() for p in policy.trained().values() if not (self.trains and id(p) in self.of_lm))
        moments = sum(memory._moments(p.numel(), state) for p in policy.trained().values() if not (self.trains and id(p) in self.of_lm))
        if self.trains:
            mine = sum(_part(t, layout.parts) for t in cut)
            out |= {"buffers": whole.get("buffers", 0)}
            own, moments = own + mine, moments + 8 * mine
        else:
            for t, name in cut.items():
                out[name] -= (t.numel() - _part(t, layout.parts)) * t.element_size()
        return program | out | {"trained weights in float32": 4 * own, "gradients in float32": 4 * own, "moments of AdamW": moments}

    def _cut(self, policy: Policy) -> dict[Tensor, str]:
        """What FSDP2 cuts, and under which name it stands: of a base that trains everything, else the blocks, in codes where they are."""
        lm = policy.lm
        if self.trains:
            return dict.fromkeys(_unique(lm.parameters()), "")
        out: dict[Tensor, str] = {}
        added = {id(p) for p in policy.trained().values()}
        for block in blocks_of(lm, policy.base.anatomy):
            codes = {id(t): t for _, linear in packed(block) for t in linear.stored().values() if t.dim()}
            out |= dict.fromkeys(codes.values(), "frozen weights in codes")
            floats = (p for p in block.parameters() if id(p) not in added and id(p) not in codes and not p.requires_grad)
            out |= {p: f"frozen weights in {memory._name(p.dtype)}" for p in floats}
        return out

    def _working(self, run: Run, layout: Layout) -> dict[str, int]:
        """A micro-batch, as its first rank runs it, with what is gathered for it."""
        plan, key = self.plan, (self._key(run), layout.parts > 1)
        if key in self.peaks:
            return self.peaks[key]
        found: list[Holding] = []

        def watching(ours: Iterable[Tensor], scored: int) -> Holding:
            found.append(Holding(ours, scored))
            return found[0]

        def step(watch: Any, batch: Batch) -> None:
            with Gathers(watch, self._kept(layout), self._outside()).following() if layout.parts > 1 else nullcontext():
                memory.stepping(plan.policy, plan.objective, batch, watch)

        peak = self._stepping(run, step, once=plan.stacks, watching=watching)
        out = dict(peak.parts)
        if self.device == "cuda":
            out["allocator"] = round(memory.CUDA_ALLOCATOR * peak.bytes)
        self.peaks[key] = out
        return out

    def _stepping(self, run: Run, step: Any, **how: Any) -> Peak:
        """Run a micro-batch of this rank's on meta, recomputed where the run does that."""
        plan, shared = self.plan, run.place.context
        group = Group(0, shared, traffic=self.said) if shared > 1 else None
        batch, scored = batch_of(shape_of(run, plan.policy.base), plan.policy.base, sharing(plan.objective, group))
        ours = list(memory.tensors_of(plan.policy, plan.optimizer))
        if run.recompute == "blocks":
            plan.policy.lm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
        try:
            plan.policy.train()
            return saved.count(plan.policy, ours, self.device, lambda watch: step(watch, batch), scored=scored, **how)
        finally:
            if run.recompute == "blocks":
                plan.policy.lm.activation_checkpointing_disable()

    def _kept(self, layout: Layout) -> list[tuple[nn.Module, int, int]]:
        """The blocks that stand for all, each with its bytes as gathered and as added up."""
        return [(block, *self._bytes(block.parameters(), block)) for _, kept in self.plan.stacks for block, _ in kept]

    def _outside(self) -> tuple[int, int]:
        """The same of what is cut and not in a block."""
        policy = self.plan.policy
        inside = {id(p) for b in blocks_of(policy.lm, policy.base.anatomy) for p in b.parameters()}
        return self._bytes(p for p in policy.lm.parameters() if id(p) not in inside)

    def _bytes(self, params: Iterable[Tensor], module: nn.Module | None = None) -> tuple[int, int]:
        """Of what is cut of these: bytes as gathered, and of the float32 gradients that are added up (0: none)."""
        compute = self.plan.run.precision.dtype
        mine = [t for t in _unique([*params, *(_codes_of(module) if module is not None else ())]) if id(t) in self.cut]
        if self.trains:
            return sum(t.numel() * compute.itemsize for t in mine), sum(4 * t.numel() for t in mine)
        return sum(t.nbytes for t in mine), 0

    # --- traffic ------------------------------------------------------------------------------------------------------

    def _replicated(self, layout: Layout) -> int:
        """Trained numbers that every rank holds all of."""
        policy = self.plan.policy
        return sum(p.numel() for p in policy.trained().values() if layout.parts == 1 or not self.trains or id(p) not in self.of_lm)

    def _weights(self, layout: Layout) -> dict[str, int]:
        """Of the sharded base, in a micro-batch: see sharding.Sharding.traffic, which asks the laid-out model the same."""
        if layout.parts == 1:
            return {}
        policy, n, compute, cut = self.plan.policy, layout.parts, self.plan.run.precision.dtype, self.cut
        part = lambda t: _part(t, n) * (compute.itemsize if self.trains else t.element_size())  # noqa: E731
        blocks = [[t for t in _unique([*b.parameters(), *_codes_of(b)]) if id(t) in cut] for b in blocks_of(policy.lm, policy.base.anatomy)]
        inside = {id(t) for some in blocks for t in some}
        out = {WEIGHTS: 2 * sum(part(t) for some in blocks for t in some) + sum(part(t) for k, t in cut.items() if k not in inside)}
        if self.trains:
            whole = sum(4 * _part(t, n) * n for t in cut.values())
            out[OF_WEIGHTS] = whole + (whole // n if layout.shard == "hybrid" else 0)
        return out

    # --- time ---------------------------------------------------------------------------------------------------------

    def _counted(self, run: Run) -> tuple[Work, dict[str, int]]:
        """The operations of a micro-batch, and what ranks that share a sequence say in it; once for each kind of micro-batch."""
        key = self._key(run)
        if key not in self.counted:
            found: list[Work] = []

            def watching(ours: Iterable[Tensor], scored: int) -> Work:
                found.append(Work(ours, scored, self.gpu))
                self.said.work = found[0]
                return found[0]

            def step(watch: Any, batch: Batch) -> None:
                with watch.counting([entry for _, kept in self.plan.stacks for entry in kept]):
                    memory.stepping(self.plan.policy, self.plan.objective, batch, watch)

            self.said.clear()
            self._stepping(run, step, once=self.plan.stacks, watching=watching)
            self.counted[key] = found[0], dict(self.said)
        return self.counted[key]

    def _key(self, run: Run) -> str:
        return repr((shape_of(run, self.plan.policy.base), run.recompute, run.place.context))

    def _seconds(self, run: Run, mesh: Mesh, layout: Layout, work: Work, said: dict[str, int], micro: int) -> dict[str, float]:
        gpu, policy = self.gpu, self.plan.policy
        assert gpu is not None
        ring, everyone = layout.ring(mesh), Ring(mesh.local, mesh.machines)
        blocks = len(list(blocks_of(policy.lm, policy.base.anatomy)))
        forward, backward = work.forward, work.total - work.forward
        out = {"computing": micro * work.total}
        if layout.parts > 1:
            block, of_block = self._bytes(next(blocks_of(policy.lm, policy.base.anatomy)).parameters(), next(blocks_of(policy.lm, policy.base.anatomy)))
            outside, of_outside = self._outside()
            gather = gathering(block, ring, gpu)
            first = gather + (gathering(outside, ring, gpu) if outside else 0.0)
            back = gather
            if self.trains:
                copies = Ring(1, mesh.machines) if layout.shard == "hybrid" else Ring(1, 1)
                back += gathering(of_block, ring, gpu) + adding(of_block / layout.parts, copies, gpu)
            hidden = max(0.0, gather - forward / blocks) + max(0.0, back - backward / blocks)
            last = back - gather + (gathering(of_outside, ring, gpu) if self.trains else 0.0)
            out["waiting for weights"] = micro * (first + blocks * hidden + last)
        if said:
            shared = _sharers(run.place.context, mesh)
            out["waiting for keys and values"] = micro * _kv(said, blocks, run, shared, gpu)
        replicated = 4 * self._replicated(layout)
        if mesh.ranks > 1:
            out["adding up gradients"] = adding(replicated, everyone, gpu) if replicated else 0.0
            out["counting together"] = 3 * adding(100, everyone, gpu)  # units, losses, and whether all are well
        own = self._replicated(layout) + (sum(_part(t, layout.parts) for t in self._cut(policy)) if self.trains and layout.parts > 1 else 0)
        out["updating"] = own * 36 / (gpu.bandwidth * 1e9 * gpu.reached)  # the norm reads gradients; AdamW reads four tensors, writes three, and zeroes one
        return out


def _kv(said: dict[str, int], blocks: int, run: Run, ring: Ring, gpu: Gpu) -> float:
    """Seconds of a micro-batch that ranks wait for one another's keys, values and their gradients: what is handed over is a part at each gather, and all at
    each scatter, of one size."""
    gathers, n = blocks * (2 if run.recompute == "blocks" else 1), ring.size
    part = said[KEYS] / (gathers + blocks * n)
    sums = adding(said.get(SUMS, 0), ring, gpu)
    return (gathers + blocks) * gathering(part * n, ring, gpu) + sums


def _sharers(shared: int, mesh: Mesh) -> Ring:
    """Neighbours that share a sequence."""
    return Ring(shared, 1) if shared <= mesh.local else Ring(mesh.local, -(-shared // mesh.local))


def _of_lane(run: Run, lanes: int) -> Run:
    """The run as one share of the data sees it: its part of a step."""
    o = run.optim
    if o.batch_examples is not None:
        return replace(run, optim=replace(o, batch_examples=max(1, -(-o.batch_examples // lanes))))
    return replace(run, optim=replace(o, batch_tokens=max(1, -(-o.batch_tokens // lanes))))


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _codes(base: Base) -> list[Tensor]:
    return _codes_of(base.model)


def _codes_of(module: nn.Module) -> list[Tensor]:
    return [t for _, linear in packed(module) for t in linear.stored().values()]


def _part(t: Tensor, parts: int) -> int:
    """Numbers of the first of so many parts, along the first dimension."""
    if not t.dim():
        return t.numel()
    return -(-t.shape[0] // parts) * (t.numel() // t.shape[0]) if t.shape[0] else 0
