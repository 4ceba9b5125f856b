"""Settings: YAML and key=value overrides to the frozen dataclasses of run.py, strictly, and back.

    run = load_run("run.yaml", ["method.rank=16", "objective=dpo"])

Every key names a field. A field marked ``Plug`` reads ``{kind: lora, rank: 8}``, or ``lora`` alone: kind names a file, the other keys are the
fields of its dataclass. Whatever cannot be read is one sentence saying where it stands, what was found and what is accepted.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ConfigError, LuthierError
from . import runfile
from .names import foreign, nearest
from .plugins import Plug, Range, hints, kind_of, kinds, plugin, sentences, unwrap
from .runfile import Key, Mark, Tree
from .schema import schema

if TYPE_CHECKING:
    from .run import Run

__all__ = [
    "ConfigError",
    "Plug",
    "Range",
    "completed",
    "difference",
    "digest",
    "dump",
    "error_at",
    "is_plug",
    "kind_of",
    "kinds",
    "load_run",
    "override",
    "plain",
    "plugin",
    "read",
    "run_of",
    "schema",
    "sentences",
    "spell_out",
    "tree_of",
]

T = TypeVar("T")
_SIMPLE: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_YES_NO = {"yes": True, "on": True, "no": False, "off": False}


def load_run(source: str | Path | Mapping[str, Any] | None, overrides: Iterable[str] = ()) -> Run:
    """A Run from a YAML file, a plain tree or nothing, and "key=value" settings, which win. Raises ConfigError."""
    tree = tree_of(source)
    if isinstance(named := tree.values.get("stages"), Mapping):
        what = f"these settings are several runs, the stages {_names(named)}"
        raise error_at(tree, ("stages",), f"{what}, and one run is asked for here; luthier train runs them (luthier.train_stages in Python), --stage NAME one")
    override(tree, [(s, *runfile.split(s)) for s in overrides])
    return run_of(tree)


def tree_of(source: str | Path | Mapping[str, Any] | None) -> Tree:
    """The settings of a YAML file, a plain tree or nothing, shorthands spelled out (`method: lora` as {kind: lora})."""
    tree = runfile.read_file(Path(source)) if isinstance(source, str | Path) else Tree(copy.deepcopy(dict(source or {})))
    spell_out(tree)
    return tree


def override(tree: Tree, settings: Iterable[tuple[str, list[str], str]]) -> None:
    """Apply settings to the tree of a run: (what the user wrote, the keys, the text of the value)."""
    from .run import Run

    names_kind = lambda keys: keys[0] in hints(Run) and is_plug(keys[0]) and keys[1:] in ([], ["kind"])  # noqa: E731
    for setting, keys, text in sorted(settings, key=lambda s: not names_kind(s[1])):  # kinds first: a new kind drops the old kind's keys, not this line's
        _override(Run, tree, setting, keys, text)


def run_of(tree: Tree) -> Run:
    """The Run of a tree. Raises ConfigError."""
    from .run import Run

    return _Reader(tree, files=True).fields(Run, tree.values, ())


def error_at(tree: Tree, path: Key, problem: str) -> ConfigError:
    """The one sentence for a problem with a setting: where it was written, its key, the problem."""
    return _Reader(tree).error(path, problem)


def is_plug(section: str) -> bool:
    """Whether a section of a run holds a plug-in, so that its keys depend on its kind."""
    from .run import Run

    return unwrap(hints(Run)[section])[1] is not None


def read(cls: type[T], tree: Any, where: str = "") -> T:
    """Plain data as a dataclass of settings; ``where`` begins the key path in messages. The user's own .py files are not run. Raises ConfigError."""
    return _Reader(Tree(tree), where=where).fields(cls, tree, ())


def completed(settings: Any) -> dict[str, Any]:
    """The fields of a Run written in Python, checked like a file's, with kinds given by name replaced by their plug-ins. Raises ConfigError."""
    values = _shallow(settings)
    reader = _Reader(Tree(values), files=True)
    return {k: reader.value(h, values[k], (k,), values[k]) for k, h in hints(type(settings)).items()}


def plain(settings: Any) -> dict[str, Any]:
    """Settings as plain data that reads back equal, the kind of each plug-in included."""
    return {spelled(name): _plain(getattr(settings, name), hint) for name, hint in hints(type(settings)).items()}


