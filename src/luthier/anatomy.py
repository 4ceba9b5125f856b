"""Families: what a model calls its query, key, value, output, gate, up and down projections; its blocks, embedding and head.

The only file that knows a family by name. A family that is not in the table is read from its structure: the linears inside its repeated
block, by the names the field uses. What cannot be told so can still be targeted by its own name or by a regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .core import Incompatible

# Canonical name -> the spellings users type for it.
ROLES = {
    "query": ("query", "q"),
    "key": ("key", "k"),
    "value": ("value", "v"),
    "output": ("output", "o"),
    "gate": ("gate",),
    "up": ("up",),
    "down": ("down",),
}
GROUPS = {
    "attention": ("query", "key", "value", "output"),
    "mlp": ("gate", "up", "down"),
    "all": tuple(ROLES),
}

_LLAMA = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_EXPERTS = {role: path for role, path in _LLAMA.items() if role in GROUPS["attention"]}  # experts are not linears of their own


def _fused(qkv: str, output: str, up: str, down: str, gate: str | None = None) -> dict[str, str]:
    """A family whose query, key and value are rows of one matrix: that matrix is edited whole."""
    return {"query": qkv, "key": qkv, "value": qkv, "output": output, "up": up, "down": down} | ({"gate": gate} if gate else {})


FAMILIES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "cohere", "olmo2", "smollm3"), _LLAMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"), _EXPERTS),
    "phi": _LLAMA | {"output": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"},
    "phi3": _fused("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", gate="mlp.gate_up_proj"),
    "gpt_neox": _fused("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "gpt2": _fused("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}
del FAMILIES["phi"]["gate"]


def is_linear(module: nn.Module) -> bool:
    """A linear layer, GPT-2's transposed Conv1D included."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if type(module).__name__ == "Conv1D":
        return module.weight.shape[0], module.weight.shape[1]  # type: ignore[return-value, index]
    return module.in_features, module.out_features  # type: ignore[return-value]


@dataclass(frozen=True)
class Anatomy:
    """Where things are in one model."""

    family: str
    blocks: str  # path of the ModuleList of transformer blocks
    linears: dict[str, str]  # canonical role -> path inside a block
    experts: bool  # its feed-forward is a mixture of experts
    head_scale: float  # logits = cap(scale * head(hidden))
    head_cap: float | None
    kind: str = "decoder"  # or "encoder", "encoder_decoder"
    first_position: int = 0  # the position id of an example's first token
    decoder_start: int = 0  # the token an encoder-decoder's answer begins with

    @classmethod
    def of(cls, model: Any) -> Anatomy:
        """Read a transformers model. Raises Incompatible where no trunk of repeated blocks or no output head is found."""
        config = model.config.get_text_config()
        family = config.model_type
        blocks = _blocks(model)
        if model.get_output_embeddings() is None:
            raise Incompatible(f"{type(model).__name__} has no language-model head; this program trains decoders with one (AutoModelForCausalLM)")
        linears = FAMILIES.get(family) or _guess(model.get_submodule(blocks)[0])  # type: ignore[index]
        experts = any("expert" in n for n, _ in model.named_modules())
        return cls(family, blocks, linears, experts, *_head_rule(config))

    def targets(self, model: nn.Module, names: Sequence[str]) -> list[str]:
        """Module paths that the user's names mean, in model order.

        A name is canonical (query, q, ..., attention, mlp, all), a module's own last name (q_proj), or a regular expression that
        matches a whole path. Raises Incompatible naming what there is where a name matches nothing.
        """
        paths = [n for n, m in model.named_modules() if is_linear(m) and n.startswith(self.blocks + ".")]
        everything = [n for n, m in model.named_modules() if is_linear(m)]
        found: set[str] = set()
        for name in names:
            roles = GROUPS.get(name) or tuple(r for r, spellings in ROLES.items() if name in spellings)
            if roles:
                suffixes = {self.linears[r] for r in roles if r in self.linears}
                if not suffixes and self.experts:
                    raise Incompatible(
                        f"targets: {name!r} are the experts of this mixture ({self.family}), which are not trained; "
                        "its attention is: query, key, value, output or attention"
                    )
                hits = [p for p in paths if any(p.endswith("." + s) for s in suffixes)]
            elif re.fullmatch(r"\w+", name):
                hits = [p for p in paths if p.rsplit(".", 1)[-1] == name]
            else:
                try:
                    hits = [p for p in everything if re.fullmatch(name, p)]
                except re.error as e:
                    raise Incompatible(f"targets: {name!r} is no valid regular expression: {e}") from None
            if not hits:
                own = sorted({p.rsplit(".", 1)[-1] for p in paths})
                raise Incompatible(
                    f"targets: nothing in this model ({self.family}) is called {name!r}; there are {', '.join(sorted(set(self.linears)))}, "
                    f"attention, mlp, all; by their own names {', '.join(own)}; or a regular expression over whole paths such as {paths[0]!r}"
                )
            found.update(hits)
        return [p for p in everything if p in found]

    def before_head(self, model: Any, hidden: Tensor) -> Tensor:
        """What the output matrix is applied to: the hidden states, or a family's transform of them."""
        return hidden

    def head(self, model: Any, hidden: Tensor) -> Tensor:
        """fp32 logits of hidden states (..., D), as the model itself makes them."""
        logits = model.get_output_embeddings()(self.before_head(model, hidden)).float() * self.head_scale
        return logits if self.head_cap is None else self.head_cap * torch.tanh(logits / self.head_cap)


