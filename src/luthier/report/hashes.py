"""SHA-256 of the files that a run left."""

from __future__ import annotations

import hashlib
from pathlib import Path

TOO_LARGE = 4_000_000_000  # bytes: more would take longer than a report may
CARD = "README.md"  # written from the same facts, after them


def hashes(folder: Path) -> dict[str, tuple[str, int]] | None:
    """File -> (SHA-256, bytes) of everything in a folder but its card; None where that is too much to read unasked."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != CARD]
    if sum(p.stat().st_size for p in files) > TOO_LARGE:
        return None
    return {str(p.relative_to(folder)): (sha256(p), p.stat().st_size) for p in files}


def sha256(path: Path) -> str:
    """Of one file, read a piece at a time."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
