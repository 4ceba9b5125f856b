"""What can be wrong with data, a family of findings a file: each file here has classes derived from Check, and that is their registration.

A check is shown every row once (``row``), what gave no row (``fault``), and the texts of held-out files before any training row (``held``); it keeps numbers
and hashes and no texts, so that a million rows fit. In the end it is asked for its findings.
"""

from __future__ import annotations

import importlib
import pkgutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...core import Row
from ..answers import Renderer
from ..divide import Item
from ..labels import Labelled, name_of
from ..preferences import Judged
from ..rows import Form
from ..shapes import Chat, Document
from ..words import short

Severity = Literal["error", "warning", "note"]
Split = Literal["train", "validation", "test", "against"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
SHOWN = 3  # examples of a finding


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the checks know beforehand: how rows are made, and what counts as alike."""

    renderer: Renderer
    renders: str
    form: Form
    max_tokens: int
    over_length: str
    positions: int  # how many tokens the model can see
    near: float = 0.8  # Jaccard similarity from which two rows are near duplicates
    ngram: int = 13  # words in a row that make a leak
    expected: int = 0  # rows, about; 0: not known
    objective: str = "sft"  # as the user writes it


@dataclass(frozen=True, slots=True)
class Cut:
    """What the over-length policy makes of a row that is too long."""

    response: bool  # the end of what is learned is gone
    lost: bool  # nothing that is learned is left
    pieces: int = 1


@dataclass(slots=True)
class Seen:
    """One row on its way past the checks."""

    index: int
    split: Split
    item: Item
    system: str
    prompt: str  # what is asked; of labelled texts, the texts
    answers: tuple[str, ...]  # what is learned: responses, or the text itself
    label: str = ""
    rows: Sequence[Row] = ()  # whole, before anything is cut
    cut: Cut | None = None  # None: it fits
    notes: Mapping[str, int] = field(default_factory=dict)  # what the renderer had to say of it

    @property
    def text(self) -> str:
        """Everything that is said in it."""
        return "\n".join(t for t in (self.system, self.prompt, *self.answers) if t)


def seen(index: int, split: Split, item: Item) -> Seen:
    """An item, taken apart."""
    if isinstance(item, Document):
        return Seen(index, split, item, "", "", (item.text,))
    if isinstance(item, Labelled):
        return Seen(index, split, item, "", "\n".join(item.texts), (), "" if item.label is None else name_of(item.label))
    if isinstance(item, Judged):
        asked = item.chats[0].messages[: item.prompt]
        label = "" if item.good is None else "good" if item.good else "bad"
        return Seen(index, split, item, _said(asked, "system"), _said(asked, "user", "tool", "assistant"), tuple(item.answers()), label)
    assert isinstance(item, Chat)
    learned = [i for i, m in enumerate(item.messages) if m["role"] == "assistant" and i not in item.untrained]
    asked = [m for i, m in enumerate(item.messages) if i not in learned]
    return Seen(index, split, item, _said(asked, "system"), _said(asked, "user", "tool", "assistant"), tuple(spoken(item.messages[i]) for i in learned))


def _said(messages: Iterable[Mapping[str, Any]], *roles: str) -> str:
    return "\n".join(spoken(m) for m in messages if m["role"] in roles)


def spoken(message: Mapping[str, Any]) -> str:
    """A message as text, with the calls it makes."""
    calls = (f"{c['function']['name']} {c['function']['arguments']}" for c in message.get("tool_calls") or ())
    return "\n".join(t for t in (message["content"], *calls) if t)


class Hits:
    """The rows that something was found in, eight bytes each, and what to show of the first few."""

    def __init__(self) -> None:
        self.rows, self.beside = array("q"), array("q")
        self.said: list[str] = []

    def add(self, row: int, said: str = "", beside: int = -1) -> None:
        """``said``: what was found there; ``beside``: another row that it has to do with."""
        self.rows.append(row)
        self.beside.append(beside)
        if len(self.said) < SHOWN:
            self.said.append(said)

    def __len__(self) -> int:
        return len(self.rows)


def beginning(row: Seen) -> str:
    """What is shown of a row where nothing better is known: how it begins."""
    said = (row.prompt, *row.answers) if row.prompt else row.answers
    return " → ".join(short(t, 110) for t in said[:2] if t) + (f" → {row.label}" if row.label else "")


@dataclass(kw_only=True)
class Finding:
    """Something to know about the data."""

    name: str  # what --keep calls it
    severity: Severity
    title: str  # what is so, in a few words
    said: str  # what that means
    fix: str  # the setting or option that helps
    hits: Hits
    count: int | None = None  # None: as many as there are hits
    unit: str = "rows"
    removes: Hits | None = None  # the rows --fix leaves out
    mends: Callable[[str], str] | None = None  # what --fix makes of every text of the file
    show: Callable[[Seen], str] = beginning

    @property
    def n(self) -> int:
        return len(self.hits) if self.count is None else self.count


class Check:
    """A family of findings; what it does not need it leaves out."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def held(self, row: Seen) -> None:
        """A row of a held-out or benchmark file, before any training row comes."""

    def row(self, row: Seen) -> None:
        """A row that is trained (or of a validation or test file, ``row.split``), with its tokens."""

    def fault(self, index: int, reason: str, *, in_record: bool) -> None:
        """A record that gives no row, and why. ``in_record``: it could be read, but not used."""

    def findings(self, again: Again) -> Iterator[Finding]:
        """What was found. ``again`` reads chosen rows once more."""
        return iter(())


Again = Callable[[Iterable[int]], Iterator[tuple[int, Seen]]]


def checks(setting: Setting) -> list[Check]:
    """One of every class in the files of this folder."""
    out: list[Check] = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        for thing in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(thing, type) and issubclass(thing, Check) and thing.__module__ == f"{__name__}.{module.name}":
                out.append(thing(setting))
    return out


def share(n: float, of: float) -> str:
    """ "12%", or "0.03%" where that is less than one."""
    part = 100 * n / of if of else 0.0
    return f"{part:.0f}%" if part >= 1 or not part else f"{part:.1g}%"
