"""The text side of settings: YAML to plain values that remember where they stood, key=value overrides, and YAML again.

YAML is read by the rules of YAML 1.2: `1e-5` is a number, `on`, `off`, `yes`, `no`, dates and times are text. Nothing is expanded from the
environment. A key given twice is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

Key = tuple[str | int, ...]  # ("data", "train", 0)


@dataclass(frozen=True)
class Mark:
    """Where a value was written, and how."""

    origin: str  # "run.yaml, line 4"
    raw: str | None = None  # a scalar's own text: a text setting may look like a number
    above: str = ""  # the keys above the tree's root where it was written: "stages.sft"


@dataclass
class Tree:
    """Plain values with the place of each."""

    values: Any
    marks: dict[Key, Mark] = field(default_factory=dict)

    def mark(self, path: Key) -> Mark | None:
        """The place of a key, or of the nearest one above it."""
        for n in range(len(path), -1, -1):
            if path[:n] in self.marks:
                return self.marks[path[:n]] if n == len(path) else replace(self.marks[path[:n]], raw=None)
        return None

    def forget(self, path: Key) -> None:
        """Drop the places of everything at and below a key."""
        self.marks = {k: m for k, m in self.marks.items() if k[: len(path)] != path}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (the base declares it)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either generation of YAML would read as something other than text."""

    yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012


_TAG = "tag:yaml.org,2002:"
_RULES: list[tuple[str, str, str]] = [  # (tag, form, first characters)
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
    ("merge", r"<<", "<"),
]
for _name, _form, _first in _RULES:
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_form})$"), [*_first, *([""] if _name == "null" else [])])
_Dumper.add_representer(list, lambda d, v: d.represent_sequence(_TAG + "seq", v, flow_style=True))

_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, 0) if text[:2] in ("0x", "0o") else int(text.replace("_", "")),
    "float": lambda text: float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan")),
}


