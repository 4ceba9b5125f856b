"""What is done to every trainer of a peer: it starts from the workload's tensors, and its steps are seen. Losses are taken from `training_step`, so that no
logging is needed to see them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..gradients import Sink
from ..meter import Meter
from ..workload import Workload

Seen = tuple[int, int, int]  # tokens, labelled tokens, positions with padding


def common(work: Workload, settings: dict[str, Any]) -> dict[str, Any]:
    """Of any trainer's arguments; all that is not here and not in the settings is the trainer's default."""
    micro = 1 if settings["bins"] else settings["micro"] or work.examples
    return {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings["bins"] or work.examples // micro,
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


def loading(settings: dict[str, Any]) -> dict[str, Any]:
    """What is said to `from_pretrained`."""
    return {key: value for key, value in (("dtype", settings["dtype"]), ("attn_implementation", settings["attention"])) if value}


def recorded(kind: Any, see: Callable[[dict[str, Any]], Seen]) -> Any:
    """The trainer's class, adding up what a step saw in ``seen``: its loss, and the counts of ``see``."""

    class Recorded(kind):
        seen: Any = None

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            counts = see(inputs)
            loss = super().training_step(model, inputs, *args, **kwargs).detach()
            before = self.seen or (0.0, 0, 0, 0)
            self.seen = (before[0] + loss, *(a + b for a, b in zip(before[1:], counts, strict=True)))
            return loss

    return Recorded


def callback(meter: Meter, sink: Sink | None) -> Any:
    """Marks the ends of steps, and writes down the gradients of the first (clipped, which turns no angle). Its ``trainer`` and ``trained`` come later."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        trainer: Any = None
        trained: dict[str, Any] = {}  # noqa: RUF012
        left = [sink]  # noqa: RUF012

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.ready()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            if (keep := self.left.pop() if self.left else None) is not None:
                with meter.aside():
                    for name, p in self.trained.items():
                        if p.grad is not None:
                            keep.add(name, p.grad)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step(*self.trainer.seen)
            self.trainer.seen = None

    return Watch()


def begin(work: Workload, folder: Path, trainer: Any, watch: Any) -> None:
    """Give the trainer's tensors the workload's start."""
    import torch
    from safetensors.torch import load_file

    trained = {name(n): p for n, p in trainer.model.named_parameters() if p.requires_grad}
    watch.trainer, watch.trained = trainer, trained
    if work.method == "full":
        return
    start = load_file(folder / "start.safetensors")
    if set(start) != set(trained):
        raise ValueError(f"the trained tensors are not those of the workload: {sorted(set(start) ^ set(trained))[:3]}")
    with torch.no_grad():
        for n, p in trained.items():
            p.copy_(start[n])


_OTHER = {
    "prompt_encoder.default.embedding.weight": "prefix:table",
    "base_model.model.bert.pooler.modules_to_save.default.dense.weight": "head:dense.weight",
    "base_model.model.bert.pooler.modules_to_save.default.dense.bias": "head:dense.bias",
    "base_model.model.classifier.modules_to_save.default.weight": "head:out.weight",
    "base_model.model.classifier.modules_to_save.default.bias": "head:out.bias",
}


def name(of: str) -> str:
    """A parameter's name under PEFT, or of a plain model, as the workload's."""
    if of in _OTHER:
        return _OTHER[of]
    path, lora, leaf = of.removeprefix("base_model.model.").partition(".lora_")
    return f"{path}:lora_{leaf[0]}" if lora else ":".join(path.rsplit(".", 1))
