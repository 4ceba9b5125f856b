"""Writing files so that a crash leaves the old or the new, never half of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import LuthierError


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends well, after everything in it is on disk."""
    try:
        yield begin(path)
        finish(path)
    except BaseException as e:
        shutil.rmtree(temporary(path), ignore_errors=True)
        if said := _system_error(e):
            raise LuthierError(f"{path}: cannot be written: {said}; free space or choose another folder (out=FOLDER)") from e
        raise


def temporary(path: Path) -> Path:
    """The folder that `folder` fills before it takes the place of ``path``."""
    return path.with_name(f".{path.name}.tmp")


def begin(path: Path) -> Path:
    """Make that folder, for what is filled by several processes or later."""
    shutil.rmtree(temporary(path), ignore_errors=True)
    temporary(path).mkdir(parents=True)
    return temporary(path)


def finish(path: Path) -> None:
    """Let it take its place, once everything in it is on disk."""
    for file in temporary(path).rglob("*"):
        _sync(file)
    _sync(temporary(path))
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary(path).rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def file(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well. Its name is this process's own: two may write the same at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.rename(path)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if said := _system_error(e):
            raise LuthierError(f"{path}: cannot be written: {said}; free space or choose another folder") from e
        raise


def _system_error(e: BaseException) -> str:
    """What the system said was wrong; "" for any other error. safetensors wraps the system's error in one of its own."""
    if isinstance(e, OSError):
        return e.strerror or str(e)
    return str(e).rpartition("I/O error: ")[2] if "(os error " in str(e) else ""


def text(path: Path, content: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        _sync(temporary)
        temporary.rename(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise LuthierError(f"{path}: cannot be written: {e.strerror or e}; free space or choose another folder (out=FOLDER)") from e


def as_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
