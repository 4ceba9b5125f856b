"""transformers' Trainer on BertForSequenceClassification with PEFT's LoRA; pooler and classifier are trained whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..examples import Row
from ..gradients import Sink
from ..meter import Meter
from ..workload import Workload
from . import watch
from .sft import AS_IT_COMES

__all__ = ["AS_IT_COMES", "candidates", "configuration", "name", "run"]
# "per_step": Trainer is told to divide a micro-batch's loss by their number. By itself it adds them up: it takes PEFT's model for one that counts its items.
_FAST: dict[str, Any] = {**AS_IT_COMES, "args": {"bf16": True}}
_STORED: dict[str, Any] = {**_FAST, "dtype": "bfloat16", "per_step": True}


def name(work: Workload) -> str:
    """The peer's."""
    return "transformers + PEFT"


def candidates(work: Workload) -> dict[str, dict[str, Any]]:
    """Settings to try, the most promising first."""
    half, quarter = max(1, work.examples // 2), max(1, work.examples // 4)
    return {
        f"bf16 weights, autocast, micro-batches of {quarter}, by length": {**_STORED, "micro": quarter, "sort": True},
        f"bf16 weights, autocast, micro-batches of {half}, by length": {**_STORED, "micro": half, "sort": True},
        "bf16 weights, autocast": _STORED,
        "fp32 weights, bf16 autocast": _FAST,
        f"bf16 weights, autocast, micro-batches of {quarter}, by length, eager attention": {**_STORED, "micro": quarter, "sort": True, "attention": "eager"},
        f"bf16 weights, autocast, micro-batches of {quarter}, by length, torch.compile": {
            **_STORED,
            "micro": quarter,
            "sort": True,
            "args": {"bf16": True, "torch_compile": True},
        },
    }


def configuration(work: Workload, settings: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of TrainingArguments, in full: all others are transformers' defaults."""
    return watch.common(work, settings)


def run(work: Workload, folder: Path, steps: list[list[Row]], settings: dict[str, Any], meter: Meter, sink: Sink | None) -> None:
    """Train."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    meter.imported()
    torch.set_num_threads(work.threads)
    load = {"dtype": torch.float32} | watch.loading(settings)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", **load)
    targets = [work.linears[t].rpartition(".")[2] for t in work.targets]
    lora = LoraConfig(r=work.rank, lora_alpha=work.alpha, target_modules=targets, modules_to_save=["pooler", "classifier"], task_type="SEQ_CLS")

    def see(inputs: dict[str, Any]) -> watch.Seen:
        return int(inputs["attention_mask"].sum()), len(inputs["labels"]), inputs["input_ids"].numel()

    ordered = [sorted(rows, key=lambda r: len(r["ids"])) if settings["sort"] else rows for rows in steps]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    seen = watch.callback(meter, sink)
    adapted = get_peft_model(model, lora)
    for p in adapted.parameters():  # modules_to_save are copied as the base is stored
        if p.requires_grad:
            p.data = p.data.float()
    trainer = watch.recorded(Trainer, see)(
        model=adapted,
        args=TrainingArguments(output_dir=str(folder / "trl"), **configuration(work, settings)),
        train_dataset=Dataset.from_list([{"input_ids": r["ids"], "labels": r["label"]} for rows in ordered for r in rows]),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[seen],
    )
    if settings.get("per_step"):
        trainer.model_accepts_loss_kwargs = False
    watch.begin(work, folder, trainer, seen)
    trainer.train()
