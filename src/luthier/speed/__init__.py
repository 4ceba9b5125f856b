"""Faster equal forms of what `build.assemble` put together: each piece recognises what it knows, is tried against the plain form, and is left out where it
differs. Nothing here changes a result by more than the order of rounding; each piece has a switch in the section ``speed`` of a run.

They serve forwards that are learned from. Without gradients (evaluation, references, answers) everything is computed plainly: what a run measures is, bit for
bit, what its adapter gives when it is opened again, and a delta that is switched off is the base.
"""

from __future__ import annotations

import logging
from typing import Any

from . import attending, byhand, compiled, feedforward, form, jitted, lora, norms, varlen
from .compiled import RowKernels
from .rows import Miss

log = logging.getLogger("luthier.speed")


def kernels(device: str) -> RowKernels | None:
    """The row kernels for a kind of device, where this machine has them."""
    return compiled.kernels() if device == "cpu" else jitted.kernels() if device == "cuda" else None


def install(policy: Any, settings: Any, device: str | None = None) -> list[str]:
    """Put the faster forms that ``settings`` (run.Speed) allow into a policy whose deltas are attached, before it is moved to its place.

    ``device``: the kind of device it will run on; default: where it is. Returns what was put, for a log. Calling it again with other settings replaces what was
    put before.
    """
    remove(policy)
    device = device or policy.device.type
    rows = kernels(device) if settings.kernels == "auto" else None
    put = {
        "LoRA of linears": lora.install(policy) if settings.lora == "auto" else 0,
        "feed-forwards": feedforward.install(policy, rows) if settings.mlp == "auto" else 0,
        "norms": norms.install(policy, rows) if rows is not None else 0,
        "attentions": attending.install(policy, rows) if rows is not None else 0,
    }
    if settings.kernels == "auto":
        policy.by_hand = byhand.install(policy, rows) if isinstance(rows, compiled.Kernels) else varlen.install(policy, device)
    policy.kernel = Miss(rows) if rows is not None else None
    notes = [f"{n} {what}" for what, n in put.items() if n] + (["attention over packed examples"] if policy.by_hand is not None else [])
    if notes:
        log.info("faster forms: %s", ", ".join(notes))
    return notes


def remove(policy: Any) -> None:
    """Back to the plain forms."""
    policy.kernel = policy.by_hand = None
    lora.remove(policy)
    form.remove(policy.lm)
