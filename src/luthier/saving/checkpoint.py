"""Checkpoints: everything a run needs to go on bit for bit, written whole or not at all.

checkpoints/step-N/ holds state.safetensors (masters, moments, random states, the delta's buffers, what the feed has under way) and state.json (step, feed
position, counters, the resolved run and its hash). safetensors and JSON only; no pickle.

Where the base is sharded over ranks, masters and moments are in shards/, a file a rank, written beside the training where memory allows. Any number of ranks
reads either form.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import atomic
from ..core import Feed, LuthierError
from ..devices.launched import launched
from ..modelling.shards import here, is_sharded, like
from ..optim import Optimizer
from ..policy import Policy
from . import resharding
from .adapter import read_tensors

SHARDS = "shards"
_PENDING: list[Any] = []  # the checkpoint that is being written beside the training


@dataclass
class State:
    """What is read back: tensors, those of the optimizer aside, and the JSON beside them."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    folder: Path  # where the optimizer's are

    @property
    def step(self) -> int:
        """Steps done when it was saved."""
        return int(self.facts["step"])


def save(folder: Path, step: int, policy: Policy, optimizer: Optimizer, feed: Feed, *, keep: int, facts: dict[str, Any]) -> Path:
    """Write checkpoints/step-N and delete all but the newest ``keep``. ``facts`` are the session's own, JSON only.

    With a sharded base all ranks call it, and `settle` before anything counts on what was written.
    """
    settle()
    tensors, scalars = optimizer.state_dict()
    tensors = {f"optim|{k}": v for k, v in tensors.items()}
    cut = {k: v for k, v in tensors.items() if any(map(is_sharded, tensors.values()))}
    tensors = {k: v for k, v in tensors.items() if k not in cut} | {f"random|{k}": v for k, v in random_state().items()}
    feeding = feed.state_dict()
    tensors |= {f"feed|{k}": v for k, v in feeding.items() if isinstance(v, Tensor)}
    assert policy.delta is not None
    tensors |= {f"buffer|{k}": v for k, v in policy.delta.buffers.items()}
    path = folder / "checkpoints" / f"step-{step}"
    said = {"step": step, "optim": scalars, "feed": {k: v for k, v in feeding.items() if not isinstance(v, Tensor)}, **facts}

    def fill(new: Path) -> None:
        save_file({k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}, new / "state.safetensors")
        (new / "state.json").write_text(json.dumps(said, indent=1))

    def forget() -> None:
        for old in steps(folder)[:-keep]:
            shutil.rmtree(folder / "checkpoints" / f"step-{old}")

    if cut:
        _write_sharded(path, cut, policy, fill, forget)
        return path
    with atomic.folder(path) as new:
        fill(new)
    forget()
    return path


def _write_sharded(path: Path, tensors: dict[str, Tensor], policy: Policy, fill: Callable[[Path], None], forget: Callable[[], None]) -> None:
    """The first rank makes the folder and its other files, all write their parts, and it takes its name when the last has."""
    place: Any = policy.place
    ranks_here = launched().local_size
    new = atomic.begin(path) if place.leads else atomic.temporary(path)
    if place.leads:
        (new / SHARDS).mkdir()
        fill(new)
    place.wait("the folder of a checkpoint")

    def done() -> None:
        atomic.finish(path)
        forget()

    if place.launch.mean(float(resharding.room(tensors, ranks_here))) == 1.0:
        _PENDING.append(resharding.begin(new / SHARDS, tensors, done))
        return
    resharding.write(new / SHARDS, tensors)
    if place.leads:
        done()
    place.wait("a checkpoint")


def settle() -> None:
    """Wait for a checkpoint that is being written beside the training. Raises LuthierError where it could not be."""
    while _PENDING:
        _PENDING.pop().wait()


def keep_best(folder: Path, policy: Policy, optimizer: Optimizer) -> None:
    """Write the masters as they are now into the run's best/. With a sharded base all ranks call it."""
    masters, path = optimizer.masters(), folder / "best"
    if not any(map(is_sharded, masters.values())):
        with atomic.folder(path) as new:
            save_file({k: v.to("cpu").contiguous() for k, v in masters.items()}, new / "masters.safetensors")
        return
    new = atomic.begin(path) if policy.place.leads else atomic.temporary(path)
    policy.place.wait("the folder of the best weights")
    resharding.write(new, masters)
    if policy.place.leads:
        atomic.finish(path)
    policy.place.wait("the best weights")


def take_best(folder: Path, policy: Policy, optimizer: Optimizer) -> None:
    """Put those masters back."""
    masters = optimizer.masters()
    if any(map(is_sharded, masters.values())):
        resharding.read(folder / "best", masters)  # in place
        optimizer.load_masters(masters)
        policy.rest()
    else:
        optimizer.load_masters(read_tensors(folder / "best" / "masters.safetensors"))


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
        return State(_but_the_optimizer(path / "state.safetensors"), facts, path)
    except LuthierError as e:
        raise LuthierError(f"{e}; delete {path} to go on from the checkpoint before it") from None


def _but_the_optimizer(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that every rank needs whole."""
    try:
        with safe_open(path, framework="pt") as f:
            names = [k for k in f.keys() if not k.startswith("optim|")]  # noqa: SIM118
            return {k: f.get_tensor(k) for k in names}
    except FileNotFoundError:
        raise LuthierError(f"{path}: missing") from None
    except SafetensorError as e:
        raise LuthierError(f"{path}: damaged, or not a safetensors file: {e}") from None


def restore(state: State, policy: Policy, optimizer: Optimizer, feed: Feed) -> None:
    """Put everything back as it was after that step. With a sharded base, and from one, all ranks call it."""
    part = {k: {n.split("|", 1)[1]: t for n, t in state.tensors.items() if n.startswith(k + "|")} for k in ("random", "buffer", "feed")}
    optimizer.load_state_dict(_optimizer_of(state, optimizer), state.facts["optim"])
    policy.rest()
    assert policy.delta is not None
    for name, buffer in policy.delta.buffers.items():
        buffer.copy_(part["buffer"][name])
    feed.load_state_dict(state.facts["feed"] | part["feed"])
    set_random_state(part["random"])


def _optimizer_of(state: State, optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimizer kept, from one file or from those of several ranks; as it lies over the ranks now."""
    where = state.folder / SHARDS if (state.folder / SHARDS).is_dir() else state.folder
    now, _ = optimizer.state_dict()
    if where == state.folder and not any(map(is_sharded, now.values())):
        return {k.removeprefix("optim|"): t for k, t in read_tensors(where / "state.safetensors").items() if k.startswith("optim|")}
    there = {k.removeprefix("optim|") for k in resharding.keys(where) if k.startswith("optim|")}
    if there != set(now):  # it says what is wrong
        return dict.fromkeys(there, torch.empty(0))
    out = {k: like(torch.empty_like(here(t)), t) for k, t in now.items()}
    resharding.read(where, {f"optim|{k}": t for k, t in out.items()})
    return out


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