def parse(text: str, name: str, *, lines: bool = True) -> Tree:
    """YAML text as a Tree. Raises ConfigError in one sentence, with the line, for what is not YAML and for keys given twice."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = f"{name}, line {mark.line + 1}" if lines and mark is not None else name
        what = str(getattr(e, "problem", None) or e).replace("\n", " ")
        tab = "; indent with spaces, not tabs" if "\\t" in what else ""
        raise ConfigError(f"{place}: not valid YAML: {what}{tab}") from None
    finally:
        if loader is not None:
            loader.dispose()
    tree = Tree(None)
    if node is not None:
        tree.values = _Walk(loader, name, lines, tree).value(node, (), ())
    return tree


@dataclass
class _Walk:
    """Turns YAML nodes into values, and notes the place of each."""

    loader: Any
    name: str
    lines: bool
    tree: Tree

    def value(self, node: yaml.Node, path: Key, above: tuple[int, ...]) -> Any:
        origin = self.origin(node)
        if id(node) in above:
            raise ConfigError(f"{origin}: an alias that contains itself")
        self.tree.marks[path] = Mark(origin, node.value if isinstance(node, yaml.ScalarNode) else None)
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, above)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(n, (*path, i), above) for i, n in enumerate(node.value)]
        kind = node.tag.removeprefix(_TAG)
        if kind not in _SCALARS:
            raise ConfigError(f"{origin}: the tag {node.tag!r} is not read; only plain values are")
        try:
            return _SCALARS[kind](node.value)
        except ValueError:
            raise ConfigError(f"{origin}: {node.value!r} is no {kind}") from None

    def mapping(self, node: yaml.MappingNode, path: Key, above: tuple[int, ...]) -> dict[str, Any]:
        seen: dict[Hashable, int] = {}
        for key, _ in node.value:
            if key.tag == _TAG + "merge":
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{self.origin(key)}: a key must be a single word, found a list or a mapping")
            if key.value in seen:
                before = f" (first in line {seen[key.value]})" if self.lines else ""
                raise ConfigError(f"{self.origin(key)}: {'.'.join(map(str, (*path, key.value)))}: given twice{before}; keep one")
            seen[key.value] = key.start_mark.line + 1
        try:
            self.loader.flatten_mapping(node)  # `<<: *defaults`
        except yaml.YAMLError as e:
            raise ConfigError(f"{self.origin(node)}: {getattr(e, 'problem', e)}") from None
        out = {}
        for key, child in node.value:
            out[key.value] = self.value(child, (*path, key.value), above)
            self.tree.marks[*path, key.value] = Mark(self.origin(key), self.tree.marks[*path, key.value].raw)
        return out

    def origin(self, node: yaml.Node) -> str:
        return f"{self.name}, line {node.start_mark.line + 1}" if self.lines else self.name


def read_file(path: Path) -> Tree:
    """A YAML file as a Tree whose values are a mapping. Raises ConfigError where it is missing or is something else."""
    if not path.exists():
        raise ConfigError(f"{path}: no such run file")
    if path.is_dir():
        raise ConfigError(f"{path}: a folder; a run file is YAML (runs/NAME/run.yaml)")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8, so no run file") from None
    tree = parse(text, str(path))
    if tree.values is None:
        tree.values = {}
    if not isinstance(tree.values, dict):
        raise ConfigError(f"{path}: a run file is `key: value` lines, found {'a list' if isinstance(tree.values, list) else 'a single value'}")
    return tree


def split(assignment: str) -> tuple[list[str], str]:
    """Take "a.b=value" apart: (["a", "b"], "value"). Raises ConfigError for anything else."""
    path, eq, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not eq or not all(keys):
        raise ConfigError(f"{assignment!r}: not a setting; write key=value, for example optim.lr=1e-4 or method.rank=16")
    return keys, text.strip()


def put(tree: Tree, assignment: str, said: str | None = None) -> None:
    """Apply one "a.b=value", written by the user as ``said``; the value is read as YAML, lists take an index (or the next one, to append)."""
    keys, text = split(assignment)
    origin = said or assignment
    origin = origin if len(origin) <= 100 else origin[:97] + "..."
    value = parse(text, origin, lines=False)
    node: Any = tree.values
    path: Key = ()
    for i, word in enumerate(keys):
        last = i == len(keys) - 1
        key = _key(node, word, path, origin)
        path = (*path, key)
        if last:
            tree.forget(path)
            tree.marks |= {path: Mark(origin)} | {path + k: Mark(origin, m.raw) for k, m in value.marks.items()}
            child = value.values
        else:
            child = _child(node, key, keys[i + 1])
            tree.marks.setdefault(path, Mark(origin))
        if isinstance(node, list) and key == len(node):
            node.append(child)
        else:
            node[key] = child
        node = child


def _key(node: Any, word: str, path: Key, origin: str) -> str | int:
    above = ".".join(map(str, path))
    if isinstance(node, dict):
        return word
    if not isinstance(node, list):
        raise ConfigError(f"{origin}: {above} is {node!r}, which has nothing called {word!r} inside")
    if not word.isdigit() or int(word) > len(node):
        raise ConfigError(f"{origin}: {above} is a list of {len(node)}; its places are numbers from 0 to {len(node)} (the last one appends), found {word!r}")
    return int(word)


def _child(node: Any, key: Any, following: str) -> Any:
    """What lies at a key, made where nothing does; one text counts as a list of one when an index follows."""
    there = key in node if isinstance(node, dict) else key < len(node)
    child = node[key] if there else None
    if child is None:
        return [] if following.isdigit() else {}
    return [child] if isinstance(child, str) and following.isdigit() else child


def write(values: Any) -> str:
    """Plain values as YAML that reads back equal, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=160, default_flow_style=False)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """What differs between two plain trees, a line a key: "optim.lr: 0.001 -> 0.01"."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.get("kind") != b.get("kind"):  # the fields of two kinds do not compare
            return [f"{path}: {_said(a.get('kind'))} -> {_said(b.get('kind'))}"]
        out = []
        for key in [*a, *(k for k in b if k not in a)]:
            below = f"{path}.{key}" if path else str(key)
            if key not in a or key not in b:
                out.append(f"{below}: {_said(a[key]) if key in a else 'not there'} -> {_said(b[key]) if key in b else 'not there'}")
            else:
                out += differences(a[key], b[key], below)
        return out
    return [] if a == b and isinstance(a, bool) == isinstance(b, bool) else [f"{path or 'all'}: {_said(a)} -> {_said(b)}"]


def _said(value: Any) -> str:
    return write(value).strip().removesuffix("\n...").replace("\n", ", ") if not isinstance(value, str) else value
