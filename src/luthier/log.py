"""Where a run's numbers go: metrics.jsonl always, and the loggers a user asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from .core import LuthierError


class Log:
    """Appends a JSON line per event; passes numbers on to TensorBoard, W&B or trackio."""

    def __init__(self, folder: Path, to: Sequence[str] = (), *, name: str = "", config: dict[str, Any] | None = None, after: int | None = None):
        """``after``: a resumed run forgets the lines of later steps, which it is about to write again."""
        self.path = folder / "metrics.jsonl"
        if after is not None and self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line).get("step", 0) <= after]
            self.path.write_text("".join(line + "\n" for line in kept))
        self.file: TextIO = self.path.open("a", encoding="utf-8")
        self.sinks = [_SINKS[kind](folder, name, config or {}) for kind in to]

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """One line {"event", "step", ...}; numbers also go to the loggers as event/name."""
        self.file.write(json.dumps({"event": event, "step": step, **values}, ensure_ascii=False) + "\n")
        self.file.flush()
        numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        for sink in self.sinks:
            sink(step, numbers)

    def close(self) -> None:
        """Flush and close."""
        self.file.close()
        for sink in self.sinks:
            sink(-1, {})


class Nowhere(Log):
    """A log that writes nothing: of all ranks but the first."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _tensorboard(folder: Path, name: str, config: dict[str, Any]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise LuthierError("log.to: tensorboard is not installed; pip install 'luthier[loggers]'") from None
    writer = SummaryWriter(str(folder / "tensorboard"))

    def sink(step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        if step < 0:
            writer.close()

    return sink


def _tracker(module: str) -> Any:
    def make(folder: Path, name: str, config: dict[str, Any]) -> Any:
        try:
            tracker = __import__(module)
        except ImportError:
            raise LuthierError(f"log.to: {module} is not installed; pip install 'luthier[loggers]'") from None
        where = {"dir": str(folder)} if module == "wandb" else {}
        run = tracker.init(project="luthier", name=name, config=config, **where)
        return lambda step, numbers: run.finish() if step < 0 else run.log(numbers, step=step)

    return make


_SINKS = {"tensorboard": _tensorboard, "wandb": _tracker("wandb"), "trackio": _tracker("trackio")}
