"""Prepared data as one file of arrays and JSON, and back: equal to the last bit, or refused.

Ids of all rows lie end to end in one array, as do which of them are trained (a bit each) and other arrays, by their type; everything else is one JSON text.
What JSON would change (a tuple, a key that is no text, a date, bytes) is written with a tag. The file's header holds a digest of all of it.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import hashlib
import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..core import Row
from ..nn.corruption import Hiding
from .divide import Held

LAYOUT = "luthier rows 1"
_AS_THEY_ARE = (str, int, float, bool, type(None))
_TEXTS: dict[type, tuple[Callable[[Any], str], Callable[[str], Any]]] = {  # types that are written as a text, and how they are read
    bytes: (lambda x: base64.b64encode(x).decode(), base64.b64decode),
    datetime.datetime: (datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    datetime.date: (datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: (datetime.time.isoformat, datetime.time.fromisoformat),
    decimal.Decimal: (str, decimal.Decimal),
}
_BY_NAME = {t.__name__: t for t in _TEXTS}


class Unkeepable(Exception):
    """Why data cannot be kept."""


class Damaged(Exception):
    """Why a file cannot be read."""


# --- values -----------------------------------------------------------------------------------------------------------


class _Writer:
    """Values as JSON holds them; arrays and shared objects once, by number."""

    def __init__(self) -> None:
        self.arrays: dict[str, list[np.ndarray]] = {}
        self.places: list[list[Any]] = []  # [type, where it begins, shape] of each array
        self.shared: list[Any] = []  # the fields of each Hiding
        self._filled: dict[str, int] = {}
        self._seen: dict[int, tuple[Any, int]] = {}  # the object itself too: as long as it is held its id is its own

    def plain(self, x: Any) -> Any:
        kind = type(x)
        if kind in _AS_THEY_ARE:
            return x
        if kind is list:
            return [self.plain(v) for v in x]
        if kind is dict:
            if all(type(k) is str for k in x) and not (len(x) == 1 and next(iter(x))[:1] == "@"):
                return {k: self.plain(v) for k, v in x.items()}
            return {"@dict": [[self.plain(k), self.plain(v)] for k, v in x.items()]}
        if kind is tuple:
            return {"@tuple": [self.plain(v) for v in x]}
        if kind is np.ndarray:
            return {"@array": self._once(x, self._array)}
        if kind is Hiding:
            return {"@hiding": self._once(x, self._hiding)}
        if kind in _TEXTS:
            return {"@" + kind.__name__: _TEXTS[kind][0](x)}
        raise Unkeepable(f"a record holds a value of the type {kind.__name__}")

    def _once(self, x: Any, write: Callable[[Any], int]) -> int:
        if id(x) not in self._seen:
            self._seen[id(x)] = (x, write(x))
        return self._seen[id(x)][1]

    def _array(self, x: np.ndarray) -> int:
        if x.dtype.kind not in "biuf" or not x.dtype.isnative:
            raise Unkeepable(f"a record holds an array of {x.dtype}")
        name = x.dtype.name
        self.arrays.setdefault(name, []).append(x.ravel())
        self.places.append([name, self._filled.get(name, 0), list(x.shape)])
        self._filled[name] = self._filled.get(name, 0) + x.size
        return len(self.places) - 1

    def _hiding(self, x: Hiding) -> int:
        self.shared.append(self.plain([x.usual, x.mask, x.sentinels, x.start, x.eos]))
        return len(self.shared) - 1


class _Reader:
    """The way back, given to the JSON parser for every object, the inner ones first."""

    def __init__(self, arrays: Mapping[str, np.ndarray], places: list[list[Any]]) -> None:
        self.arrays = [arrays[name][at : at + int(np.prod(shape))].reshape(shape) for name, at, shape in places]
        self.shared: list[Hiding] = []

    def value(self, x: dict[str, Any]) -> Any:
        if len(x) != 1:
            return x
        ((key, v),) = x.items()
        if key[:1] != "@":
            return x
        if key == "@tuple":
            return tuple(v)
        if key == "@dict":
            return dict(v)
        if key == "@array":
            return self.arrays[v]
        if key == "@hiding":
            return self.shared[v]
        return _TEXTS[_BY_NAME[key[1:]]][1](v)


# --- files ------------------------------------------------------------------------------------------------------------


def write(path: Path, train: list[Row], validation: list[Row], held: list[Held], rest: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Write rows, held-out records and whatever else there is to remember. ``about``: a few words that can be read without the rest.

    Raises Unkeepable where something would not come back as it is.
    """
    rows, out = [*train, *validation], _Writer()
    if any(r.visit or r.ids.dtype != np.int32 or r.train.dtype != np.bool_ for r in rows):
        raise Unkeepable("its rows are of an unknown kind")
    content = {
        "train": len(train),
        "where": [r.where for r in rows],
        "extras": [out.plain(r.extras) for r in rows],
        "held": [[out.plain(x) for x in (h.prompt, h.references, h.tools, h.where, h.extras, h.places)] for h in held],
        "rest": out.plain(dict(rest)),
    }
    tensors = {
        "ids": _joined([r.ids for r in rows], np.int32),
        "trained": np.packbits(_joined([r.train for r in rows], np.bool_)),
        "ends": np.cumsum([len(r) for r in rows], dtype=np.int64),
        "content": _json(content),
        "shared": _json([out.places, out.shared]),  # after the content, which fills them
        **{f"array.{name}": np.concatenate(some).view(np.uint8 if name == "bool" else name) for name, some in out.arrays.items()},
    }
    save_file(tensors, path, metadata={"layout": LAYOUT, **about, "digest": _digest(tensors, about)})


