"""Read one file, of any accepted format, as records that know their line.

Lines are split, decoded and parsed here and not by a library, because a row that is wrong must be reported with its file, its line and
what is wrong with it, and must never vanish silently.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core import LuthierError

SEPARATOR = "<|endoftext|>"  # alone on a line of a text file: here one document ends and the next begins
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".label", ".all")
PACKED = (".jsonl", ".json", ".csv", ".tsv", ".txt")  # may also end with .gz
LONGEST_LINE = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it was written, and where."""

    fields: dict[str, Any]
    where: str


@dataclass
class Bad:
    """What to do with a malformed row: ``stop`` raises at the first, ``skip`` counts them and keeps the first few to show."""

    policy: Literal["stop", "skip", "fatal"] = "stop"  # fatal: stop where skipping would not help
    count: int = 0
    rows: list[tuple[str, str]] = field(default_factory=list)  # (where, reason), the first 20
    left_out: dict[str, int] = field(default_factory=dict)  # what a rule and not a fault keeps from being read, and how much of it

    def add(self, where: str, reason: str, fix: str = "Correct the row") -> None:
        """Report one row. ``reason``: what was found and what is accepted; ``fix``: what to do about it."""
        if self.policy == "fatal":
            raise LuthierError(f"{where}: {reason}. {fix}.")
        if self.policy == "stop":
            raise LuthierError(f"{where}: {reason}. {fix}, or skip such rows with data.on_bad_row=skip (they are counted and shown).")
        self.count += 1
        if len(self.rows) < 20:
            self.rows.append((where, reason))

    def leave_out(self, what: str, n: int = 1) -> None:
        """Count what is not read, and rightly so."""
        if n:
            self.left_out[what] = self.left_out.get(what, 0) + n


def suffix_of(path: Path) -> str:
    """What kind of file this is: ".jsonl" of a.jsonl and of a.jsonl.gz."""
    inner = path.with_suffix("").suffix.lower()
    return inner if path.suffix.lower() == ".gz" and inner in PACKED else path.suffix.lower()


def read_file(path: Path, *, bad: Bad) -> Iterator[Record]:
    """The records of one file, by its suffix; at least one, or an error. A table of messages is read as the trees they make."""
    from .trees import whole_trees  # which is made of records

    readers: dict[str, Callable[[Path, Bad], Iterator[Record]]] = {
        ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet, ".arrow": _arrow, ".txt": _text, ".md": _text,
        ".label": _labelled_lines, ".all": _labelled_lines,
    }  # fmt: skip
    before, any_record = bad.count, False
    for record in whole_trees(readers[suffix_of(path)](path, bad), bad):
        any_record = True
        yield record
    if not any_record:
        why = f"all {bad.count - before} rows are malformed; the first: {bad.rows[0][0]}: {bad.rows[0][1]}" if bad.count > before else "no row in it"
        raise LuthierError(f"{path}: nothing to read: {why}.")


