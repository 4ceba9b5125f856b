"""Tensors that lie over ranks on disk: written by the ranks that hold them, read by any other number of them.

PyTorch's distributed checkpoints, in its safetensors format: every rank writes a file with its parts, and the header of each says where in the whole a part
belongs. There is no pickle, and a file of whole tensors is read the same way, so what one process wrote without sharding is read here too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import LuthierError
from ..modelling import shards

logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
_BESIDE: list[Any] = []  # the process group of what is written beside the training


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every rank's parts into a folder that is there. Called by all ranks; when it returns all have written."""
    import torch.distributed.checkpoint as dcp

    alone = not torch.distributed.is_initialized()
    dcp.save(dict(tensors), storage_writer=_writer(folder), no_dist=alone)


def begin(folder: Path, tensors: Mapping[str, Tensor], done: Callable[[], None]) -> Any:
    """The same beside the training: returns once all tensors were copied to the CPU's memory. On every rank a future that `end` waits for.

    ``done``: called on the first rank, in another thread, when all ranks have written.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    if not _BESIDE:
        _BESIDE.append(dist.new_group(backend="gloo"))  # training goes on with its own meanwhile
    pending: Any = dcp.async_save(dict(tensors), storage_writer=_writer(folder), async_stager=_stager(), process_group=_BESIDE[0])
    out = _Pending(pending)
    if dist.get_rank() == 0:
        pending.add_done_callback(lambda future: out.then(done) if future.exception() is None else None)
    else:
        out.finished = True
    return out


def _stager() -> Any:
    """Copies in the CPU's memory; torch's own (2.13) copies a whole storage, which a part that is a view of one does not have."""
    from torch.distributed.checkpoint.staging import AsyncStager

    class Copies(AsyncStager):
        _synchronize_after_execute = False

        def stage(self, state_dict: Any) -> Any:
            return {k: shards.like(shards.here(t).to("cpu", copy=True), t) for k, t in state_dict.items()}

        def synchronize_staging(self) -> None:
            return None

        def close(self) -> None:
            return None

    return Copies()


class _Pending:
    """What is being written."""

    def __init__(self, future: Any):
        self.future, self.finished = future, False
        self.trouble: BaseException | None = None

    def then(self, done: Callable[[], None]) -> None:
        """Keep what goes wrong for whoever waits."""
        try:
            done()
        except BaseException as e:
            self.trouble = e
        self.finished = True

    def wait(self) -> None:
        """Until everything is on disk. Raises LuthierError where it could not be written."""
        import time

        try:
            self.future.result()
        except BaseException as e:
            raise LuthierError(f"the checkpoint of step could not be written: {_said(e)}; free space or choose another folder (out=FOLDER)") from e
        while not self.finished:  # the callback runs after the result is there
            time.sleep(0.01)
        if self.trouble is not None:
            raise self.trouble


def keys(folder: Path) -> dict[str, torch.Size]:
    """Names and whole shapes of what lies in a folder. Raises LuthierError where a file is damaged."""
    return {k: m.size for k, m in _metadata(folder).state_dict_metadata.items()}


def read(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors, whole or sharded, from files of any number of ranks. Called by all ranks. Raises LuthierError for missing names and other shapes."""
    import torch.distributed.checkpoint as dcp

    there = keys(folder)
    for name, t in into.items():
        if name not in there:
            raise LuthierError(f"{folder}: {name!r} is missing; the files of some ranks may not have been copied")
        if tuple(there[name]) != tuple(t.shape):
            raise LuthierError(f"{folder}: {name!r} is {tuple(there[name])} in the files and {tuple(t.shape)} here")
    dcp.load(dict(into), storage_reader=_reader(folder), no_dist=not torch.distributed.is_initialized())


def room(tensors: Mapping[str, Tensor], ranks_here: int) -> bool:
    """Whether this machine's memory takes a second copy of what its ranks hold of these, with as much left."""
    import psutil

    return 2 * ranks_here * shards.nbytes(tensors.values()) <= int(psutil.virtual_memory().available)


def _writer(folder: Path) -> Any:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    return HuggingFaceStorageWriter(str(folder), save_distributed=True)


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder))


def _metadata(folder: Path) -> Any:
    try:
        return _reader(folder).read_metadata()
    except Exception as e:
        raise LuthierError(f"{folder}: damaged, or not a safetensors file: {_said(e)}") from None


def _said(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
