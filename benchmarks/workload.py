"""What is trained: the model's shape, what it learns from, and by what. The rows themselves are made in examples.py, the model's files in models.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

IGNORE = -100
# Linears of a block, (role, path below the block); the first three read the block's input.
_LLAMA = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
BLOCKS = {"llama": "model.layers", "qwen2": "model.layers", "bert": "bert.encoder.layer"}
READS_INPUT = ("query", "key", "value")
ALL = tuple(_LLAMA)


@dataclass(frozen=True)
class Workload:
    """One row of the table."""

    name: str
    kind: Literal["sft", "text", "classify", "dpo"] = "sft"
    method: Literal["lora", "full", "prefix"] = "lora"
    precision: Literal["bfloat16", "nf4"] = "bfloat16"
    family: Literal["llama", "qwen2", "bert"] = "llama"
    targets: tuple[str, ...] = ("query", "value")  # roles of the linears that get a LoRA
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int = 0  # 0: as many as heads
    ff: int = 2048
    vocabulary: int = 32_000
    rank: int = 8
    alpha: float = 16.0
    length: int = 20  # of a prefix
    labels: int = 4  # to tell apart (classify)
    beta: float = 0.1  # dpo
    prompt_times: float = 0.0  # a prompt is so many times as long as its answer; 0: as GSM8K's questions are
    natural: bool = False  # ids as frequent as words are, so that there is something to learn; else uniform
    examples: int = 16  # per step
    steps: int = 4
    tune_steps: int = 3
    tries: int = 3  # so many of the peer's settings are tried, the most promising first; 0: all
    lr: float = 2e-4
    seed: int = 0
    threads: int = 2
    wants: dict[str, float] = field(default_factory=dict)  # what is aimed at: "default", "tuned": times faster; "memory": share of; "distance"

    @property
    def linears(self) -> dict[str, str]:
        """The linears of a block: role to path below the block."""
        return _BERT if self.family == "bert" else _LLAMA

    @property
    def head_width(self) -> int:
        """Of an attention head."""
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        """Of all keys of a token."""
        return (self.kv_heads or self.heads) * self.head_width

    def dims(self, role: str) -> tuple[int, int]:
        """(in, out) of a linear of a block."""
        d, ff = self.hidden, self.ff
        return {"gate": (d, ff), "up": (d, ff), "down": (ff, d), "key": (d, self.kv_width), "value": (d, self.kv_width)}.get(role, (d, d))

    @property
    def block_numbers(self) -> int:
        """Weights of a block's linears."""
        return sum(math.prod(self.dims(r)) for r in self.linears)

    @property
    def parameters(self) -> int:
        """Of the base; a decoder's embedding is tied to its head. BERT: with positions, token types and the pooler."""
        d = self.hidden
        if self.family == "bert":
            biases = sum(self.dims(r)[1] for r in self.linears)
            return self.layers * (self.block_numbers + biases + 4 * d) + (self.vocabulary + 512 + 2) * d + 2 * d + d * d + d
        biases = d + 2 * self.kv_width if self.family == "qwen2" else 0
        return self.layers * (self.block_numbers + biases + 2 * d) + d + self.vocabulary * d


def from_json(fields: dict[str, Any]) -> Workload:
    """A workload from what `dataclasses.asdict` made of it."""
    return Workload(**{**fields, "targets": tuple(fields["targets"])})
