"""luthier runs: a line for every run in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ...errors import LuthierError
from .finding import table

if TYPE_CHECKING:
    from ...report.facts import Facts, Number

COLUMNS = ("name", "when", "model", "method", "objective", "steps", "held out", "general text", "score", "state")


def command(where: Path) -> None:
    """Print the table, and below it a sentence for each folder that cannot be read."""
    from ...report.facts import STAGES, found, read

    if not where.is_dir():
        raise LuthierError(
            f"{where}: there is no such folder; runs are written to runs/ unless out=FOLDER says otherwise; luthier runs --in FOLDER looks there"
        )
    rows: list[tuple[str, ...]] = []
    said, seen = [], 0
    for folder in found(where):
        seen += 1
        name = str(folder.relative_to(where))
        if (folder / STAGES).is_file():
            rows.append((name, "", "", "", "", "", "", "", "", "stages, below"))
            continue
        try:
            facts = read(folder)
        except LuthierError as e:
            said.append(str(e))
            continue
        rows.append(line(name, facts))
        said += [f"{name}: {problem}" for problem in facts.problems]
    if not seen:
        raise LuthierError(f"{where}: there are no runs here; luthier train writes them, and luthier runs --in FOLDER looks elsewhere")
    if rows:
        table(COLUMNS, rows, words=("name", "when", "model", "method", "objective", "state"))
    for sentence in said:
        typer.echo(sentence)


def line(name: str, facts: Facts) -> tuple[str, ...]:
    """The cells of COLUMNS for one run."""
    from ...report.facts import GENERAL, HELD_OUT

    before, after = facts.measures()
    when = f"{facts.began:%Y-%m-%d %H:%M}" if facts.began else ""
    of = facts.planned
    steps = f"{facts.steps:,}" if of is None or of == facts.steps else f"{facts.steps:,} of {of:,}"
    model = Path(facts.model).name if Path(facts.model).is_dir() else facts.model
    kinds = tuple(Path(facts.kind(axis)).stem for axis in ("method", "objective"))
    return (name, when, model, *kinds, steps, _path(before, after, HELD_OUT), _path(before, after, GENERAL), _score(after), facts.state)


def _path(before: dict[str, Number], after: dict[str, Number], name: str) -> str:
    a, b = (f"{m[name].value:.4f}" if name in m else "" for m in (before, after))
    return f"{a} -> {b}" if a and b else b or a


def _score(after: dict[str, Number]) -> str:
    """The first score of the run's tasks, the one it names first."""
    from ...report.facts import HELD_OUT, is_kept

    name = next((n for n in after if n != HELD_OUT and not is_kept(n)), None)
    return "" if name is None else f"{name} {after[name].value:.{after[name].digits}f}"
