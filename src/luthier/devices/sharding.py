"""A base laid out over ranks by PyTorch's FSDP2 (`fully_shard`): each rank holds a part of every weight and gathers a block when it is computed with.

Zhao et al., 2023, arXiv 2304.11277; Rajbhandari et al., 2019, arXiv 1910.02054 (ZeRO, stage 3). Two layouts:

1. A frozen base: the blocks are sharded as they are stored, and codes are gathered as codes. Embeddings, head and what else is outside the blocks stay whole on
   every rank: they are read in more ways than by a forward. Deltas are attached afterwards, so no shard holds them: they are whole on every rank.
2. A base whose every weight trains: everything is sharded, in float32 (the optimizer's masters), and gathered in the precision it computes with. Gradients are
   averaged in float32 and each rank keeps its part. What is outside the blocks is gathered before the first block and stays until its gradient is done.

How this differs from calling fully_shard on a model: the root is a module that is never called itself. A policy runs the trunk (of an encoder-decoder, both
stacks) and reads the head's weight afterwards, so the trunk's forward is what gathers the root's weights, and they stay for whoever reads them next.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import amounts, heap
from ..core import Incompatible, LuthierError
from ..modelling import shards
from ..modelling.anatomy import Anatomy, modules, trunk
from ..modelling.packed import PackedLinear, packed
from .device import Alone


class _Root(nn.Module):
    """Holds the model for FSDP2; never called."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm


