"""What `luthier compare` is asked for: settings with lists become axes, axes become rows.

    rows = rows_of("run.yaml", ["methods=[lora,adapter]", "method.rank=[4,8]", "seed=[0,1,2]"])[0]

A list is swept where its setting takes a single value (method.rank=[4,8]). Where a setting is a list itself (method.targets, evaluate.tasks, data.train) a
list is its value, and only a list of lists is swept (method.targets=[[query,value],[all]]). Two settings are no axes: values of `seed` are repetitions,
whose results are averaged, and values of `optim.lr` are the rates that the search of every row tries.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings import config, runfile
from ..settings.plugins import hints, kind_of, plugin, unwrap
from ..settings.run import Run
from ..settings.runfile import Tree

METHODS = ("crafted_prompt", "lora", "adapter", "prefix", "prompt", "full")  # compared where none is named
ALIASES = {"methods": "method", "seeds": "seed", "models": "model"}
TAKEN = {"name": "the comparison names its runs itself", "out": "say --out FOLDER", "stages": "a comparison is of single runs"}
PLUGS = ("method", "objective", "precision", "place")
PLAIN = re.compile(r"[\w./:+-]+")
Setting = tuple[str, Any]  # a dotted key and its plain value


@dataclass(frozen=True)
class Row:
    """One row of the comparison: a run, but for its learning rate, its steps and its seed."""

    name: str
    run: Run
    settings: tuple[str, ...]  # key=value, of what makes this row


@dataclass(frozen=True)
class Asked:
    """All rows, and what is the same for all of them."""

    rows: list[Row]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]  # that are tried; empty: those around each method's default
    notes: list[str]
    chosen: bool  # whether the methods were named


def rows_of(source: str | Path | Mapping[str, Any] | None, settings: Iterable[str] = ()) -> Asked:
    """The rows of a run file (or a plain tree, or nothing) and of settings with lists. Raises ConfigError for what cannot be read."""
    given = [_parsed(s) for s in settings]
    for key, _ in given:
        if (top := key.partition(".")[0]) in TAKEN:
            raise ConfigError(f"{key}: {TAKEN[top]}")
    tree = config.tree_of(source)
    if "stages" in tree.values:
        config.load_run(source)  # says it in its own words
    kinds = {s: _kind_of(s, tree.values, given) for s in PLUGS}
    given = [*_lists_in(tree.values, kinds), *given]  # a file may hold lists to sweep as well
    methods, chosen = _methods(given, tree)
    seeds, rates = _last(given, "seed", tree, (0,)), _last(given, "optim.lr", tree, ())
    rest = [(k, v) for k, v in given if k not in ("method", "seed", "optim.lr")]
    asked = Asked([], tuple(dict.fromkeys(map(int, seeds))), tuple(sorted(dict.fromkeys(map(float, rates)))), [], chosen)
    useless = {k for k, _ in rest if k.startswith("method.")}
    for method in methods:
        useless -= _expand(tree, method, rest, asked, kinds)
    for key in sorted(useless):
        raise _unknown(source, key, next(v for k, v in rest if k == key), methods)
    _name_apart(asked.rows)
    return asked


def _parsed(setting: str) -> Setting:
    keys, value = runfile.split(setting)
    keys[0] = ALIASES.get(keys[0], keys[0])
    if keys[0] in PLUGS and keys[1:] == ["kind"]:
        keys = keys[:1]
    tree = runfile.parse(value, setting, lines=False)
    return ".".join(keys), tree.values if isinstance(tree.values, list | dict) else value


def _kind_of(section: str, values: Mapping[str, Any], given: Sequence[Setting]) -> str:
    """The kind that keys below a section are read as: the last that is named, of several the first."""
    named = [v for k, v in given if k == section] or [values.get(section)]
    one = named[-1][0] if isinstance(named[-1], list) and named[-1] else named[-1]
    kind = one.get("kind") if isinstance(one, Mapping) else one
    kind = kind[0] if isinstance(kind, list) and kind else kind
    return kind if isinstance(kind, str) else str(getattr(Run, section))


def _lists_in(values: dict[str, Any], kinds: Mapping[str, str]) -> list[Setting]:
    """Take what is to be swept out of a file's values: `methods: [...]`, and lists where a setting takes one value."""
    out: list[Setting] = []
    for alias, name in ALIASES.items():
        if alias in values:
            values[name] = values.pop(alias)
    for section in [s for s in (*PLUGS, "model") if s in values]:  # spelled out by now: {kind: [...]}
        found, short = values[section], "id" if section == "model" else "kind"
        if isinstance(found, list):
            out.append((section, values.pop(section)))
        elif isinstance(found, dict) and isinstance(found.get(short), list):
            out.append((section, found.pop(short)))
    return out + list(_swept_below(values, (), kinds))


def _swept_below(values: dict[str, Any], path: tuple[str, ...], kinds: Mapping[str, str]) -> Iterable[Setting]:
    for key, value in list(values.items()):
        here = (*path, str(key))
        if isinstance(value, dict) and here != ("data", "mix"):
            yield from _swept_below(value, here, kinds)
        elif isinstance(value, list) and (swept := _swept(here, value, kinds)) is not None:
            del values[key]
            yield ".".join(here), swept


