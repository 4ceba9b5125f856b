"""What is right: plain PyTorch in float32, one sequence at a time, full logits, torch's own cross-entropy. Slow, and shared with no peer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .examples import Row, sequences
from .gradients import Sink
from .models import HEAD
from .workload import BLOCKS, Workload


def first_step(work: Workload, folder: Path, rows: list[Row], sink: Sink) -> float:
    """The loss of one step; its gradients, before any clipping, go into ``sink``."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(work.threads)
    model = _model(work, folder)
    leaves = {n: t.requires_grad_() for n, t in load_file(folder / "start.safetensors").items()}
    if work.method == "full":
        leaves = {":".join(n.rsplit(".", 1)): p.requires_grad_() for n, p in model.named_parameters()}
    on = [True]
    _lora(work, model, leaves, on)
    total = {"dpo": _pairs, "classify": _labels}.get(work.kind, _tokens)(work, model, leaves, rows, _off(on))
    for name, leaf in leaves.items():
        sink.add(name, leaf.grad)
    return total


def _model(work: Workload, folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if work.family == "bert" else AutoModelForCausalLM
    model = kind.from_pretrained(folder / "model", dtype=torch.float32).eval().requires_grad_(False)
    if work.precision == "nf4":
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # whose codes define the format

        for layer in range(work.layers):
            for path in work.linears.values():
                weight = model.get_submodule(f"{BLOCKS[work.family]}.{layer}.{path}").weight
                weight.copy_(dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)))
    return model


def _lora(work: Workload, model: Any, leaves: dict[str, Any], on: list[bool]) -> None:
    from torch.nn.functional import linear

    scale = work.alpha / work.rank
    for path in {n.partition(":")[0] for n in leaves if n.endswith(":lora_A")}:
        a, b = leaves[f"{path}:lora_A"], leaves[f"{path}:lora_B"]
        model.get_submodule(path).register_forward_hook(lambda _, x, y, a=a, b=b: y + scale * linear(linear(x[0], a), b) if on[0] else y)


def _off(on: list[bool]) -> Callable[[], Any]:
    @contextmanager
    def without() -> Iterator[None]:
        import torch

        on[0] = False
        with torch.no_grad():
            yield
        on[0] = True

    return without


def _logits(work: Workload, model: Any, leaves: dict[str, Any], ids: Any) -> Any:
    """(T, V). A prefix enters as keys and values that are already there."""
    if work.method != "prefix":
        return model(input_ids=ids[None], use_cache=False).logits[0]
    from transformers import DynamicCache

    heads = work.kv_heads or work.heads
    k_and_v = leaves["prefix:table"].view(work.length, work.layers, 2, heads, work.head_width).permute(1, 2, 3, 0, 4)  # (L, 2, heads, P, width)
    cache = DynamicCache()
    for layer, (k, v) in enumerate(k_and_v):
        cache.update(k[None], v[None], layer)
    return model(input_ids=ids[None], past_key_values=cache, use_cache=True).logits[0]


def _nll(work: Workload, model: Any, leaves: dict[str, Any], ids: list[int], answer: int) -> Any:
    """Minus the sum of log-probabilities of an answer."""
    import torch
    from torch.nn.functional import cross_entropy

    t = torch.tensor(ids)
    first = max(1, answer)
    return cross_entropy(_logits(work, model, leaves, t)[first - 1 : -1], t[first:], reduction="sum")


def _tokens(work: Workload, model: Any, leaves: dict[str, Any], rows: list[Row], off: Any) -> float:
    """Mean over the labelled tokens."""
    labelled = sum(len(ids) - max(1, answer) for ids, answer in sequences(rows))
    total = 0.0
    for ids, answer in sequences(rows):
        loss = _nll(work, model, leaves, ids, answer) / labelled
        loss.backward()
        total += float(loss.detach())
    return total


def _pairs(work: Workload, model: Any, leaves: dict[str, Any], rows: list[Row], off: Any) -> float:
    """Mean over pairs of -log sigmoid(beta (log-ratio of the better - of the worse)); the reference is the model without the LoRA."""
    from torch.nn.functional import logsigmoid

    total = 0.0
    for r in rows:
        both = sequences([r])
        with off():
            before = [float(_nll(work, model, leaves, *one)) for one in both]
        better, worse = (was - _nll(work, model, leaves, *one) for one, was in zip(both, before, strict=True))
        loss = -logsigmoid(work.beta * (better - worse)) / len(rows)
        loss.backward()
        total += float(loss.detach())
    return total


def _labels(work: Workload, model: Any, leaves: dict[str, Any], rows: list[Row], off: Any) -> float:
    """Mean over rows of -log p(label); the head is a dense layer with tanh and a linear one over the first token."""
    import torch
    from torch.nn.functional import cross_entropy, linear

    dense, dense_bias, out, out_bias = (leaves[n] for n in HEAD)
    total = 0.0
    for r in rows:
        hidden = model.bert(input_ids=torch.tensor([r["ids"]])).last_hidden_state[0, 0]
        logits = linear(torch.tanh(linear(hidden, dense, dense_bias)), out, out_bias)
        loss = cross_entropy(logits[None], torch.tensor([r["label"]])) / len(rows)
        loss.backward()
        total += float(loss.detach())
    assert math.isfinite(total)
    return total
