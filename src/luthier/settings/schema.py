"""A JSON schema of a run for editors, from the same dataclasses that read it."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from .plugins import Plug, Range, hints, kinds, plugin, sentences, unwrap

_SIMPLE = {bool: "boolean", int: "integer", float: "number", str: "string"}


def schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a run file, the fields of every plug-in included, and its stages. Imports every plug-in."""
    from .run import Run

    whole = _object(Run)
    stages = {
        "type": "object",
        "description": "Runs one after another. Each is laid over what stands beside stages; stage:NAME in it is what that earlier stage leaves.",
        "minProperties": 1,
        "propertyNames": {"pattern": "^(?!all$)[A-Za-z0-9][A-Za-z0-9_-]*$"},
        "additionalProperties": _stage(Run),
    }
    whole["properties"] = whole["properties"] | {"stages": stages}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A luthier run", **whole}


def _stage(cls: type) -> dict[str, Any]:
    """A stage: a run without a place of its own. A plug-in given without its kind takes the shared one, whose fields are not known here."""
    properties: dict[str, Any] = {}
    for name, hint in hints(cls).items():
        if name in ("name", "out"):
            continue
        same = {"$ref": f"#/properties/{name}"}
        _, plug, _ = unwrap(hint)
        properties[name] = same if plug is None else {"anyOf": [same, {"type": "object", "not": {"required": ["kind"]}}]}
    return {"anyOf": [{"type": "object", "properties": properties, "additionalProperties": False}, {"type": "null"}]}


def _object(cls: type, **first: Any) -> dict[str, Any]:
    properties, said = dict(first), sentences(cls)
    required = []
    for f in dataclasses.fields(cls):
        about = _value(hints(cls)[f.name], f.default)
        if f.name in said:
            about = {"description": said[f.name]} | about
        default = list(f.default) if isinstance(f.default, tuple) else f.default
        if default is None or isinstance(default, bool | int | float | str | list):
            about = about | {"default": default}
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            required.append(f.name)
        properties[f.name.removesuffix("_")] = about
    whole = {"type": "object", "description": (cls.__doc__ or "").strip().split("\n")[0], "properties": properties, "additionalProperties": False}
    return whole | ({"required": required} if required else {})


def _value(hint: Any, default: Any = None) -> dict[str, Any]:
    inner, plug, bounds = unwrap(hint)
    if plug is not None:
        return _plug(plug, default)
    if typing.get_origin(inner) in (typing.Union, types.UnionType):
        options = [a for a in typing.get_args(inner) if a is not type(None)]
        return {"anyOf": [_value(o) | _bounds(bounds) for o in options] + [{"type": "null"}]}
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    if dataclasses.is_dataclass(inner):
        short = getattr(inner, "shorthand", None)
        whole = _object(inner)  # type: ignore[arg-type]
        return {"anyOf": [whole, _value(hints(inner)[short])]} if short else whole  # type: ignore[arg-type]
    if origin is typing.Literal:
        yes_no = [True, False] if {"yes", "no"} <= set(args) else []  # editors that speak YAML 1.1 read yes and no as these
        return {"enum": [*args, *yes_no]}
    if origin is tuple:
        return {"anyOf": [{"type": "array", "items": _value(args[0])}, _value(args[0])]}
    if origin is dict:
        _, plug, _ = unwrap(args[1])
        return {"type": "object", "additionalProperties": _value(args[1]) if plug is None else {"$ref": f"#/properties/{_section(plug)}"}}
    return {"type": _SIMPLE[inner]} | _bounds(bounds)


def _section(plug: Plug) -> str:
    """Where a run has a plug-in of this axis: plug-ins that hold others of their own axis would have no end."""
    from .run import Run

    return next(name for name, hint in hints(Run).items() if unwrap(hint)[1] == plug)


def _bounds(bounds: Range | None) -> dict[str, float]:
    if bounds is None:
        return {}
    low = {} if bounds.low is None else {"exclusiveMinimum" if bounds.low_open else "minimum": bounds.low}
    return low | ({} if bounds.high is None else {"maximum": bounds.high})


def _plug(plug: Plug, default: Any) -> dict[str, Any]:
    names = kinds(plug.package)
    words = [*names, "auto"] if default == "auto" else names
    objects = []
    for kind in names:
        one = _object(plugin(plug.package, kind), kind={"const": kind})
        objects.append(one if kind == default else one | {"required": ["kind", *one.get("required", [])]})
    if default == "auto":
        objects.append({"type": "object", "properties": {"kind": {"const": "auto"}}, "additionalProperties": False})
    own = {"type": "object", "properties": {"kind": {"type": "string", "pattern": r"\.py$"}}, "required": ["kind"]}
    return {"anyOf": [{"enum": words}, {"type": "string", "pattern": r"\.py$"}, *objects, own]}