def _methods(given: list[Setting], tree: Tree) -> tuple[list[Any], bool]:
    """The methods, each a kind or a mapping with one; and whether they were named by a setting."""
    named = [v for k, v in given if k == "method"]
    if named:
        methods = named[-1] if isinstance(named[-1], list) else [named[-1]]
        if not methods:
            raise ConfigError("methods=[]: names none; give some, for example methods=[lora,full], or leave it out")
        return methods, True
    of_file = tree.values.get("method")
    kind = of_file.get("kind", "lora") if isinstance(of_file, dict) else None
    return [*dict.fromkeys([*([kind] if kind else []), *METHODS])], False


def _last(given: list[Setting], key: str, tree: Tree, default: Any) -> Sequence[Any]:
    values = [v for k, v in given if k == key]
    value: Any = values[-1] if values else None
    if value is None:
        inner: Any = tree.values
        for part in key.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        value = default if inner is None else inner
    if value == []:
        raise ConfigError(f"{key}=[]: names no value; give some, or leave it out")
    several = value if isinstance(value, list | tuple) else [value]
    for v in several:
        config.load_run(None, [f"{key}={text(v)}"])  # in the reader's own words, where it is no such value
    return several


def _expand(tree: Tree, method: Any, rest: list[Setting], asked: Asked, kinds: Mapping[str, str]) -> set[str]:
    """Add the rows of one method; returns the keys below method that it takes."""
    kind = method.get("kind", "lora") if isinstance(method, dict) else str(method)
    takes = {config.spelled(n) for n in hints(plugin("methods", kind, files=True))}
    fixed: dict[str, Any] = {}
    axes: dict[str, list[Any]] = {}
    used: set[str] = set()
    for key, value in rest:
        keys = key.split(".")
        if keys[0] == "method":
            if keys[1] not in takes:
                continue
            used.add(key)
        for there in (fixed, axes):
            there.pop(key, None)  # the last one counts
        if isinstance(value, list) and (swept := _swept(keys, value, {**kinds, "method": kind})) is not None:
            axes[key] = swept
        else:
            fixed[key] = value
    if left_out := sorted({k.partition(".")[2] for k, _ in rest if k.startswith("method.") and k not in used}):
        asked.notes.append(f"{kind} has no {', '.join(left_out)}: compared without")
    mapped = [(f"method.{k}", v) for k, v in method.items() if k != "kind"] if isinstance(method, dict) else []
    for values in itertools.product(*axes.values()):
        varied = list(zip(axes, values, strict=True))
        settings = [f"{k}={text(v)}" for k, v in [("method", method), *fixed.items(), *varied]]
        run = config.load_run(tree.values, settings)
        several = [(k, v) for k, v in varied if len(axes[k]) > 1]
        name = ", ".join([Path(kind_of(run.method)).stem, *(_said(k, v) for k, v in [*mapped, *several])])
        asked.rows.append(Row(name, run, tuple(settings)))
    return used


def _swept(keys: Sequence[str], value: list[Any], kinds: Mapping[str, str]) -> list[Any] | None:
    """The values of an axis, or None where the list is the setting's own value. Raises ConfigError for an axis of no values."""
    if takes_list(keys, kinds):
        return value if value and all(isinstance(v, list) for v in value) else None
    if not value:
        raise ConfigError(f"{'.'.join(keys)}=[]: an axis of no values; give some, or leave it out")
    return value


def takes_list(keys: Sequence[str], kinds: Mapping[str, str]) -> bool:
    """Whether a setting's own value is a list. ``kinds``: those that keys below method, objective, ... are of. A key that there is not takes none."""
    cls: Any = Run
    for i, key in enumerate(keys):
        found = {config.spelled(n): h for n, h in hints(cls).items()}.get(key)
        if found is None:
            return False
        inner, plug, _ = unwrap(found)
        parts = [a for a in typing.get_args(inner) if a is not type(None)]
        inner = parts[0] if type(None) in typing.get_args(inner) else inner
        last = i == len(keys) - 1
        if plug is not None:
            if last or kinds.get(key, "auto") == "auto":
                return False
            inner = plugin(plug.package, kinds[key], files=True)
        if not dataclasses.is_dataclass(inner):
            return last and typing.get_origin(inner) is tuple
        if last:
            short = getattr(inner, "shorthand", None)
            return short is not None and takes_list([*keys, short], kinds)
        cls = inner
    return False


def _unknown(source: Any, key: str, value: Any, methods: Sequence[Any]) -> ConfigError:
    """What the reader says of a key that none of the methods has, by the method that has one of nearly that name."""
    said = []
    for method in methods:
        try:
            config.load_run(source, [f"method={text(method)}", f"{key}={text(value)}"])
        except ConfigError as e:
            said.append(e)
    return next((e for e in said if "did you mean" in str(e)), said[0])


def text(value: Any) -> str:
    """A plain value as it is written behind key= on the command line."""
    return value if isinstance(value, str) and PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def _said(key: str, value: Any) -> str:
    short = key.rpartition(".")[2]
    said = "+".join(map(str, value)) if isinstance(value, list) else str(value.get("kind", value)) if isinstance(value, dict) else str(value)
    return said if key in ("precision", "model", "objective", "model.id") else f"{short} {said}"


def _name_apart(rows: list[Row]) -> None:
    """Equal rows are one, the first; different ones of one name get a number."""
    seen: dict[str, int] = {}
    runs: set[str] = set()
    kept: list[Row] = []
    for row in rows:
        if (mark := config.digest(row.run)) in runs:
            continue
        runs.add(mark)
        seen[row.name] = seen.get(row.name, 0) + 1
        kept.append(row if seen[row.name] == 1 else dataclasses.replace(row, name=f"{row.name} ({seen[row.name]})"))
    rows[:] = kept
