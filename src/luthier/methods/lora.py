"""LoRA: y = W x + s B A x, with A (rank, in) and B (out, rank) trained and W frozen.

Hu et al., 2021, arXiv 2106.09685, section 4.1: A random, B zero, s = alpha / rank. Fields for rank-stabilised scaling, s = alpha / sqrt(rank)
(Kalajdzievski, 2023, arXiv 2312.03732) and PiSSA initialisation (Meng et al., 2024, arXiv 2404.02948, eqs. 2-4).

How it differs from the papers:
1. A is Kaiming-uniform with a = sqrt(5), as in the authors' code and in PEFT, not Gaussian.
2. PiSSA leaves W alone. It is the edit s (B A - B0 A0) with A0, B0 the frozen principal part, equal to training the principal part over the
   residual; so switching it off gives the base bit for bit, and packed bases can carry it. It is exported as a plain LoRA of twice the rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..anatomy import features
from ..core import Base, Delta, Incompatible, LuthierError
from ..site import Edit, site_at


class LoraEdit(Edit):
    """The low-rank term of one linear. lora_A (rank, in), lora_B (out, rank), fp32; computed in the activations' dtype."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float, device: Any):
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))
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

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.factors()
        h = x if self.dropout == 0.0 else torch.nn.functional.dropout(x, self.dropout, self.training)
        return torch.add(y, linear(linear(h, a.to(x.dtype)), b.to(x.dtype)), alpha=self.scale)

    def fold(self, weight: Tensor) -> Tensor:
        a, b = self.factors()
        return weight + self.scale * (b.to(weight) @ a.to(weight))


@dataclass(frozen=True, kw_only=True)
class Method:
    """Low-rank adaptation of linear layers."""

    edits: ClassVar[Literal["outputs"]] = "outputs"
    lr_factor: ClassVar[float] = 10.0

    rank: int = 8
    """Width of the bottleneck: the rank of the change to each matrix."""
    alpha: float = 16.0
    """The change is scaled by alpha / rank (rank_stabilised: alpha / sqrt(rank))."""
    dropout: float = 0.0
    """Dropout on the input of the low-rank path."""
    targets: tuple[str, ...] = ("query", "value")
    """Which linears: query key value output gate up down, attention, mlp, all, a module's own name, or a regular expression."""
    rank_stabilised: bool = False
    """rsLoRA: scale by alpha / sqrt(rank), so that high ranks learn as fast as low ones."""
    init: Literal["zero", "pissa"] = "zero"
    """zero: B starts at 0. pissa: A and B start at the principal singular directions of W."""
    from_: str | None = None
    """Start from the delta saved in this adapter's or run's folder, instead of from init."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LuthierError(f"rank: must be at least 1, found {self.rank}")
        if not 0 <= self.dropout < 1:
            raise LuthierError(f"dropout: must be in [0, 1), found {self.dropout}")
        if self.alpha <= 0:
            raise LuthierError(f"alpha: must be above 0, found {self.alpha}")
        if not self.targets:
            raise LuthierError("targets: names no module; try [query, value] or [all]")

    @property
    def scale(self) -> float:
        """s in y = W x + s B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def attach(self, base: Base, name: str) -> Delta:
        """Put an edit at every target. Raises Incompatible where a target is unknown or the rank exceeds a matrix."""
        edits: dict[str, LoraEdit] = {}
        embedding = base.model.get_input_embeddings().weight  # type: ignore[operator]
        for path in base.anatomy.targets(base.model, self.targets):
            if base.model.get_submodule(path).weight is embedding:
                raise Incompatible(f"method.targets: {path} shares its weight with the input embedding, so it cannot be edited by itself; leave it out")
            site = site_at(base.model, path)
            n_in, n_out = features(site.base)
            if self.init == "pissa" and self.rank > min(n_in, n_out):
                raise Incompatible(f"method.rank: PiSSA takes at most {min(n_in, n_out)} at {path} ({n_in} x {n_out}), found {self.rank}")
            edit = LoraEdit(n_in, n_out, self.rank, self.scale, self.dropout, site.base.weight.device)
            if self.init == "pissa" and site.base.weight.device.type != "meta":
                edit.start_from(*principal(dense_weight(site.base), self.rank, self.scale))
            site.edits[name] = edits[path] = edit
        params = {f"{path}:{leaf}": p for path, e in edits.items() for leaf, p in e.named_parameters()}
        buffers = {f"{path}:{leaf}": b for path, e in edits.items() for leaf, b in e.named_buffers()}
        return Delta(
            params,
            buffers=buffers,
            fold=lambda: _fold(base.model, list(edits), name),
            export=lambda: self._peft(base, edits),
        )

    def _peft(self, base: Base, edits: dict[str, LoraEdit]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's adapter_config.json and tensors."""
        doubled = 2 if self.init == "pissa" else 1
        rank = self.rank * doubled
        # PEFT divides by its own r, so alpha grows with it: the scale stays ours.
        alpha = self.scale * (math.sqrt(rank) if self.rank_stabilised else rank)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.source,
            "revision": base.revision,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": self.dropout,
            "target_modules": sorted(edits),
            "bias": "none",
            "use_rslora": self.rank_stabilised,
            "fan_in_fan_out": any(type(site_at(base.model, p).base).__name__ == "Conv1D" for p in edits),
            "init_lora_weights": True,
        }
        tensors = {}
        for path, edit in edits.items():
            a, b = edit.factors()
            tensors[f"base_model.model.{path}.lora_A.weight"] = a.detach()
            tensors[f"base_model.model.{path}.lora_B.weight"] = b.detach()
        return config, tensors

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Method, dict[str, Tensor]]:
        """A PEFT LoRA directory as this method and its params. Raises Incompatible, naming the feature, for what plain LoRA is not."""
        for key in ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "trainable_token_indices"):
            if config.get(key):
                raise Incompatible(f"adapter_config.json: {key} = {config[key]!r} is not plain LoRA, which is all that `lora` reads so far")
        params = {}
        for key, tensor in tensors.items():
            path, kind, leaf = key.removeprefix("base_model.model.").rpartition(".lora_")
            if not kind or leaf not in ("A.weight", "B.weight"):
                raise Incompatible(f"adapter_model.safetensors: {key!r} is no LoRA tensor of a linear layer")
            params[f"{path}:lora_{leaf[0]}"] = tensor
        paths = tuple(sorted({k.split(":")[0].replace(".", r"\.") for k in params}))
        return cls(
            rank=config["r"],
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout") or 0.0),
            targets=paths,
            rank_stabilised=bool(config.get("use_rslora")),
        ), params


def _fold(model: nn.Module, paths: list[str], name: str) -> None:
    for path in paths:
        site_at(model, path).fold(name)


def dense_weight(module: nn.Module) -> Tensor:
    """(out, in) fp32 weight of a linear, GPT-2's Conv1D included."""
    weight = module.weight.detach().float()  # type: ignore[operator, union-attr]
    return weight.t() if type(module).__name__ == "Conv1D" else weight


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A0, B0) with scale * B0 A0 = the best rank-``rank`` approximation of ``weight`` (out, in), the singular values split evenly."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root