def _plain(value: Any, hint: Any) -> Any:
    inner, plug, _ = unwrap(hint)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ({"kind": kind_of(value)} if plug is not None else {}) | plain(value)
    each = typing.get_args(inner)[-1] if typing.get_origin(inner) is dict else None
    if isinstance(value, Mapping):
        return {k: _plain(v, each) for k, v in value.items()}
    return [_plain(v, None) for v in value] if isinstance(value, tuple) else value


def spelled(field: str) -> str:
    """A setting's key: `from_` is written `from`, which no Python field can be called."""
    return field.removesuffix("_")


class _Own(dict[str, Any]):
    """A settings object's fields, by their Python names."""


def dump(run: Any) -> str:
    """A whole run as YAML; ``load_run`` reads it back equal."""
    return runfile.write(plain(run))


def digest(run: Any) -> str:
    """SHA-256 of all settings."""
    return hashlib.sha256(json.dumps(plain(run), sort_keys=True).encode()).hexdigest()


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What differs between two plain runs, a line a setting: "optim.lr: 0.001 -> 0.01"."""
    return runfile.differences(dict(a), dict(b))


# --- before reading: shorthands and overrides ------------------------------------------------------------------------


def spell_out(tree: Tree) -> None:
    """Write `method: lora` as {kind: lora} and `model: fiddle` as {id: fiddle}, so that overrides find their place."""
    from .run import Run

    for name, hint in hints(Run).items():
        short = _short(hint)
        value = tree.values.get(name, {})
        if value is None and (short or dataclasses.is_dataclass(unwrap(hint)[0])):
            tree.values[name] = {}  # a heading whose lines are all commented out
        elif short and not isinstance(value, dict):
            tree.values[name] = {short: value}
            tree.marks |= {(name, short, *k[1:]): m for k, m in list(tree.marks.items()) if k[:1] == (name,)}
        if dataclasses.is_dataclass(inner := _one_of(hint)):
            _spell_inside(tree, inner, tree.values.get(name), (name,))


def _spell_inside(tree: Tree, cls: Any, values: Any, path: Key) -> None:
    """The same for settings that lie in a mapping of the user's own names: `sources: {news: news.jsonl}` as {news: {files: news.jsonl}}."""
    for name, hint in hints(cls).items() if isinstance(values, dict) else ():
        inner, value, here = _one_of(hint), values.get(name), (*path, name)
        if dataclasses.is_dataclass(inner):
            _spell_inside(tree, inner, value, here)
        elif typing.get_origin(inner) is dict and isinstance(value, dict) and (short := _short(typing.get_args(inner)[1])):
            for key, given in value.items():
                if given is not None and not isinstance(given, dict):
                    value[key] = {short: given}
                    n = len(here) + 1
                    tree.marks |= {(*here, key, short, *k[n:]): m for k, m in list(tree.marks.items()) if k[:n] == (*here, key)}


def _one_of(hint: Any) -> Any:
    """The type, of one that may be None the other."""
    inner, _, _ = unwrap(hint)
    options = [a for a in typing.get_args(inner) if a is not type(None)]
    return options[0] if typing.get_origin(inner) in (typing.Union, types.UnionType) and options else inner


def _short(hint: Any) -> str | None:
    """The key that a value written without one goes to."""
    inner, plug, _ = unwrap(hint)
    return "kind" if plug is not None else getattr(inner, "shorthand", None) if dataclasses.is_dataclass(inner) else None


def _override(cls: type, tree: Tree, setting: str, keys: list[str], text: str) -> None:
    hint = hints(cls).get(keys[0])
    short = None if hint is None else _short(hint)
    value = runfile.parse(text, setting, lines=False).values if short and len(keys) == 1 else None
    if short and len(keys) == 1 and not isinstance(value, dict):
        keys = [keys[0], short]
    if short == "kind" and keys[1:] == ["kind"]:
        now = tree.values.setdefault(keys[0], {})
        default = next(f.default for f in dataclasses.fields(cls) if f.name == keys[0])
        if not isinstance(now, dict) or now.get("kind", default) != text:
            tree.values[keys[0]] = {}
            tree.forget((keys[0],))
    runfile.put(tree, ".".join(keys) + "=" + text, setting)


def _shallow(settings: Any) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}


