"""luthier kinds: what there is on each axis, read from the files themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..names import nearest
from ..plugins import AXES, first_line, folder, kinds


def command(
    axis: Annotated[str | None, typer.Argument(help="One of methods, objectives, precision, place, tasks. Default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a run file, for editors.")] = False,
) -> None:
    """List the kinds of each axis with one sentence each. A kind is a file; your own is `kind: ./file.py`."""
    if schema:
        if axis or as_json:
            raise ConfigError("--schema is about a whole run; give it alone")
        from ..schema import schema as whole

        typer.echo(json.dumps(whole(), indent=2))
        return
    found = {a: {k: first_line(_file(a, k)) for k in kinds(a)} for a in ([_axis(axis)] if axis else AXES)}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    width = max((len(k) for table in found.values() for k in table), default=0)
    for name, table in found.items():
        typer.echo(name)
        for kind, sentence in table.items():
            typer.echo(f"  {kind:<{width}}  {sentence}")
        if not table:
            typer.echo("  (none)")


def _file(axis: str, kind: str) -> Path:
    single = folder(axis) / f"{kind}.py"
    return single if single.is_file() else folder(axis) / kind / "__init__.py"


def _axis(word: str) -> str:
    guess = next((a for a in AXES if word.lower().rstrip("s") == a.rstrip("s")), None)
    if guess is None:
        near = nearest(word, AXES)
        raise ConfigError(f"no axis is called {word!r}; " + (f"did you mean {near}?" if near else f"there are {', '.join(AXES)}"))
    return guess
