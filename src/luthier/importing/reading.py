"""A configuration file of another program, whose program is told from its keys, to a run file of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LuthierError
from ..settings.names import nearest
from ..settings.run import Run
from ..settings.runfile import Tree, read_file
from . import axolotl, llama_factory, trl
from .translation import Line, Translation, text

TOOLS: dict[str, Any] = {m.NAME: m for m in (llama_factory, axolotl, trl)}


@dataclass(frozen=True)
class Translated:
    """A run file, and what became of every key that is not in it."""

    tool: str
    run: Run
    text: str
    put: int  # settings
    left: list[Line]
    needless: list[Line]


def translated(file: Path, *, tool: str | None = None, objective: str | None = None) -> Translated:
    """Translate one file. Raises ConfigError, with the line, for what is no such configuration and for values that are not accepted."""
    tree = read_file(file)
    if tool is None:
        tool = told(tree, file)
    elif tool not in TOOLS:
        guess = nearest(tool, TOOLS)
        raise ConfigError(f"--from {tool}: known are {', '.join(TOOLS)}" + (f"; did you mean {guess}?" if guess else ""))
    if objective is not None and (tool != trl.NAME or objective not in trl.OBJECTIVES):
        what = f"known are {', '.join(trl.OBJECTIVES)}" if tool == trl.NAME else f"{tool} says it in the file; this is for TRL, whose command says it"
        raise ConfigError(f"--objective {objective}: {what}")
    t = Translation(tool, tree, file)
    if tool == trl.NAME:
        trl.translate(t, objective)
    else:
        TOOLS[tool].translate(t)
    try:
        run = t.finish()
    except LuthierError as e:
        raise ConfigError(f"{e}; correct it there, or take it out and set it here") from None
    return Translated(tool, run, text(t, run), _count(t.run.values), t.left, t.needless)


def told(tree: Tree, file: Path) -> str:
    """Which program a configuration is of, by the keys that it has. Raises ConfigError where none or two fit."""
    keys = set(tree.values)
    if {"method", "objective", "optim", "data"} & keys and {"model", "data"} & keys and isinstance(tree.values.get("data"), dict):
        raise ConfigError(f"{file}: a run file of this program already: luthier train {file}")
    own = {name: keys & set(m.TELLS) for name, m in TOOLS.items()}
    unique = {name: found - set().union(*(o for n, o in own.items() if n != name)) for name, found in own.items()}
    scores = {name: (len(unique[name]), len(own[name])) for name in TOOLS}
    best = max(scores.values())
    fits = [name for name, score in scores.items() if score == best]
    if best[1] < 2 or len(fits) > 1:
        raise ConfigError(f"{file}: its keys ({', '.join(sorted(keys)[:8])}, ...) do not say whose it is; name the program: --from {', '.join(TOOLS)}")
    return fits[0]


def _count(values: Any) -> int:
    return sum(_count(v) if k != "rewards" and k != "columns" and isinstance(v, dict) else 1 for k, v in values.items())
