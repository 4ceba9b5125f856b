"""A task in a process of its own, so that its peak memory is its own: ``python -m MODULE --one JSON`` prints its numbers as JSON in its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import Interrupted, LuthierError

USER = 2  # the exit code of what the user can put right, as the command line has it
STOPPED = 130
PARENT = "LUTHIER_STARTED_BY"  # the process that waits for a task's numbers: it may be gone before the task is ready to ask whose child it is
PATIENCE = 60.0  # seconds that a task gets to save what it has after Ctrl-C


def numbers_of(
    module: str, task: Any, label: str, *, threads: int | None = None, cwd: Path | None = None, wait: Callable[[float], None] | None = None
) -> dict[str, Any]:
    """What a task printed. ``threads``: of its products; None: as the environment has it. ``wait`` is called a few times a second with the seconds so far.

    Raises LuthierError with the task's own sentence, or with the end of its trace where it broke; Interrupted after Ctrl-C.
    """
    environment = os.environ | {PARENT: str(os.getpid())} | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:  # a pipe that nobody reads would fill
        process = subprocess.Popen([sys.executable, "-m", module, "--one", json.dumps(task)], cwd=cwd, env=environment, stdout=out, stderr=err, text=True)
        code = _wait(process, wait)
        out.seek(0)
        err.seek(0)
        said, wrong = out.read(), err.read().strip()
    if code == STOPPED:
        raise Interrupted(f"{label}: interrupted")
    if code == USER:
        raise LuthierError(wrong.splitlines()[-1].removeprefix("error: ") if wrong else f"{label}: failed")
    if code:
        why = f"it was ended by signal {-code}, as a system does that has run out of memory" if code < 0 else wrong[-3000:]
        raise LuthierError(f"{label}: failed: {why}")
    return dict(json.loads(said.splitlines()[-1]))


def _wait(process: subprocess.Popen[str], wait: Callable[[float], None] | None) -> int:
    began = time.monotonic()
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=0.3)
            if wait is not None:
                wait(time.monotonic() - began)
    except KeyboardInterrupt:  # the task got it too, and saves what it has
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=PATIENCE)
        raise Interrupted("interrupted") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def end_with_parent() -> None:
    """Let this process end when the one that started it with `numbers_of` is gone, however that ended: nobody waits for its numbers any more."""
    parent = int(os.environ.get(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
