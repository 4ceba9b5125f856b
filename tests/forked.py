"""Some processes at once, forked from this one so that nothing is imported again, joined by gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 90.0  # seconds


def ranks(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``work(rank, size, *args)`` returns on every rank, which must pickle; raises where one of them did."""
    how = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [how.Pipe(duplex=False) for _ in range(size)]
        started = [how.Process(target=_rank, args=(r, size, Path(folder) / "store", pipes[r][1], work, args), daemon=True) for r in range(size)]
        for p in started:
            p.start()
        try:
            found = []
            for rank, (reading, writing) in enumerate(pipes):
                writing.close()
                assert reading.poll(LIMIT), f"rank {rank} said nothing for {LIMIT:.0f} s"
                found.append(reading.recv())
        finally:
            for p in started:
                p.kill()
                p.join()
    wrong = [f"rank {rank}:\n{said}" for rank, (fine, said) in enumerate(found) if not fine]
    assert not wrong, "\n".join(wrong)
    return [said for _, said in found]


def _rank(rank: int, size: int, store: Path, told: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        told.send((True, work(rank, size, *args)))
    except BaseException:
        told.send((False, traceback.format_exc()))
    told.close()
