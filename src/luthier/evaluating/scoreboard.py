"""What was found in an evaluation, as a person reads it and as JSON has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..measuring.confusion import Report
from ..measuring.marks import Mark, Score, digits_of
from ..measuring.paired import Difference, differences
from ..measuring.slices import LEAST, Slicing, Worst, worst
from .evaluation import Found
from .winning import Wins

SHOWN = 12  # slices, labels and confusions of a table; --json has all
P_SEEN = 0.0005


@dataclass
class Sliced:
    """One slicing of one model's scores."""

    slicing: Slicing
    scores: dict[str, dict[str, Score]]  # measure -> slice -> score
    worst: dict[str, Worst]


@dataclass
class Board:
    """An evaluation: scores by column; differences, slices, labels by what they are of."""

    columns: dict[str, dict[str, Score]] = field(default_factory=dict)
    differences: dict[str, dict[str, Difference]] = field(default_factory=dict)  # "tuned - base" -> measure
    slices: dict[str, list[Sliced]] = field(default_factory=dict)
    labels: dict[str, Report] = field(default_factory=dict)
    wins: dict[str, Wins] = field(default_factory=dict)  # "tuned against base"
    notes: list[str] = field(default_factory=list)
    first: str = ""  # the column whose slices are printed

    def fill(self, found: Found, beside: str | None, seed: int) -> None:
        """Every score with its interval, and what is evaluated less what it is compared with. ``beside``: another model's column."""
        self.columns = {c: {k: m.score(seed=seed) for k, m in sheet.marks.items()} for c, sheet in found.sheets.items()}
        others = sorted((c for c in found.sheets if c not in found.subjects), key=lambda c: c != beside)
        models = [c for c in others if c in ("base", beside)]
        self.compared({c: sheet.marks for c, sheet in found.sheets.items()}, found.subjects, models, seed)
        self.compared({c: sheet.marks for c, sheet in found.sheets.items()}, found.subjects[:1], [c for c in others if c not in models], seed)

    def compared(self, marks: Mapping[str, Mapping[str, Mark]], subjects: Sequence[str], others: Sequence[str], seed: int) -> None:
        """What each subject has more than each of the others, on the same rows."""
        for other in others:
            for mine in subjects:
                if each := differences(marks[other], marks[mine], seed=seed):
                    self.differences[f"{mine} - {other}"] = each

    def plain(self) -> dict[str, Any]:
        """As JSON has it; what there is none of is left out."""
        sliced = {
            name: {
                s.slicing.by: {
                    "scores": {k: {n: _plain(v) for n, v in each.items()} for k, each in s.scores.items()},
                    "worst": {k: _worst(w) for k, w in s.worst.items()},
                }
                for s in some
            }
            for name, some in self.slices.items()
        }
        out = {
            "scores": {c: {k: _plain(v) for k, v in cells.items()} for c, cells in self.columns.items()},
            "differences": {pair: {k: vars(d) | {"verdict": d.verdict} for k, d in each.items()} for pair, each in self.differences.items()},
            "slices": sliced,
            "labels": {c: r.plain() for c, r in self.labels.items()},
            "wins": {pair: w.plain() for pair, w in self.wins.items()},
            "notes": self.notes,
        }
        return {k: v for k, v in out.items() if v or k == "scores"}


def _plain(score: Score) -> dict[str, Any]:
    return {k: None if v != v else v for k, v in vars(score).items()}  # a number without an interval


def _worst(w: Worst) -> dict[str, Any]:
    return {"slice": w.slice, "difference": vars(w.difference), "rest": vars(w.rest), "slices": w.slices, "clear": w.is_clear}


def sliced(slicing: Slicing, marks: Mapping[str, Mark], *, seed: int) -> Sliced:
    """Every score by slice. Numbers that need several labels to say anything are left out where slices are by label, and perplexity follows the loss."""
    found = Sliced(slicing, {}, {})
    for name, mark in marks.items():
        if name == "perplexity" or (slicing.by == "label" and mark.stats_NK is None):
            continue
        cut = slicing.marks(mark)
        found.scores[name] = {n: m.score(seed=seed) for n, m in cut.items()}
        if (w := worst(mark, cut, seed=seed)) is not None:
            found.worst[name] = w
    return found


