"""TRL's SFTTrainer: on instructions and on raw text; with PEFT's LoRA, PEFT's prefix tuning, LoRA on bitsandbytes' NF4, or with all weights trained.

Entropy and token accuracy, which TRL computes at every position, cannot be switched off by any setting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..examples import Row, into_bins
from ..gradients import Sink
from ..meter import Meter
from ..workload import IGNORE, Workload
from . import watch

# "dtype" None: not given, and TRL loads a model that is given by name in float32. "micro": rows of a micro-batch; "sort": a step's rows by length, so that
# micro-batches hold little padding; "bins": so many packed rows a step. "args": SFTConfig's own.
AS_IT_COMES: dict[str, Any] = {"dtype": None, "attention": None, "micro": None, "sort": False, "bins": 0, "fp32_adapters": False, "args": {}}
_OFF = {"gradient_checkpointing": False}
_TUNED: dict[str, Any] = {**AS_IT_COMES, "dtype": "bfloat16", "args": _OFF}
_FREE = {**_OFF, "padding_free": True, "max_length": None}


def name(work: Workload) -> str:
    """The peer's."""
    return {"full": "TRL", "prefix": "TRL + PEFT", "lora": "TRL + PEFT"}[work.method] + (" + bitsandbytes" if work.precision == "nf4" else "")


def candidates(work: Workload) -> dict[str, dict[str, Any]]:
    """Settings to try for the tuned column, the most promising first."""
    quarter, eighth = max(1, work.examples // 4), max(1, work.examples // 8)
    if work.method == "full":
        base, stored = {**_TUNED, "dtype": None}, "fp32 weights, bf16 autocast, no checkpointing"
    elif work.precision == "nf4":
        base, stored = {**_TUNED, "fp32_adapters": True}, "bf16, no checkpointing, adapters back in fp32"
    else:
        base, stored = _TUNED, "bf16 weights, no checkpointing"
    by_length = {**base, "sort": True}
    out = {f"{stored}, micro-batches of {eighth}, by length": {**by_length, "micro": eighth}}
    packed = {f"{stored}, packed into 4 rows": {**base, "bins": 4, "args": _FREE}}
    if work.method != "prefix":
        out |= packed
    out |= {
        f"{stored}, micro-batches of {quarter}, by length": {**by_length, "micro": quarter},
        f"{stored}, micro-batches of {quarter}, by length, eager attention": {**by_length, "micro": quarter, "attention": "eager"},
        stored: base,
        f"{stored}, micro-batches of {quarter}, by length, no autocast": {**by_length, "micro": quarter, "args": {**_OFF, "bf16": False}},
        f"{stored}, micro-batches of {quarter}, by length, torch.compile": {**by_length, "micro": quarter, "args": {**_OFF, "torch_compile": True}},
    }
    if work.method == "prefix":  # tried, to show what comes of it: with a cache, transformers sees no borders between packed rows
        return dict(list(out.items())[:2]) | packed | dict(list(out.items())[2:])
    out[f"{stored}, padding-free"] = {**base, "args": _FREE}
    if work.method == "full":
        rounds = {**_TUNED, "sort": True, "micro": quarter, "equal": False, "why": "AdamW rounds its updates into bf16 weights"}
        out[f"bf16 weights, no checkpointing, micro-batches of {quarter}, by length"] = rounds
    return out


def configuration(work: Workload, settings: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of SFTConfig, in full: all others are TRL's defaults."""
    load = watch.loading(settings)
    return {**({"model_init_kwargs": load} if load else {}), **watch.common(work, settings)}


def dataset(steps: list[list[Row]], settings: dict[str, Any]) -> Any:
    """Tokenised, with labels, in the workload's order."""
    from datasets import Dataset

    def joined(rows: list[Row]) -> dict[str, Any]:
        ids = [i for r in rows for i in r["ids"]]
        labels = [i for r in rows for i in [IGNORE] * r["answer"] + r["ids"][r["answer"] :]]
        return {"input_ids": ids, "labels": labels} | ({"seq_lengths": [len(r["ids"]) for r in rows]} if settings["bins"] else {})

    if settings["bins"]:
        return Dataset.from_list([joined(b) for rows in steps for b in into_bins(rows, settings["bins"])])
    ordered = [sorted(rows, key=lambda r: len(r["ids"])) if settings["sort"] else rows for rows in steps]
    return Dataset.from_list([joined([r]) for rows in ordered for r in rows])


def adaptation(work: Workload) -> Any:
    """PEFT's configuration; None where all weights are trained."""
    from peft import LoraConfig, PrefixTuningConfig

    if work.method == "lora":
        return LoraConfig(r=work.rank, lora_alpha=work.alpha, target_modules=[work.linears[t].rpartition(".")[2] for t in work.targets], task_type="CAUSAL_LM")
    return PrefixTuningConfig(num_virtual_tokens=work.length, task_type="CAUSAL_LM") if work.method == "prefix" else None


def quantised(work: Workload) -> dict[str, Any]:
    """What makes the trainer load in 4 bits, as the paper has it: NF4, double quantisation, computed in bfloat16."""
    if work.precision != "nf4":
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4)}


def run(work: Workload, folder: Path, steps: list[list[Row]], settings: dict[str, Any], meter: Meter, sink: Sink | None) -> None:
    """Train."""
    import peft  # noqa: F401
    import torch
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    meter.imported()
    torch.set_num_threads(work.threads)

    def see(inputs: dict[str, Any]) -> watch.Seen:
        real = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        return int(real), int((inputs["labels"][:, 1:] != IGNORE).sum()), inputs["input_ids"].numel()

    seen = watch.callback(meter, sink)
    trainer = watch.recorded(SFTTrainer, see)(
        model=str(folder / "model"),
        args=SFTConfig(output_dir=str(folder / "trl"), **configuration(work, settings)),
        train_dataset=dataset(steps, settings),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=adaptation(work),
        callbacks=[seen],
        **quantised(work),
    )
    if settings["fp32_adapters"]:  # TRL has just rounded them to bfloat16
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.data = p.data.float()
    watch.begin(work, folder, trainer, seen)
    trainer.train()
