"""Checkpoints: everything a run needs to go on bit for bit, written whole or not at all.

checkpoints/step-N/ holds state.safetensors (masters, moments, random states, the delta's buffers, what the feed has under way) and state.json (step, feed
position, counters, the resolved run and its hash). safetensors and JSON only; no pickle.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from . import atomic
from .adapter import read_tensors
from .core import Feed, LuthierError
from .optim import Optimizer
from .policy import Policy


@dataclass
class State:
    """What is read back: tensors, and the JSON beside them."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done when it was saved."""
        return int(self.facts["step"])


def save(folder: Path, step: int, policy: Policy, optimizer: Optimizer, feed: Feed, *, keep: int, facts: dict[str, Any]) -> Path:
    """Write checkpoints/step-N and delete all but the newest ``keep``. ``facts`` are the session's own, JSON only."""
    tensors, scalars = optimizer.state_dict()
    tensors = {f"optim|{k}": v for k, v in tensors.items()} | {f"random|{k}": v for k, v in random_state().items()}
    feeding = feed.state_dict()
    tensors |= {f"feed|{k}": v for k, v in feeding.items() if isinstance(v, Tensor)}
    assert policy.delta is not None
    tensors |= {f"buffer|{k}": v for k, v in policy.delta.buffers.items()}
    path = folder / "checkpoints" / f"step-{step}"
    with atomic.folder(path) as new:
        save_file({k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}, new / "state.safetensors")
        (new / "state.json").write_text(
            json.dumps({"step": step, "optim": scalars, "feed": {k: v for k, v in feeding.items() if not isinstance(v, Tensor)}, **facts}, indent=1)
        )
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / "checkpoints" / f"step-{old}")
    return path


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint, in order."""
    names = [p.name for p in (folder / "checkpoints").glob("step-*")]
    return sorted(int(m[1]) for n in names if (m := re.fullmatch(r"step-(\d+)", n)))


def newest(folder: Path) -> State | None:
    """The last checkpoint of a run, or None. Raises LuthierError where it is damaged."""
    there = steps(folder)
    if not there:
        return None
    path = folder / "checkpoints" / f"step-{there[-1]}"
    try:
        facts = json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise LuthierError(f"{path / 'state.json'}: damaged ({e}); delete {path.name} to go on from the checkpoint before it") from None
    try:
        return State(read_tensors(path / "state.safetensors"), facts)
    except LuthierError as e:
        raise LuthierError(f"{e}; delete {path} to go on from the checkpoint before it") from None


def restore(state: State, policy: Policy, optimizer: Optimizer, feed: Feed) -> None:
    """Put everything back as it was after that step."""
    part = {k: {n.split("|", 1)[1]: t for n, t in state.tensors.items() if n.startswith(k + "|")} for k in ("optim", "random", "buffer", "feed")}
    optimizer.load_state_dict(part["optim"], state.facts["optim"])
    assert policy.delta is not None
    for name, buffer in policy.delta.buffers.items():
        buffer.copy_(part["buffer"][name])
    feed.load_state_dict(state.facts["feed"] | part["feed"])
    set_random_state(part["random"])


def size(policy: Policy, optimizer: Optimizer) -> int:
    """Bytes of one checkpoint."""
    assert policy.delta is not None
    return optimizer.state_bytes + sum(b.numel() * b.element_size() for b in policy.delta.buffers.values()) + 64 * 1024


def random_state() -> dict[str, Tensor]:
    """All generators' states as tensors."""
    version, words, gauss = random.getstate()
    _, keys, position, has, value = np.random.get_state()  # type: ignore[misc]
    out = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([position, has, value], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put `random_state` back."""
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has, value = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(has), value))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
