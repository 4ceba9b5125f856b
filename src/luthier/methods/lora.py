"""LoRA: y = W x + s B A x, with A (rank, in) and B (out, rank) trained and W frozen.

Hu et al., 2021, arXiv 2106.09685, section 4.1: A random, B zero, s = alpha / rank. Fields for rank-stabilised scaling, s = alpha / sqrt(rank)
(Kalajdzievski, 2023, arXiv 2312.03732), PiSSA initialisation (Meng et al., 2024, arXiv 2404.02948, eqs. 2-4) and LoRA+ learning rates
(Hayou et al., 2024, arXiv 2402.12354, section 4).

How it differs from the papers:
1. A is Kaiming-uniform with a = sqrt(5), as in the authors' code and in PEFT, not Gaussian.
2. PiSSA leaves W alone. It is the edit s (B A - B0 A0) with A0, B0 the frozen principal part, equal to training the principal part over the
   residual; so switching it off gives the base bit for bit, and packed bases can carry it. It is exported as a plain LoRA of twice the rank.
3. The embedding is edited as in PEFT: row t of its matrix changes by s B A[:, t], with A zero and B Gaussian at the start, and no dropout. Where the head
   is the embedding's own matrix, both uses are edited by one A and B; PEFT's files hold a pair for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import embedding as look_up
from torch.nn.functional import linear

from ..core import Base, Delta, Incompatible, LuthierError
from ..deltas.layout import common, uses
from ..deltas.lowrank import Pair, best, by_place, fields_of, from_peft, places, to_peft
from ..deltas.outputs import at_sites
from ..modelling.anatomy import dense_weight, device_of, features
from ..modelling.site import Edit, site_at
from ..settings.plugins import Range, within_ranges


class LoraEdit(Edit):
    """The low-rank term of one linear. lora_A (rank, in), lora_B (out, rank), fp32; computed in the activations' dtype."""

    def __init__(self, module: nn.Module, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        n_in, n_out = features(module)
        device = device_of(module)
        self.scale, self.dropout = scale, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, n_in, device=device))
        self.lora_B = nn.Parameter(torch.zeros(n_out, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def start_from(self, a0: Tensor, b0: Tensor) -> None:
        """PiSSA: begin at the principal part (a0, b0), and subtract it, frozen."""
        with torch.no_grad():
            self.lora_A.copy_(a0)
            self.lora_B.copy_(b0)
        self.register_buffer("start_A", a0.clone())
        self.register_buffer("start_B", -b0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole edit; PiSSA's are twice as wide."""
        if "start_A" not in self._buffers:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, self.start_B], 1)  # type: ignore[list-item]

    def pair(self) -> Pair:
        """The edit as data."""
        return Pair(*self.factors(), self.scale)

    def dropped(self, x: Tensor) -> Tensor:
        """The input of the low-rank path."""
        return x if self.dropout == 0.0 else drop(x, self.dropout, self.training)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.factors()
        return torch.add(y, linear(linear(self.dropped(x), a.to(x.dtype)), b.to(x.dtype)), alpha=self.scale)

    def term(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.dropout and self.training else (*self.factors(), self.scale)

    def fold(self, weight: Tensor) -> Tensor:
        a, b = self.factors()
        return weight + self.scale * (b.to(weight) @ a.to(weight))


class EmbeddingEdit(Edit):
    """The low-rank term of an embedding: lora_embedding_A (rank, V), lora_embedding_B (D, rank). Its input is token ids."""

    def __init__(self, module: nn.Module, rank: int, scale: float):
        super().__init__()
        weight: Any = module.weight
        (vocabulary, width), device = weight.shape, weight.device
        self.scale, self.times = scale, multiplier(module)
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, vocabulary, device=device))
        self.lora_embedding_B = nn.Parameter(torch.randn(width, rank, device=device))

    def pair(self) -> Pair:
        """The edit as data."""
        return Pair(self.lora_embedding_A, self.lora_embedding_B, self.scale, embedding=True)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.add_rows(x, y, self.times)

    def add_rows(self, ids: Tensor, y: Tensor, times: float) -> Tensor:
        """y (..., D) plus the changes of the rows of these ids."""
        rows = look_up(ids, self.lora_embedding_A.t()).to(y.dtype)
        return torch.add(y, linear(rows, self.lora_embedding_B.to(y.dtype)), alpha=self.scale * times)

    def fold(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.lora_embedding_B.to(weight) @ self.lora_embedding_A.to(weight)).t()


