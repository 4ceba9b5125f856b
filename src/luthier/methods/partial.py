"""Partial fine-tuning: chosen tensors of the base are trained, the others stay.

The last blocks, all bias terms (BitFit: Ben Zaken, Ravfogel & Goldberg, 2021, arXiv 2106.10199), the norms, the embeddings, or parameters by name; any of
these together. Only the chosen tensors are saved, and `merge` writes them into the base.

How it differs from the papers:
1. The base keeps its own tensors. What trains is an fp32 copy that stands in for them where the delta serves, rounded to the base's precision at
   each use: so switching it off gives the base bit for bit, and a 16-bit base trains without a lost bit. The price is one more copy of what is trained,
   beside the four that gradients, moments and masters take anyway.
2. BitFit also trains a task head; that is the objective's here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core import Base, Delta, Incompatible
from ..deltas.standin import Value, Weight, weights
from ..errors import ConfigError
from ..modelling.anatomy import modules
from ..modelling.packed import packed
from ..modelling.shards import whole
from ..settings.plugins import Range, within_ranges


@dataclass(frozen=True, kw_only=True)
class Method:
    """Trains chosen tensors of the base; what is chosen by several fields adds up."""

    edits: ClassVar[Literal["weights"]] = "weights"
    reversible: ClassVar[bool] = True

    last_blocks: Annotated[int | None, Range(1)] = None
    """Train so many blocks, counted from the output (an encoder-decoder's: of its decoder). Default: 1 where nothing else is chosen."""
    biases: bool = False
    """Train every bias term, those of norms included (BitFit)."""
    norms: bool = False
    """Train every normalisation."""
    embeddings: bool = False
    """Train the embedding tables; an output matrix that is tied to one trains with it, as one tensor."""
    matching: tuple[str, ...] = ()
    """Train parameters whose whole name matches one of these regular expressions; a tied tensor has a name at each of its places."""
    from_: str | None = None
    """Start from the delta saved in this adapter's or run's folder, instead of from the base."""

    def __post_init__(self) -> None:
        within_ranges(self)
        for pattern in self.matching:
            try:
                re.compile(pattern)
            except re.error as e:
                raise ConfigError(f"matching: {pattern!r} is no valid regular expression: {e}") from None

    @property
    def lr_factor(self) -> float:
        """Vectors alone take about ten times the learning rate of matrices: BitFit trains at 1e-4 to 1e-3 where all weights take 1e-5 to 5e-5."""
        return 10.0 if (self.biases or self.norms) and not (self.last_blocks or self.embeddings or self.matching) else 1.0

    def attach(self, base: Base, name: str) -> Delta:
        """Put a trained copy before every chosen tensor. Keys are "<module path>:<attribute>".

        Raises Incompatible where a choice matches nothing, or a tensor whose precision cannot be trained.
        """
        chosen = self._chosen(base)
        params = {}
        for weight in chosen:
            params[weight.key] = copy = nn.Parameter(whole(weight.tensor).to(torch.float32, copy=True))
            weight.put(name, _replaced_by(copy))

        def fold() -> None:
            for weight in chosen:
                weight.fold(name)

        return Delta(params, fold=fold)

    def _chosen(self, base: Base) -> list[Weight]:
        """The tensors of all choices, in model order."""
        everything = list(weights(base.model))
        found: dict[Weight, None] = {}
        for said, names in self._choices(base, everything):
            hits = [w for w in everything if names.intersection(w.names)]
            if not hits:
                raise Incompatible(f"method.{said} chooses nothing in this model ({base.anatomy.family}); {_inventory(base, everything)}")
            _refuse_packed(base.model, said, hits, names)
            found.update(dict.fromkeys(hits))
        return [w for w in everything if w in found]

    def _choices(self, base: Base, everything: list[Weight]) -> Iterator[tuple[str, set[str]]]:
        """What the user wrote, and the parameter names it means; names of packed weights among them."""
        names = [n for w in everything for n in w.names]
        inside = dict(modules(base.model))
        count = self.last_blocks or (0 if self.biases or self.norms or self.embeddings or self.matching else 1)
        if count:
            path, there = _stack(base)
            if count > there:
                raise Incompatible(f"method.last_blocks: this model ({base.anatomy.family}) has {there} blocks, found {count}; choose at most {there}")
            last = tuple(f"{path}.{i}." for i in range(there - count, there))
            yield "last_blocks", {n for n in [*names, *_packed(base.model)] if n.startswith(last)}
        if self.biases:
            yield "biases", {n for n in names if n.rpartition(".")[2] == "bias" or n.endswith("_bias")}
        if self.norms:
            yield "norms", {n for n in names if _is_norm(inside[n.rpartition(".")[0]])}
        if self.embeddings:
            yield "embeddings", {n for n in names if isinstance(inside[n.rpartition(".")[0]], nn.Embedding)}
        for pattern in self.matching:
            yield f"matching: {pattern!r}", {n for n in [*names, *_packed(base.model)] if re.fullmatch(pattern, n)}


def _replaced_by(copy: nn.Parameter) -> Value:
    def value(own: Tensor, training: bool) -> Tensor:
        return copy.to(own.dtype)

    return value


def _stack(base: Base) -> tuple[str, int]:
    """Path and length of the list of blocks that ends at the output."""
    path = list(base.anatomy.stacks.values())[-1]
    listed: Any = dict(modules(base.model))[path]
    return path, len(listed)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _packed(model: nn.Module) -> dict[str, str]:
    """Names that the weights of packed linears would have, and how they are stored: such a weight is no parameter."""
    return {f"{path}.weight": next(str(t.dtype).removeprefix("torch.") for t in m.stored().values()) for path, m in packed(model)}


def _refuse_packed(model: nn.Module, said: str, hits: list[Weight], names: set[str]) -> None:
    found = {n: kind for n, kind in _packed(model).items() if n in names}
    found |= {w.names[0]: str(w.tensor.dtype).removeprefix("torch.") for w in hits if not w.tensor.is_floating_point()}
    if found:
        name, kind = next(iter(found.items()))
        raise Incompatible(
            f"method.{said}: {name} is packed into {kind} codes, which cannot be trained ({len(found)} such tensors are chosen); choose biases or norms, "
            "a float precision, or a method that edits outputs (lora)"
        )


def _inventory(base: Base, everything: list[Weight]) -> str:
    """What there is to choose from."""
    inside = dict(modules(base.model))
    kinds = [inside[w.names[0].rpartition(".")[0]] for w in everything]
    biases = sum(w.names[0].endswith("bias") for w in everything)
    norms, tables = sum(map(_is_norm, kinds)), sum(isinstance(m, nn.Embedding) for m in kinds)
    example = next((w.names[0] for w in everything if "." in w.names[0] and w.tensor.ndim == 2), everything[0].names[0])
    return (
        f"there are {_stack(base)[1]} blocks, {biases} bias terms, {norms} tensors of norms and {tables} of embeddings; "
        f"by name, regular expressions over whole names such as {example!r}"
    )
