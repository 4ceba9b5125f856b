"""`luthier compare` from what was asked to the page: reads the rows, runs the jobs in processes of their own, writes and shows what they came to."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..data.sources import files_of
from ..errors import Interrupted, LuthierError
from ..report.verdict import clock
from . import advice, page, plots, table
from .apart import numbers_of
from .conduct import Conduct
from .outcome import Table, table_of
from .state import ASKED, State
from .sweep import rows_of

EVERY = 10.0  # seconds between lines where there is no terminal
WORK = "luthier.comparing.task"


def compare(asked: dict[str, Any], folder: Path, *, quiet: bool = False) -> Table:
    """Run a comparison, or what of it is missing, and write its files into ``folder``.

    ``asked``: file, settings, minutes, target, test, equal, rates, as compare.yaml keeps them. Raises LuthierError, Interrupted after Ctrl-C.
    """
    rows = rows_of(asked["file"], asked["settings"])  # before a folder is made
    if not rows.rows[0].run.data.files:
        raise LuthierError("no training data: say luthier compare FILE, or name data.train in the run file")
    for source in {s for r in rows.rows for s in (*r.run.data.files, *r.run.data.held_out, *r.run.data.general)} | set(asked["test"]):
        files_of(source)  # raises for one that is not there
    new = not (folder / ASKED).is_file()
    state = State(folder, asked)
    speaker = Speaker(float(asked["minutes"]) * 60, quiet=quiet)
    speaker.say(f"{len(rows.rows)} rows: {'; '.join(r.name for r in rows.rows)}; {asked['minutes']:g} minutes; folder {folder}")
    for note in rows.notes:
        speaker.say(note)
    conduct = Conduct(rows, state, lambda name, task, limit: speaker.run(name, state.task_file(name, task), conduct.spent, limit), say=speaker.say)
    try:
        found = conduct.go()
    except (Interrupted, KeyboardInterrupt):
        state.save(conduct.spent())
        raise Interrupted(f"interrupted; what is finished is kept, go on with: luthier compare --resume {folder}") from None
    except LuthierError:
        if new and not state.finished:  # nothing half-written stays
            shutil.rmtree(folder, ignore_errors=True)
        raise
    state.save(conduct.spent())
    out = table_of(found, asked["target"])
    page.write(out, folder)
    return out


class Speaker:
    """What a person sees while jobs run: a line for each, with the time it takes and how much of the whole is gone."""

    def __init__(self, seconds: float, *, quiet: bool):
        self.console = Console(quiet=quiet, highlight=False, stderr=False, soft_wrap=not sys.stdout.isatty())
        self.seconds, self.said = seconds, 0.0

    def say(self, text: str) -> None:
        """One fact."""
        self.console.print(Text("  " + text))

    def run(self, name: str, task: Path, spent: Callable[[], float], limit: float) -> dict[str, Any]:
        """A job in a process of its own, for ``limit`` seconds at most. Raises LuthierError after them."""
        self.said = time.monotonic()

        def wait(seconds: float, show: Callable[[str], None] | None = None) -> None:
            if seconds > limit:
                raise LuthierError(f"{name} was stopped after {clock(seconds)}, when the time for it was up; --resume with more --minutes goes on with it")
            if show is None:
                self._line(name, seconds, spent())
            else:
                show(self._said(name, seconds, spent()))

        if not self.console.is_terminal:
            return numbers_of(WORK, {"file": str(task)}, name, wait=wait)
        with self.console.status(name) as status:
            return numbers_of(WORK, {"file": str(task)}, name, wait=lambda s: wait(s, status.update))

    def _line(self, name: str, seconds: float, spent: float) -> None:
        if time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            self.console.print(Text(self._said(name, seconds, spent)))

    def _said(self, name: str, seconds: float, spent: float) -> str:
        return f"{name}: {clock(seconds)}; in all {clock(spent)} of {clock(self.seconds)}, left {clock(max(0.0, self.seconds - spent))}"


def show(t: Table, folder: Path) -> None:
    """The table and the advice in the terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 180
    console.print()
    for part in (table.GOOD, table.COST):
        console.print(table.terminal(t, part))
        console.print()
    for line in table.refused(t):
        console.print(Text(f"not compared: {line}"), style="yellow")
    said, caveats = advice.sentences(t)
    for s in said:
        console.print(Text(s, style="bold"))
    for s in [*caveats, *t.notes]:
        console.print(Text(s, style="dim"))
    where = f"tested on {t.about['records']:,} {'prompts' if t.about['renders'] == 'chat' else 'rows'} ({t.tests}), which nothing was chosen by"
    console.print(Text(where + (f"; target: {t.target_said}" if t.target_said else ""), style="dim"))
    drawn = ", plots (*.png)" if plots.there() else "; matplotlib is not installed (pip install 'luthier[plots]'), so nothing was drawn"
    console.print(Text(f"report: {folder / page.FILE}; beside it compare.csv, compare.tex{drawn}", style="bold"))
