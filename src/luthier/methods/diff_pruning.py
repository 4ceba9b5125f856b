"""Diff pruning: a sparse difference to the base's weights, and which weights differ is learned.

Guo, Rush & Kim, 2021, arXiv 2012.07463. Every weight gets a difference w and a hard-concrete gate (Louizos et al., 2018, arXiv 1712.01312) with parameter a:

    weight = base + z(a) z(a_g) w                                       equations 1-2; z(a_g), section 3.2: one more gate for the whole tensor
    loss + penalty * sum_i P(z(a_i) > 0) P(z(a_g(i)) > 0)               equation 3: the expected number of weights that differ

A run has three phases. Gates and differences are learned for the first `search` of its steps; then the differences of largest magnitude are kept,
exactly `share` of the base's parameters, and the rest is zero for good (section 3.3); in the remaining steps the kept ones are trained. What is
saved is their places and values.

While it trains, all differences and gates are: about 36 bytes a weight beside the base (difference, gate, noise, their gradients and moments). A
share of 0.5 % is what the result changes, not what the training costs.

How it differs from the paper:
1. The embedding tables and the output matrix are left out unless ``embeddings`` says so; the share is counted over all parameters of the base as in the paper.
2. One run with one learning-rate schedule, not three runs.
3. Evaluation and pruning take the gates at test time (Louizos, equation 13), not a sample of them.
4. The penalty of a structured gate is the product of the probabilities, as in the paper's section 3.2; the authors' program adds them.
5. Gradients are clipped together with all others, not gates and differences each by themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core import Base, Delta, Incompatible, LuthierError
from ..deltas.standin import Value, Weight, weights
from ..errors import ConfigError
from ..modelling.packed import packed
from ..modelling.site import Site
from ..nn.hard_concrete import HardConcrete, gated, logistic_
from ..settings.plugins import Range, within_ranges


@dataclass(frozen=True, kw_only=True)
class Method:
    """A sparse difference to the base's weights."""

    edits: ClassVar[Literal["weights"]] = "weights"
    reversible: ClassVar[bool] = True
    lr_factor: ClassVar[float] = 10.0  # LoRA's; on E2E the best was three times that, and nine times that diverged

    share: Annotated[float, Range(0, 1, low_open=True)] = 0.005
    """Share of the base's parameters that differ in the end; exact."""
    structured: bool = True
    """One more gate for each tensor, so that whole tensors can stay as they are (section 3.2)."""
    search: Annotated[float, Range(0, 1)] = 0.5
    """Share of the run's steps in which gates are learned; at least one step, and at least one is left to train what was kept."""
    penalty: Annotated[float, Range(0)] = 1.25e-7
    """Price of each weight that is expected to differ, in units of the loss."""
    gate_lr: Annotated[float, Range(0, low_open=True)] = 0.1
    """Peak learning rate of the gates, whatever the run's own is; it follows the run's schedule."""
    gate_start: float = 5.0
    """Where the gates' parameters start: high is open."""
    low: float = -1.5
    """Lower end of the gates' stretched range, below 0: the further, the more of them are exactly 0."""
    high: float = 1.5
    """Upper end of it, above 1."""
    temperature: Annotated[float, Range(0, low_open=True)] = 1.0
    """Of the gates' noise: low is nearer to a coin."""
    embeddings: bool = False
    """Also change the embedding tables and the output matrix."""
    from_: str | None = None
    """Go on from the delta saved in this adapter's or run's folder: its places stay as they are and its values are trained."""

    def __post_init__(self) -> None:
        within_ranges(self)
        if not self.low < 0:
            raise ConfigError(f"low: must be below 0, found {self.low:g}")
        if not self.high > 1:
            raise ConfigError(f"high: must be above 1, found {self.high:g}")

    def attach(self, base: Base, name: str) -> Delta:
        """Put a gated difference before every weight. Keys are "<module path>:<attribute>.value", ".gate" and ".group".

        Raises Incompatible where a weight is packed, or where fewer weights are open to change than the share asks for.
        """
        everything = list(weights(base.model))
        chosen = [w for w in everything if self.embeddings or not _is_table(base.model, w)]
        coded = next((f"{path}.weight" for path, _ in packed(base.model)), None)
        if coded is not None:
            raise Incompatible(f"{coded} is packed into codes and takes no difference; use a float precision, or a method that edits outputs (lora)")
        kept = max(1, round(self.share * sum(w.tensor.numel() for w in everything)))
        if kept > (there := sum(w.tensor.numel() for w in chosen)):
            raise Incompatible(f"method.share: {self.share:g} of all parameters are {kept:,}, and {there:,} are open to change; use less, or embeddings: true")
        return Differences(self, chosen, kept, name).delta