# --- in a terminal ---------------------------------------------------------------------------------------------------


def show(board: Board) -> None:
    """Print it."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a pipe has no width of its own
    say = lambda text: console.print(text, markup=False, soft_wrap=True)  # noqa: E731
    keys = dict.fromkeys(k for cells in board.columns.values() for k in cells)
    cells = [[k, *(_cell(k, column.get(k)) for column in board.columns.values())] for k in keys]
    for head, rows in _in_width(["measure", *board.columns], cells, console.width):
        console.print(_table(head, rows))
    for pair, each in board.differences.items():
        say(f"\n{pair}, on the same rows:")
        console.print(_table(["measure", "difference", "p", ""], [[k, d.numbers(k), _p(d.p), d.verdict] for k, d in each.items()]))
    for name, wins in board.wins.items():
        say("\n" + wins.said(*name.split(" against ", 1)))
        for note in wins.notes:
            say(f"  {note}")
    for name, report in board.labels.items():
        _show_labels(console, say, name, report)
    for s in board.slices.get(board.first, ()):
        _show_slices(console, say, board.first, s)
    for note in board.notes:
        say(f"\n{note}")


def _show_labels(console: Any, say: Any, name: str, report: Report) -> None:
    say(f"\nlabels, {name}:")
    cells = [[x.name, f"{x.given:,}", f"{x.said:,}", *(("-" if v is None else v.numbers()) for v in (x.precision, x.recall, x.f1))] for x in report.labels]
    console.print(_table(["label", "given", "said", "precision", "recall", "F1"], cells[:SHOWN]))
    if len(cells) > SHOWN:
        say(f"and {len(cells) - SHOWN} labels more (--json has all)")
    if report.confusions:
        most = ", ".join(f"{given} as {said} ({n})" for given, said, n in report.confusions[:5])
        say(f"most often taken for one another: {most}")


def _show_slices(console: Any, say: Any, name: str, s: Sliced) -> None:
    say(f"\nby {s.slicing.by}, {name}:")
    names = [n for n in s.slicing.places if any(n in each for each in s.scores.values())]
    last = list(s.worst)[-1] if s.worst else ""
    if len(names) > SHOWN and last:  # the worst first, by the last of the scores: a task's, where there is one
        sign = -1 if s.worst[last].lower_is_better else 1
        names.sort(key=lambda n: sign * s.scores[last][n].value if n in s.scores[last] else float("inf"))
    cells = [[n, *(_cell(k, each.get(n)) for k, each in s.scores.items())] for n in names[:SHOWN]]
    for head, rows in _in_width([s.slicing.by, *s.scores], cells, console.width):
        console.print(_table(head, rows))
    if len(names) > SHOWN:
        say(f"{f'the worst {SHOWN} by {last}' if last else f'the first {SHOWN}'}; {len(names) - SHOWN} more (--json has all)")
    for w in s.worst.values():
        if w.is_clear:
            say(w.said(s.slicing.by))
    if unclear := [f"{w.measure} in {w.slice} ({w.gap})" for w in s.worst.values() if not w.is_clear]:
        say(f"worst, but not clearly worse than the rest: {'; '.join(unclear)}")
    if not s.worst:
        say(f"no two slices have the {LEAST} rows that it takes to call one the worst")


def _in_width(head: list[str], rows: list[list[str]], width: int) -> Iterator[tuple[list[str], list[list[str]]]]:
    """A table in parts that fit, each with the first column."""
    wide = [max(len(line[i]) for line in [head, *rows]) + 3 for i in range(len(head))]
    part = [0]
    for i in range(1, len(head)):
        if len(part) > 1 and sum(wide[k] for k in [*part, i]) > width:
            yield [head[k] for k in part], [[line[k] for k in part] for line in rows]
            part = [0]
        part.append(i)
    yield [head[k] for k in part], [[line[k] for k in part] for line in rows]


def _table(head: list[str], rows: list[list[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(Text(name), justify="left" if i == 0 or not name else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _cell(measure: str, value: Score | None) -> str:
    return "" if value is None else f"{value.numbers(digits=digits_of(measure))} n={value.n:,}"


def _p(p: float) -> str:
    return "<0.001" if p < P_SEEN else f"{p:.3f}"
