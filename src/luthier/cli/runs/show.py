"""luthier runs show: one run in a terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from .finding import folder, table


def command(context: typer.Context, name: Annotated[str, typer.Argument(metavar="NAME", help="A run's name, or the path of its folder.")]) -> None:
    """What a run was asked, what it came to, and what to do with it now."""
    from ...report import verdict
    from ...report.facts import mapping, read
    from ...report.following import commands

    facts = read(folder(name, context.obj))
    when = f", began {facts.began:%Y-%m-%d %H:%M}" if facts.began else ""
    typer.echo(f"{facts.name}: {facts.state}{when}")
    typer.echo(f"model {facts.model}, method {facts.kind('method')}, objective {facts.kind('objective')}, precision {facts.kind('precision')}")
    for key, value in mapping(facts.told.get("asked")).items():
        typer.echo(f"  {key}: {value}")
    typer.echo("")
    for sentence in verdict.sentences(facts):
        typer.echo(sentence)
    for which, said in verdict.alarms(facts):
        typer.echo(f"{which}. {said}")
    before, after = facts.measures()
    if after or before:
        typer.echo("")
        names = list(dict.fromkeys([*after, *before]))
        rows = ([n, str(before.get(n, "")), str(after.get(n, "")), _n((after.get(n) or before[n]).n)] for n in names)
        table(["measure", "before", "after" if facts.finished else "at the last evaluation", "n"], rows, words=("measure",))
    for problem in facts.problems:
        typer.echo(problem)
    typer.echo("")
    page = facts.folder / "report.html"
    if page.is_file():
        typer.echo(f"report: {page}")
    todo = list(commands(facts))
    width = max(len(line) for _, line in todo)
    for what, line in todo:
        typer.echo(f"  {line:<{width}}  # {what}")


def _n(n: int | None) -> str:
    return "" if n is None else f"{n:,}"
