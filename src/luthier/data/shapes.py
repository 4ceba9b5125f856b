"""What shape records have, and one normal form for all of them: a chat or a document.

The shape is detected from the first records and named to the user; nothing is registered anywhere. A name that could mean two things is
not guessed: the error lists the columns and how to say which is which.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core import LuthierError
from .formats import Record
from .trees import NAME as TREE
from .trees import is_tree

LOOK_AT = 100  # records read before the shape is decided
SHAPES = ("text", "prompt", "alpaca", "messages", "sharegpt")
PAIRS = (
    ("prompt", "completion"), ("question", "answer"), ("mr", "ref"), ("mr", "refs"), ("input", "output"), ("source", "target"),
    ("query", "response"), ("prompt", "response"),
)  # fmt: skip
OURS = {
    "text": ("text",),
    "prompt": ("prompt", "completion", "system"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "messages": ("messages", "tools", "system"),
    "sharegpt": ("conversations", "tools", "system"),
}
NEEDED = {
    "text": ("text",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation in the form that chat templates read."""

    messages: list[dict[str, Any]]  # {"role": system | user | assistant | tool, "content": str, "tool_calls"?: [...]}
    tools: list[dict[str, Any]] | None = None
    where: str = ""
    untrained: frozenset[int] = frozenset()  # assistant turns whose record says weight 0
    extras: Mapping[str, Any] = field(default_factory=dict)  # the record as it was written


@dataclass(frozen=True, slots=True)
class Document:
    """Raw text."""

    text: str
    where: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """The name of a shape, and under which of the user's columns its parts stand (ours -> yours)."""

    name: str
    columns: Mapping[str, str]

    @property
    def is_text(self) -> bool:
        return self.name == "text"

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(k if k == v else f'{k} = column {v!r}' for k, v in self.columns.items())})"


# --- detection ------------------------------------------------------------------------------------------------------


def detect(records: Sequence[Record], *, shape: str = "auto", columns: Mapping[str, str] | None = None) -> Shape:
    """The shape of these records; ``columns`` (ours: yours) and a given ``shape`` decide before the names do."""
    if columns:
        return _mapped(records, shape, columns)
    if shape == "auto" and is_tree(records[0].fields):
        return Shape(TREE, {"prompt": "prompt"})
    if shape == "auto":
        _refuse_judged(records[0])
    found: dict[str, tuple[Shape, Record]] = {}
    unknown: list[Record] = []
    for record in records:
        one = _shape_of(record.fields, shape)
        if one is None:
            unknown.append(record)
        else:
            found.setdefault(one.name, (one, record))
    if len(found) > 1:
        listed = "; ".join(f"{s.name} at {r.where} (columns {', '.join(r.fields)})" for s, r in found.values())
        raise LuthierError(f"rows of different shapes in one file: {listed}. Put each shape in a file of its own, or set data.shape and data.columns.")
    if not found:
        raise _unknown(records[0], shape)
    one, _ = next(iter(found.values()))
    # the record that has most of the optional parts names them; a part that only later rows have is still read
    names = {ours: yours for r in records for s in [_shape_of(r.fields, shape)] if s for ours, yours in s.columns.items()}
    return Shape(one.name, names)


def _shape_of(fields: Mapping[str, Any], wanted: str) -> Shape | None:
    """The first shape, from the most to the least specific, whose columns this record has."""
    has = fields.keys()

    def named(name: str, **renamed: str) -> Shape:
        return Shape(name, {ours: renamed.get(ours, ours) for ours in OURS[name] if renamed.get(ours, ours) in has})

    for ours in ("messages", "conversations", "conversation"):
        if isinstance(fields.get(ours), list) and wanted in ("auto", "messages", "sharegpt"):
            name = wanted if wanted != "auto" else "messages" if ours == "messages" else "sharegpt"
            return named(name, **{NEEDED[name][0]: ours})
    if wanted in ("auto", "alpaca") and "instruction" in has:
        if "output" in has:
            return named("alpaca")
        if "response" in has:
            return named("alpaca", output="response", input="context" if "context" in has else "input")
    if wanted in ("auto", "prompt"):
        pairs = [(p, c) for p, c in PAIRS if p in has and c in has]
        if len(pairs) == 1 or ("prompt", "completion") in pairs:
            return named("prompt", prompt=pairs[0][0], completion=pairs[0][1])
        if pairs:
            return None
    if wanted in ("auto", "text") and isinstance(fields.get("text"), str):
        return named("text")
    return None