class SharedEdit(Edit):
    """One more use of a matrix that an EmbeddingEdit changes: another embedding of it, or the head, where h meets its transpose."""

    def __init__(self, first: EmbeddingEdit, module: nn.Module):
        super().__init__()
        self.first, self.looks_up, self.times = first, isinstance(module, nn.Embedding), multiplier(module)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.looks_up:
            return self.first.add_rows(x, y, self.times)
        a, b = self.first.lora_embedding_A.to(x.dtype), self.first.lora_embedding_B.to(x.dtype)
        return torch.add(y, (x @ b) @ a, alpha=self.first.scale)

    def pair(self) -> Pair:
        """The edit as data of its own."""
        return self.first.pair().again(embedding=self.looks_up)

    def fold(self, weight: Tensor) -> Tensor:
        return weight  # the first use has written it


@dataclass(frozen=True, kw_only=True)
class Method:
    """Low-rank adaptation of linear layers, of the embedding and of the head."""

    edits: ClassVar[Literal["outputs"]] = "outputs"
    lr_factor: ClassVar[float] = 10.0

    rank: int = 8
    """Width of the bottleneck: the rank of the change to each matrix."""
    alpha: float = 16.0
    """The change is scaled by alpha / rank (rank_stabilised: alpha / sqrt(rank))."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Another rank for some targets: {down: 4}. Names as in targets; a later one counts over an earlier."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Another alpha for some targets, likewise."""
    dropout: float = 0.0
    """Dropout on the input of the low-rank path."""
    targets: tuple[str, ...] = ("query", "value")
    """Which modules: query key value output gate up down, attention, mlp, all (of these), embedding, head, a module's own name, or a regular expression."""
    rank_stabilised: bool = False
    """rsLoRA: scale by alpha / sqrt(rank), so that high ranks learn as fast as low ones."""
    init: Literal["zero", "pissa"] = "zero"
    """zero: B starts at 0. pissa: A and B of linears start at the principal singular directions of W."""
    lr_ratio: Annotated[float, Range(0, low_open=True)] = 1.0
    """LoRA+: how many times faster than A the B of a linear learns; its authors advise about 16, with a lower optim.lr."""
    from_: str | None = None
    """Start from the delta saved in this adapter's or run's folder, instead of from init."""

    def __post_init__(self) -> None:
        within_ranges(self)
        for name, rank in {"rank": self.rank, **{f"ranks.{k}": r for k, r in self.ranks.items()}}.items():
            if rank < 1:
                raise LuthierError(f"{name}: must be at least 1, found {rank}")
        if not 0 <= self.dropout < 1:
            raise LuthierError(f"dropout: must be in [0, 1), found {self.dropout}")
        for name, alpha in {"alpha": self.alpha, **{f"alphas.{k}": a for k, a in self.alphas.items()}}.items():
            if alpha <= 0:
                raise LuthierError(f"{name}: must be above 0, found {alpha}")
        if not self.targets:
            raise LuthierError("targets: names no module; try [query, value] or [all]")

    def scales(self, base: Base) -> dict[str, float]:
        """s of every target by its path: what a saved delta's numbers mean."""
        return {path: scale for path, (_, scale) in self._sizes(base).items()}

    def attach(self, base: Base, name: str) -> Delta:
        """Put an edit at every target. Raises Incompatible where a target is unknown or the rank exceeds a matrix."""
        edits: dict[str, Edit] = {}
        for path, (rank, scale) in self._sizes(base).items():
            module = site_at(base.model, path).base
            if isinstance(module, nn.Embedding):
                edits |= self._embedding(base, path, rank, scale)
            else:
                edits[path] = self._linear(base, path, module, rank, scale)
        optim = {} if self.lr_ratio == 1.0 else {r":lora_B$": {"lr": self.lr_ratio}}
        delta = at_sites(base, name, edits, export=lambda: self._peft(base, edits))
        delta.optim = optim
        return delta

    def _sizes(self, base: Base) -> dict[str, tuple[int, float]]:
        """(rank, s) of every target by its path."""
        paths = places(base, self.targets)
        ranks, alphas = by_place(base, self.ranks, "ranks", paths), by_place(base, self.alphas, "alphas", paths)
        out = {}
        for path in paths:
            rank = ranks.get(path, self.rank)
            out[path] = (rank, alphas.get(path, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank))
        return out

    def _linear(self, base: Base, path: str, module: nn.Module, rank: int, scale: float) -> LoraEdit:
        edit = LoraEdit(module, rank, scale, self.dropout)
        self._start(edit, path, module)
        return edit

    def _start(self, edit: LoraEdit, path: str, module: nn.Module) -> None:
        """PiSSA's start, where it is asked for."""
        rank, (n_in, n_out) = len(edit.lora_A), features(module)
        if self.init == "pissa" and rank > min(n_in, n_out):
            raise Incompatible(f"method.rank: PiSSA takes at most {min(n_in, n_out)} at {path} ({n_in} x {n_out}), found {rank}")
        if self.init == "pissa" and edit.lora_A.device.type != "meta":
            edit.start_from(*principal(dense_weight(module), rank, edit.scale))

    def _embedding(self, base: Base, path: str, rank: int, scale: float) -> dict[str, Edit]:
        """The embedding and every other use of its matrix."""
        first, *others = uses(base.model, path)
        edit = EmbeddingEdit(site_at(base.model, first).base, rank, scale)
        return {first: edit} | {p: SharedEdit(edit, site_at(base.model, p).base) for p in others}

    def _peft(self, base: Base, edits: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's adapter_config.json and tensors. The scales stay ours: PEFT divides alpha by its own r, so PiSSA's alpha grows with its rank."""
        config, tensors = to_peft({p: e.pair() for p, e in edits.items()}, rank_stabilised=self.rank_stabilised)
        config |= {
            "lora_dropout": self.dropout,
            "fan_in_fan_out": any(type(site_at(base.model, p).base).__name__ == "Conv1D" for p in edits),
        }
        return common(base, "LORA") | config, tensors

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Method, dict[str, Tensor]]:
        """A PEFT LoRA directory as this method and its params. Raises Incompatible, naming the feature, for what plain LoRA is not."""
        pairs = from_peft(config, tensors)
        odd = next((path for path, p in pairs.items() if p.magnitude is not None), None)
        if config.get("use_dora") or odd is not None:
            raise Incompatible("adapter_config.json: use_dora is not plain LoRA; the method is dora")
        params: dict[str, Tensor] = {}
        for path, p in pairs.items():
            leaf = "lora_embedding_" if p.embedding else "lora_"
            params |= {f"{path}:{leaf}A": p.a, f"{path}:{leaf}B": p.b}
        return cls(**fields_of(config, pairs)), params


def multiplier(module: nn.Module) -> float:
    """What an embedding multiplies its rows by before it gives them (Gemma 3, BART): a change of the matrix is multiplied as well."""
    found: Any = getattr(module, "scalar_embed_scale", None) or getattr(module, "embed_scale", None)
    return 1.0 if found is None else float(found)


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A0, B0) with scale * B0 A0 = the best rank-``rank`` approximation of ``weight`` (out, in), the singular values split evenly."""
    return best(weight / scale, rank)
