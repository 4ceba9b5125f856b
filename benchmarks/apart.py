"""One task of a benchmark in a process of its own, with the date and the commit beside its numbers."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from luthier.comparing import apart
from luthier.errors import LuthierError

ROOT = Path(__file__).resolve().parent.parent


def numbers_of(module: str, task: dict[str, Any], label: str, threads: int | None = None) -> dict[str, Any]:
    """What a task printed, with the date and the commit. ``threads``: of its products; None: as the environment has it. Ends the program where it failed."""
    try:
        numbers = apart.numbers_of(module, task, label, threads=threads, cwd=ROOT)
    except LuthierError as e:
        raise SystemExit(str(e)) from None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return numbers | {"date": time.strftime("%Y-%m-%d"), "commit": commit}
