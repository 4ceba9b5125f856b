"""luthier runs report: write a run's report.html and its model card again, from the files in its folder."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import heavy
from .finding import folder


def command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A run's name, or the path of its folder.")],
    plan: Annotated[bool, typer.Option("--plan/--no-plan", help="Predict the run's memory where that was not done before; takes a second or more.")] = True,
) -> None:
    """Write report.html, and the model card beside what was trained."""
    from ...errors import LuthierError
    from ...report import card, page
    from ...report.facts import STAGES, found, mapping, read

    there = folder(name, context.obj)
    if (there / STAGES).is_file():
        stages = [p for p in found(there) if not (p / STAGES).is_file()]
        if not stages:
            raise LuthierError(f"{there}: none of its stages has begun, so there is nothing to report; go on with: luthier train --resume {there}")
    else:
        stages = [there]
    for one in stages:
        facts = read(one)
        if plan and facts.told and not mapping(facts.told.get("memory")):
            _predict(facts.folder)
        typer.echo(f"wrote {page.write(one)}")
        made = card.write(one)
        if made is not None:
            typer.echo(f"wrote {made}")
        for problem in facts.problems:
            typer.echo(f"{facts.name}: {problem}")


def _predict(run: object) -> None:
    """Add the prediction; where its base is not at hand, or a setting is no more, say so."""
    from dataclasses import replace
    from pathlib import Path

    heavy("planning.foresight")
    from ... import build
    from ...errors import LuthierError
    from ...planning.foresight import add_memory
    from ...settings.config import load_run

    where = Path(str(run))
    try:
        asked = load_run(str(where / "run.yaml"))
        resolved, _ = build.resolve(replace(asked, model=replace(asked.model, offline=True)))
        add_memory(where, resolved)
    except (LuthierError, OSError) as e:
        typer.echo(f"memory was not predicted: {e}")
