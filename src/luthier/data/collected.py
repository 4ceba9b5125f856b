"""Judged answers as they are written: one line a question or a pair, at once, in the shapes that preferences.py reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core import LuthierError
from .questions import Question, asked

KINDS = {"ranked": "rankings", "chosen": "pairs"}


# --- lines -----------------------------------------------------------------------------------------------------------


def ranking_line(question: Question, places: Sequence[Sequence[str]], collected: Mapping[str, Any]) -> dict[str, Any]:
    """A ranking, best place first; answers that share a place are tied. ``collected``: who judged, and of what."""
    return _line(question, {"ranked": [p[0] if len(p) == 1 else list(p) for p in places]}, collected)


def pair_line(question: Question, better: str, worse: str, collected: Mapping[str, Any], *, tied: bool = False) -> dict[str, Any]:
    """A pair of answers; of a tied one it does not matter which stands first."""
    return _line(question, {"chosen": better, "rejected": worse} | ({"tie": True} if tied else {}), collected)


def _line(question: Question, judged: Mapping[str, Any], collected: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": question.prompt, **({"tools": question.tools} if question.tools else {}), **judged, "collected": dict(collected)}


# --- the file --------------------------------------------------------------------------------------------------------


class Collected:
    """A file that grows by a question at a time, knows which questions it holds, and can take the last back.

    ``kind``: the column that its lines have, "ranked" or "chosen"; ``source``: where the questions come from. Raises LuthierError for a file of anything
    else, for the source itself, and for a folder that is not there. A last line that was cut off while it was written is dropped.
    """

    def __init__(self, path: Path, kind: str, *, source: str = ""):
        self.path, self.kind = path, kind
        self.keys: set[str] = set()
        self._added: list[tuple[int, str]] = []  # where each question's lines begin, and its key
        if not path.parent.is_dir():
            raise LuthierError(f"{path}: there is no folder {path.parent}; make it, or choose another --output")
        if source and path.exists() and Path(source).expanduser().resolve() == path.resolve():
            raise LuthierError(f"{path}: is where the prompts come from; choose another --output")
        if path.is_dir():
            raise LuthierError(f"{path}: is a folder; name a file: --output {path / 'preferences.jsonl'}")
        whole = 0
        for number, raw in enumerate(path.open("rb") if path.exists() else (), 1):
            if not raw.endswith(b"\n"):
                break
            self._read(raw, number)
            whole += len(raw)
        self._cut(whole)
        self.found = len(self.keys)

    def _read(self, raw: bytes, number: int) -> None:
        try:
            line = json.loads(raw)
        except ValueError:
            line = None
        kind = next((k for k in KINDS if isinstance(line, dict) and k in line), None)
        if kind is None or "prompt" not in line:
            raise LuthierError(f"{self.path}:{number}: is no line of judged answers, so nothing is added to this file; choose another --output")
        if kind != self.kind:
            raise LuthierError(
                f"{self.path}:{number}: this file holds {KINDS[kind]}, and {KINDS[self.kind]} would be added; choose another --output, or "
                + ("leave --pairs out" if self.kind == "chosen" else "add --pairs")
            )
        self.keys.add(asked(line["prompt"], line.get("tools")).key)

    def __contains__(self, question: Question) -> bool:
        return question.key in self.keys

    def add(self, question: Question, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write a question's lines, so that they are on disk when this returns. Raises LuthierError where they cannot be written."""
        start = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "surrogatepass"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise LuthierError(f"{self.path}: cannot be written: {(e.strerror or str(e)).lower()}; what was judged before is in it") from e
        self.keys.add(question.key)
        self._added.append((start, question.key))

    def undo(self) -> None:
        """Take the lines of the last added question out of the file again."""
        start, key = self._added.pop()
        self.keys.discard(key)
        self._cut(start)

    def _cut(self, size: int) -> None:
        if self.path.exists() and self.path.stat().st_size > size:
            os.truncate(self.path, size)


# --- rankings as they are typed --------------------------------------------------------------------------------------


class Unread(LuthierError):
    """What was typed is no ranking."""


def typed_ranking(text: str, n: int) -> list[list[int]]:
    """The places of a ranking of n answers, numbered from 0: "2 1 3", or with ties "2=1 3"; what is not named shares the last place.

    Commas and > are read as spaces. Raises Unread, with what is accepted.
    """
    places, named = [], set[int]()
    for place in re.sub(r"\s*=\s*", "=", re.sub(r"[,>]", " ", text)).split():
        numbers = place.split("=")
        for number in numbers:
            if not number.isdecimal():
                raise Unread(f"{number or '='!r} is no number of an answer; say for example 2 1 3, or 2=1 3 where two are as good as one another")
            if not 1 <= int(number) <= n:
                spaced = len(number) > 1 and n < 10 and len(set(number)) == len(number) and all("1" <= c <= str(n) for c in number)
                raise Unread(f"there is no answer {number}: there are 1 to {n}" + (f"; did you mean {' '.join(number)}?" if spaced else ""))
            if int(number) - 1 in named:
                raise Unread(f"answer {int(number)} is named twice")
            named.add(int(number) - 1)
        places.append([int(number) - 1 for number in numbers])
    if not places:
        raise Unread("nothing was typed")
    rest = [i for i in range(n) if i not in named]
    return [*places, rest] if rest else places