# --- reading --------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads plain values as types; knows where each was written."""

    def __init__(self, tree: Tree, *, where: str = "", files: bool = False):
        self.tree, self.where, self.files = tree, where, files

    def error(self, path: Key, problem: str) -> ConfigError:
        """The one sentence: where it was written, the key, the problem."""
        mark = self.tree.mark(path) or Mark("")
        key, origin = ".".join([*filter(None, (self.where, mark.above)), *map(str, path)]), mark.origin
        parts = [origin] if origin.startswith(f"{key}=") else [origin, key]
        return ConfigError(": ".join([*filter(None, parts), problem]))

    def fields(self, cls: type[T], value: Any, path: Key, name: str = "") -> T:
        """A dataclass from a mapping of its fields."""
        value = _Own(_shallow(value)) if isinstance(value, cls) else value
        if not isinstance(value, Mapping):
            short = getattr(cls, "shorthand", None)
            if short is None or value is None:
                raise self.error(path, f"found {_found(value)}, accepted are the keys {_names(hints(cls))}")
            value = {short: value}
        defaults = {spelled(f.name): f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        value = {spelled(k): v for k, v in value.items()} if isinstance(value, _Own) else value
        for key in value:
            if key not in defaults:
                raise self.unknown(cls, key, path, name)
        for f in dataclasses.fields(cls):  # type: ignore[arg-type]
            if spelled(f.name) not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise self.error((*path, f.name), f"must be given. {sentences(cls).get(f.name, '')}".strip())
        ready = {}
        for field, hint in hints(cls).items():
            key = spelled(field)
            if key in value:
                ready[field] = self.value(hint, value[key], (*path, key), defaults[key], sentences(cls).get(field, ""))
        try:
            return cls(**ready)
        except ConfigError:
            raise
        except LuthierError as e:  # its own check: "rank: must be at least 1"
            key, colon, rest = str(e).partition(": ")
            raise (self.error((*path, key), rest) if colon and key in defaults else self.error(path, str(e))) from None

    def value(self, hint: Any, value: Any, path: Key, default: Any = None, sentence: str = "") -> Any:
        """One value as its annotated type, its range checked."""
        inner, plug, bounds = unwrap(hint)
        if plug is not None:
            return self.plug(plug, value, path, default)
        if typing.get_origin(inner) in (typing.Union, types.UnionType):
            options = [a for a in typing.get_args(inner) if a is not type(None)]
            if value is None and len(options) < len(typing.get_args(inner)):
                return None
            number = int in options and isinstance(value, int | float) and not isinstance(value, bool)
            inner = next((o for o in options if (typing.get_origin(o) is dict) == isinstance(value, Mapping) and (o is int) == number), options[0])
            if typing.get_origin(inner) is typing.Literal:
                return self.choice(typing.get_args(inner), value, path, *(["a whole number"] if int in options else []))
        origin, args = typing.get_origin(inner), typing.get_args(inner)
        if dataclasses.is_dataclass(inner):
            return self.fields(inner, value, path)  # type: ignore[arg-type]
        if origin is typing.Literal:
            return self.choice(args, value, path)
        if origin is tuple:
            if isinstance(value, list | tuple):
                return tuple(self.value(args[0], v, (*path, i), sentence=sentence) for i, v in enumerate(value))
            if value is None or isinstance(value, Mapping):
                raise self.wrong(value, "a list", path, sentence)
            return (self.value(args[0], value, path, sentence=sentence),)  # one alone
        if origin is dict:
            if not isinstance(value, Mapping):
                raise self.wrong(value, "a mapping of key: value", path, sentence)
            return {str(k): self.value(args[1], v, (*path, k), sentence=sentence) for k, v in value.items()}
        return self.simple(inner, bounds, value, path, sentence)

    def simple(self, cls: type, bounds: Range | None, value: Any, path: Key, sentence: str) -> Any:
        """true/false, a number or a text; bool is not int, `1e4` is a whole number, a text may look like a number."""
        raw = self.tree.marks[path].raw if path in self.tree.marks else None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        ready: Any = None
        if cls is str:
            ready = value if isinstance(value, str) else raw if value is not None else None
        elif cls is bool:
            ready = value if isinstance(value, bool) else _YES_NO.get(str(value).lower())
        elif is_number and math.isfinite(value) and (cls is float or float(value).is_integer()):
            ready = cls(value)
        accepted = _SIMPLE[cls] + (f", {bounds}" if bounds is not None else "")
        if ready is None or (bounds is not None and not bounds.holds(ready)):
            raise self.wrong(value, accepted, path, sentence)
        return ready

    def wrong(self, value: Any, accepted: str, path: Key, sentence: str) -> ConfigError:
        """Found this, accepted is that; and what the setting is for."""
        return self.error(path, f"found {_found(value)}, accepted is {accepted}" + (f" ({sentence.rstrip('.')})" if sentence else ""))

    def choice(self, choices: tuple[Any, ...], value: Any, path: Key, *more: str) -> Any:
        """One of a few words (or something ``more``, which the value is not); true and false count as yes and no where these are among them."""
        if isinstance(value, bool) and {"yes", "no"} <= set(choices):
            value = "yes" if value else "no"
        if any(value == c and type(value) is type(c) for c in choices):
            return value
        guess = nearest(str(value), map(str, choices))
        raise self.error(path, f"found {_found(value)}, accepted are {_names((*choices, *more))}" + (f"; did you mean {guess}?" if guess else ""))

    def plug(self, plug: Plug, value: Any, path: Key, default: Any) -> Any:
        """A plug-in: its kind, or a mapping of its kind and its fields; an object made in Python stays as it is."""
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return value
        value = {"kind": value} if isinstance(value, str) else {} if value is None else value
        if not isinstance(value, Mapping):
            raise self.error(path, f"found {_found(value)}, accepted are {_names(kinds(plug.package))}, or a mapping with a kind")
        rest = dict(value)
        kind = rest.pop("kind", default)
        if not isinstance(kind, str):
            raise self.error((*path, "kind"), f"found {_found(kind)}, accepted are {_names(kinds(plug.package))}")
        if kind == "auto" and default == "auto":
            if rest:
                raise self.error((*path, next(iter(rest))), f"auto takes no settings; name a kind: {_names(kinds(plug.package))}")
            return kind
        try:
            cls = plugin(plug.package, kind, files=self.files)
        except ConfigError as e:
            raise self.error((*path, "kind") if (*path, "kind") in self.tree.marks else path, str(e)) from e.__cause__
        return self.fields(cls, rest, path, f"{path[-1]} {kind}")

    # --- a key that is not there ------------------------------------------------------------------------------------

    def unknown(self, cls: type, key: Any, path: Key, name: str) -> ConfigError:
        """The error for a key nothing is called: with the right name, if one can be guessed."""
        here = ".".join(map(str, path))
        full, key = (*path, key), str(key)
        own = [spelled(n) for n in hints(cls)]
        mine = [f"{here}.{n}" if here else n for n in own]
        if ":" in key:
            return self.error(full, f"unknown key; write `{key.split(':')[0]}: {key.split(':', 1)[1].strip()}`, with a space after the colon")
        if "." in key:
            return self.error(full, f"unknown key; in a file, nest it: `{key.split('.')[0]}: {{{key.split('.', 1)[1]}: ...}}`")
        if not here and isinstance(self.tree.values, Mapping) and isinstance(self.tree.values.get(key), Mapping) and nearest(key, ["stages"], 0.8):
            return self.error(full, "unknown key; did you mean stages?")
        near = nearest(key, own, 0.6)
        found = [mine[own.index(near)]] if near and near.lower() == key.lower().replace("-", "_") else []
        theirs = foreign(key) if not self.where else None
        found = found or [p for p in self.everywhere().get(key, []) if p not in mine] or ([theirs] if theirs and theirs != here else [])
        found = found or ([mine[own.index(near)]] if near else [])
        if not found and (far := nearest(key, self.everywhere(), 0.8)):
            found = self.everywhere()[far]
        owner = f"{name} has no such key" if name else "unknown key"
        accepted = _names(own) or "none"
        return self.error(full, f"{owner}; did you mean {' or '.join(found)}?" if found else f"{owner}; accepted: {accepted}")

    def everywhere(self) -> dict[str, list[str]]:
        """Field name -> the key paths that have it, over the whole run, with the kinds this run names. Empty where no run is read."""
        from .run import Run

        if self.where or not isinstance(self.tree.values, Mapping):
            return {}
        out: dict[str, list[str]] = {}
        for section, hint in hints(Run).items():
            inner, plug, _ = unwrap(hint)
            if plug is not None:
                given = self.tree.values.get(section)
                kind = given.get("kind") if isinstance(given, Mapping) else given
                default = getattr(Run, section)
                inner = _class(plug, kind if isinstance(kind, str) else default, self.files)
            for name in hints(inner) if dataclasses.is_dataclass(inner) else ():
                out.setdefault(name, []).append(f"{section}.{name}")
            out.setdefault(section, []).append(section)
        return out


def _class(plug: Plug, kind: str, files: bool) -> type | None:
    try:
        return plugin(plug.package, kind, files=files)
    except ConfigError:
        return None


def _names(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names))


def _found(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    return json.dumps(value) if isinstance(value, bool) else f"the list {list(value)}" if isinstance(value, list | tuple) else repr(value)