class Difference:
    """What one tensor differs by: gated while gates are searched, masked afterwards, a few places once it has been saved."""

    def __init__(self, weight: Weight, method: Method, shape: HardConcrete):
        self.weight, self.shape = weight, shape
        zeros = torch.zeros(weight.tensor.shape, device=weight.tensor.device)
        self.value = nn.Parameter(zeros)
        self.gate = nn.Parameter(torch.full_like(zeros, method.gate_start))
        self.group = nn.Parameter(torch.full((), method.gate_start, device=zeros.device)) if method.structured else None
        self.mask = torch.zeros_like(zeros, dtype=torch.bool)
        self.noise: Tensor | None = None
        self.group_noise: Tensor | None = None

    def draw(self, generator: torch.Generator) -> None:
        """Fresh noise for a step."""
        if self.noise is None:
            self.noise = torch.empty_like(self.value)
            self.group_noise = None if self.group is None else torch.empty_like(self.group)
        logistic_(self.noise, generator)
        if self.group_noise is not None:
            logistic_(self.group_noise, generator)

    def shut(self) -> bool:
        """Whether this step's noise shuts the gate of the whole tensor."""
        return self.group is not None and self.group_noise is not None and not bool(self.shape.gate(self.group, self.group_noise))

    def searched(self, own: Tensor, training: bool) -> Tensor:
        """The weight while gates are learned."""
        noise, group_noise = (self.noise, self.group_noise) if training else (None, None)
        group = None if self.group is None else self.shape.gate(self.group, group_noise)
        return gated(own, self.value, self.gate, group, noise, self.shape)

    def fixed(self, own: Tensor) -> Tensor:
        """The weight once it is known which places differ."""
        return (own + torch.where(self.mask, self.value, 0.0)).to(own.dtype)

    @torch.no_grad()
    def change(self) -> Tensor:
        """The difference itself with the gates of test time."""
        change = self.shape.gate(self.gate, None) * self.value
        return change if self.group is None else change * self.shape.gate(self.group, None)

    @torch.no_grad()
    def rank(self) -> Tensor:
        """What to keep first: the largest differences; behind all of them, where too few gates are open, the largest behind closed gates."""
        change = self.change()
        return torch.where(change == 0, -1 / (self.value.abs() + 1e-30), change.abs())

    def expected(self) -> Tensor:
        """How many places are expected to differ, differentiable."""
        count = self.shape.open(self.gate).sum()
        return count if self.group is None else count * self.shape.open(self.group)


