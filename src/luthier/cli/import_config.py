"""luthier import-config: a configuration of LLaMA-Factory, Axolotl or TRL as a run file of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file of LLaMA-Factory, Axolotl or TRL.")],
    from_: Annotated[str | None, typer.Option("--from", help="llama-factory, axolotl or trl. Default: told from its keys.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the run file goes. Default: it is printed.")] = None,
    objective: Annotated[str | None, typer.Option(help="Of TRL, whose command and not its file says it: sft, dpo, kto, reward, orpo, grpo, text.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 where anything could not be translated.")] = False,
) -> None:
    """Translate: `luthier import-config theirs.yaml --output run.yaml`, then `luthier train run.yaml`.

    Every key is accounted for: translated, needless here, or not translated, each with its line and the reason. Relative paths stay as they are.
    """
    from rich.console import Console
    from rich.text import Text

    from .. import atomic
    from ..importing.reading import translated

    made = translated(file, tool=from_, objective=objective)
    if output is not None:
        atomic.text(output, made.text)
    else:
        typer.echo(made.text, nl=False)
    aside = Console(stderr=output is None, highlight=False)
    line = lambda text: aside.print(Text(text), soft_wrap=True)  # noqa: E731
    where = f" into {output}" if output is not None else ""
    line(f"{file}: {made.tool}, {made.put} settings put{where}, {len(made.left)} keys not translated, {len(made.needless)} needless here")
    for title, some in (("not translated:", made.left), ("needless here:", made.needless)):
        if some:
            line(title)
            for one in some:
                line(f"  {one}")
    if output is not None:
        line(f"next:  luthier train {output} --dry-run    luthier plan {output}")
    if strict and made.left:
        raise typer.Exit(1)
