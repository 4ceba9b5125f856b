"""luthier runs: list the runs there are, look at one, compare two, write a report again, look at the spectra of what it learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .diff import command as diff
from .listing import command as listing
from .report import command as report
from .show import command as show
from .spectrum import command as spectrum

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.callback(invoke_without_command=True)
def runs(
    context: typer.Context,
    where: Annotated[Path, typer.Option("--in", metavar="FOLDER", help="The folder that holds the runs.")] = Path("runs"),
) -> None:
    """List the runs in a folder; show one, compare two, write a report again, or look at the ranks of what was learned."""
    context.obj = where
    if context.invoked_subcommand is None:
        listing(where)


app.command("show")(show)
app.command("diff")(diff)
app.command("report")(report)
app.command("spectrum")(spectrum)
