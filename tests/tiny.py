"""Tiny real models of every family, with random weights, and rows for them. No network, no files."""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from luthier.core import Base, Row

V = 50
_COMMON = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PLAIN = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON, tie_word_embeddings=True)),
    "mistral_window": lambda: MistralForCausalLM(MistralConfig(**_COMMON, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_COMMON, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_COMMON, head_dim=8, final_logit_softcapping=0.5, attn_logit_softcapping=2.0, sliding_window=4, query_pre_attn_scalar=8)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_COMMON, head_dim=8, sliding_window=4)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_COMMON)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_COMMON)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_PLAIN)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2)
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**_COMMON, logits_scaling=8.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_COMMON)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**_COMMON, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)),
}
DECODERS = list(MODELS)
DENSE = [f for f in DECODERS if f != "qwen3_moe"]


def model(family: str = "llama", seed: int = 0):
    """A transformers model with its own random weights."""
    torch.manual_seed(seed)
    return MODELS[family]()


def base(family: str = "llama", seed: int = 0) -> Base:
    """The same as a Base, probed."""
    from luthier.build import adopt

    return adopt(model(family, seed), source=f"tiny-{family}")


def rows(n: int = 4, seed: int = 0, shortest: int = 6, longest: int = 30, prompt: int = 3) -> list[Row]:
    """Random token rows, the first ``prompt`` tokens of each not trained."""
    rng = np.random.default_rng(seed)
    out = []
    for i, length in enumerate(rng.integers(shortest, longest, n)):
        out.append(Row(rng.integers(3, V, length).astype(np.int32), np.arange(length) >= prompt, f"made:{i + 1}"))
    return out


def randomise(params: dict[str, torch.nn.Parameter], seed: int = 0, std: float = 0.1) -> None:
    """Random values, so that a delta does something (LoRA's B starts at zero)."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in params.values():
            p.copy_(torch.randn(p.shape, generator=g) * std)


def tokenizer():
    """A byte-level tokenizer of a few hundred tokens, made here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<eos>", "<pad>", "<user>", "<assistant>", "<end>"]
    vocabulary = {t: i for i, t in enumerate(special + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", additional_special_tokens=["<user>", "<assistant>", "<end>"], model_max_length=512
    )
    out.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    return out


def folder(path, seed: int = 0, positions: int = 512):
    """Write a tiny Llama with its tokenizer to a folder, as a user's own base."""
    torch.manual_seed(seed)
    made = tokenizer()
    config = LlamaConfig(
        **(_COMMON | {"vocab_size": len(made), "max_position_embeddings": positions, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None})
    )
    LlamaForCausalLM(config).save_pretrained(path)
    made.save_pretrained(path)
    return path