def _mapped(records: Sequence[Record], shape: str, columns: Mapping[str, str]) -> Shape:
    """The shape that the user's mapping describes."""
    if shape == "auto":
        fits = [name for name in SHAPES if set(columns) <= set(OURS[name])]
        full = [name for name in fits if set(NEEDED[name]) <= set(columns)]
        # {"input": "context"} alone: the parts that are not mapped keep their own names
        bare = [name for name in fits if all(columns.get(n, n) in records[0].fields for n in NEEDED[name])]
        if not (full or bare):
            accepted = "; ".join(f"{name}: {', '.join(parts)}" for name, parts in OURS.items())
            raise LuthierError(
                f"data.columns maps {', '.join(columns)}, which is no shape. Accepted on the left of each pair: {accepted}. "
                f"Columns of {records[0].where}: {', '.join(records[0].fields)}. Example: {{prompt: question, completion: answer}}."
            )
        shape = (full or bare)[0]
    wrong = set(columns) - set(OURS[shape])
    if wrong:
        raise LuthierError(f"data.columns: the shape {shape} has no part {sorted(wrong)[0]!r}. It has: {', '.join(OURS[shape])}.")
    full_map = {ours: columns.get(ours, ours) for ours in OURS[shape]}
    present = {key for r in records for key in r.fields}
    for ours, yours in full_map.items():
        if yours not in present and (ours in columns or ours in NEEDED[shape]):
            near = difflib.get_close_matches(yours, present, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise LuthierError(
                f"{records[0].where}: no column {yours!r} (wanted for {ours!r} of the shape {shape}). Columns found: {', '.join(records[0].fields)}.{hint} "
                f"Set data.columns={{{ours}: YOUR_COLUMN}}."
            )
    return Shape(shape, {ours: yours for ours, yours in full_map.items() if yours in present})


def _unknown(record: Record, shape: str) -> LuthierError:
    columns = ", ".join(record.fields)
    if shape != "auto":
        return LuthierError(
            f"{record.where}: not the shape {shape} that data.shape names: it needs {', '.join(NEEDED[shape])}. Columns found: {columns}. "
            f"Set data.columns={{{NEEDED[shape][-1]}: YOUR_COLUMN}}, or leave data.shape to be detected."
        )
    if any(p in record.fields for p, _ in PAIRS) and not any(a in record.fields for _, a in PAIRS):
        return LuthierError(
            f"{record.where}: prompts without answers (columns {columns}): nothing to learn from by themselves. objective: ppo and grpo learn from them, and "
            f"luthier eval --prompts scores what a model answers; else name the answers: data.columns={{prompt: {next(iter(record.fields))}, completion: ...}}."
        )
    pairs = [p for p in PAIRS if p[0] in record.fields and p[1] in record.fields]
    which = f" Several pairs would do: {', '.join(f'{a} / {b}' for a, b in pairs)}." if pairs else ""
    pairs_text = ", ".join(f"{a} / {b}" for a, b in PAIRS)
    return LuthierError(
        f"{record.where}: cannot tell the shape of the data. Columns found: {columns}.{which} Known: text; messages; conversations; "
        f"instruction / input / output; instruction / context / response; {pairs_text}. "
        f"Say which column is which, for example data.columns={{prompt: {next(iter(record.fields))}, completion: ...}} or {{text: ...}}."
    )


def _refuse_judged(record: Record) -> None:
    """Preference and KTO data look like demonstrations, and half of them are bad answers."""
    fields = record.fields
    if "chosen" in fields and "rejected" in fields:
        raise _judged(
            record,
            "preference pairs (chosen, rejected)",
            "objective: dpo, orpo or reward, or data.columns={prompt: prompt, completion: chosen} (or data.shape)",
        )
    flag = next((k for k in ("label", "kto_tag") if isinstance(fields.get(k), bool)), None)
    if flag and "text" not in fields:
        raise _judged(record, f"judged answers ({flag} true or false)", "objective: kto, or a file of the good ones, or set data.shape to train on all of them")


def _judged(record: Record, what: str, do: str) -> LuthierError:
    return LuthierError(f"{record.where}: these rows are {what}: training on them as they stand would also teach the bad answers. Use {do}.")
