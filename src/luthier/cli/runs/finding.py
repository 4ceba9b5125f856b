"""Which folder a run's name stands for, and tables that fit a terminal or a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import LuthierError
from ...settings.names import nearest

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 200  # characters of a table where there is no terminal to fit into


def folder(name: str, where: Path) -> Path:
    """The folder of a run: a path to it, or its name in ``where``. Raises LuthierError for neither, with the nearest name there is."""
    from ...report.facts import found

    for path in (Path(name), where / name):
        if (path / "run.yaml").is_file():
            return path
    there = [str(p.relative_to(where)) for p in found(where)]
    guess = nearest(name, there)
    if Path(name).is_dir():
        raise LuthierError(f"{name}: no run.yaml here, so it is no run folder; luthier runs lists the runs there are")
    known = f"did you mean {guess}?" if guess else f"there are {', '.join(there[:8])}{', ...' if len(there) > 8 else ''}" if there else "there are none"
    raise LuthierError(f"{name}: no run of this name in {where}; {known} (runs elsewhere: luthier runs --in FOLDER, or the run's path)")


def console() -> Console:
    """For tables: as wide as the terminal, or wide where the output is a file or a pipe."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[str] = ()) -> None:
    """Print a table; columns named in ``words`` are to the left, the others are numbers."""
    from rich.table import Table
    from rich.text import Text

    made = Table(show_edge=False, pad_edge=False)
    for name in columns:
        made.add_column(name, justify="left" if name in words else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    console().print(made)
