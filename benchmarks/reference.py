"""What is right: plain PyTorch in float32, one example at a time, full logits, torch's own cross-entropy. Slow, and shared with no peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .workload import IGNORE, Workload


def first_step(work: Workload, folder: Path, rows: list[dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    """Mean loss over the labelled tokens of one step, and its gradient by "path:leaf", before any clipping."""
    import torch
    from safetensors.torch import load_file
    from torch.nn.functional import cross_entropy, linear
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(work.threads)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval().requires_grad_(False)
    leaves = {n: t.requires_grad_() for n, t in load_file(folder / "adapter.safetensors").items()}
    scale = work.alpha / work.rank
    for path in {n.partition(":")[0] for n in leaves}:
        a, b = leaves[f"{path}:lora_A"], leaves[f"{path}:lora_B"]
        model.get_submodule(path).register_forward_hook(lambda _, x, y, a=a, b=b: y + scale * linear(linear(x[0], a), b))
    labelled = sum(len(r["ids"]) - r["answer"] for r in rows)
    total = 0.0
    for r in rows:
        ids = torch.tensor(r["ids"])
        target = torch.where(torch.arange(len(ids)) >= r["answer"], ids, IGNORE)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = cross_entropy(logits[:-1], target[1:], ignore_index=IGNORE, reduction="sum") / labelled
        loss.backward()
        total += float(loss.detach())
    return total, {n: t.grad for n, t in leaves.items()}
