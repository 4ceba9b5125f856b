"""The records of files, one by one, with what could not be read or used in its place: for what looks at data, and for what writes it again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..core import LuthierError
from .divide import Item
from .formats import Bad, Record, read_file, suffix_of
from .guess import renders_of
from .labels import Labelled
from .prepare import Reader
from .quality import Split
from .shapes import LOOK_AT
from .sources import files_of, read


@dataclass(frozen=True)
class File:
    """One file (or Hub data set) and what it is to the run."""

    name: str
    split: Split
    source: str  # as the user wrote it, where it is no file


class Heard(Bad):
    """Bad rows, one by one, until they are taken."""

    def __init__(self) -> None:
        super().__init__("skip")
        self.fresh: list[tuple[str, str]] = []

    def add(self, where: str, reason: str, fix: str = "Correct the row") -> None:
        super().add(where, reason, fix)
        self.fresh.append((where, reason))

    def taken(self) -> list[tuple[str, str]]:
        fresh, self.fresh = self.fresh, []
        return fresh


@dataclass(frozen=True, slots=True)
class Step:
    """A record, or a place where there should have been one."""

    where: str
    record: Record | None
    items: Sequence[Item]
    reason: str = ""  # why there is no item, or one fewer


def steps(reader: Reader, file: File) -> tuple[str, Iterator[Step]]:
    """The shape of a file, and its records in order."""
    heard = Heard()
    shape, opened = reader.opened(file.name, _records(file, reader.how.split, heard), heard)

    def walk() -> Iterator[Step]:
        before = heard.taken()
        for record, items in opened:
            # what was heard is of lines before this one, and of this one last
            fresh = heard.taken()
            own = [reason for where, reason in fresh if where == record.where]
            for where, reason in before + [f for f in fresh if f[0] != record.where]:
                yield Step(where, None, (), reason)
            before = []
            yield Step(record.where, record, items, own[0] if own else "")
        for where, reason in before + heard.taken():
            yield Step(where, None, (), reason)

    return str(shape), walk()


def _records(file: File, split: str, bad: Bad) -> Iterator[Record]:
    return read_file(Path(file.name), bad=bad) if Path(file.name).is_file() else read(file.source, bad=bad, split=split)


def files_for(sources: Sequence[str], split: str, role: Split) -> list[File]:
    """The files that sources stand for."""
    out = []
    for source in sources:
        found = files_of(source, split)
        out += [File(source, role, source)] if found is None else [File(str(f), role, source) for f in found]
    return out


def kind_of(file: File, split: str, columns: dict[str, str]) -> str:
    """What a file is for, by its first records; see guess.py."""
    first = list(islice(_records(file, split, Heard()), LOOK_AT))
    return renders_of(first, columns=columns)


def benchmark(file: File, reader: Reader) -> tuple[str, Iterator[Step]]:
    """A benchmark's rows, of whatever shape: as they would be trained where that can be told, else every text in a record."""
    split = reader.how.split
    try:
        first = list(islice(_records(file, split, Heard()), LOOK_AT))
        kind: Any = renders_of(first)
        return steps(reader.like(renders=kind, shape="auto", columns={}), file)
    except LuthierError:
        return "any texts", (Step(r.where, r, _strings(r)) for r in _records(file, split, Heard()))


def _strings(record: Record) -> list[Item]:
    texts: list[str] = []
    waiting: list[Any] = [record.fields]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, str) and value.strip():
            texts.append(value)
        elif isinstance(value, dict | list):
            waiting[:0] = list(value.values()) if isinstance(value, dict) else value
    return [Labelled(tuple(texts), None, record.where, record.fields)] if texts else []


def expected_rows(files: Sequence[File]) -> int:
    """About how many rows there are, by the files' sizes and their first records; 0 where that cannot be told."""
    return sum(_expected(Path(f.name), f) for f in files)


def _expected(path: Path, file: File) -> int:
    kind = suffix_of(path)
    if not path.is_file():
        return 0
    if kind == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.ParquetFile(path).metadata.num_rows)
    first = list(islice(_records(file, "train", Heard()), LOOK_AT))
    each = sum(len(json.dumps(r.fields, ensure_ascii=False, default=str).encode("utf-8", "replace")) + 2 for r in first) / len(first)
    return len(first) if len(first) < LOOK_AT else round(path.stat().st_size * (3.0 if path.suffix == ".gz" else 1.0) / each)
