"""TRL's DPOTrainer with PEFT's LoRA. Its reference is the base with the adapter switched off: at every step, or once before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..examples import Row
from ..gradients import Sink
from ..meter import Meter
from ..workload import Workload
from . import watch
from .sft import AS_IT_COMES, adaptation

__all__ = ["AS_IT_COMES", "candidates", "configuration", "name", "run"]
_OFF = {"gradient_checkpointing": False}
_TUNED: dict[str, Any] = {**AS_IT_COMES, "dtype": "bfloat16"}


def name(work: Workload) -> str:
    """The peer's."""
    return "TRL DPO + PEFT"


def candidates(work: Workload) -> dict[str, dict[str, Any]]:
    """Settings to try, the most promising first. padding_free is not among them: TRL 1.16 takes it, warns, and pads."""
    half, before = max(1, work.examples // 2), {**_OFF, "precompute_ref_log_probs": True}
    stored = "bf16 weights, no checkpointing"
    return {
        f"{stored}, reference before training, one pair at a time": {**_TUNED, "micro": 1, "args": before},
        f"{stored}, reference before training, {half} pairs at a time, by length": {**_TUNED, "micro": half, "sort": True, "args": before},
        f"{stored}, reference before training": {**_TUNED, "args": before},
        f"{stored}, reference at every step, one pair at a time": {**_TUNED, "micro": 1, "args": _OFF},
        f"{stored}, reference before training, one pair at a time, eager attention": {**_TUNED, "micro": 1, "attention": "eager", "args": before},
        f"{stored}, reference before training, one pair at a time, no autocast": {**_TUNED, "micro": 1, "args": {**before, "bf16": False}},
    }


def configuration(work: Workload, settings: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of DPOConfig, in full: all others are TRL's defaults."""
    load = watch.loading(settings)
    return {**({"model_init_kwargs": load} if load else {}), "beta": work.beta, "max_length": None, **watch.common(work, settings)}


def run(work: Workload, folder: Path, steps: list[list[Row]], settings: dict[str, Any], meter: Meter, sink: Sink | None) -> None:
    """Train."""
    import peft  # noqa: F401
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    meter.imported()
    torch.set_num_threads(work.threads)

    class Tokenised(DPOTrainer):
        """Takes the workload's ids as they are."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            with meter.reference():
                return super()._precompute_ref_logps(*args, **kwargs)

    def see(inputs: dict[str, Any]) -> watch.Seen:
        return int(inputs["attention_mask"].sum()), int(inputs["completion_mask"][:, 1:].sum()), inputs["input_ids"].numel()

    ordered = [sorted(rows, key=lambda r: len(r["prompt"])) if settings["sort"] else rows for rows in steps]
    seen = watch.callback(meter, sink)
    trainer = watch.recorded(Tokenised, see)(
        model=str(folder / "model"),
        args=DPOConfig(output_dir=str(folder / "trl"), **configuration(work, settings)),
        train_dataset=Dataset.from_list([{f"{k}_ids": r[k] for k in ("prompt", "chosen", "rejected")} for rows in ordered for r in rows]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=adaptation(work),
        callbacks=[seen],
    )
    watch.begin(work, folder, trainer, seen)
    trainer.train()
