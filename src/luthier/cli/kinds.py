"""luthier kinds: what there is on each axis, read from the files themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..settings.names import nearest
from ..settings.plugins import AXES, first_line, folder, kinds
from . import heavy


def command(
    axis: Annotated[str | None, typer.Argument(help="One of methods, objectives, precision, place, tasks. Default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a run file, for editors.")] = False,
    check: Annotated[Path | None, typer.Option(help="Run the contracts of your own file (a Method, an Objective or a Task) on tiny models.")] = None,
) -> None:
    """List the kinds of each axis with one sentence each. A kind is a file; your own is `kind: ./file.py`.

    `luthier kinds --check ./mine.py` tries it on tiny models: does it learn, is the base left alone, does it pack, recompute, restore, fold, generate?
    """
    if check is not None:
        if axis or as_json or schema:
            raise ConfigError("--check is about one file; give it alone")
        raise typer.Exit(_check(check))
    if schema:
        if axis or as_json:
            raise ConfigError("--schema is about a whole run; give it alone")
        from ..settings.schema import schema as whole

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


def _check(path: Path) -> int:
    """Print every contract; 1 where one does not hold."""
    heavy("checking")
    from .. import checking
    from ..settings.plugins import is_path, plugin

    name = str(path) if is_path(str(path)) else f"./{path}"
    axis = next((a for a in ("methods", "objectives", "tasks") if f"class {AXES[a]}" in _source(path)), None)
    if axis is None:
        raise ConfigError(f"{path}: defines no class Method, Objective or Task, so there is no contract to run")
    made = plugin(axis, name, files=True)()
    run = {"methods": checking.check_method, "objectives": checking.check_objective, "tasks": checking.check_task}[axis]
    wrong = 0
    typer.echo(f"{path}: {AXES[axis].lower()}, with its default settings")
    for f in run(made):
        wrong += bool(f.wrong)
        mark = "-" if f.skipped else "WRONG" if f.wrong else "ok"
        typer.echo(f"  {mark:<5}  {f.model:<6}  {f.contract}" + (f": {f.wrong}" if f.wrong else ""))
    typer.echo("every contract holds" if not wrong else f"{wrong} contracts do not hold")
    return bool(wrong)


def _source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from None


def _file(axis: str, kind: str) -> Path:
    single = folder(axis) / f"{kind}.py"
    return single if single.is_file() else folder(axis) / kind / "__init__.py"


def _axis(word: str) -> str:
    guess = next((a for a in AXES if word.lower().rstrip("s") == a.rstrip("s")), None)
    if guess is None:
        near = nearest(word, AXES)
        raise ConfigError(f"no axis is called {word!r}; " + (f"did you mean {near}?" if near else f"there are {', '.join(AXES)}"))
    return guess