@dataclass
class Sharding:
    """How one base lies over the ranks of a mesh, whose last dimension is the one that shards; one before it replicates."""

    mesh: Any  # torch.distributed.device_mesh.DeviceMesh
    trains: bool  # every weight of the base
    compute: torch.dtype  # of activations
    offload: bool = False  # what a rank holds lies in the CPU's memory
    place: Any = field(default_factory=Alone)  # where it is computed, what counts and names its collectives
    said: str = ""  # in a sentence
    root: Any = None  # once laid out

    def __post_init__(self) -> None:
        if self.device.type == "cpu":
            heap.give_back_always()

    @property
    def part(self) -> tuple[int, int]:
        """(which, of how many) parts this rank holds."""
        dim = self.mesh.ndim - 1
        return int(self.mesh.get_local_rank(dim)), int(self.mesh.size(dim))

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return getattr(self.place, "device", torch.device("cpu"))

    @property
    def copies(self) -> int:
        """How often the whole base is there."""
        return int(self.mesh.size()) // self.part[1]

    # --- laying out ---------------------------------------------------------------------------------------------------

    def lay_out(self, lm: nn.Module) -> None:
        """Cut a model's weights: in memory, or on the meta device before they are read, in which case only the parts are."""
        from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

        if self.trains:
            _join_tied(lm)
            for p in lm.parameters():
                p.data = p.data.float()
            lm.requires_grad_(True)
        anatomy = Anatomy.of(lm)
        blocks = list(blocks_of(lm, anatomy))
        parts = {(m, n): t for b in blocks for m, n, t in _codes_as_parameters(b)}
        mixed = MixedPrecisionPolicy(param_dtype=self.compute, reduce_dtype=torch.float32) if self.trains else MixedPrecisionPolicy()
        how: dict[str, Any] = {"mesh": self.mesh, "mp_policy": MixedPrecisionPolicy(mixed.param_dtype, mixed.reduce_dtype, None, cast_forward_inputs=False)}
        if self.offload:
            how["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        for block in blocks:
            fully_shard(block, reshard_after_forward=True, **how)  # type: ignore[call-overload]
        self.root = _Root(lm)
        inside = {id(p) for b in blocks for p in b.parameters()}
        outside = set() if self.trains else {p for p in lm.parameters() if id(p) not in inside}
        fully_shard(self.root, reshard_after_forward=False, ignored_params=outside, **how)
        gather, reduce = _collectives(self)
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(gather)
                module.set_custom_reduce_scatter(reduce)
                module.set_reduce_scatter_unused_params(self.trains)  # what gets no gradient on one rank may get one on another
                module.set_force_sum_reduction_for_comms(self.device.type != "cuda")  # gloo sums, and does not average
        for below, block in zip([blocks[0], *blocks], blocks, strict=False):  # by default it asks for what came before in the last forward, an evaluation's too
            block.set_modules_to_backward_prefetch([below])
        for (module, name), t in parts.items():
            module._parameters[name] = nn.Parameter(shards.like(t, module._parameters[name]), requires_grad=False)
        stacks = [lm.get_encoder(), lm.get_decoder()] if anatomy.kind == "encoder_decoder" else [trunk(lm)]  # type: ignore[operator]
        for i, stack in enumerate(stacks):
            self._through_root(stack, f"stack_{i}")
        lm._sharding = self  # type: ignore[assignment]

    def _through_root(self, stack: nn.Module, name: str) -> None:
        """Calling ``stack`` is a forward of the root."""
        from torch.distributed.fsdp import register_fsdp_forward_method

        own = stack.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs)

        setattr(self.root, name, forward)
        register_fsdp_forward_method(self.root, name)
        run = getattr(self.root, name)
        stack.forward = functools.wraps(own)(lambda *args, **kwargs: run(*args, **kwargs))

    def settle(self, lm: nn.Module) -> None:
        """After the weights were read: round what trains as one process would hold it, and move what is not sharded to the device."""
        shards.let_go(lm.parameters())
        with torch.no_grad():
            for p in lm.parameters() if self.trains and self.compute != torch.float32 else ():
                part = shards.here(p)
                part.copy_(part.to(self.compute))
        if self.offload:
            self.move(lm)
        else:
            lm.to(self.device)

    def move(self, module: nn.Module) -> None:
        """What is not sharded to the device. Parts stay where `settle` left them: FSDP2 knows them, and would look for them under a tensor that stands in."""
        for m in module.modules():
            for p in m._parameters.values():
                if p is not None and not shards.is_sharded(p):
                    p.data = p.data.to(self.device)
            for n, b in m._buffers.items():
                m._buffers[n] = None if b is None else b.to(self.device)

    def rest(self) -> None:
        """Give back what the last forward gathered and left for the head; the parameters are parts again."""
        self.root.reshard()

    # --- traffic ------------------------------------------------------------------------------------------------------

    def traffic(self, lm: nn.Module, *, backward: bool = True, reached: int | None = None) -> dict[str, int]:
        """Bytes that this rank hands to collectives in one micro-batch: its part of each all-gather, all of what a reduce-scatter adds up,
        and its part of that once more where there are copies of the whole.

        ``backward``: a training step. ``reached``: through how many blocks, from the last, the gradient goes; default: all.
        """
        blocks = list(blocks_of(lm, Anatomy.of(lm)))
        again = 0 if not backward else len(blocks) if reached is None else min(reached + 1, len(blocks))  # one is asked for ahead
        inside = {id(p) for b in blocks for p in b.parameters()}
        outside = [p for p in lm.parameters() if shards.is_sharded(p) and id(p) not in inside]
        _, count = self.part
        if count == 1 and self.copies == 1:
            return {"weights": 0, "gradients of weights": 0}
        gathered = sum(self._gathered(b.parameters()) for b in blocks) + self._gathered(outside) if count > 1 else 0
        gathered += sum(self._gathered(b.parameters()) for b in blocks[len(blocks) - again :]) if count > 1 else 0
        added = 0
        if self.trains and backward:
            whole = sum(4 * _padded(p, count) for p in {id(p): p for p in lm.parameters() if p.requires_grad}.values())
            added = (whole if count > 1 else 0) + (whole // count if self.copies > 1 else 0)
        return {"weights": gathered, "gradients of weights": added}

    def _gathered(self, params: Any) -> int:
        """Bytes of this rank's part of an all-gather of these."""
        _, count = self.part
        size = lambda p: (self.compute if self.trains else p.dtype).itemsize  # noqa: E731
        return sum(size(p) * _padded(p, count) // count for p in {id(p): p for p in params}.values() if shards.is_sharded(p))


def _collectives(sharding: Sharding) -> tuple[Any, Any]:
    """FSDP2's own two, with their bytes counted and their waiting named."""
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

    place, copies = sharding.place, sharding.copies

    class Gather(DefaultAllGather):
        """Of the weights of a block."""

        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            place.traffic["weights"] += input_tensor.nbytes
            with place.doing("gathering weights"):
                return super().__call__(output_tensor, input_tensor, *args, **kwargs)

    class Reduce(DefaultReduceScatter):
        """Of their gradients; where there are copies of the whole, FSDP2 adds up each part over them afterwards."""

        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            place.traffic["gradients of weights"] += input_tensor.nbytes + (output_tensor.nbytes if copies > 1 else 0)
            with place.doing("adding up gradients of weights"):
                return super().__call__(output_tensor, input_tensor, *args, **kwargs)

    return Gather(), Reduce()


def blocks_of(lm: nn.Module, anatomy: Anatomy) -> Iterator[nn.Module]:
    """All blocks in model order, an encoder's first, sites seen through."""
    everything = dict(modules(lm))
    for path in anatomy.stacks.values():
        for i in range(len(everything[path])):  # type: ignore[arg-type]
            yield everything[f"{path}.{i}"]


def sharding_of(lm: nn.Module) -> Sharding | None:
    """How a model was laid out; None: it is whole on every rank."""
    return lm.__dict__.get("_sharding")


def _padded(p: Tensor, count: int) -> int:
    """Numbers of a tensor whose first dimension is filled up to a multiple of ``count``."""
    rows = -(-p.shape[0] // count) * count
    return rows * p[0].numel() if p.shape[0] else 0


def _join_tied(lm: Any) -> None:
    """transformers ties weights after reading them; they have to be one before they are cut."""
    for target, source in (getattr(lm, "all_tied_weights_keys", None) or {}).items():
        (path, _, leaf), (other, _, theirs) = target.rpartition("."), source.rpartition(".")
        lm.get_submodule(path)._parameters[leaf] = lm.get_submodule(other)._parameters[theirs]


def _codes_as_parameters(block: nn.Module) -> Iterator[tuple[PackedLinear, str, Tensor]]:
    """Make the codes of a block's packed linears parameters, which is what FSDP2 shards. Yields those of which this rank already holds only its part."""
    for _, linear in packed(block):
        if linear.resident is not None:
            raise Incompatible("decoded weights are kept in memory beside the codes, which a sharded base has no room for; set precision.resident=no")
        for name, t in linear.stored().items():
            if t.dim() and name in linear._buffers:
                del linear._buffers[name]
                full = linear.cut_from.get(name)
                if full is not None:
                    yield linear, name, t
                stand_in = t if full is None else torch.empty(full, dtype=t.dtype, device="meta")
                linear.register_parameter(name, nn.Parameter(stand_in, requires_grad=False))


# --- what to do -----------------------------------------------------------------------------------------------------

ROOM = 0.5  # of a device's memory that a frozen base may take before it is sharded: the rest is for activations, deltas and answers


def choose(lm: nn.Module, *, trains: bool, compute: torch.dtype, place: Any, local_size: int) -> Sharding | None:
    """The layout for a model on the meta device, as ``place.shard`` (auto, full or hybrid) asks; None: every rank holds all of it.

    auto: a base that trains is sharded over all ranks; a frozen one that fits into half of a device's memory is not sharded, since gathering it again for every
    micro-batch is traffic for nothing; one that does not is sharded inside each machine where it fits so, else over all ranks.
    """
    shard, why = place.shard, "as asked"
    machines = place.size // local_size
    if shard == "auto" and trains:
        shard, why = "full", "every weight trains"
    elif shard == "auto":
        size = _bytes_of(lm)
        room = min(place.gather(_room(place, local_size), "memory of devices"))
        if size <= ROOM * room:
            return None
        fits = machines > 1 and size / local_size <= ROOM * room
        shard = "hybrid" if fits else "full"
        why = f"its {amounts.size(size)} are more than half of the {amounts.size(room)} of a device"
    if shard == "hybrid" and (machines < 2 or place.size % local_size):
        raise LuthierError(
            f"place.shard: hybrid shards inside each machine and keeps a copy on every machine, and this launch has {place.size} processes, {local_size} of "
            "them on this machine; use shard: full, or start the same number of processes on two machines or more"
        )
    from torch.distributed.device_mesh import init_device_mesh

    kind = place.device.type
    with place.doing("meeting the ranks that share a copy"):
        mesh = (
            init_device_mesh(kind, (machines, local_size), mesh_dim_names=("copies", "parts"))
            if shard == "hybrid"
            else init_device_mesh(kind, (place.size,), mesh_dim_names=("parts",))
        )
    ranks = local_size if shard == "hybrid" else place.size
    said = f"sharded over {ranks} ranks{' of each machine' if shard == 'hybrid' else ''}: {why}"
    return Sharding(mesh, trains, compute, offload=place.offload, place=place, said=said)


def _bytes_of(lm: nn.Module) -> int:
    """Bytes of a model's weights as they are stored, tied ones once."""
    tensors = {id(t): t for t in [*lm.parameters(), *(t for _, m in packed(lm) for t in m.stored().values())]}
    return sum(t.nbytes for t in tensors.values())


def _room(place: Any, local_size: int) -> int:
    """Bytes of memory that a rank may take: its device's free ones; of a CPU's, its share; never more than place.memory."""
    if place.device.type == "cuda":
        free = int(torch.cuda.mem_get_info(place.device)[0])
    else:
        import psutil

        free = int(psutil.virtual_memory().available) // local_size
    return min(free, place.ceiling or free)
