"""What a run came to, the counters it carries on, and a step as a line of numbers."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..forgetting.alarms import Alarm
from ..measuring.measure import Measures
from ..train import Step


@dataclass
class Result:
    """What a run came to."""

    folder: Path
    artefact: Path  # the adapter, or the model where all weights were trained
    before: Measures
    after: Measures
    trained: int
    total: int
    steps: int
    seconds: float  # in training steps
    tokens: int
    peak_bytes: int
    best_step: int
    stopped: str = ""  # why it ended before its last step
    replayed: dict[str, float] = field(default_factory=dict)  # tokens of what is replayed, their share, passes over it; empty: nothing is
    alarms: list[Alarm] = field(default_factory=list)  # that it forgot, that it overfitted


@dataclass
class Progress:
    """Counters that a checkpoint carries on."""

    step: int = 0
    best_loss: float = float("inf")  # the lowest held-out loss, or minus the highest held-out reward
    best_step: int = 0
    stale: int = 0  # evaluations since the best
    skipped: int = 0  # steps with a non-finite loss
    seconds: float = 0.0
    tokens: int = 0
    before: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # one per evaluation
    alarms: dict[str, Any] = field(default_factory=dict)  # what they have seen so far


def line(step: Step, took: float) -> dict[str, Any]:
    out: dict[str, Any] = {
        "loss": step.loss,
        "lr": step.lr,
        "grad_norm": step.grad_norm,
        "tokens": step.tokens,
        **{f"units_{k}": n for k, n in step.units.items()},
    }
    if len(step.terms) > 1:
        out |= {f"loss_{k}": v for k, v in step.terms.items()}
    out |= {"traffic_bytes": step.traffic} if step.traffic else {}
    out |= step.metrics | {"seconds": round(took, 4), "tokens_per_second": round(step.tokens / took, 1), "memory_bytes": peak_bytes(torch.device("cpu"))}
    return out if step.finite else out | {"skipped": True, "where": list(step.where)}


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of the GPU where there is one, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
