"""One task of a benchmark in a process of its own, so that its peak memory is its own: ``python -m MODULE --one JSON`` prints its numbers last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def numbers_of(module: str, task: dict[str, Any], label: str, threads: int | None = None) -> dict[str, Any]:
    """What a task printed, with the date and the commit. ``threads``: of its products; None: as the environment has it. Ends the program where it failed."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--one", json.dumps(task)],
        cwd=ROOT,
        env=os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{label}: failed\n{done.stderr[-3000:]}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return json.loads(done.stdout.splitlines()[-1]) | {"date": time.strftime("%Y-%m-%d"), "commit": commit}
