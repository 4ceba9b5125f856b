"""Facts to ask a model: questions with their answers, subjects with their objects, or beginnings of statements; out of data of any shape."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..core import LuthierError
from .convert import convert
from .formats import Bad, Record
from .shapes import LOOK_AT, Chat, Shape, detect
from .sources import read

SUBJECT, OBJECT = "sub_label", "obj_label"  # LAMA's and ParaRel's names
ALIASES = ("aliases", "answer_aliases")  # columns that hold more right answers


@dataclass(frozen=True, slots=True)
class Fact:
    """A question and what answers it: any of ``answers`` is right. ``question`` is a subject where patterns say the fact."""

    question: str
    answers: tuple[str, ...]
    system: str = ""
    group: str = ""  # exemplars come from the same
    where: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)  # the record as it was written


@dataclass(frozen=True, slots=True)
class Pattern:
    """A way to say facts of one relation: "[X] was born in [Y]." """

    before: str  # up to [Y], with [X] in it
    tail: str  # behind [Y]: punctuation or nothing

    def opening(self, subject: str) -> str:
        """The statement up to where the answer comes."""
        return self.before.replace("[X]", subject)

    def __str__(self) -> str:
        return f"{self.before} [Y]{self.tail}"


def pattern_of(text: str) -> Pattern:
    """A pattern as it is written. Raises LuthierError where nothing can be asked with it."""
    before, found, tail = text.partition("[Y]")
    if not found or "[X]" not in before:
        raise LuthierError(f'the pattern {text!r} cannot ask: it needs [X], the subject, and behind it [Y], the answer, as in "[X] was born in [Y]."')
    if re.search(r"\w", tail):
        raise LuthierError(f"the pattern {text!r} goes on behind [Y]; the answer has to come last, but for punctuation")
    return Pattern(before.rstrip(), tail.strip())


def read_patterns(given: Sequence[str]) -> tuple[list[Pattern], list[str]]:
    """Patterns of the command line, each a text or a file with a column ``pattern``; and sentences about those of a file that cannot ask."""
    out, said = [], []
    for text in given:
        if "[X]" in text or "[Y]" in text or not Path(text).expanduser().exists():
            out.append(pattern_of(text))
            continue
        useless = 0
        for record in read(text, bad=Bad("fatal")):
            try:
                out.append(pattern_of(str(record.fields.get("pattern", ""))))
            except LuthierError as e:
                if "pattern" not in record.fields:
                    raise LuthierError(f"{record.where}: no column 'pattern'; columns found: {', '.join(record.fields)}") from e
                useless += 1
        if useless:
            said.append(f"{text}: {useless} of its patterns are left out: the answer does not come last in them")
    return list(dict.fromkeys(out)), said


def read_facts(
    sources: Sequence[str], *, patterns: bool = False, columns: Mapping[str, str] | None = None, group: str | None = None
) -> tuple[list[Fact], list[str]]:
    """The facts of files, folders or Hub data sets, a row each, in their order, and sentences about what was met on the way.

    ``patterns``: statements say the facts, so subjects with objects are expected. ``columns``: ours to yours (prompt, completion). ``group``: the column whose
    value exemplars must share with a fact; default: the source. Bad rows are left out and counted. Raises LuthierError for what holds no facts.
    """
    out: list[Fact] = []
    said: list[str] = []
    for source in sources:
        bad = Bad("skip")
        found = list(_of_source(source, patterns, dict(columns or {}), group, bad))
        if bad.count:
            said.append(f"{source}: {bad.count:,} rows left out; the first: {bad.rows[0][0]}: {bad.rows[0][1]}")
        if not found:
            raise LuthierError(f"{source}: holds no fact" + (f"; {bad.rows[0][0]}: {bad.rows[0][1]}" if bad.count else ""))
        out += found
    return out, said


def _of_source(source: str, patterns: bool, columns: dict[str, str], group: str | None, bad: Bad) -> Iterator[Fact]:
    records = read(source, bad=bad)
    first = list(islice(records, LOOK_AT))
    if not first:
        raise LuthierError(f"{source}: no row in it")
    if not columns and {SUBJECT, OBJECT} <= first[0].fields.keys():
        if not patterns:
            raise LuthierError(
                f"{first[0].where}: these are subjects with objects ({SUBJECT}, {OBJECT}), which ask nothing by themselves; say how the fact is said: "
                '--pattern "[X] was born in [Y]." or --pattern FILE'
            )
        columns = {"prompt": SUBJECT, "completion": OBJECT}
    if group is not None and not any(group in r.fields for r in first):
        raise LuthierError(f"{first[0].where}: no column {group!r} to group by. Columns found: {', '.join(first[0].fields)}")
    shape = detect([_plain(r, columns.get("completion")) for r in first], columns=columns)
    if shape.is_text:
        raise LuthierError(
            f"{first[0].where}: this is raw text (columns {', '.join(first[0].fields)}), which asks nothing; "
            "say which columns are question and answer: --column prompt=NAME --column completion=NAME"
        )
    for record in chain(first, records):
        fact = _fact(record, shape, source if group is None else str(record.fields.get(group, "")), bad)
        if fact is not None:
            yield fact


def _plain(record: Record, answer: str | None) -> Record:
    """A record whose answer is an object {value, aliases} (TriviaQA), as one with a list of answers."""
    name = answer or next((n for n in ("answer", "completion", "output", "response") if n in record.fields), None)
    value = record.fields.get(name or "")
    if name is None or not isinstance(value, Mapping) or not isinstance(value.get("value"), str):
        return record
    more = value.get("aliases")
    return Record({**record.fields, name: list(dict.fromkeys([value["value"], *(more if isinstance(more, list) else [])]))}, record.where)


def _fact(record: Record, shape: Shape, group: str, bad: Bad) -> Fact | None:
    chats = [c for c in convert(_plain(record, shape.columns.get("completion")), shape, bad) if isinstance(c, Chat)]
    if not chats:
        return None
    turns = chats[0].messages
    questions = [m["content"] for m in turns if m["role"] == "user"]
    if len(questions) != 1 or turns[-1]["role"] != "assistant" or not questions[0].strip():
        bad.add(record.where, f"a fact is one question with its answer; this conversation has {len(questions)} questions")
        return None
    answers = [c.messages[-1]["content"].strip() for c in chats]
    for name in ALIASES:
        more = record.fields.get(name)
        answers += [a.strip() for a in more if isinstance(a, str) and a.strip()] if isinstance(more, list) else []
    system = "\n".join(m["content"] for m in turns if m["role"] == "system")
    return Fact(questions[0].strip(), tuple(dict.fromkeys(a for a in answers if a)), system, group, record.where, record.fields)
