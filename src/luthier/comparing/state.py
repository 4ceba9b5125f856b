"""A comparison's folder: what was asked, which jobs are done with what numbers, what was decided on the way, how much time is spent.

compare.yaml      what was asked
progress.json     seconds spent, and what was decided: steps, seeds
jobs/NAME.json    the numbers of a finished job, under a digest of its settings
search/, runs/    short runs of the searches; the runs that count, each an ordinary run's folder
compare.html, compare.csv, compare.tex, compare.json, *.png
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import atomic
from ..errors import LuthierError
from ..settings import runfile

ASKED, PROGRESS = "compare.yaml", "progress.json"
FREE = ("minutes", "target")  # of what was asked: may be another when a comparison goes on
IDENTITY = ("kind", "run", "rows", "test", "seed", "rates", "lr", "steps", "run_seed", "name")  # of a task: the rest is how much time it gets


class State:
    """Reads and writes the folder; every file is written whole or not at all."""

    def __init__(self, folder: Path, asked: dict[str, Any]):
        """A new folder, or one to go on with. Raises LuthierError where another comparison is there."""
        self.folder, self.asked = folder, asked
        if (folder / ASKED).is_file():
            was = runfile.read_file(folder / ASKED).values
            if changed := runfile.differences(_bound(was), _bound(asked)):
                raise LuthierError(
                    f"{folder}: another comparison is there ({'; '.join(changed[:5])}); choose another folder with --out, or go on with that one: "
                    f"luthier compare --resume {folder}"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise LuthierError(f"{folder}: there is something here that is no comparison; choose another folder with --out")
        folder.mkdir(parents=True, exist_ok=True)
        atomic.text(folder / ASKED, runfile.write(asked))
        progress = _read(folder / PROGRESS)
        self.spent: float = progress.get("spent", 0.0)
        self.decided: dict[str, Any] = progress.get("decided", {})

    def save(self, spent: float) -> None:
        """Keep the seconds spent and what was decided."""
        self.spent = spent
        atomic.as_json(self.folder / PROGRESS, {"spent": round(spent, 1), "decided": self.decided})

    def done(self, name: str, task: Mapping[str, Any]) -> dict[str, Any] | None:
        """The numbers of a job that is finished under these settings; None where it is not."""
        found = _read(self.folder / "jobs" / f"{slug(name)}.json")
        return found["numbers"] if found.get("digest") == digest(task) else None

    @property
    def finished(self) -> int:
        """Jobs that are done."""
        return sum(not f.name.endswith(".task.json") for f in (self.folder / "jobs").glob("*.json"))

    def keep(self, name: str, task: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
        """A job is finished."""
        (self.folder / "jobs").mkdir(exist_ok=True)
        atomic.as_json(self.folder / "jobs" / f"{slug(name)}.json", {"name": name, "digest": digest(task), "numbers": numbers})

    def task_file(self, name: str, task: Mapping[str, Any]) -> Path:
        """Where a job's process reads what it has to do."""
        path = self.folder / "jobs" / f"{slug(name)}.task.json"
        path.parent.mkdir(exist_ok=True)
        atomic.as_json(path, task)
        return path


def _bound(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked, without what may be another when it goes on."""
    return {k: v for k, v in asked.items() if k not in FREE}


def asked_in(folder: Path) -> dict[str, Any]:
    """What was asked of the comparison in a folder. Raises LuthierError where there is none."""
    if not (folder / ASKED).is_file():
        raise LuthierError(f"{folder}: no {ASKED} here, so it is no comparison to go on with; name the folder that luthier compare wrote")
    return dict(runfile.read_file(folder / ASKED).values)


def digest(task: Mapping[str, Any]) -> str:
    """SHA-256 of what makes a job the job that it is."""
    return hashlib.sha256(json.dumps({k: task[k] for k in IDENTITY if k in task}, sort_keys=True).encode()).hexdigest()


def slug(name: str) -> str:
    """A name as a file's."""
    short = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
    return short if len(short) <= 80 else f"{short[:70]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