class Differences:
    """All tensors' differences of one delta, and the phase they are in."""

    def __init__(self, method: Method, chosen: Sequence[Weight], kept: int, name: str):
        self.method, self.kept, self.name = method, kept, name
        self.seed = torch.initial_seed()  # the run's: noise is a function of it and of the step
        shape = HardConcrete(method.low, method.high, method.temperature)
        self.parts = {w.key: Difference(w, method, shape) for w in chosen}
        self.pruned = torch.zeros((), dtype=torch.bool)  # stays on the CPU, where reading it costs nothing; saved with the masks
        for part in self.parts.values():
            part.weight.put(name, self.value_of(part))
        gates = {k: p for k, part in self.parts.items() for k, p in ((f"{k}.gate", part.gate), (f"{k}.group", part.group)) if p is not None}
        self.delta = Delta(
            {f"{k}.value": part.value for k, part in self.parts.items()} | gates,
            buffers={f"{k}.mask": part.mask for k, part in self.parts.items()} | {"pruned": self.pruned},
            optim={r"\.(gate|group)$": {"rate": method.gate_lr, "decay": 0.0}},
            penalty=self.penalty,
            on_step=self.on_step,
            fold=lambda: _fold(chosen, name),
            pack=self.pack,
            unpack=self.unpack,
            pending=lambda: not bool(self.pruned),
            resting=lambda: self.resting(gates),
        )

    def value_of(self, part: Difference) -> Value:
        """What stands in for a weight, in the phase that it is read in."""

        def value(own: Tensor, training: bool) -> Tensor:
            return part.fixed(own) if self.pruned else part.searched(own, training)

        return value

    def on_step(self, step: int, total: int) -> None:
        """Draw the step's noise while gates are searched; prune at the first step after. Raises LuthierError for a run of one step."""
        if self.pruned:
            return
        if total < 2:
            raise LuthierError("diff_pruning takes at least 2 steps, one to search and one to train what was kept; this run has 1")
        if step >= min(max(1, round(self.method.search * total)), total - 1):
            return self.prune()
        generators: dict[torch.device, torch.Generator] = {}
        for part in self.parts.values():
            device = part.value.device
            if device not in generators:
                generators[device] = torch.Generator("cpu" if device.type == "meta" else device).manual_seed((self.seed * 1_000_003 + step) % 2**63)
            part.draw(generators[device])

    def penalty(self) -> Tensor:
        """What the weights that are expected to differ cost; a constant 0 once they are fixed."""
        if self.pruned:
            return torch.zeros(())
        return self.method.penalty * torch.stack([part.expected() for part in self.parts.values()]).sum()

    @torch.no_grad()
    def prune(self) -> None:
        """Keep the largest differences, exactly as many as asked for, and make them the values."""
        for part, mask in zip(self.parts.values(), largest((part.rank() for part in self.parts.values()), self.kept), strict=True):
            part.mask.copy_(mask)
            part.value.copy_(torch.where(mask, part.change(), 0.0))
            part.noise = part.group_noise = None
        self.pruned.fill_(True)

    def resting(self, gates: Collection[str]) -> frozenset[str]:
        """What does not learn now: in the search, values whose tensor's gate is shut; once pruned, gates, and values of tensors that stay as they are."""
        if not self.pruned:
            return frozenset(f"{k}.value" for k, part in self.parts.items() if part.shut())
        return frozenset(gates) | {f"{k}.value" for k, part in self.parts.items() if not bool(part.mask.any())}

    @torch.no_grad()
    def pack(self) -> dict[str, Tensor]:
        """Places and values of the weights that differ; tensors of which none does are left out. Raises LuthierError before they are known."""
        if not self.pruned:
            raise LuthierError("diff_pruning: nothing is pruned yet, so there is nothing sparse to save; train to the last step, or go on from a checkpoint")
        out = {}
        for key, part in self.parts.items():
            place = part.mask.flatten().nonzero().squeeze(1)
            if len(place):
                out[f"{key}.index"] = place.to(_index_type(part.mask))
                out[f"{key}.value"] = part.value.detach().flatten()[place]
        return out

    def unpack(self, saved: Mapping[str, Tensor]) -> None:
        """Become what `pack` gave: no gates and no phases; per tensor a list of places and one trained value for each. Values are copied in by the caller.

        Raises LuthierError where a place lies outside its tensor.
        """
        places = {}
        for key, part in self.parts.items():
            if (index := saved.get(f"{key}.index")) is None:
                part.weight.leave(self.name)
                continue
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < part.weight.tensor.numel():
                raise LuthierError(f"{key}: a saved difference lies outside this tensor of {part.weight.tensor.numel():,}; it was made on another base")
            places[key] = Places(part.weight, len(index))
            part.weight.put(self.name, places[key].written)
        delta = self.delta
        delta.params = {f"{k}.value": part.value for k, part in places.items()}
        delta.buffers = {f"{k}.index": part.index for k, part in places.items()}
        delta.fold = lambda: _fold([part.weight for part in places.values()], self.name)
        delta.optim, delta.penalty, delta.on_step, delta.pack, delta.unpack, delta.pending, delta.resting = {}, None, None, None, None, None, None


class Places:
    """The saved form of one tensor's difference: places in the flattened tensor, and a value for each."""

    def __init__(self, weight: Weight, count: int):
        self.weight, device = weight, weight.tensor.device
        self.value = nn.Parameter(torch.zeros(count, device=device))
        self.index = torch.zeros(count, dtype=_index_type(weight.tensor), device=device)

    def written(self, own: Tensor, training: bool) -> Tensor:
        """The weight with its differences."""
        return own.float().flatten().index_add(0, self.index, self.value).view(own.shape).to(own.dtype)


def _fold(chosen: Sequence[Weight], name: str) -> None:
    for weight in chosen:
        weight.fold(name)


def _index_type(t: Tensor) -> torch.dtype:
    return torch.int32 if t.numel() <= torch.iinfo(torch.int32).max else torch.int64


def _is_table(model: nn.Module, weight: Weight) -> bool:
    """An embedding table, or the output matrix."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    head = head.base if isinstance(head, Site) else head
    return any(isinstance(module, nn.Embedding) or (module is head and leaf == "weight") for module, leaf in weight.holders)


def largest(scores: Iterable[Tensor], k: int) -> list[Tensor]:
    """Masks of the k highest scores over all tensors; holds no more than k of them beside one tensor's."""
    shapes: list[torch.Size] = []
    best, where, start = torch.empty(0), torch.empty(0, dtype=torch.long), 0
    for t in scores:
        shapes.append(t.shape)
        best = torch.cat([best.to(t.device), t.flatten()])
        where = torch.cat([where.to(t.device), torch.arange(start, start + t.numel(), device=t.device)])
        if len(best) > k:
            best, order = best.topk(k, sorted=False)
            where = where[order]
        start += t.numel()
    masks, start = [], 0
    for shape in shapes:
        mask = torch.zeros(shape.numel(), dtype=torch.bool, device=where.device)
        mask[where[(where >= start) & (where < start + len(mask))] - start] = True
        masks.append(mask.view(shape))
        start += len(mask)
    return masks
