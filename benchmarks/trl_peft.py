"""The peer's column: TRL's SFTTrainer with PEFT's LoRA, as it comes and tuned.

What the two share, because the workload says so: batch of a step, number of steps, learning rate (constant), AdamW, order of the examples. Nothing
is logged, saved or drawn meanwhile. Losses are taken from `training_step`, so that no logging is needed to see them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .meter import Meter
from .workload import IGNORE, Workload

# "dtype" None: not given, and TRL loads a model that is given by name in float32. Keys of "args" are SFTConfig's own.
AS_IT_COMES: dict[str, Any] = {"dtype": None, "attention": None, "micro": None, "sort": False, "bf16_adapters": False, "args": {}}
_TUNED: dict[str, Any] = {**AS_IT_COMES, "dtype": "bfloat16", "args": {"gradient_checkpointing": False}}


def candidates(examples: int) -> dict[str, dict[str, Any]]:
    """Settings to try for the tuned column. "sort": each step's examples by length, so that micro-batches hold little padding.

    Entropy and token accuracy, which TRL computes at every position, cannot be switched off by any setting. "equal" False: shown, never chosen, because the
    work is not the same (AdamW rounds its updates to adapters stored in bfloat16).
    """
    quarter, eighth = max(1, examples // 4), max(1, examples // 8)
    off = {"gradient_checkpointing": False}
    return {
        "bf16 weights, no checkpointing": _TUNED,
        f"+ micro-batches of {quarter}, by length": {**_TUNED, "micro": quarter, "sort": True},
        f"+ micro-batches of {eighth}, by length": {**_TUNED, "micro": eighth, "sort": True},
        f"+ micro-batches of {quarter}, by length, eager attention": {**_TUNED, "micro": quarter, "sort": True, "attention": "eager"},
        "+ padding-free": {**_TUNED, "args": {**off, "padding_free": True, "max_length": None}},
        f"+ micro-batches of {quarter}, by length, no autocast": {**_TUNED, "micro": quarter, "sort": True, "args": {**off, "bf16": False}},
        f"+ micro-batches of {quarter}, by length, bf16 adapters, no autocast": {
            **_TUNED,
            "micro": quarter,
            "sort": True,
            "bf16_adapters": True,
            "args": {**off, "bf16": False},
            "equal": False,
        },
    }


def configuration(work: Workload, settings: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of SFTConfig, in full: all others are TRL's defaults."""
    micro = settings["micro"] or work.examples
    load = {key: value for key, value in (("dtype", settings["dtype"]), ("attn_implementation", settings["attention"])) if value}
    return {
        **({"model_init_kwargs": load} if load else {}),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": work.examples // micro,
        "max_steps": work.steps,
        "learning_rate": work.lr,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": work.seed,
        **settings["args"],
    }


def dataset(steps: list[list[dict[str, Any]]], sort: bool) -> Any:
    """Tokenised, with labels, in the workload's order."""
    from datasets import Dataset

    ordered = [sorted(rows, key=lambda r: len(r["ids"])) if sort else rows for rows in steps]
    return Dataset.from_list([{"input_ids": r["ids"], "labels": [IGNORE] * r["answer"] + r["ids"][r["answer"] :]} for rows in ordered for r in rows])


def run(work: Workload, folder: Path, steps: list[list[dict[str, Any]]], settings: dict[str, Any], meter: Meter, keep_grads: bool) -> dict[str, Any]:
    """Train; returns the adapter gradients of step 1 (clipped, which turns no angle) by "path:leaf" where asked for."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    meter.imported()
    torch.set_num_threads(work.threads)
    taken: dict[str, Any] = {}
    lora = LoraConfig(r=work.rank, lora_alpha=work.alpha, target_modules=list(work.targets), task_type="CAUSAL_LM")
    model: Any = str(folder / "model")
    if settings["bf16_adapters"]:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), lora, autocast_adapter_dtype=False)
    config = configuration(work, settings)
    if settings["bf16_adapters"]:
        config.pop("model_init_kwargs")

    class Recorded(SFTTrainer):
        """Adds up what a step saw."""

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.seen = getattr(self, "seen", None) or [0.0, 0, 0, 0]
            real = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            seen = (int(real), int((inputs["labels"][:, 1:] != IGNORE).sum()), inputs["input_ids"].numel())
            loss = super().training_step(model, inputs, *args, **kwargs).detach()
            self.seen = [self.seen[0] + loss, *(a + b for a, b in zip(self.seen[1:], seen, strict=True))]
            return loss

    class Watch(TrainerCallback):
        """Marks the ends of steps."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.ready()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            if keep_grads and not taken:
                taken.update({n: p.grad.float().clone() for n, p in trained.items()})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step(*trainer.seen)
            trainer.seen = None

    trainer = Recorded(
        model=model,
        args=SFTConfig(output_dir=str(folder / "trl"), **config),
        train_dataset=dataset(steps, settings["sort"]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=None if settings["bf16_adapters"] else lora,
        callbacks=[Watch()],
    )
    trained = {_path(n): p for n, p in trainer.model.named_parameters() if p.requires_grad}
    start = load_file(folder / "adapter.safetensors")
    if set(start) != set(trained):
        raise ValueError(f"the adapter's tensors are not those of the workload: {sorted(set(start) ^ set(trained))[:3]}")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(start[name])
    trainer.train()
    return taken


def _path(name: str) -> str:
    """PEFT's parameter name as "path:leaf"."""
    path, _, leaf = name.removeprefix("base_model.model.").partition(".lora_")
    return f"{path}:lora_{leaf[0]}"