def read(path: Path) -> tuple[list[Row], list[Row], list[Held], dict[str, Any]]:
    """(training rows, validation rows, held-out records, the rest). Raises Damaged for anything that is not whole."""
    try:
        with safe_open(path, "np") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as e:
        raise Damaged(str(e).splitlines()[0][:100]) from None
    given, layout = about.pop("digest", ""), about.pop("layout", "")
    if layout != LAYOUT or given != _digest(tensors, about):
        raise Damaged("its content is not what was written")
    places, shared = _parsed(tensors["shared"], lambda x: x)
    back = _Reader({k.removeprefix("array."): v.view(bool) if k == "array.bool" else v for k, v in tensors.items() if k.startswith("array.")}, places)
    back.shared = [Hiding(*_parsed(_json(fields), back.value)) for fields in shared]
    content = _parsed(tensors["content"], back.value)
    trained = np.unpackbits(tensors["trained"], count=len(tensors["ids"])).view(np.bool_)
    cuts = pairwise([0, *tensors["ends"].tolist()])
    rows = [
        Row(tensors["ids"][a:b], trained[a:b], where, extras) for (a, b), where, extras in zip(cuts, content["where"], content["extras"], strict=True)
    ]  # fmt: skip
    n = content["train"]
    return rows[:n], rows[n:], [Held(*h) for h in content["held"]], content["rest"]


def about(path: Path) -> dict[str, str]:
    """The words in a file's header; {} where it has none that can be read."""
    try:
        with safe_open(path, "np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return {}


def _joined(some: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(some) if some else np.zeros(0, dtype=dtype)


def _json(content: Any) -> np.ndarray:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)  # files of records may hold half of a surrogate pair


def _parsed(content: np.ndarray, value: Callable[[dict[str, Any]], Any]) -> Any:
    return json.loads(content.tobytes().decode("utf-8", "surrogatepass"), object_hook=value)


def _digest(tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> str:
    h = hashlib.blake2b(json.dumps(sorted(about.items())).encode(), digest_size=16)
    for name in sorted(tensors):
        t = np.ascontiguousarray(tensors[name])
        h.update(f"{name} {t.dtype.str} {t.shape} ".encode())
        h.update(t.reshape(-1).view(np.uint8).data)
    return h.hexdigest()