@dataclass(frozen=True)
class Attention:
    """One attention module: what `attention.attend` gets as its module."""

    path: str
    module: nn.Module
    heads: int  # of keys and values
    dim: int  # of each

    @property
    def columns(self) -> int:
        """Numbers that one virtual token takes here: its key and its value."""
        return 2 * self.heads * self.dim


def attentions(model: Any) -> list[Attention]:
    """All attentions in model order: an encoder-decoder's encoder first, in its decoder self before cross."""
    out = []
    for path, module in model.named_modules():
        if not (hasattr(module, "layer_idx") and hasattr(module, "is_causal") and any(is_linear(m) for m in module.children())):
            continue
        config = getattr(module, "config", None) or model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = next((d for k in ("head_dim", "key_value_proj_dim", "attention_head_size") if (d := getattr(module, k, None))), None)
        out.append(Attention(path, module, heads, dim or config.hidden_size // config.num_attention_heads))
    return out


def trunk(model: Any) -> nn.Module:
    """The part that makes hidden states: everything but the head."""
    return model.base_model


def _blocks(model: nn.Module) -> str:
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) and "expert" not in n]
    # The list of blocks is the outermost one with the most parameters.
    best = max(lists, key=lambda nm: (sum(p.numel() for p in nm[1].parameters()), -nm[0].count(".")), default=None)
    if best is None:
        raise Incompatible(f"{type(model).__name__} has no list of repeated blocks; this program knows transformer models")
    return best[0]


def _guess(block: nn.Module) -> dict[str, str]:
    """Roles of an unknown family, from the names its linears have."""
    known = {
        "query": ("q_proj", "query", "q"),
        "key": ("k_proj", "key", "k"),
        "value": ("v_proj", "value", "v"),
        "output": ("o_proj", "out_proj", "dense"),
        "gate": ("gate_proj", "w1"),
        "up": ("up_proj", "fc1", "w3", "fc_in", "c_fc"),
        "down": ("down_proj", "fc2", "w2", "fc_out"),
    }
    out: dict[str, str] = {}
    for path, module in block.named_modules():
        leaf = path.rsplit(".", 1)[-1]
        if is_linear(module) and "expert" not in path:
            for role, names in known.items():
                if leaf in names:
                    out.setdefault(role, path)
            if leaf in ("qkv_proj", "query_key_value", "c_attn", "Wqkv"):
                out |= dict.fromkeys(("query", "key", "value"), path)
    return out


def _head_rule(config: Any) -> tuple[float, float | None]:
    """How a family changes its logits: a multiplier and a soft cap. The probe at load checks it against the model itself."""
    cap = getattr(config, "final_logit_softcapping", None)
    if getattr(config, "logits_scaling", None):  # Granite divides
        return 1.0 / config.logits_scaling, cap
    return float(getattr(config, "logit_scale", None) or 1.0), cap  # Cohere multiplies
