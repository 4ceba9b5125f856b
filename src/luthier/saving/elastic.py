"""A launch that torchrun starts again finds the run it was in and goes on; and what several processes do one after the other.

torchrun starts all processes anew where one has died (--max-restarts), with the same command. Which run they were in is kept in the folder of the runs, in
.launches/, under the name of the launch (--rdzv-id; where it has none, under torchrun's own process) and of the settings.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil

from .. import atomic
from ..core import LuthierError, Place
from ..devices.launched import launched
from ..settings import config
from ..settings.run import Run
from . import checkpoint

T = TypeVar("T")
FOLDER = ".launches"


def remember(run: Run, folder: Path) -> None:
    """Note that this launch is in the run of ``folder``; notes of runs that are gone or have finished are removed."""
    if (file := _file(run)) is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        for note in file.parent.iterdir():
            before = Path(run.out) / note.read_text(encoding="utf-8").strip()
            if not before.is_dir() or (before / "result.json").is_file():
                note.unlink(missing_ok=True)
        atomic.text(file, folder.name + "\n")


def begun(run: Run) -> Path | None:
    """The folder of the run that this launch was in before it was started again; None where there is none.

    It has a checkpoint to go on from, or is removed: the run begins again in its place. One that has finished is left alone, unless torchrun started this
    process anew.
    """
    file = _file(run)
    if file is None or not file.is_file():
        return None
    folder = Path(run.out) / file.read_text(encoding="utf-8").strip()
    if not folder.is_dir() or ((folder / "result.json").is_file() and not launched().restarts):
        return None
    if not checkpoint.steps(folder):
        shutil.rmtree(folder, ignore_errors=True)
    return folder


def _file(run: Run) -> Path | None:
    """Where this launch notes its run; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    name = launched().id
    if not name:
        with suppress(psutil.Error):
            parent = psutil.Process(os.getppid())
            name = f"{platform.node()} {parent.pid} {parent.create_time():.2f}"
    digest = hashlib.blake2b(f"{name}\n{config.digest(run)}".encode(), digest_size=8).hexdigest()
    return Path(run.out) / FOLDER / digest


def in_turn(place: Place, work: Callable[[], T], what: str) -> T:
    """``work`` on the first rank, then on the others, which find on disk what it left there."""
    if place.size == 1:
        return work()
    out = [work()] if place.leads else []
    place.wait_for_first(what)
    return out[0] if out else work()


def all_see(place: Place, folder: Path) -> None:
    """Raise LuthierError where a rank does not see the folder of the run, from which all of them go on."""
    blind = [str(r) for r, sees in enumerate(place.gather(folder.is_dir(), "who sees the folder")) if not sees]
    if blind:
        raise LuthierError(
            f"{folder}: is not seen by rank {', '.join(blind[:8])}; a run of several machines needs a folder that all of them share (out=FOLDER)"
        )
