"""Every row of some files, past every check, in one pass that keeps no text: what is said of them is what training would do.

Rows are read, converted and rendered by the program's own reader. They are rendered whole first, so that true lengths are known; those that are too long
are rendered again as the over-length policy would have them.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..core import LuthierError, Row, examples_of
from .codec import BATCH_ROWS
from .divide import Item
from .labels import Labelled
from .preferences import Judged
from .prepare import Reader
from .quality import SEVERITIES, SHOWN, Cut, Finding, Seen, Setting, Split, checks, seen
from .quality.unusable import SURROGATE
from .rows import Counts, sides
from .shapes import Chat, Document
from .steps import File, Heard, Step, benchmark, steps

WHOLE = 1 << 30  # tokens: nothing is cut
CHARS = 4_000_000  # of the rows that are rendered at a time
HELD: tuple[Split, ...] = ("against", "test", "validation")


@dataclass
class Facts:
    """What is said of a file."""

    file: File
    shape: str
    rows: int = 0
    faults: int = 0


@dataclass
class Report:
    """All that was found."""

    files: list[Facts]
    findings: list[Finding]
    setting: Setting
    places: Places
    lengths: np.ndarray  # (rows,) tokens of each training row, whole
    trained: int  # tokens learned from, whole
    policy: dict[str, int]
    examples: dict[int, Seen] = field(default_factory=dict)  # the rows that findings show

    @property
    def worst(self) -> str:
        """The gravest severity, "" where there is no finding."""
        return next((s for s in SEVERITIES if any(f.severity == s for f in self.findings)), "")


class Places:
    """Where each row came from, in twelve bytes: a number, and the text around it, which many share."""

    def __init__(self) -> None:
        self.around: dict[tuple[str, str], int] = {}
        self.texts: list[tuple[str, str]] = []
        self.which, self.number = array("i"), array("q")

    def add(self, where: str) -> int:
        """The index of a new row."""
        found = re.search(r"(\d{1,18})(\D*)$", where)
        before, n, after = (where[: found.start()], found[1], found[2]) if found else (where, "", "")
        if n and (n[0] == "0" and n != "0"):
            before, n, after = where, "", ""
        key = (before, after)
        if key not in self.around:
            self.around[key] = len(self.texts)
            self.texts.append(key)
        self.which.append(self.around[key])
        self.number.append(int(n) if n else -1)
        return len(self.which) - 1

    def __getitem__(self, index: int) -> str:
        before, after = self.texts[self.which[index]]
        return f"{before}{self.number[index] if self.number[index] >= 0 else ''}{after}"

    def __len__(self) -> int:
        return len(self.which)


class Inspection:
    """Files past checks. ``run`` once, then ``again`` reads chosen rows a second time."""

    def __init__(self, files: Sequence[File], reader: Reader, setting: Setting, *, limit: int | None = None) -> None:
        self.files = sorted(files, key=lambda f: HELD.index(f.split) if f.split in HELD else len(HELD))  # held-out rows are known before training rows come
        self.reader, self.setting, self.limit = reader, setting, limit
        self.whole = reader.like(max_tokens=WHOLE)
        self.short = reader.like(over_length="truncate")
        self.places, self.checks = Places(), checks(setting)
        self.facts: list[Facts] = []
        self.lengths = array("i")
        self.trained = 0
        self.taken = 0  # training rows so far
        self.policy = {"over": 0, "prompt_cut": 0, "response_cut": 0, "lost": 0, "pieces": 0, "tokens_over": 0}

    def run(self, progress: Callable[[int], None] = lambda n: None, read: Callable[[], None] = lambda: None) -> Report:
        """Look at everything. ``progress`` is told of every so many rows, ``read`` is called when all are read and are to be compared."""
        for file in self.files:
            waiting: list[tuple[int, Item]] = []
            chars = 0
            for step, index in self._walk(file, self.places.add, self.facts.append):
                for item in step.items:
                    waiting.append((index, item))
                    chars += _size(item)
                    index += 1
                if step.reason:
                    self.facts[-1].faults += 1
                    self._fault(index, step.reason, in_record=step.record is not None)
                if len(waiting) >= BATCH_ROWS or chars >= CHARS:
                    self._batch(waiting, file.split)
                    progress(len(waiting))
                    waiting, chars = [], 0
            self._batch(waiting, file.split)
            progress(len(waiting))
        read()
        found = [f for check in self.checks for f in check.findings(self.again)]
        found.sort(key=lambda f: (SEVERITIES.index(f.severity), -f.n))
        report = Report(self.facts, found, self.setting, self.places, np.asarray(self.lengths), self.trained, self.policy)
        report.examples = dict(self.again(i for f in found for i in f.hits.rows[:SHOWN]))
        return report

    def again(self, wanted: Iterable[int]) -> Iterator[tuple[int, Seen]]:
        """Chosen rows, read once more, in order."""
        left = set(wanted)
        for file, step, index in self.steps() if left else ():
            for i, item in enumerate(step.items, index):
                if i in left:
                    left.remove(i)
                    yield i, seen(i, file.split, item)
            if step.reason:
                left.discard(index + len(step.items))  # of a fault there is nothing to show
            if not left:
                return

    def steps(self) -> Iterator[tuple[File, Step, int]]:
        """Every record once more: (file, record, index of its first row; a fault comes after its rows)."""
        self.taken, at = 0, 0

        def place(where: str) -> int:
            nonlocal at
            at += 1
            return at - 1

        for file in self.files:
            for step, index in self._walk(file, place, lambda facts: None):
                yield file, step, index

    def _walk(self, file: File, place: Callable[[str], int], begun: Callable[[Facts], None]) -> Iterator[tuple[Step, int]]:
        """Each record with the index of its first row. Indices are given in the same order every time."""
        shape, there = benchmark(file, self.reader) if file.split == "against" else steps(self.reader, file)
        facts = Facts(file, shape)
        begun(facts)
        for step in there:
            if file.split == "train" and self.limit is not None:
                if self.taken >= self.limit:
                    return
                step = replace(step, items=step.items[: self.limit - self.taken])
            self.taken += len(step.items) if file.split == "train" else 0
            facts.rows += len(step.items)
            indices = [place(step.where) for _ in range(len(step.items) + bool(step.reason))]
            if indices:
                yield step, indices[0]

    def _fault(self, index: int, reason: str, *, in_record: bool) -> None:
        for check in self.checks:
            check.fault(index, reason, in_record=in_record)

    # --- rendering ---

    def _batch(self, waiting: Sequence[tuple[int, Item]], split: Split) -> None:
        if split == "against":
            for index, item in waiting:
                row = seen(index, split, item)
                for check in self.checks:
                    check.held(row)
            return
        items = [item for _, item in waiting]
        made = self._made(items)
        if made is None:  # something in it cannot be rendered: one at a time, to know which
            made = [one for item in items for one in self._alone(item)]
        for (index, item), (rows, notes, reason) in zip(waiting, made, strict=True):
            if reason:
                self.facts[-1].faults += 1
                self.facts[-1].rows -= 1
                self._fault(index, reason, in_record=True)
                continue
            row = seen(index, split, item)
            row.rows, row.notes = rows, notes
            self._measure(row)
            for check in self.checks:
                if split != "train":
                    check.held(row)
                check.row(row)

    def _made(self, items: Sequence[Item]) -> list[tuple[list[Row], dict[str, int], str]] | None:
        """Rows, notes and fault of each item; None where one of them stops the rendering."""
        heard, counts = Heard(), Counts()
        out = []
        try:
            for _, rows in self.whole.rendered(items, heard, counts):
                fresh = heard.taken()
                out.append((rows, counts.notes, fresh[0][1] if fresh else ""))
                counts.notes = {}
        except (LuthierError, TypeError, UnicodeError):
            if len(items) == 1:
                raise
            return None
        return out

    def _alone(self, item: Item) -> list[tuple[list[Row], dict[str, int], str]]:
        try:
            return self._made([item]) or []
        except (TypeError, UnicodeError):
            if not any(0xD800 <= ord(c) <= 0xDFFF for c in seen(0, "train", item).text):
                raise
            return [([], {}, f"holds {SURROGATE} (\\ud800 to \\udfff without its partner)")]
        except LuthierError as e:
            if not str(e).startswith(item.where):
                raise  # nothing this row can help
            return [([], {}, str(e).removeprefix(item.where).strip())]

    def _measure(self, row: Seen) -> None:
        """Lengths, and what the over-length policy makes of a row that is too long."""
        limit = self.setting.max_tokens
        length = sum(sum(sides(e)) for r in row.rows for e in examples_of(r))
        long = [r for r in row.rows if any(max(sides(e)) > limit for e in examples_of(r))]
        if long:
            row.cut = self._cut(row)
        if row.split != "train":
            return
        self.lengths.append(min(length, 2**31 - 1))
        self.trained += sum(int(r.train[1:].sum()) for r in row.rows)
        if row.cut is not None:
            p = self.policy
            p["over"] += 1
            p["tokens_over"] += length
            p["lost"] += row.cut.lost
            p["response_cut"] += row.cut.response and not row.cut.lost
            p["prompt_cut"] += not row.cut.response and not row.cut.lost
            p["pieces"] += row.cut.pieces

    def _cut(self, row: Seen) -> Cut:
        if isinstance(row.item, Document):
            room = self.setting.max_tokens - 1  # a piece begins with the last token of the one before
            return Cut(False, False, sum(-(-(len(r) - 1) // room) for r in row.rows))
        counts = Counts()
        kept = [r for _, rows in self.short.rendered([row.item], Heard(), counts) for r in rows]
        ranked = self.setting.renders in ("label", "ranked")
        return Cut(bool(counts.cut_responses) and not ranked, not any(r.train[0 if ranked else 1 :].any() for r in kept))


def _size(item: Item) -> int:
    if isinstance(item, Document):
        return len(item.text)
    if isinstance(item, Labelled):
        return sum(map(len, item.texts))
    chats = item.chats if isinstance(item, Judged) else (item,) if isinstance(item, Chat) else ()
    return sum(len(m["content"]) for c in chats for m in c.messages)
