"""What is trained: the model's shape, the examples, the adapter's start, and how many operations a step cannot do without.

Everything is written once to a folder that all peers read: weights (random, fixed seed, stored in bfloat16, so that float32 and bfloat16 peers
compute with the same numbers), a tokenizer (never used on text), the examples of every step, and the adapter's first A and B.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

IGNORE = -100
RESERVED = 3  # ids 0, 1, 2: pad, end, unknown
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WORDS_TO_TOKENS = 1.3
# (mean, standard deviation) of WORDS_TO_TOKENS x words over GSM8K's 7,473 training rows: for where the file is not at hand.
QUESTION, ANSWER = (58.6, 22.7), (67.2, 34.8)


@dataclass(frozen=True)
class Workload:
    """One row of the table."""

    name: str
    targets: tuple[str, ...]  # last names of the linears that get a LoRA
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    ff: int = 2048
    vocabulary: int = 32_000
    rank: int = 8
    alpha: float = 16.0
    examples: int = 16  # per step
    steps: int = 6
    lr: float = 2e-4
    seed: int = 0
    threads: int = 2

    def dims(self, linear: str) -> tuple[int, int]:
        """(in, out) of a linear of a block; all heads have their own keys and values."""
        d, ff = self.hidden, self.ff
        return {"gate_proj": (d, ff), "up_proj": (d, ff), "down_proj": (ff, d)}.get(linear, (d, d))

    @property
    def parameters(self) -> int:
        """Of the base; the embedding is tied to the head."""
        block = sum(math.prod(self.dims(n)) for n in LINEARS) + 2 * self.hidden
        return self.layers * block + self.hidden + self.vocabulary * self.hidden


def full() -> list[Workload]:
    """SFT of a 110 M-parameter Llama shape: LoRA on query and value, and on all linears."""
    return [Workload("SFT, LoRA on q, v", ("q_proj", "v_proj")), Workload("SFT, LoRA on all linears", LINEARS)]


def quick() -> list[Workload]:
    """A shape so small that only the harness is tried, not the speed."""
    tiny: dict[str, Any] = {"hidden": 64, "layers": 2, "heads": 4, "ff": 128, "vocabulary": 512, "examples": 4, "steps": 3, "threads": 1}
    return [Workload("quick: tiny shape", ("q_proj", "v_proj"), **tiny)]


def from_json(fields: dict[str, Any]) -> Workload:
    """A workload from what `dataclasses.asdict` made of it."""
    return Workload(**{**fields, "targets": tuple(fields["targets"])})


# --- the examples ---------------------------------------------------------------------------------------------------


def lengths(n: int, seed: int) -> tuple[list[tuple[int, int]], str]:
    """(question, answer) token lengths of n examples, and where they come from."""
    rng = np.random.default_rng([seed, 1])
    path = Path(os.environ.get("LUTHIER_DATA", "")) / "data" / "gsm8k" / "train.jsonl"
    if "LUTHIER_DATA" in os.environ and path.is_file():
        with path.open(encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        chosen = rng.choice(len(rows), size=n, replace=n > len(rows))
        sizes = [[max(2, round(WORDS_TO_TOKENS * len(rows[i][key].split()))) for key in ("question", "answer")] for i in chosen]
        return [(q, a) for q, a in sizes], f"GSM8K train, {WORDS_TO_TOKENS} x words"
    pairs = zip(_log_normal(rng, n, *QUESTION), _log_normal(rng, n, *ANSWER), strict=True)
    return list(pairs), f"log-normal with GSM8K's means and standard deviations, {WORDS_TO_TOKENS} x words"


def _log_normal(rng: np.random.Generator, n: int, mean: float, sd: float) -> list[int]:
    variance = math.log1p((sd / mean) ** 2)
    return [max(2, round(float(x))) for x in rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), n)]


def examples(work: Workload) -> tuple[list[list[dict[str, Any]]], str]:
    """The examples of each step, {"ids", "answer": where the answer begins}; token ids are random."""
    sizes, source = lengths(work.steps * work.examples, work.seed)
    rng = np.random.default_rng([work.seed, 2])
    rows = [{"ids": rng.integers(RESERVED, work.vocabulary, q + a).tolist(), "answer": q} for q, a in sizes]
    return [rows[i : i + work.examples] for i in range(0, len(rows), work.examples)], source


def counts(steps: list[list[dict[str, Any]]]) -> list[tuple[int, int]]:
    """(tokens, labelled tokens) of each step. The answer's first token is predicted from the question's last."""
    return [(sum(len(r["ids"]) for r in rows), sum(len(r["ids"]) - r["answer"] for r in rows)) for rows in steps]


# --- the folder -----------------------------------------------------------------------------------------------------


def write(work: Workload, folder: Path) -> str:
    """Put the model, the examples and the adapter's start into ``folder``. Returns where the lengths come from."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(work.seed)
    config = LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=work.ff,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1, "<unknown>": 2}, unk_token="<unknown>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>").save_pretrained(folder / "model")
    save_file(adapter(work), folder / "adapter.safetensors")
    steps, source = examples(work)
    (folder / "examples.json").write_text(json.dumps(steps))
    return source


def adapter(work: Workload) -> dict[str, Any]:
    """First A and B by "path:lora_A". B is not zero, or A would have no gradient to compare in step 1."""
    import torch

    made = torch.Generator().manual_seed(work.seed + 1)
    out = {}
    for layer in range(work.layers):
        for name in work.targets:
            n_in, n_out = work.dims(name)
            path = f"model.layers.{layer}.{'self_attn' if name in LINEARS[:4] else 'mlp'}.{name}"
            out[f"{path}:lora_A"] = (torch.rand(work.rank, n_in, generator=made) * 2 - 1) / math.sqrt(n_in)  # Kaiming-uniform, a = sqrt(5)
            out[f"{path}:lora_B"] = torch.randn(n_out, work.rank, generator=made) * 0.02
    return out


# --- the limit ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Operations a step cannot do without: no padding, no recomputation, no unlabelled logits, no metrics."""

    linears: float  # frozen matrices, LoRA and attention
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.linears + self.head


def useful(work: Workload, sizes: list[int], labelled: int) -> Flops:
    """Of one step whose examples have these lengths.

    Frozen linears 4 T k n (forward, and the gradient of the input); LoRA 6 T r (k + n); causal attention 3.5 x 2 S^2 d an example and layer (forward
    1, backward 2.5); head 4 T_labelled d V. Nothing below the first block trains, so its q, k, v need no gradient of their input.
    """
    T, r = sum(sizes), work.rank
    frozen = 4 * T * sum(math.prod(work.dims(n)) for n in LINEARS) * work.layers - 2 * T * sum(math.prod(work.dims(n)) for n in LINEARS[:3])
    lora = 6 * T * r * sum(sum(work.dims(n)) for n in work.targets) * work.layers - 2 * T * r * sum(work.dims(n)[0] for n in work.targets if n in LINEARS[:3])
    attention = 3.5 * 2 * sum(s * s for s in sizes) * work.hidden * work.layers
    return Flops(frozen + lora + attention, 4.0 * labelled * work.hidden * work.vocabulary)
