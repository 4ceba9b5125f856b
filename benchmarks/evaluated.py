"""Is a step after an evaluation the step it would have been without one? Asked of a base in 4 bits, whose modules may change when they are evaluated.

The gradients of step 1 twice, on the same weights and rows: first as they are, then after a forward in evaluation mode without gradients.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import ours
from .examples import Row
from .gradients import Different, Sink, cosines
from .meter import Meter
from .peers import sft
from .workload import IGNORE, Workload


def check(work: Workload, folder: Path, steps: list[list[Row]], settings: dict[str, Any], of: str) -> dict[str, Any]:
    """{"cosine" of the two, "worst" tensor's, "silent": tensors without gradient after the evaluation, "of": all, "error"}."""
    before, after = folder / f"before-{of}.bin", folder / f"after-{of}.bin"
    step = (_ours if of == "ours" else _peer)(work, folder, steps, settings)
    with Sink(before) as sink:
        for name, grad in step(False).items():
            sink.add(name, grad)
    try:
        found = step(True)
    except Exception as e:
        return {"error": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"}
    with Sink(after) as sink:
        for name, grad in found.items():
            sink.add(name, grad)
    everything = len(json.loads(before.with_suffix(".json").read_text())) - 1
    try:
        cosine, worst = cosines(after, before)
    except Different:
        cosine, worst = 0.0, 0.0
    return {"cosine": cosine, "worst": worst, "silent": everything - len(found), "of": everything}


def _ours(work: Workload, folder: Path, steps: list[list[Row]], settings: dict[str, Any]) -> Any:
    import torch

    asked, policy, objective = ours.assembled(work, folder, settings)
    batch = next(ours.fed(work, folder, asked, policy, objective, steps, Meter(0.0)))[0]

    def step(evaluate: bool) -> dict[str, Any]:
        if evaluate:
            policy.eval()
            with torch.no_grad():
                objective.loss(policy, batch)
        policy.train()
        for p in policy.trained().values():
            p.grad = None
        next(iter(objective.loss(policy, batch).sums.values())).backward()
        return {n: p.grad for n, p in ours.named(policy).items() if p.grad is not None}

    return step


def _peer(work: Workload, folder: Path, steps: list[list[Row]], settings: dict[str, Any]) -> Any:
    """PEFT on transformers' own loading of bitsandbytes' NF4, without a trainer, so that nothing but the modules is asked."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16, **sft.quantised(work))
    model = get_peft_model(base, sft.adaptation(work))
    torch.manual_seed(work.seed)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.02)
    ids = torch.tensor([steps[0][0]["ids"]])
    labels = ids.clone()
    labels[:, : steps[0][0]["answer"]] = IGNORE

    def step(evaluate: bool) -> dict[str, Any]:
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(input_ids=ids, labels=labels)
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    return step
