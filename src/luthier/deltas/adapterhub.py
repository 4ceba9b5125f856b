"""AdapterHub's directory of a bottleneck adapter (the `adapters` library, 1.3.0), written and read: adapter_config.json and adapter.safetensors.

Its configuration names no placement but says it in flags; its tensors carry the adapter's name and stand where its own model classes keep the
adapter. Both are learned here from a `Block`, so no family is named. What the layout cannot say (trained normalisations, a parallel adapter
behind the normalisation) is written under an ``architecture`` that library does not know: it then refuses the directory instead of computing
another function from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core import Base, Incompatible
from ..modelling.anatomy import Block

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
VERSION = "adapters.1.3.0"
BEYOND = "luthier"  # the architecture of what only this program reads

# placement -> the flags that say it. Read as: the adapter sees the sum of its sublayer and the stream, normalised where the model normalises that sum
# (original_ln_before), is added to the sublayer alone (residual_before_ln) or to what it saw, and the model's own sum and norm follow or do not (_after).
FLAGS: dict[str, dict[str, bool]] = {
    "houlsby": {"mh_adapter": True, "output_adapter": True, "is_parallel": False, "original_ln_before": False, "original_ln_after": True},
    "pfeiffer": {"mh_adapter": False, "output_adapter": True, "is_parallel": False, "original_ln_before": True, "original_ln_after": True},
    "block": {"mh_adapter": False, "output_adapter": True, "is_parallel": False, "original_ln_before": True, "original_ln_after": False},
    "parallel": {"mh_adapter": False, "output_adapter": True, "is_parallel": True, "original_ln_before": False, "original_ln_after": True},
}
RESIDUAL = {"pfeiffer": True, "block": False}  # residual_before_ln where it says anything
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": "swish"}  # ours -> theirs
READ_ACTIVATIONS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"silu": "silu"}
PLAIN: dict[str, Any] = {  # what may only have this value
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "phm_layer": False,
    "inv_adapter": None,
    "leave_out": [],
    "stochastic_depth": 0.0,
}
LEAVES = {"down.weight": "adapter_down.0.weight", "down.bias": "adapter_down.0.bias", "up.weight": "adapter_up.weight", "up.bias": "adapter_up.bias"}


def home(block: Block, role: str) -> str:
    """The module under which that library keeps the adapter of a sublayer ("attention", "cross", "mlp"): the sublayer's own where it holds the sum
    (BERT's output, T5's layers), else one beside it."""
    out = {"attention": block.attention_out, "cross": block.cross_out, "mlp": block.mlp_out}[role]
    assert out is not None
    if out.endswith(".output.dense"):
        return out.removesuffix(".dense")
    for own in (".SelfAttention.o", ".EncDecAttention.o", ".DenseReluDense"):
        if out.endswith(own):
            return out.removesuffix(own)
    return f"{block.path}.{ {'attention': 'attention', 'cross': 'cross_attention', 'mlp': 'output'}[role] }_adapters"


def reduction_factor(width: int, bottleneck: int) -> float:
    """A factor from which int(width // factor), which is how that library computes it, gives the bottleneck back."""
    return width / bottleneck if width % bottleneck == 0 else width / (bottleneck + 0.5)


def write_config(base: Base, name: str, fields: Mapping[str, Any], *, beyond: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json. ``fields``: placement, bottleneck, activation, scale, dropout, cross. ``beyond``: what the layout cannot say, by our names."""
    placement = fields["placement"]
    config = {
        **FLAGS[placement],
        "cross_adapter": fields["cross"],
        "residual_before_ln": RESIDUAL.get(placement, True),
        "adapter_residual_before_ln": False,
        "reduction_factor": reduction_factor(base.width, fields["bottleneck"]),
        "non_linearity": ACTIVATIONS[fields["activation"]],
        "scaling": float(fields["scale"]),
        "dropout": fields["dropout"],
        "init_weights": "mam_adapter",
        "init_weights_seed": None,
        "inv_adapter_reduction_factor": None,
        **PLAIN,
    }
    if beyond:
        config |= {"architecture": BEYOND, BEYOND: dict(beyond)}
    return {
        "config": config,
        "hidden_size": base.width,
        "model_class": type(base.model).__name__,
        "model_name": base.source,
        "model_type": base.anatomy.family,
        "name": name,
        "version": VERSION,
    }


def read_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields, beyond) of an adapter_config.json: placement, activation, scale, dropout, cross; and what only this program writes.

    Raises Incompatible, naming the key, for what is no bottleneck adapter of these placements.
    """
    inner = config.get("config")
    if not isinstance(inner, Mapping) or "non_linearity" not in inner:
        raise _refused("config", inner and inner.get("architecture"), "a bottleneck adapter")
    if inner.get("architecture") not in (None, BEYOND):
        raise _refused("architecture", inner["architecture"], "a bottleneck adapter, which has none")
    for key, value in PLAIN.items():
        if inner.get(key, value) not in (value, value or None):
            raise _refused(key, inner[key], repr(value))
    flags = {"is_parallel": False, "original_ln_before": False, "original_ln_after": True} | {k: inner[k] for k in FLAGS["houlsby"] if k in inner}
    residual = inner.get("residual_before_ln", True)
    found = [p for p, said in FLAGS.items() if flags == said and RESIDUAL.get(p, residual) is residual]
    if not found:
        raise Incompatible(
            f"adapter_config.json: {', '.join(f'{k}={v}' for k, v in flags.items())}, residual_before_ln={residual} is no placement this program "
            "has; it reads double_seq_bn (houlsby), seq_bn (pfeiffer), par_bn (parallel) and their like"
        )
    cross = bool(inner.get("cross_adapter", False))
    if cross and found[0] != "houlsby":
        raise _refused("cross_adapter", True, f"false for the placement {found[0]}")
    # Before the first "adapters" release, which wrote a version, gelu meant its approximation by tanh.
    activation = None if "version" not in config and inner["non_linearity"] == "gelu" else READ_ACTIVATIONS.get(str(inner["non_linearity"]).lower())
    if activation is None:
        raise _refused("non_linearity", inner["non_linearity"], "relu, gelu (exact) and swish")
    scaling = inner.get("scaling", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, int | float):
        raise _refused("scaling", scaling, "a number")
    fields = {"placement": found[0], "activation": activation, "scale": float(scaling), "dropout": float(inner.get("dropout") or 0.0), "cross": cross}
    return fields, dict(inner.get(BEYOND) or {})


def _refused(key: str, value: Any, accepted: str) -> Incompatible:
    return Incompatible(f"adapter_config.json: {key} is {value!r}, which `adapter` cannot express; it reads {accepted}")


def tensor_name(place: str, name: str, leaf: str) -> str:
    """The name of one tensor of an adapter called ``name`` in its home."""
    return f"{place}.adapters.{name}.{LEAVES[leaf]}"


def match(wanted: Mapping[str, str], tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Our keys with their tensors. ``wanted``: our key -> its name in the file. The directory of a model without a head lacks the model's ``prefix``.

    Raises Incompatible where one is missing, or one is left over.
    """
    bare = [n.removeprefix(f"{prefix}.") for n in wanted.values()]
    names: Sequence[str] = bare if not set(tensors) & set(wanted.values()) else list(wanted.values())
    missing, over = [n for n in names if n not in tensors], sorted(set(tensors) - set(names))
    if missing or over:
        odd = f"{missing[0]!r} is missing" if missing else f"{over[0]!r} has no place"
        raise Incompatible(f"{WEIGHTS}: does not fit this base: {odd} ({len(missing)} missing, {len(over)} left over); the adapter belongs to another model")
    return {key: tensors[n] for key, n in zip(wanted, names, strict=True)}
