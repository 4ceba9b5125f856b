"""The field's layouts of saved deltas: which of our methods a configuration is, what PEFT's adapter_config.json says, and where heads lie.

PEFT names a tensor ``base_model.model.<path in the base>.<leaf>``; a classifier's head stands among them under the path it has in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core import Base, Incompatible
from ..modelling.anatomy import attentions
from ..modelling.site import Site

TASKS = {"decoder": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION", "encoder_decoder": "SEQ_2_SEQ_LM"}
PEFT_KINDS = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt", "P_TUNING": "p_tuning", "PREFIX_TUNING": "prefix"}
TOP = "base_model.model."


def recognise(config: Mapping[str, Any], where: str) -> str:
    """The kind of method that a configuration of another program is. Raises Incompatible for one that is not read."""
    if "peft_type" not in config and isinstance(config.get("config"), Mapping):
        return "adapter"  # AdapterHub's
    found = config.get("peft_type")
    if found not in PEFT_KINDS:
        raise Incompatible(f"{where}: peft_type {found!r} is not read; {', '.join(PEFT_KINDS)} are")
    return "dora" if found == "LORA" and config.get("use_dora") else PEFT_KINDS[found]


def common(base: Base, peft_type: str) -> dict[str, Any]:
    """The keys every kind has."""
    return {
        "peft_type": peft_type,
        "task_type": TASKS[base.anatomy.kind],
        "base_model_name_or_path": base.source,
        "revision": base.revision,
        "inference_mode": True,
    }


def virtual(base: Base, peft_type: str, length: int, *, deep: bool) -> dict[str, Any]:
    """The keys of the kinds with virtual tokens; ``deep``: keys and values for each layer instead of one vector in front of the input."""
    own = attentions(base.model)
    heads, dim = own[0].heads, own[0].dim
    return common(base, peft_type) | {
        "num_virtual_tokens": length,
        "num_transformer_submodules": 1,
        "num_layers": len(own),
        "num_attention_heads": heads,
        "token_dim": heads * dim if deep else base.width,
    }


def exactly(path: str) -> str:
    """A target that means this module alone: a regular expression, also where the path is a single word."""
    return path.replace(".", r"\.") if "." in path else f"(?:{path})"


def matches(pattern: str, path: str) -> bool:
    """Whether PEFT would apply a key of rank_pattern or alpha_pattern to a module: the end of its path, from a dot on."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def without(config: Mapping[str, Any], keys: Iterable[str], kind: str) -> None:
    """Raise Incompatible where a PEFT configuration uses a feature that this kind of ours does not have."""
    for key in keys:
        if config.get(key):
            raise Incompatible(f"adapter_config.json: {key} = {config[key]!r} is not plain {kind}, which is all that is read")


# --- matrices with several uses -------------------------------------------------------------------------------------


def embedding_path(model: nn.Module) -> str:
    """Where the input embedding stands."""
    return _path_of(model, model.get_input_embeddings())


def head_path(model: nn.Module) -> str:
    """Where the output matrix stands."""
    return _path_of(model, model.get_output_embeddings())


def uses(model: nn.Module, path: str) -> list[str]:
    """Paths of all modules that hold the same matrix as the one at ``path``, this first."""
    weight = model.get_submodule(path).weight
    same = [n for n, m in _modules(model) if getattr(m, "weight", None) is weight]
    return [path] + [n for n in same if n != path]


def _path_of(model: nn.Module, module: Any) -> str:
    return next(n for n, m in _modules(model) if m is module)


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules under every path they have, without what stands inside a site."""
    everything = list(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{n}." for n, m in everything if isinstance(m, Site))
    return [(n, m) for n, m in everything if not n.startswith(inside)] if inside else everything


# --- what lies beside the delta -------------------------------------------------------------------------------------


def head_homes(base: Base) -> dict[str, str]:
    """Our classification head's modules -> their paths in transformers' sequence classifier, where that computes the same from the same vector.

    Every decoder's is one linear on the last token; RoBERTa's and its like are ours; BERT's pooler is our dense layer. Others have none.
    """
    if base.anatomy.kind == "decoder":
        return {"label.out": "score"}
    if base.anatomy.family in ("roberta", "xlm-roberta", "camembert"):
        return {"label.dense": "classifier.dense", "label.out": "classifier.out_proj"}
    return {"label.dense": "bert.pooler.dense", "label.out": "classifier"} if base.anatomy.family == "bert" else {}


def with_heads(base: Base, config: dict[str, Any], heads: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, the heads' tensors) as PEFT has them; (as it was, none) where transformers has no such head. ``heads``: "label.out.weight"."""
    homes = head_homes(base)
    named = {key: key.rpartition(".") for key in heads}
    if not heads or any(module not in homes for module, _, _ in named.values()):
        return config, {}
    top = "base_model." if "num_virtual_tokens" in config else TOP  # what is put before the input wraps the model once less
    tensors = {f"{top}{homes[module]}.{leaf}": heads[key] for key, (module, _, leaf) in named.items()}
    saved = {p.split(".")[1 if p.startswith("bert.") else 0] for p in (homes[module] for module, _, _ in named.values())}
    return config | {"task_type": "SEQ_CLS", "modules_to_save": sorted(saved)}, tensors


def split(base: Base, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the delta's tensors, the heads' by our names) of a PEFT folder.

    Copies of the base's own tensors are left out: PEFT adds the embedding where it is edited. Raises Incompatible where such a copy is not this
    base's, and for modules saved whole that are no classifier's head.
    """
    homes = {theirs: ours for ours, theirs in head_homes(base).items()}
    delta, heads = {}, {}
    for key, tensor in tensors.items():
        module, _, leaf = key.removeprefix(TOP).removeprefix("base_model.").rpartition(".")
        if module in homes:
            heads[f"{homes[module]}.{leaf}"] = tensor
        elif module.endswith(".base_layer"):
            _same(base, f"{module.removesuffix('.base_layer')}.{leaf}", tensor, where)
        else:
            delta[key] = tensor
    known = {"classifier", "score", *(part for path in homes for part in path.split("."))}
    if odd := sorted(set(config.get("modules_to_save") or ()) - known):
        raise Incompatible(f"{where}: modules_to_save = {odd} are modules saved whole, which are not read; a classifier's head is")
    return delta, heads


def _same(base: Base, name: str, tensor: Tensor, where: str) -> None:
    own = dict(base.model.named_parameters(remove_duplicate=False)).get(name)
    if own is None or own.shape != tensor.shape or not bool((own.detach().cpu().float() - tensor.float()).abs().max() <= 1e-2 * tensor.float().abs().max()):
        raise Incompatible(f"{where}: it comes with a {name} of its own, which is not this base's; it was made on a base with another vocabulary")
