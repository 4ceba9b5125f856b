"""The held-out rows of a comparison: some to choose by (rates, the best step, prompts), others that nothing is chosen by and every row is scored on.

Both are the same for all rows and seeds. Where no test file is named, three times data.validation_rows (of a share of the training rows, twice that share) are
held out and every prompt's rows go as a whole to one side: one prompt in three to choosing, two in three to testing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from ..core import LuthierError, Row
from ..data.prepare import DECODER, Prepared, prepare
from ..data.rows import Form
from ..reading import made_of, read_data
from ..settings.plugins import kind_of
from ..settings.run import Run

TIMES = 3  # data.validation_rows is held out so often where one part is for testing
IN_THREE = 3  # of so many prompts one is for choosing


@dataclass
class Tests:
    """What every row is scored on."""

    rows: list[Row] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)
    said: str = ""  # where they are from


class Reading:
    """Reads the data of runs, once a process: the same rows whatever the run's seed and method, without the test rows."""

    def __init__(self, *, test: Sequence[str], seed: int, positions: int, choose: int | None = None):
        """``positions``: that all rows of the comparison have for their text; ``choose``: rows to choose by, at most."""
        self.test, self.seed, self.positions, self.choose = tuple(test), seed, positions, choose
        self.tests = Tests()
        self.seconds = 0.0  # that reading took so far
        self._kept: dict[str, tuple[Prepared, Tests]] = {}

    def __call__(self, run: Run, tokenizer: Any, *, positions: int = 0, say: Callable[[str], None] = lambda _: None, form: Form = DECODER) -> Prepared:
        """In the place of ``reading.read_data``. Raises LuthierError where there is nothing to test on, and see there."""
        d = run.data
        if d.mix is not None:
            raise LuthierError("data.mix: a comparison takes one data set; compare on each source by itself, or name the files in data.train")
        if "rollouts" in run.objective.needs:
            raise LuthierError(f"objective: a comparison needs held-out rows with a loss, and {kind_of(run.objective)} answers prompts")
        key = repr((run.model.id, kind_of(run.objective), run.objective, d))
        if key not in self._kept:
            began = time.perf_counter()
            self._kept[key] = self._read(run, tokenizer, say, form)
            self.seconds += time.perf_counter() - began
        made, self.tests = self._kept[key]
        out = copy(made)
        out.train, out.validation, out.validation_records = list(made.train), list(made.validation), list(made.validation_records)
        out.facts = dict(made.facts)
        return out

    def _read(self, run: Run, tokenizer: Any, say: Callable[[str], None], form: Form) -> tuple[Prepared, Tests]:
        d = run.data
        if not self.test:
            named = bool(d.validation)
            share = d.validation_share if named else min(0.9, 2 * d.validation_share)
            d = replace(d, validation_rows=TIMES * d.validation_rows, validation_share=share)
        made = read_data(replace(run, seed=self.seed, data=d), tokenizer, positions=self.positions, say=say, form=form)
        tests = self._named(run, tokenizer, made, form) if self.test else take_tests(made)
        if not tests.rows or not made.validation:
            raise LuthierError(
                f"too few rows are held out to choose by some and test on others ({len(made.validation)} and {len(tests.rows)}); give more data, raise "
                "data.validation_share, or name a test file with --test"
            )
        if self.choose is not None:
            fewer(made, self.choose)
        return made, tests

    def _named(self, run: Run, tokenizer: Any, made: Prepared, form: Form) -> Tests:
        known = {k: made.facts[k] for k in ("problem", "labels") if k in made.facts}
        how = made_of(run, positions=self.positions, form=form)
        found = prepare(self.test, tokenizer, **how, **known, on_bad_row=run.data.on_bad_row, validation=self.test, validation_rows=10**9, say=lambda _: None)
        return Tests(found.validation, found.validation_records, f"--test {', '.join(self.test)}")


def take_tests(made: Prepared) -> Tests:
    """Take two prompts in three, with all their rows, out of what is held out."""
    groups = grouped(made.validation, made.validation_records)
    if len(groups) == 1:  # one long document: its end is for testing
        rows = groups[0][0]
        cut = max(1, len(rows) // IN_THREE) if len(rows) > 1 else 0
        made.validation[:], made.validation_records[:] = rows[:cut], []
        return Tests(rows[cut:], [], "the end of the held-out document")
    sides: tuple[tuple[list[Row], list[Any]], ...] = (([], []), ([], []))
    for i, (rows, records) in enumerate(groups):
        side = sides[int(i % IN_THREE != 0)]
        side[0].extend(rows)
        side[1].extend(records)
    made.validation[:], made.validation_records[:] = sides[0]
    origin = made.facts.get("validation", {}).get("from", "training rows")
    of = origin if isinstance(origin, str) else ", ".join(map(str, origin))
    return Tests(*sides[1], f"two in three of the prompts held out of {of}")


def grouped(rows: Sequence[Row], records: Sequence[Any]) -> list[tuple[list[Row], list[Any]]]:
    """Held-out rows by what must not be torn apart, in their order: the rows of one opening with their records, the pieces of one document."""
    starts: dict[str, tuple[int, str]] = {}
    for i, r in enumerate(records):
        starts.setdefault(r.where, (i, _opening(r.prompt)))
    out: list[tuple[list[Row], list[Any]]] = []
    places: dict[str, int] = {}
    now = ""
    for row in rows:
        i, opening = starts.get(row.where, (-1, now if records else row.where))
        now = opening
        if opening not in places:
            places[opening] = len(out)
            out.append(([], []))
        group = out[places[opening]]
        group[0].append(row)
        if i >= 0 and not any(r is records[i] for r in group[1]):
            group[1].append(records[i])
    return out


def _opening(prompt: Sequence[dict[str, Any]]) -> str:
    """What two conversations share that would leak into one another."""
    until = next((i for i, m in enumerate(prompt) if m.get("role") == "assistant"), len(prompt))
    return json.dumps(prompt[:until], sort_keys=True)


def fewer(made: Prepared, most: int) -> None:
    """Keep at most so many rows to choose by, with the records of those that stay."""
    if len(made.validation) <= most:
        return
    del made.validation[most:]
    kept = grouped(made.validation, made.validation_records)
    made.validation_records[:] = [r for _, records in kept for r in records]
