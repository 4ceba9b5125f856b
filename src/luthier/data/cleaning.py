"""Writing data without what was found wrong with it, and a record of every row that was left out or changed, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..core import LuthierError
from .formats import suffix_of
from .inspection import Inspection, Report
from .quality import Finding
from .steps import File, Step
from .words import short

Mend = Callable[[str], str]


@dataclass
class Cleaned:
    """What was written of one file."""

    file: str
    out: Path
    record: Path
    written: int = 0
    removed: Counter[str] = field(default_factory=Counter)  # by finding
    changed: Counter[str] = field(default_factory=Counter)


def fixable(findings: Sequence[Finding], keep: Sequence[str]) -> list[Finding]:
    """The findings that can be fixed, but for those whose rows stay as they are. Raises LuthierError for a name that is none."""
    able = [f for f in findings if f.removes or f.mends]
    for name in keep:
        if name not in {f.name for f in findings}:
            names = ", ".join(f.name for f in able) or "nothing that could be fixed"
            raise LuthierError(f"--keep {name}: nothing of this name was found; found were: {names}")
    return [f for f in able if f.name not in keep]


def targets(files: Sequence[File], out: Path) -> dict[str, tuple[Path, Path]]:
    """(cleaned file, its record) for each training file: ``out`` itself for one file, files in the folder ``out`` for several.

    Raises LuthierError where a file would be written over what is read, or the name says another format.
    """
    train = [f for f in files if f.split == "train"]
    if len(train) == 1 and not out.is_dir():
        if out.suffix.lower() not in (".jsonl", ""):
            raise LuthierError(f"--fix {out}: cleaned data is written as JSON lines; name a file that ends with .jsonl, or a folder")
        paths = {train[0].name: out if out.suffix else out / f"{_stem(train[0])}.jsonl"}
    else:
        paths = {f.name: out / f"{_stem(f)}.jsonl" for f in train}
    if len(set(paths.values())) < len(paths):
        raise LuthierError(f"--fix {out}: two of the files have the same name; check them one by one")
    for path in paths.values():
        if any(Path(f.name).exists() and path.exists() and path.samefile(f.name) for f in files):
            raise LuthierError(f"--fix {out}: {path} is what is read; name another file or folder")
    return {name: (path, path.with_name(f"{path.stem}.removed.jsonl")) for name, path in paths.items()}


def _stem(file: File) -> str:
    name = Path(file.name).name
    return name.removesuffix(".gz").removesuffix(suffix_of(Path(file.name))) or "data"


def clean(inspection: Inspection, report: Report, findings: Sequence[Finding], out: Path, progress: Callable[[int], None] = lambda n: None) -> list[Cleaned]:
    """Write the training files of an inspection without the rows that ``findings`` remove, with what they mend put right.

    Each record is written as it was read. A record that gives several rows stays as long as one of them does. What is written and its record
    take their places together, when all is written.
    """
    gone: dict[int, tuple[Finding, int]] = {}
    for finding in reversed(findings):  # the gravest is named
        for i, index in enumerate(finding.removes.rows if finding.removes else ()):
            gone[index] = (finding, i)
    mends = sorted((f for f in findings if f.mends), key=lambda f: f.name != "mojibake")  # first, while all its characters are there
    paths, done = targets(inspection.files, out), list[Cleaned]()
    with _written([p for pair in paths.values() for p in pair]) as streams:
        at = ""
        for file, step, index in inspection.steps():
            if file.split != "train":
                continue
            if file.name != at:
                at = file.name
                done.append(Cleaned(at, *paths[at]))
            entry = _one(step, index, gone, mends, report, done[-1], streams[paths[at][0]])
            if entry:
                streams[paths[at][1]].write(_line(entry))
            progress(1)
    return done


def _one(step: Step, index: int, gone: dict[int, tuple[Finding, int]], mends: Sequence[Finding], report: Report, done: Cleaned, out: IO[str]) -> dict[str, Any]:
    """Write one record or not; what the record file says of it."""
    whys = [gone.get(i) for i in range(index, index + len(step.items) + bool(step.reason))]
    if step.record is None or (whys and all(whys)):
        first = next((w for w in whys if w), None)
        if first is None:  # a line that cannot be read, and that is to be kept: it cannot be written
            done.removed["malformed"] += 1
            return {"where": step.where, "action": "removed", "finding": "malformed", "reason": step.reason}
        finding, i = first
        assert finding.removes is not None
        done.removed[finding.name] += 1
        beside = finding.removes.beside[i]
        why = step.reason or finding.title
        like = {"like": report.places[beside]} if beside >= 0 else {}
        text = {"text": short(json.dumps(step.record.fields, ensure_ascii=False, default=str), 200)} if step.record else {}
        return {"where": step.where, "action": "removed", "finding": finding.name, "reason": why, **like, **text}
    fields: Any = step.record.fields
    changed = []
    for finding in mends:
        assert finding.mends is not None
        better = _mended(fields, finding.mends)
        if better != fields:
            changed.append(finding.name)
            fields = better
    done.changed.update(changed)
    done.written += 1
    out.write(_line(fields))
    return {"where": step.where, "action": "changed", "finding": ", ".join(changed), "reason": "characters put right"} if changed else {}


def _mended(value: Any, mend: Mend) -> Any:
    """The value with every text in it put right."""
    if isinstance(value, str):
        return mend(value)
    if isinstance(value, dict):
        return {k: _mended(v, mend) for k, v in value.items()}
    return [_mended(v, mend) for v in value] if isinstance(value, list) else value


def _line(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which only an escape can hold
        text = json.dumps(value, default=str)
    return text + "\n"


@contextmanager
def _written(paths: Sequence[Path]) -> Iterator[dict[Path, IO[str]]]:
    """Files that take their places when all are whole, or not at all."""
    temporary = {p: p.with_name(f".{p.name}.tmp") for p in paths}
    streams: dict[Path, IO[str]] = {}
    try:
        for p, t in temporary.items():
            p.parent.mkdir(parents=True, exist_ok=True)
            streams[p] = t.open("w", encoding="utf-8")
        yield streams
        for s in streams.values():
            s.close()
        for p, t in temporary.items():
            t.rename(p)
    except OSError as e:
        raise LuthierError(f"{e.filename or paths[0]}: cannot be written: {e.strerror or e}; free space or name another file") from e
    finally:
        for s in streams.values():
            s.close()
        for t in temporary.values():
            t.unlink(missing_ok=True)
