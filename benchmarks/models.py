"""The folder that all peers read: weights (random, fixed seed, stored in bfloat16, so that float32 and bfloat16 peers compute with the same numbers), a
tokenizer (never used on text), the examples of every step, and what the trained tensors start from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .examples import examples
from .workload import BLOCKS, Workload

HEAD = ("head:dense.weight", "head:dense.bias", "head:out.weight", "head:out.bias")  # a classifier's


def write(work: Workload, folder: Path) -> str:
    """Put everything into ``folder``. Returns where the lengths come from."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(work.seed)
    model = _model(work).to(torch.bfloat16)
    save_file(start(work, model), folder / "start.safetensors")
    model.save_pretrained(folder / "model")
    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1, "<unknown>": 2}, unk_token="<unknown>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>").save_pretrained(folder / "model")
    steps, source = examples(work)
    (folder / "examples.json").write_text(json.dumps(steps))
    return source


def _model(work: Workload) -> Any:
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    shape = {
        "vocab_size": work.vocabulary,
        "hidden_size": work.hidden,
        "intermediate_size": work.ff,
        "num_hidden_layers": work.layers,
        "num_attention_heads": work.heads,
        "pad_token_id": 0,
    }
    if work.family == "bert":  # without dropout: the peers' random masks could not be equal
        return BertForSequenceClassification(BertConfig(**shape, num_labels=work.labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    decoder = {
        "num_key_value_heads": work.kv_heads or work.heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return Qwen2ForCausalLM(Qwen2Config(**shape, **decoder)) if work.family == "qwen2" else LlamaForCausalLM(LlamaConfig(**shape, **decoder))


def start(work: Workload, model: Any = None) -> dict[str, Any]:
    """What is trained, before step 1: "path:lora_A", "path:lora_B", "prefix:table", "head:...". Nothing for full fine-tuning, whose start is the model.

    LoRA's B is not zero, or A would have no gradient to compare in step 1. ``model``: what the classifier's head is taken from.
    """
    import torch

    made = torch.Generator().manual_seed(work.seed + 1)
    out: dict[str, Any] = {}
    if work.method == "lora":
        for layer in range(work.layers):
            for role in work.targets:
                n_in, n_out = work.dims(role)
                path = f"{BLOCKS[work.family]}.{layer}.{work.linears[role]}"
                out[f"{path}:lora_A"] = (torch.rand(work.rank, n_in, generator=made) * 2 - 1) / math.sqrt(n_in)  # Kaiming-uniform, a = sqrt(5)
                out[f"{path}:lora_B"] = torch.randn(n_out, work.rank, generator=made) * 0.02
    if work.method == "prefix":
        out["prefix:table"] = torch.randn(work.length, 2 * work.layers * work.kv_width, generator=made) * 0.3
    if work.kind == "classify" and model is not None:
        parts = (model.bert.pooler.dense, model.classifier)
        out |= dict(zip(HEAD, (t.detach().float().clone() for m in parts for t in (m.weight, m.bias)), strict=True))
    return out
