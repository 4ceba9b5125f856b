"""The processes of a launch, joined: what they agree on, in one collective each, with the bytes counted and the waiting watched."""

from __future__ import annotations

import atexit
import os
import pickle
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .heartbeat import Heart, Lost
from .launched import Launched, launched

T = TypeVar("T")
GRACE = 60.0  # seconds that torch waits longer than we do, so that it is we who say which rank is missing
SPEAKING, ALONE = 0.5, 10.0  # seconds: to speak in; after which a rank has failed alone
_GROUP: list[Group] = []


def joined(device: torch.device, timeout: float) -> Group:
    """The group of this process; joins it at the first call, after which ``timeout`` (seconds) is that of the first. Raises Lost where not all come."""
    if not _GROUP:
        _GROUP.append(Group(device, timeout))
        atexit.register(_leave)
    return _GROUP[0]


def _leave() -> None:
    while _GROUP:
        _GROUP.pop().close()


def first_to_say(sentence: str) -> bool:
    """Whether this rank is the one that tells of a failure: the first to fail; before the ranks have joined, rank 0.

    The others wait: torchrun ends all once one has, and who speaks must have spoken. Who is not ended meanwhile has failed alone, and says so.
    """
    if _GROUP:
        first = _GROUP[0].heart.first_to_say(sentence)
        time.sleep(0.0 if first else SPEAKING)
        return first
    if not launched().leads:
        time.sleep(ALONE)
    return True


def _meeting_point(here: Launched, timeout: float) -> tuple[dist.Store, bool]:
    """The launch's store, and whether this rank holds it: rank 0, where torchrun does not. Raises Lost where there is none."""
    where, port, held = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = here.rank == 0 and not held
    try:
        store = dist.TCPStore(where, int(port), None, hosts, timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True)
    except (ValueError, RuntimeError) as e:
        raise Lost(
            f"rank {here.rank} of {here.size} found no meeting point at MASTER_ADDR={where}, MASTER_PORT={port} within {timeout:g} s "
            f"({str(e).splitlines()[0][:200]}); start all processes with torchrun, which sets them, or unset WORLD_SIZE"
        ) from None
    return dist.PrefixStore(f"start {here.restarts}", store), hosts  # what a store that lives on knows of processes that are gone must not be read


class Group:
    """All ranks. Each collective is called by all of them, in the same order."""

    def __init__(self, device: torch.device, timeout: float):
        here = launched()
        self.rank, self.size, self.device = here.rank, here.size, device
        self.traffic: Counter[str] = Counter()
        self.turns = 0  # how often rank 0 was waited for
        self.names: dict[str, list[str]] = {}  # by what is summed: the names that any rank has had so far, the same list on all
        wait = timedelta(seconds=timeout + GRACE)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, hosts = _meeting_point(here, timeout)
        self.heart = Heart(store, here.rank, here.size, timeout, hosts)
        self.heart.all_here()
        self.heart.start()
        if not dist.is_initialized():
            kind = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            more: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
            with self.doing("meeting the others"):
                dist.init_process_group(kind, store=dist.PrefixStore("group", store), rank=here.rank, world_size=here.size, timeout=wait, **more)

    def close(self) -> None:
        """Leave the others."""
        self.heart.stop()
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """An operation in which the others are waited for. Raises Lost, with the name of the rank that is missing, where torch says that one is gone."""
        self.heart.enter(what)
        try:
            yield
        except RuntimeError as e:
            if isinstance(e, torch.OutOfMemoryError):
                raise
            raise self.heart.lost(str(e)) from None
        finally:
            self.heart.leave()

    # --- collectives --------------------------------------------------------------------------------------------------

    def sums(self, named: Mapping[str, float], what: str) -> dict[str, float]:
        """The sum of each name that any rank has, in float64. A name that no rank has had before costs one more exchange, once."""
        known = self.names.setdefault(what, [])
        new = sorted(set(named) - set(known))
        total, there = self._told(named, known, len(new), what)
        if total[-1]:
            known += sorted({k for some in self.gather(new, what) for k in some})
            total, there = self._told(named, known, 0, what)
        found = {k: v for k, v, n in zip(known, total, there, strict=False) if n}
        return {k: found[k] for k in [*named, *(k for k in found if k not in named)]}  # in this rank's order

    def _told(self, named: Mapping[str, float], known: list[str], new: int, what: str) -> tuple[list[float], list[float]]:
        """Sums of the known names and of ``new``, and how many ranks have each."""
        own = [[named.get(k, 0.0) for k in known] + [float(new)], [float(k in named) for k in known] + [1.0]]
        total, there = self._sum(torch.tensor(own, dtype=torch.float64), what).tolist()
        return total, there

    def _sum(self, numbers: Tensor, what: str) -> Tensor:
        with self.doing(what):
            dist.all_reduce(numbers)
        self.traffic[what] += numbers.nbytes
        return numbers

    def average(self, tensors: Sequence[Tensor], what: str) -> None:
        """Each tensor becomes its mean over ranks, where it is: one all-reduce a tensor."""
        with self.doing(what):
            for t in tensors:
                dist.all_reduce(t)
                t.div_(self.size)
                self.traffic[what] += t.nbytes
            if self.device.type == "cuda":  # their norm is asked for next, so waiting for it here costs nothing, and tells what is waited for
                torch.cuda.current_stream().synchronize()

    def gather(self, own: T, what: str) -> list[T]:
        """What every rank has."""
        out: list[Any] = [None] * self.size
        with self.doing(what):
            dist.all_gather_object(out, own)
        self.traffic[what] += len(pickle.dumps(own))
        return out

    def share(self, own: T, what: str) -> T:
        """What rank 0 has."""
        box = [own]
        with self.doing(what):
            dist.broadcast_object_list(box, src=0)
        self.traffic[what] += len(pickle.dumps(own)) if self.rank == 0 else 0
        return box[0]

    def wait(self, what: str) -> None:
        """Until all are here."""
        self._sum(torch.zeros(1, dtype=torch.float64), what)

    def wait_for_first(self, what: str) -> None:
        """Until rank 0 is here, however long it works, as long as it lives. Raises Lost where it has been silent for the timeout."""
        self.turns += 1
        self.heart.wait_for(0, f"turn {self.turns}", what)
