"""Tiny real models of every family, with random weights, and rows for them. No network, no files."""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
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
    ModernBertConfig,
    ModernBertForMaskedLM,
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
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from luthier.core import Base, Row
from luthier.modelling.packed import PackedLinear

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
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**_COMMON, logits_scaling=8.0, residual_multiplier=0.25)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_COMMON)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**_COMMON, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)),
}
DECODERS = list(MODELS)
_BERT = _PLAIN | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
# The second block sees 4 tokens to either side.
_MODERN = _PLAIN | {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 8, "initializer_range": 0.2}
_T5 = {
    "vocab_size": V,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "init_std": 0.2,
}


def _loud(model):
    """T5's random blocks whisper beside its embeddings, so that it repeats its last token: let them write four times as much."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                p.mul_(4)
    return model


MODELS |= {
    "bert": lambda: BertForMaskedLM(BertConfig(**_BERT)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**_BERT | {"pad_token_id": 1, "bos_token_id": 0})),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**_MODERN)),
    "t5": lambda: _loud(T5ForConditionalGeneration(T5Config(**_T5, num_decoder_layers=3))),
    # FLAN-T5's and T5 1.1's
    "t5_gated": lambda: _loud(T5ForConditionalGeneration(T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**_BART)),
}
ENCODERS = ["bert", "roberta", "modernbert"]
SEQ2SEQ = ["t5", "t5_gated", "bart"]
DENSE = [f for f in DECODERS if f != "qwen3_moe"]


def model(family: str = "llama", seed: int = 0):
    """A transformers model with its own random weights."""
    torch.manual_seed(seed)
    return MODELS[family]()


def base(family: str = "llama", seed: int = 0) -> Base:
    """The same as a Base, probed."""
    from luthier.build import adopt

    return adopt(model(family, seed), source=f"tiny-{family}")


class ByRow(PackedLinear):
    """The simplest storage in codes: a whole number of -7 to 7 a weight, and a scale a row."""

    def write(self, weight):
        scales = weight.float().abs().amax(1, keepdim=True) / 7
        self.register_buffer("codes", (weight.float() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def values(self, dtype):
        return (self.codes.float() * self.scales).to(dtype)


class Codes:
    """A precision of such linears."""

    packed, dtype = True, torch.float32

    def linear(self, in_features, out_features, bias, *, transposed=False):
        return ByRow(in_features, out_features, bias, transposed=transposed)


def in_codes(family: str = "llama", seed: int = 0, precision=None) -> Base:
    """A tiny base whose linears are in codes."""
    from luthier.build import adopt
    from luthier.quantising.quantised import pack

    lm = model(family, seed)
    pack(lm, precision or Codes())
    return adopt(lm, source=f"tiny-{family}")


def rows(n: int = 4, seed: int = 0, shortest: int = 6, longest: int = 30, prompt: int = 3) -> list[Row]:
    """Random token rows, the first ``prompt`` tokens of each not trained."""
    rng = np.random.default_rng(seed)
    out = []
    for i, length in enumerate(rng.integers(shortest, longest, n)):
        out.append(Row(rng.integers(3, V, length).astype(np.int32), np.arange(length) >= prompt, f"made:{i + 1}"))
    return out


def pairs(family: str, n: int = 4, seed: int = 0, shortest: int = 4, longest: int = 20) -> list[Row]:
    """Random rows of an encoder-decoder: the answer with its starting token, and what the encoder reads in ``extras["source"]``."""
    start = {"bart": 2}.get(family, 0)
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        answer, source = (rng.integers(3, V, rng.integers(shortest, longest)).astype(np.int32) for _ in range(2))
        ids = np.concatenate([[start], answer, [2]]).astype(np.int32)
        out.append(Row(ids, np.arange(len(ids)) > 0, f"made:{i + 1}", {"source": source}))
    return out


def rows_for(family: str, n: int = 4, seed: int = 0, shortest: int = 6, longest: int = 20) -> list[Row]:
    """Random rows of the shape a family trains on."""
    if family in SEQ2SEQ:
        return pairs(family, n, seed, shortest, longest)
    return rows(n, seed=seed, shortest=shortest, longest=longest)


def row(ids: list[int]) -> Row:
    """One row of these tokens, all but the first trained."""
    return Row(np.array(ids, dtype=np.int32), np.arange(len(ids)) > 0)


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
