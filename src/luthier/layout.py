"""What PEFT's adapter_config.json says for every kind of delta, and for those made of virtual tokens."""

from __future__ import annotations

from typing import Any

from .anatomy import attentions
from .core import Base

TASKS = {"decoder": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION", "encoder_decoder": "SEQ_2_SEQ_LM"}


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
