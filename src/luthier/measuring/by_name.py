"""A task by its name with its settings, as a shell would quote them: bleu, exact_match after="Answer: ", ./mytask.py, instruments:facts for one score."""

from __future__ import annotations

import shlex
from typing import Any

from ..core import LuthierError, Task
from ..settings.config import read as read_settings
from ..settings.plugins import hints, is_path, plugin, unwrap
from ..settings.runfile import parse


def open_task(name: str, where: str = "--task") -> Task:
    """The task of a name; ``where``: what an error calls the place it stands at. Raises LuthierError for a task or a setting that is not there."""
    task, part = task_and_part(name, where)
    if part:
        raise LuthierError(f"{where}: {name!r}: all scores of a task are shown; leave out :{part}")
    return task


def task_and_part(name: str, where: str) -> tuple[Task, str]:
    """The task and which of its scores is meant, "" for the first."""
    try:
        first, *settings = shlex.split(name) or [""]
    except ValueError as e:
        raise LuthierError(f'{where}: {name!r}: {str(e).lower()}; settings are quoted as in a shell: exact_match after="Answer: "') from None
    kind, _, part = (first, "", "") if is_path(first) else first.partition(":")
    cls: Any = plugin("tasks", kind, files=True)
    if odd := [s for s in settings if "=" not in s]:
        raise LuthierError(f"{where}: {name!r}: {odd[0]!r} is no setting; say name=value")
    given = {key: _value(cls, key, text) for key, _, text in (s.partition("=") for s in settings)}
    if given and not hasattr(cls, "__dataclass_fields__"):
        raise LuthierError(f"{where}: {kind} has no settings: its class Task is no dataclass; leave out {', '.join(given)}")
    try:
        task: Task = read_settings(cls, given, f"{where}: {kind}") if given else cls()
    except TypeError as e:
        raise LuthierError(f"{where}: {kind}: cannot be made: {e}; give its fields defaults") from None
    return task, part


def _value(cls: type, key: str, text: str) -> Any:
    """A task's setting as a run file would have it."""
    known = hints(cls) if hasattr(cls, "__dataclass_fields__") else {}
    return text if unwrap(known.get(key))[0] is str else parse(text, f"{cls.__name__}: {key}", lines=False).values
