"""luthier compare: methods on the same data, seeds and budget, in one table with plots and advice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import heavy
from .train import asked as sorted_out

if TYPE_CHECKING:
    from ..comparing.outcome import Table

MINUTES, RATES = 30.0, 3


def command(
    what: Annotated[
        list[str] | None, typer.Argument(help="A run file (.yaml), or training data (a file, folder or Hub id); then key=value, or key=\\[a,b] to compare.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, help=f"Time for everything, kept within 10 %. Default: {MINUTES:g}.")] = None,
    target: Annotated[
        float | None, typer.Option(help="A score (or, where only a loss is measured, a loss): when did each row reach it? Default: 95 % of the best.")
    ] = None,
    test: Annotated[
        list[str] | None, typer.Option(help="Data that nothing is chosen by; may be given several times. Default: two in three of the held-out prompts.")
    ] = None,
    equal: Annotated[str, typer.Option(help="What all rows get as much of: tokens, or time (a slow method then gets fewer tokens).")] = "tokens",
    rates: Annotated[int, typer.Option(min=1, max=4, help="Learning rates tried around each method's default; 1: the default alone.")] = RATES,
    model: Annotated[str | None, typer.Option(help="The base: fiddle, a folder or a Hub id; short for model.id=...")] = None,
    objective: Annotated[str | None, typer.Option(help="What the loss is: short for objective=...")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the comparison. Default: compare/DATA-TIME.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the comparison in this folder; what is finished is not run again. Takes --minutes anew.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the table as CSV instead (it is always written to compare.csv).")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="Print the table as LaTeX instead (it is always written to compare.tex).")] = False,
) -> None:
    """Compare methods: `luthier compare my.jsonl --minutes 45`, `luthier compare run.yaml methods=\\[lora,full] method.rank=\\[4,8] seed=\\[0,1,2]`.

    A list is compared where a setting takes one value: method.rank=\\[4,8], precision=\\[bfloat16,nf4].

    Where a setting is a list itself (method.targets, evaluate.tasks, data.train) a list is its value; a list of lists is compared: \\[\\[query],\\[all]].

    Several lists give every combination; a key below method counts for the methods that have it. Methods may bring their own: {kind: lora, rank: 64}.

    Values of seed are repetitions, whose results are averaged; values of optim.lr are the rates that each row tries.

    Without methods: crafted_prompt, lora, adapter, prefix, prompt and full. What this base or objective does not allow is listed with the reason.
    """
    from ..errors import ConfigError

    if as_csv and as_latex:
        raise ConfigError("--csv and --latex: one at a time on the screen; both files are written anyway")
    if equal not in ("tokens", "time"):
        raise ConfigError(f"--equal {equal}: accepted are tokens and time")
    heavy("comparing.compare")
    from ..comparing.compare import compare, show

    if resume is not None:
        if what or test or model or objective or out:
            raise ConfigError(f"--resume {resume}: goes on as it was asked; only --minutes and --target may be given anew")
        wanted = _earlier(resume, minutes, target)
        folder = resume
    else:
        file, data, settings = sorted_out(what or [], model, None, objective)
        wanted = {
            "file": file, "settings": settings, "minutes": minutes or MINUTES, "target": target, "test": list(test or ()), "equal": equal, "rates": rates,
        }  # fmt: skip
        folder = out or _folder(file, data)
    quiet = as_csv or as_latex
    table = compare(wanted, folder, quiet=quiet)
    if quiet:
        _print(table, as_csv)
    else:
        show(table, folder)


def _earlier(folder: Path, minutes: float | None, target: float | None) -> dict[str, Any]:
    from ..comparing.state import asked_in

    was = asked_in(folder)
    return was | ({} if minutes is None else {"minutes": minutes}) | ({} if target is None else {"target": target})


def _folder(file: str | None, data: list[str]) -> Path:
    from datetime import datetime

    name = Path(data[0]).stem if data else Path(file).stem if file else "data"
    return Path("compare") / f"{name.replace(' ', '_')[:40]}-{datetime.now():%Y%m%d-%H%M%S}"


def _print(table: Table, as_csv: bool) -> None:
    from ..comparing import table as tables

    typer.echo(tables.as_csv(table) if as_csv else tables.as_latex(table), nl=False)
