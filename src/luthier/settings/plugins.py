"""The file name is the registration: how the kinds of an axis are found, loaded and described.

``methods/lora.py`` is ``method: lora``. Listing kinds reads file names, never the files: importing one costs torch.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import math
import pkgutil
import sys
import textwrap
import typing
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ConfigError
from ..heap import loading
from .names import nearest

AXES = {"methods": "Method", "objectives": "Objective", "precision": "Precision", "place": "Place", "tasks": "Task"}
OURS = __name__.partition(".")[0]
ROOT = Path(__file__).parents[1]  # the folders of the axes stand here
_OWN: dict[tuple[Path, int], ModuleType] = {}  # the user's own files, by path and time of change


@dataclasses.dataclass(frozen=True)
class Plug:
    """Marks a field that holds a plug-in: a file of ``package``, which defines ``cls``."""

    package: str
    cls: str


@dataclasses.dataclass(frozen=True)
class Range:
    """Marks the accepted range of a number; both ends belong to it unless ``low_open``."""

    low: float | None = None
    high: float | None = None
    low_open: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        if not math.isfinite(value):
            return False
        above = self.low is None or value > self.low or (value == self.low and not self.low_open)
        return above and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.low is not None and self.high is not None and not self.low_open:
            return f"{self.low:g} to {self.high:g}"
        low = [] if self.low is None else [f"above {self.low:g}" if self.low_open else f"at least {self.low:g}"]
        return " and ".join(low + ([] if self.high is None else [f"at most {self.high:g}"]))


def within_ranges(obj: Any) -> None:
    """For a plug-in's ``__post_init__``: raise ConfigError where a number lies outside the Range of its field."""
    for name, hint in hints(type(obj)).items():
        _, _, bounds = unwrap(hint)
        value = getattr(obj, name)
        for v in value.values() if isinstance(value, dict) else [value]:
            if bounds is not None and v is not None and not bounds.holds(v):
                raise ConfigError(f"{name}: must be {bounds}, found {v}")


def folder(package: str) -> Path:
    """Where the files of an axis stand."""
    return ROOT / package


def kinds(package: str) -> list[str]:
    """The kinds of an axis, sorted; nothing is imported."""
    return sorted(m.name for m in pkgutil.iter_modules([str(folder(package))]) if not m.name.startswith("_"))


def plugin(package: str, kind: str, *, files: bool = False) -> type:
    """The class of a kind. ``files``: a path to the user's own .py file is also accepted; never for what a download names.

    Raises ConfigError where there is no such kind.
    """
    name = AXES[package]
    if kind in kinds(package):
        with loading():
            module = importlib.import_module(f"{OURS}.{package}.{kind}")
        return _class_in(module, name, kind)
    if is_path(kind):
        if not files:
            raise ConfigError(f"{kind!r}: a Python file is only run where your own run file or command line names it; accepted are {', '.join(kinds(package))}")
        return _class_in(_load_own(package, Path(kind).expanduser()), name, kind)
    guess = nearest(kind, kinds(package))
    hint = f"did you mean {guess}?" if guess else f"there are {', '.join(kinds(package))}, and your own: ./file.py"
    raise ConfigError(f"no {name.lower()} is called {kind!r}; {hint}")


def is_path(kind: str) -> bool:
    """Whether a kind names the user's own file."""
    return kind.endswith(".py") or "/" in kind or "\\" in kind


def kind_of(obj: Any) -> str:
    """The kind of a plug-in object: the name of its file, or the whole path of the user's own file."""
    module = sys.modules[type(obj).__module__]
    return getattr(module, "OWN_FILE", None) or module.__name__.rsplit(".", 1)[-1]


def _class_in(module: ModuleType, name: str, kind: str) -> type:
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise ConfigError(f"{kind}: the file must define a class called {name}, and it defines none")
    if name != "Task" and not dataclasses.is_dataclass(found):  # a task has no settings to read
        raise ConfigError(f"{kind}: its class {name} must be a dataclass, so that its settings can be read")
    return found


def _load_own(package: str, path: Path) -> ModuleType:
    """Import the user's file as if it stood in the axis' folder, so that a copy of one of ours works unchanged."""
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; paths are read from the current folder")
    key = (path, path.stat().st_mtime_ns)
    if key in _OWN:
        return _OWN[key]
    name = f"{OURS}.{package}.{path.stem}" if path.stem not in kinds(package) else f"{OURS}.{package}.own_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    module.__dict__["OWN_FILE"] = str(path)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[name]
        raise ConfigError(f"{path}: does not import: {type(e).__name__}: {e}") from e
    _OWN[key] = module
    return module


# --- what the fields say --------------------------------------------------------------------------------------------


def sentences(cls: Any) -> dict[str, str]:
    """The sentence below each field of a dataclass, parents included."""
    return _sentences(cls)


def hints(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, in order, with what Annotated says."""
    return _hints(cls)


@cache
def _sentences(cls: type) -> dict[str, str]:
    out: dict[str, str] = {}
    for c in reversed(cls.__mro__):
        if dataclasses.is_dataclass(c):
            out |= _sentences_in(c)
    return out


def _sentences_in(cls: type) -> dict[str, str]:
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):  # typed at a prompt: there is no source to read
        return {}
    assert isinstance(body, ast.ClassDef)
    out = {}
    for statement, after in zip(body.body, body.body[1:], strict=False):
        match statement, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                out[name] = " ".join(said.split())
    return out


@cache
def first_line(path: Path) -> str:
    """The first line of a file's docstring; the file is parsed, not imported."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return doc.splitlines()[0] if doc else ""


@cache
def _hints(cls: type) -> dict[str, Any]:
    types = typing.get_type_hints(cls, include_extras=True)
    return {f.name: types[f.name] for f in dataclasses.fields(cls)}


def unwrap(hint: Any) -> tuple[Any, Plug | None, Range | None]:
    """(the type without Annotated, its Plug, its Range)."""
    if typing.get_origin(hint) is not typing.Annotated:
        return hint, None, None
    inner, *marks = typing.get_args(hint)
    plug = next((m for m in marks if isinstance(m, Plug)), None)
    return inner, plug, next((m for m in marks if isinstance(m, Range)), None)
