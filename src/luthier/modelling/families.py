"""What each family calls its parts. The only file that knows a family by name; it holds names and no code that reads a model.

A family that is not here is read from its structure, by the names the field uses (`anatomy`).
"""

from __future__ import annotations

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

Roles = dict[str, tuple[str, ...]]  # canonical role -> paths inside a block; in an encoder-decoder self-attention and cross-attention alike


def _roles(**paths: str | tuple[str, ...]) -> Roles:
    return {role: (path,) if isinstance(path, str) else path for role, path in paths.items()}


def _attention(prefix: str, query: str = "q_proj", key: str = "k_proj", value: str = "v_proj", output: str = "o_proj") -> dict[str, str]:
    return {role: f"{prefix}.{name}" for role, name in zip(GROUPS["attention"], (query, key, value, output), strict=True)}


def _fused(qkv: str, output: str, up: str, down: str, gate: str | None = None) -> Roles:
    """A family whose query, key and value are rows of one matrix: that matrix is edited whole."""
    return _roles(query=qkv, key=qkv, value=qkv, output=output, up=up, down=down) | (_roles(gate=gate) if gate else {})


def _both(own: dict[str, str], cross: dict[str, str]) -> Roles:
    """A stack with cross-attention: a role means its self-attention and its cross-attention."""
    return {role: (path, cross[role]) for role, path in own.items()}


_LLAMA = _roles(**_attention("self_attn"), gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
_PHI = _roles(**_attention("self_attn", output="dense"), up="mlp.fc1", down="mlp.fc2")
_EXPERTS = {role: paths for role, paths in _LLAMA.items() if role in GROUPS["attention"]}  # experts are not linears of their own
_BERT = _roles(**_attention("attention.self", "query", "key", "value"), up="intermediate.dense", down="output.dense") | _roles(output="attention.output.dense")
_FEED = ("layer.1.DenseReluDense", "layer.2.DenseReluDense")  # T5's encoder and decoder
_T5 = _both(_attention("layer.0.SelfAttention", *"qkvo"), _attention("layer.1.EncDecAttention", *"qkvo")) | _roles(
    gate=tuple(f"{f}.wi_0" for f in _FEED),
    up=tuple(f"{f}.{wi}" for f in _FEED for wi in ("wi", "wi_1")),  # plain, gated
    down=tuple(f"{f}.wo" for f in _FEED),
)
_BART = _both(_attention("self_attn", output="out_proj"), _attention("encoder_attn", output="out_proj")) | _roles(up="fc1", down="fc2")

FAMILIES: dict[str, Roles] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "cohere", "olmo2", "smollm3"), _LLAMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"), _EXPERTS),
    "phi": _PHI,
    "phi3": _fused("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", gate="mlp.gate_up_proj"),
    "gpt_neox": _fused("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "gpt2": _fused("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), _BERT),
    "modernbert": _fused("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo", gate="mlp.Wi"),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian", "blenderbot", "m2m_100"), _BART),
}

# --- for families that are not above, and for what all share --------------------------------------------------------

# A linear's own name -> its role.
USUAL = {
    "query": ("q_proj", "query", "q"),
    "key": ("k_proj", "key", "k"),
    "value": ("v_proj", "value", "v"),
    "output": ("o_proj", "out_proj", "dense"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "fc1", "w3", "fc_in", "c_fc"),
    "down": ("down_proj", "fc2", "w2", "fc_out"),
}
USUAL_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
# The last linear of an attention: inside it, or (BERT) beside it.
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "Wo", "o")
# The feed-forward sublayer: (the module whose input it is, the module whose output it is), inside a block.
FEED_FORWARDS = (
    ("layer.2.DenseReluDense", "layer.2.DenseReluDense"),
    ("layer.1.DenseReluDense", "layer.1.DenseReluDense"),
    ("mlp", "mlp"),
    ("block_sparse_moe", "block_sparse_moe"),
    ("feed_forward", "feed_forward"),
    ("intermediate.dense", "output.dense"),
    ("fc1", "fc2"),
)
# Norms that stand behind a sublayer, before the sum: (attention's, feed-forward's). Gemma 2 and 3 and OLMo 2; GLM 4.
POST_NORMS = (("post_attention_layernorm", "post_feedforward_layernorm"), ("post_self_attn_layernorm", "post_mlp_layernorm"))
