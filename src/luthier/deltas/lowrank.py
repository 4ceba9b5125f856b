"""Low-rank changes as data: which modules a name means, embedding and head included, and PEFT's LoRA files both ways."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import Base, Incompatible
from .layout import TOP, embedding_path, exactly, head_path, matches, uses, without

NOT_OURS = (
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


@dataclass(frozen=True)
class Pair:
    """The change of one matrix: scale * b @ a; of an embedding, whose matrix is (V, D), its transpose."""

    a: Tensor  # (rank, in); of an embedding (rank, V)
    b: Tensor  # (out, rank); of an embedding (D, rank)
    scale: float
    embedding: bool = False
    magnitude: Tensor | None = None  # (out,): DoRA's

    @property
    def rank(self) -> int:
        return len(self.a)

    def again(self, *, embedding: bool) -> Pair:
        """An embedding's pair at another use of its matrix: an embedding too, or the head, which meets the transpose. A copy."""
        a, b = (self.a, self.b) if embedding else (self.b.t(), self.a.t())
        return Pair(a.clone(), b.clone(), self.scale, embedding)

    def repeats(self, first: Pair) -> bool:
        """Whether this is an embedding's pair at another use."""
        again = first.again(embedding=self.embedding)
        return first.embedding and self.magnitude is None and self.scale == first.scale and torch.equal(self.a, again.a) and torch.equal(self.b, again.b)


# --- PEFT's files ---------------------------------------------------------------------------------------------------


def to_peft(pairs: Mapping[str, Pair], *, rank_stabilised: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What adapter_config.json says of ranks, scales and targets, and the tensors. The commonest rank and alpha are r and lora_alpha, others patterns."""
    root = math.sqrt if rank_stabilised else float
    ranks = {path: p.rank for path, p in pairs.items()}
    alphas = {path: _tidy(p.scale * root(p.rank)) for path, p in pairs.items()}
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(pairs),
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "bias": "none",
        "use_rslora": rank_stabilised,
        "use_dora": any(p.magnitude is not None for p in pairs.values()),
        "init_lora_weights": True,
    }
    tensors: dict[str, Tensor] = {}
    for path, p in pairs.items():
        names = ("lora_embedding_A", "lora_embedding_B") if p.embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{TOP}{path}.{n}": t.detach() for n, t in zip(names, (p.a, p.b), strict=True)}
        if p.magnitude is not None:
            tensors[f"{TOP}{path}.lora_magnitude_vector"] = p.magnitude.detach()
    return config, tensors


def from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Pair]:
    """Pairs by module path. Raises Incompatible, naming the feature, for what low-rank changes of linears and embeddings are not."""
    without(config, NOT_OURS, "LoRA")
    if config.get("bias", "none") != "none":
        raise Incompatible(f"adapter_config.json: bias = {config['bias']!r}: biases trained beside LoRA are not read")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, kind, leaf = key.removeprefix(TOP).rpartition(".lora_")
        leaf = leaf.removesuffix(".weight")
        if not kind or leaf not in ("A", "B", "embedding_A", "embedding_B", "magnitude_vector"):
            raise Incompatible(f"adapter_model.safetensors: {key!r} is no LoRA tensor of a linear layer or an embedding")
        found.setdefault(path, {})[leaf] = tensor
    root = math.sqrt if config.get("use_rslora") else float
    pairs = {}
    for path, t in found.items():
        embedding = "embedding_A" in t
        a, b = (t.get(f"embedding_{x}" if embedding else x) for x in "AB")
        if a is None or b is None:
            raise Incompatible(f"adapter_model.safetensors: {path} has only one of its two LoRA tensors")
        alpha = next((v for k, v in (config.get("alpha_pattern") or {}).items() if matches(k, path)), config.get("lora_alpha", 8))
        pairs[path] = Pair(a, b, float(alpha) / root(len(a)), embedding, t.get("magnitude_vector"))
    return pairs


def fields_of(config: Mapping[str, Any], pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """The settings of a method that attaches exactly these pairs."""
    stabilised = bool(config.get("use_rslora"))
    root = math.sqrt if stabilised else float
    rank, alpha = int(config["r"]), float(config.get("lora_alpha", 8))
    alphas = {path: _tidy(p.scale * root(p.rank)) for path, p in pairs.items()}
    return {
        "rank": rank,
        "alpha": alpha,
        "ranks": {exactly(path): p.rank for path, p in pairs.items() if p.rank != rank},
        "alphas": {exactly(path): a for path, a in alphas.items() if a != alpha},
        "dropout": float(config.get("lora_dropout") or 0.0),
        "targets": tuple(sorted(exactly(path) for path in pairs)),
        "rank_stabilised": stabilised,
    }


def single_use(base: Base, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A PEFT folder's tensors with those of an embedding's matrix once, at the embedding; PEFT has a pair for each use, the head's its transposes.

    Raises Incompatible where the uses of one matrix are not all edited alike.
    """
    first, *others = uses(base.model, embedding_path(base.model))
    pairs = from_peft(config, {k: t for k, t in tensors.items() if k.removeprefix(TOP).rpartition(".lora_")[0] in (first, *others)})
    if not pairs or not others:
        return dict(tensors)
    one = pairs.get(first)
    odd = [path for path in others if one is None or path not in pairs or not pairs[path].repeats(one)]
    if odd:
        raise Incompatible(
            f"{where}: {first} and {odd[0]} are one matrix in this model, and only one of them is edited, or each in its own way; "
            "train it with PEFT's ensure_weight_tying"
        )
    return {k: t for k, t in tensors.items() if k.removeprefix(TOP).rpartition(".lora_")[0] not in others}


def _tidy(x: float) -> float:
    """A number without the rounding that a product of roots leaves, and whole where it is whole."""
    x = float(f"{x:.12g}")
    return int(x) if x.is_integer() else x


# --- which modules --------------------------------------------------------------------------------------------------


def places(base: Base, names: Sequence[str]) -> list[str]:
    """Paths of the modules that target names mean: those of linears (`Anatomy.targets`), and ``embedding`` and ``head``.

    Where the head is the embedding's own matrix, either means both uses, and the embedding's path stands for them. Raises Incompatible where a name
    matches nothing, or a regular expression for linears catches such a head.
    """
    embedding, head = embedding_path(base.model), head_path(base.model)
    shared = uses(base.model, embedding)
    tied = head in shared
    special = {"embedding": embedding, "head": embedding if tied else head}
    for path in (head, *shared):
        special |= dict.fromkeys((path, exactly(path)), embedding if path in shared else path)
    out = [special[n] for n in names if n in special]
    linears = [n for n in names if n not in special]
    if linears:
        out += base.anatomy.targets(base.model, linears)
    if tied and head in out:
        raise Incompatible(
            f"method.targets: {head} shares its weight with the input embedding, so it cannot be edited by itself; say embedding to edit both uses"
        )
    return list(dict.fromkeys(out))


def by_place(base: Base, values: Mapping[str, Any], setting: str, paths: Sequence[str]) -> dict[str, Any]:
    """Settings by target name as settings by path; a later name counts over an earlier. Raises Incompatible for a name that means none of ``paths``."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        hits = [p for p in places(base, [name]) if p in paths]
        if not hits:
            raise Incompatible(f"method.{setting}: {name!r} is none of the modules that method.targets names")
        out |= dict.fromkeys(hits, value)
    return out


def best(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A (rank, in), B (out, rank)) with B A the best approximation of a matrix (out, in), the singular values split evenly."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root
