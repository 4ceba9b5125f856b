"""Questions to collect judgements on: what was asked, and the answers that are there already, out of data of any shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..core import LuthierError
from ..nn.preferences import pairs_of
from .formats import Bad, Record, lines, suffix_of
from .preferences import LABELS, PROMPTS, REJECTED, convert_preferences, detect_preferences, turns
from .prompted import convert_prompts, detect_prompts
from .shapes import LOOK_AT
from .sources import files_of, read
from .trees import is_tree

GIVEN = ("answers", "completions", "responses", "candidates")  # columns that hold a list of answers


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that waits for its answer."""

    messages: list[dict[str, Any]]
    answers: tuple[str, ...] = ()  # that are there already
    better: tuple[tuple[int, int], ...] = ()  # places of two answers of which the data says that the first is better
    tools: list[dict[str, Any]] | None = None
    where: str = ""

    @property
    def key(self) -> str:
        """Equal for equal questions."""
        return json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False)

    @property
    def prompt(self) -> str | list[dict[str, Any]]:
        """As it is written to a file: a text where one message of the user is all."""
        only = self.messages[0] if len(self.messages) == 1 else {}
        alone = only.keys() == {"role", "content"} and only["role"] == "user" and turns(only["content"]) is None
        return only["content"] if alone else self.messages


def asked(prompt: str | Sequence[dict[str, Any]], tools: Any = None) -> Question:
    """The question of a prompt as `Question.prompt` writes it."""
    return Question([{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt), tools=tools)


def spoken(message: Mapping[str, Any]) -> str:
    """What a message says, to be read by a person or a judge; of a call of tools the calls."""
    calls = [c.get("function", c) for c in message.get("tool_calls") or ()]
    return "\n".join([*([str(message["content"])] if message.get("content") else []), *(json.dumps(c, ensure_ascii=False) for c in calls)])


def read_questions(source: str, *, columns: Mapping[str, str] | None = None) -> tuple[list[Question], list[str]]:
    """The questions of a file, a folder or a Hub data set, each once, and sentences about what was met on the way.

    .txt: one question a line. Else: prompts alone; conversations, of which the last answer is taken away; preferences and conversation trees, whose answers
    come along; prompts with a list of answers. ``columns`` (ours: yours): prompt, answers, and the parts of preferences. Rows that cannot be read are skipped
    and counted. Raises LuthierError for what has no questions, with what is accepted.
    """
    bad, found, repeated = Bad("skip"), dict[str, Question](), 0
    for question in _in_lines(source, bad) if suffix_of(Path(source)) == ".txt" else _in_records(source, columns or {}, bad):
        there = found.setdefault(question.key, question)
        if there is not question:
            repeated += 1
            found[question.key] = _together(there, question)
    said = [f"{repeated:,} rows repeat a question; it is asked once, about all of their answers"] if repeated else []
    if bad.count:
        said.append(f"{bad.count:,} bad rows skipped; the first: {bad.rows[0][0]}: {bad.rows[0][1]}")
    said += [f"left out: {what}: {n:,}" for what, n in bad.left_out.items()]
    if not found:
        raise LuthierError(f"{source}: holds no question" + (f"; {said[-1]}" if said else ""))
    return list(found.values()), said


def _together(a: Question, b: Question) -> Question:
    """Two rows of the same question: a pair a line, or a row for each answer."""
    answers = tuple(dict.fromkeys(a.answers + b.answers))
    place = {answer: i for i, answer in enumerate(answers)}
    better = {(place[q.answers[i]], place[q.answers[j]]): None for q in (a, b) for i, j in q.better if q.answers[i] != q.answers[j]}
    return replace(a, answers=answers, better=tuple(better))


def _in_lines(source: str, bad: Bad) -> Iterator[Question]:
    files_of(source)  # says what is wrong with the path
    path = Path(source).expanduser()
    for number, line in lines(path, bad):
        if line.strip():
            yield replace(asked(line.strip()), where=f"{path}:{number}")


def _in_records(source: str, columns: Mapping[str, str], bad: Bad) -> Iterator[Question]:
    records = read(source, bad=bad)
    first = list(islice(records, LOOK_AT))
    if not first:
        raise LuthierError(f"{source}: no row in it")
    there = {name for r in first for name in r.fields}
    given = columns.get("answers") or next((c for c in GIVEN if all(isinstance(r.fields.get(c), list) for r in first)), None)
    if given is not None:
        prompt = columns.get("prompt") or next((p for p in PROMPTS if p in there), None)
        for name in (given, prompt):
            if name not in there:
                raise LuthierError(
                    f"{first[0].where}: answers need a prompt, and no column {name or 'prompt'!r} is here. Columns found: {', '.join(first[0].fields)}. "
                    "Say which is which: --column prompt=NAME --column answers=NAME"
                )
        for record in chain(first, records):
            yield from _with_answers(record, str(prompt), given, bad)
    elif is_tree(first[0].fields) or there & {*REJECTED, "ranked"} or "rejected" in columns or _is_judged(first[0]):
        shape = detect_preferences(first, renders="ranked", columns=columns, judged=False)
        for record in chain(first, records):
            for item in convert_preferences(record, shape, bad, renders="ranked"):
                chat, better = item.chats[0], tuple((i, j) for i, j, tied in pairs_of(item.ranks) if not tied)
                yield Question(chat.messages[: item.prompt], tuple(item.answers()), better, chat.tools, item.where)
    else:
        yield from _prompts(first, records, columns, bad)


def _is_judged(record: Record) -> bool:
    return any(isinstance(record.fields.get(name), bool) for name in LABELS) and "text" not in record.fields


def _with_answers(record: Record, prompt: str, given: str, bad: Bad) -> Iterator[Question]:
    """A record that holds a list of answers."""
    answers = record.fields.get(given)
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        bad.add(record.where, f"column {given!r} is no list of texts")
        return
    for question in _prompts([record], iter(()), {"prompt": prompt}, bad):
        yield replace(question, answers=tuple(answers))


def _prompts(first: Sequence[Record], rest: Iterator[Record], columns: Mapping[str, str], bad: Bad) -> Iterator[Question]:
    shape = detect_prompts(first, shape="auto", columns=columns)
    if shape.is_text:
        raise LuthierError(
            f"{first[0].where}: this is raw text (columns {', '.join(first[0].fields)}), which asks nothing; "
            "say which column is the prompt: --column prompt=NAME, or give a .txt with one prompt a line"
        )
    for record in chain(first, rest):
        for found in convert_prompts(record, shape, bad):
            yield Question(found.messages, (), (), found.tools, found.where)
