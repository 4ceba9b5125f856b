"""Models that are only a configuration, as folders: what is counted on the meta device needs no weights."""

from __future__ import annotations

import json

import tiny

SMALL = {"optim": {"micro_tokens": 128, "batch_tokens": 128}, "data": {"max_tokens": 32}}


LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def deep(family, folder):
    """The configuration of a tiny model with six blocks, or four in each stack, as a folder's only file."""
    config = tiny.model(family).config
    config.layer_types = None if getattr(config, "layer_types", None) is None else config.layer_types[:2] * 3
    for name, n in {"num_hidden_layers": 6, "num_layers": 4, "num_decoder_layers": 4, "encoder_layers": 4, "decoder_layers": 4}.items():
        if hasattr(config, name) and name not in getattr(config, "attribute_map", {}):
            setattr(config, name, n)
    config.save_pretrained(folder)
    return str(folder)


def shape(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_70B | config))
    return str(folder)
