"""Processes forked from this one, so that nothing is imported again: some at once, joined by gloo, or one that is killed while it works."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
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


class Program:
    """``main(arguments)`` in a process of its own; what it says goes to a file. No fresh one: what is imported, and the seed of hashes, are as here."""

    def __init__(self, main: Callable[[Sequence[str]], int], arguments: Sequence[str], said: Path):
        self.said = said
        self.process = multiprocessing.get_context("fork").Process(target=_program, args=(main, arguments, said))
        self.process.start()

    def over(self) -> bool:
        """Whether it has ended."""
        return self.process.exitcode is not None

    def send(self, what: signal.Signals) -> None:
        """A signal, if it still runs."""
        assert self.process.pid is not None
        if not self.over():
            os.kill(self.process.pid, what)

    def wait(self, seconds: float = 120.0) -> tuple[int, str]:
        """(its exit code, negative for a signal, what it said); killed and failed where it takes longer."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"it was not done after {seconds:.0f} s: {self.said.read_text()[-3000:]}")
        return self.process.exitcode, self.said.read_text()


def _program(main: Callable[[Sequence[str]], int], arguments: Sequence[str], said: Path) -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a shell starts a program
    with said.open("w", buffering=1) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        sys.stdout = sys.stderr = file
        sys.exit(main(arguments))