def lines(path: Path, bad: Bad) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of every line. Handles a byte order mark, CRLF and .gz; bad UTF-8 and huge lines are bad rows."""
    try:
        yield from _lines(path, bad)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise LuthierError(f"{path}: cannot be unpacked ({str(e).lower()}). Check that it was written completely, or unpack it: gunzip {path.name}.") from None


def _lines(path: Path, bad: Bad) -> Iterator[tuple[int, str]]:
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            if number == 1:
                if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise LuthierError(f"{path}: this is UTF-16; UTF-8 is accepted. Convert it: iconv -f UTF-16 -t UTF-8 {path.name} > new.")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if len(raw) > LONGEST_LINE:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(LONGEST_LINE)
                bad.add(where, f"the line is longer than {LONGEST_LINE >> 20} MB", "Check that the file has one row a line")
                continue
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as e:
                reason = f"not UTF-8: byte {e.start + 1} of the line is 0x{raw[e.start]:02x}"
                bad.add(where, reason, "Convert the file to UTF-8 (if it is Latin-1: iconv -f LATIN1 -t UTF-8)")
                continue
            yield number, text.rstrip("\r\n")


# --- text -----------------------------------------------------------------------------------------------------------


def _text(path: Path, bad: Bad) -> Iterator[Record]:
    """Documents, separated by a line that holds only the separator; without one the file is one document."""
    held: list[str] = []
    first = 1

    def document() -> Iterator[Record]:
        text = "\n".join(held).strip("\n")
        if text.strip():
            yield Record({"text": text}, f"{path}:{first}")

    for number, line in lines(path, bad):
        if line.strip() == SEPARATOR:
            yield from document()
            held, first = [], number + 1
        else:
            held.append(line)
    yield from document()


def _labelled_lines(path: Path, bad: Bad) -> Iterator[Record]:
    """One row a line, its label, a space and the text, as question classification (Li and Roth, 2002) is shipped. Lines that are not UTF-8 are Latin-1."""
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            line = raw.decode("latin-1")
        if not line.strip():
            continue
        label, _, text = line.strip().partition(" ")
        if text.strip():
            yield Record({"label": label, "text": text.strip()}, f"{path}:{number}")
        else:
            bad.add(f"{path}:{number}", f"{line.strip()[:40]!r} has no text behind its label; a line is the label, a space, the text", "Correct the line")


# --- JSON -----------------------------------------------------------------------------------------------------------


def _jsonl(path: Path, bad: Bad) -> Iterator[Record]:
    for number, line in lines(path, bad):
        if line.strip():
            yield from _json_line(line, f"{path}:{number}", bad)


def _json_line(line: str, where: str, bad: Bad) -> Iterator[Record]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        bad.add(where, _json_reason(e, line), "Correct the line")
        return
    except RecursionError:
        bad.add(where, "the JSON is nested too deeply", "Correct the line")
        return
    yield from _row(row, where, bad)


def _json_reason(e: json.JSONDecodeError, line: str) -> str:
    """What is wrong, in words: an end that comes too early is the commonest (a write that was interrupted)."""
    at_end = e.pos >= len(line.rstrip()) or e.msg.startswith("Unterminated string")
    if at_end:
        return f"the JSON ends in the middle of a row ({e.msg.lower()}, column {e.colno}); the file may have been cut off"
    return f"not JSON: {e.msg.lower()} at column {e.colno}, near {line[max(0, e.pos - 15) : e.pos + 15]!r}"


def _row(row: Any, where: str, bad: Bad) -> Iterator[Record]:
    if isinstance(row, dict) and row:
        yield Record(row, where)
    elif isinstance(row, dict):
        bad.add(where, "the row is an empty object {}", "Remove the row")
    else:
        kind = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(type(row), "a number")
        bad.add(where, f'the row is {kind}; a row is an object like {{"prompt": ..., "completion": ...}}', "Correct the row")


def _json(path: Path, bad: Bad) -> Iterator[Record]:
    """An array of rows, an object of rows, or JSON lines under the wrong name."""
    text = "\n".join(line for _, line in lines(path, Bad("fatal")))  # a hole in the middle of one JSON value cannot be skipped
    start = len(text) - len(text.lstrip())
    if start == len(text):
        return
    decoder = json.JSONDecoder()
    if text[start] == "[":
        yield from _json_array(text, start + 1, path, decoder, bad)
        return
    try:
        value, end = decoder.raw_decode(text, start)
    except json.JSONDecodeError as e:
        line = text.split("\n")[e.lineno - 1]
        raise LuthierError(f"{path}:{e.lineno}: not JSON: {e.msg.lower()} at column {e.colno}, near {line[max(0, e.colno - 16) : e.colno + 14]!r}.") from None
    if text[end:].strip():
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield from _json_line(line, f"{path}:{number}", bad)
        return
    yield from _json_object(value, path, bad)


def _json_array(text: str, at: int, path: Path, decoder: json.JSONDecoder, bad: Bad) -> Iterator[Record]:
    """One element at a time, so that each knows its line."""
    blank = re.compile(r"\s*")
    line, counted = 1, 0
    expect_comma = False
    while True:
        at = blank.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        if at < len(text) and text[at] == "]":
            if text[at + 1 :].strip():
                raise LuthierError(f"{where}: there is more text after the end of the array. Keep one array in the file.")
            return
        if expect_comma:
            if at < len(text) and text[at] == ",":
                at, expect_comma = at + 1, False
                continue
            found = f"found {text[at : at + 15]!r}" if at < len(text) else "found the end of the file, which may have been cut off"
            raise LuthierError(f"{where}: expected , or ] after a row of the array; {found}. Correct the file (rows after this cannot be read).")
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as e:
            cut = "the file ends in the middle of a row; it may have been cut off" if e.pos >= len(text.rstrip()) else f"not JSON: {e.msg.lower()}"
            raise LuthierError(f"{path}:{e.lineno}: {cut} (column {e.colno}). Correct the file (rows after this cannot be read).") from None
        yield from _row(value, where, bad)
        at, expect_comma = end, True


def _json_object(value: Any, path: Path, bad: Bad) -> Iterator[Record]:
    """{"id": row, ...}, {"data": [row, ...]}, or a file that holds one row."""
    if isinstance(value, dict) and value:
        lists = [(k, v) for k, v in value.items() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)]
        if all(isinstance(v, dict) for v in value.values()):
            for key, row in value.items():
                yield from _row(row, f"{path}:{key}", bad)
            return
        if len(lists) == 1 and lists[0][0] not in ("messages", "conversations", "conversation"):
            for i, row in enumerate(lists[0][1]):
                yield from _row(row, f"{path}:{lists[0][0]}[{i}]", bad)
            return
    yield from _row(value, f"{path}:1", bad)


# --- tables ---------------------------------------------------------------------------------------------------------


def _csv(path: Path, bad: Bad) -> Iterator[Record]:
    """``strict``, because a stray quote otherwise swallows the rows up to the next one without a word."""
    csv.field_size_limit(LONGEST_LINE)
    at = 0  # the line the reader has come to; a bad line that was skipped counts too

    def numbered() -> Iterator[str]:
        nonlocal at
        for at, line in lines(path, bad):  # noqa: B007
            yield line + "\n"

    reader = csv.reader(numbered(), strict=True)
    header: list[str] | None = None
    while True:
        start = at + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            bad.add(f"{path}:{start}", f"not CSV: {e}", 'Write a quote inside a quoted field twice ("")')
            continue
        if not row:
            continue
        if header is None:
            header = _header(row, path)
        else:
            yield from _table_row(header, row, f"{path}:{start}", bad)


def _tsv(path: Path, bad: Bad) -> Iterator[Record]:
    """One line is one row, so quotes need no balance; a field that is quoted as a whole is unquoted."""
    header: list[str] | None = None
    for number, line in lines(path, bad):
        if not line.strip():
            continue
        row = [f[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', f) else f for f in line.split("\t")]
        if header is None:
            header = _header(row, path)
        else:
            yield from _table_row(header, row, f"{path}:{number}", bad)


def _header(row: list[str], path: Path) -> list[str]:
    header = [name.strip() for name in row]
    if "" in header:
        raise LuthierError(f"{path}:1: column {header.index('') + 1} has no name. The first line names the columns; found: {', '.join(header)}.")
    if len(set(header)) < len(header):
        twice = next(h for h in header if header.count(h) > 1)
        raise LuthierError(f"{path}:1: two columns are called {twice!r}. The first line names the columns, each differently.")
    return header


def _table_row(header: Sequence[str], row: Sequence[str], where: str, bad: Bad) -> Iterator[Record]:
    if len(row) != len(header):
        bad.add(
            where, f"{len(row)} fields where the header names {len(header)} ({', '.join(header)})", "Correct the row (quote a field that holds the separator)"
        )
        return
    yield Record(dict(zip(header, row, strict=True)), where)


def _parquet(path: Path, bad: Bad) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        yield from _arrow_rows(file.iter_batches(), path)
    except (pyarrow.ArrowException, OSError) as e:
        raise LuthierError(f"{path}: not a readable Parquet file ({str(e).splitlines()[0][:150]}). Check that it was written completely.") from None


def _arrow(path: Path, bad: Bad) -> Iterator[Record]:
    """The stream format (which Hugging Face datasets writes) or the file format."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as mapped:
            try:
                batches: Iterable[Any] = pyarrow.ipc.open_stream(mapped)
            except pyarrow.ArrowInvalid:
                file = pyarrow.ipc.open_file(mapped)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            yield from _arrow_rows(batches, path)
    except (pyarrow.ArrowException, OSError) as e:
        raise LuthierError(f"{path}: not a readable Arrow file ({str(e).splitlines()[0][:150]}). Check that it was written completely.") from None


def _arrow_rows(batches: Iterable[Any], path: Path) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield Record(row, f"{path}:row {number}")
