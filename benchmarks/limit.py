"""The operations a step cannot do without: no padding, no recomputation, no unlabelled logits, no metrics; a prompt that two answers share counts once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .examples import Row, sequences
from .workload import READS_INPUT, Workload

CAUSAL, BACKWARD = 2.0, 2.5  # attention: operations per pair of tokens and width, half of them masked; its backward is 2.5 forwards


@dataclass(frozen=True)
class Flops:
    """Of one step, by the rate at which this machine does them."""

    linears: float  # x W' and g W, low-rank products, attention
    head: float
    weights: float = 0.0  # g' x: gradients of weights, where those train

    @property
    def total(self) -> float:
        """All of them."""
        return self.linears + self.head + self.weights


def useful(work: Workload, rows: list[Row]) -> Flops:
    """Of the step that trains these rows. T tokens, k in, n out, r rank, P prefix, S length of a sequence.

    Frozen linears 4 T k n (forward, and the gradient of the input), trained ones 6 T k n; LoRA 6 T r (k + n); attention forward and 2.5 times that
    backward: 2 S^2 d causal, 4 S^2 d where all see all, 4 S P d for a prefix; head 4 T_labelled d V, trained 6. A reference's forward: half of the frozen
    linears, its attention and 2 T_labelled d V. Nothing below the first block trains under LoRA and prefixes, so its q, k, v need no gradient of their input.
    """
    T, labelled = _tokens(rows), _labelled(rows)
    reading = sum(math.prod(work.dims(r)) for r in READS_INPUT)
    head = float(labelled * work.hidden * work.vocabulary)
    attention = _attention(work, rows) * work.layers
    if work.method == "full":
        return Flops(4 * T * work.block_numbers * work.layers + (1 + BACKWARD) * attention, 4 * head, 2 * T * work.block_numbers * work.layers + 2 * head)
    linears = 4 * T * work.block_numbers * work.layers - 2 * T * reading + (1 + BACKWARD) * attention
    if work.method == "lora":
        linears += 6 * T * work.rank * sum(sum(work.dims(r)) for r in work.targets) * work.layers
        linears -= 2 * T * work.rank * sum(work.dims(r)[0] for r in work.targets if r in READS_INPUT)
    if work.kind == "classify":
        return Flops(linears + 6 * len(rows) * work.hidden * (work.hidden + work.labels), 0.0)
    if work.kind == "dpo":
        return Flops(linears + 2 * T * work.block_numbers * work.layers + attention, 6 * head)
    return Flops(float(linears), 4 * head)


def _tokens(rows: list[Row]) -> int:
    """That have to be read: a pair's prompt once."""
    return sum(len(r["prompt"]) + len(r["chosen"]) + len(r["rejected"]) if "prompt" in r else len(r["ids"]) for r in rows)


def _labelled(rows: list[Row]) -> int:
    return 0 if "label" in rows[0] else sum(len(ids) - max(1, answer) for ids, answer in sequences(rows))


def _attention(work: Workload, rows: list[Row]) -> float:
    """Of one layer's forward."""
    d, out = work.hidden, 0.0
    for r in rows:
        if "prompt" in r:
            p = len(r["prompt"])
            out += CAUSAL * d * p * p + sum(CAUSAL * d * (len(r[a]) ** 2 + 2 * p * len(r[a])) for a in ("chosen", "rejected"))
        else:
            s = len(r["ids"])
            out += (2 if work.family == "bert" else 1) * CAUSAL * d * s * s
            out += 2 * CAUSAL * d * s * work.length if work.method == "prefix" else 0.0
    return out
