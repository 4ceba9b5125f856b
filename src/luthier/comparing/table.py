"""The table of a comparison: in a terminal, as CSV and as LaTeX. One list of columns serves all, and the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table as Terminal

from ..report.verdict import clock, size
from . import scoring
from .advice import digits, number
from .outcome import Entry, Table

DASH = "-"


@dataclass(frozen=True)
class Column:
    """A column: its head, what a cell says, and what the head means."""

    head: str
    cell: Callable[[Table, Entry], str]
    means: str = ""


def _quality(t: Table, e: Entry) -> str:
    return DASH if e.quality is None else number(t, e)


def _less(t: Table, e: Entry) -> str:
    if e is t.best:
        return "best"
    if e.less is None:
        return DASH
    d = digits(t)
    return f"{e.less.value:+.{d}f} [{e.less.low:+.{d}f}, {e.less.high:+.{d}f}]" + (" ~" if e.less.low <= 0 <= e.less.high else "")


def _loss(t: Table, e: Entry) -> str:
    return DASH if scoring.LOSS not in e.scores else f"{e.scores[scoring.LOSS].value:.3f}"


def _general(t: Table, e: Entry) -> str:
    return DASH if e.general is None else f"{e.general:.3f} ({e.forgotten:+.3f})" if e.forgotten is not None and not e.baseline else f"{e.general:.3f}"


def _trained(t: Table, e: Entry) -> str:
    if e.trained is None or (e.baseline and not e.trained):
        return DASH
    return f"{e.trained:,} ({100 * (e.share or 0):.3g} %)"


def _target(t: Table, e: Entry) -> str:
    return DASH if e.target_tokens is None else f"{e.target_tokens / 1000:,.0f}k, {e.target_seconds:.0f} s"


def _rate(t: Table, e: Entry) -> str:
    return DASH if e.lr is None else f"{e.lr:g}" + ("" if e.searched else "*")


def _fast(prefill: float | None, token: float | None) -> str:
    if prefill is None:
        return DASH
    return f"{1000 * prefill:.1f}" + ("" if token is None else f" + {1000 * token:.2f}")


ROW = Column(
    "row",
    lambda t, e: e.name + (" ◆" if e.front else ""),
    "◆: on the front: no other row is as good or better in quality, trained parameters, forgetting and latency at once",
)
GOOD = (
    Column("quality", _quality, "on the test rows, with its 95 % interval over rows"),
    Column("less the best", _less, "paired, on the same test rows; ~: not clearly worse, the interval holds zero"),
    Column("held-out loss", _loss, "on the test rows"),
    Column("general text", _general, "loss a token on general text, and its rise over the untouched base: what was forgotten"),
    Column("rate", _rate, "learning rate, the best of those that were tried; *: the default, not searched"),
    Column("tokens", lambda t, e: DASH if e.tokens is None else f"{e.tokens / 1000:,.0f}k", "that it was trained on"),
    Column("to target", _target, "training tokens and seconds until the target"),
    Column("seeds", lambda t, e: DASH if e.baseline or not e.seeds else str(e.seeds), "whose mean the numbers are"),
)
COST = (
    Column("trained", _trained, "parameters, and their share of the base"),
    Column("s a step", lambda t, e: DASH if e.step is None else f"{e.step:.2f}", "median over steps"),
    Column("training", lambda t, e: DASH if e.seconds is None or not e.steps else clock(e.seconds), "time of all steps"),
    Column("memory", lambda t, e: DASH if e.peak is None else size(e.peak), "peak of its own process (of a GPU: of tensors there)"),
    Column("file", lambda t, e: DASH if e.bytes is None else size(e.bytes), "of what was trained"),
    Column("ms beside base", lambda t, e: _fast(e.prefill, e.token), "latency of one answer: the prompt + every token after it, the delta beside its base"),
    Column("ms merged", lambda t, e: _fast(e.merged_prefill, e.merged_token), "the same, merged into its base; -: it cannot be merged"),
)


def columns(t: Table, part: tuple[Column, ...] = (*GOOD, *COST)) -> list[Column]:
    """The row's name and the columns of a part in which at least one row says something; the head of the quality is its name."""
    shown = [c for c in part if any(c.cell(t, e) != DASH for e in t.entries)]
    if t.measure == scoring.LOSS:
        shown = [c for c in shown if c.head != "held-out loss"]
    return [ROW, *(Column(t.measure, c.cell, c.means) if c.head == "quality" else c for c in shown)]


def terminal(t: Table, part: tuple[Column, ...]) -> Terminal:
    """One part of the table, for a console."""
    out = Terminal(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    cols = columns(t, part)
    for c in cols:
        out.add_column(c.head, justify="left" if c.head == "row" else "right", no_wrap=c.head != "row", overflow="fold")
    for e in t.entries:
        if not e.problem and says(t, e, cols):
            out.add_row(*(c.cell(t, e) for c in cols), style="dim" if e.baseline else "bold" if e is t.best else None)
    return out


def says(t: Table, e: Entry, cols: list[Column]) -> bool:
    """Whether a row says anything in these columns besides its name."""
    return any(c.cell(t, e) != DASH for c in cols[1:])


def refused(t: Table) -> Iterator[str]:
    """A line for each row without numbers."""
    for e in t.entries:
        if e.problem:
            yield f"{e.name}: {e.problem}"


# --- files ------------------------------------------------------------------------------------------------------------


NUMBERS = (
    "clearly_worse", "general", "forgotten", "trained", "share", "lr", "searched", "steps", "tokens", "seconds", "step", "peak", "bytes", "prefill",
    "token", "merged_prefill", "merged_token", "target_tokens", "target_seconds",
)  # fmt: skip
UNITS = {"step": "seconds_a_step", "peak": "peak_bytes", "bytes": "file_bytes"} | {n: f"{n}_seconds" for n in NUMBERS if n.endswith(("prefill", "token"))}


def plain(t: Table, e: Entry) -> dict[str, Any]:
    """An entry as plain numbers, in SI units but for shares."""
    out: dict[str, Any] = {"row": e.name, "kind": "baseline" if e.baseline else "refused" if e.problem else "row", "front": e.front, "seeds": e.seeds}
    for name, i in e.scores.items():
        key = name.replace(" ", "_").replace("-", "_")
        out |= {key: i.value, f"{key}_low": i.low, f"{key}_high": i.high, f"{key}_n": i.n}
    out["quality_by_seed"] = " ".join(f"{v:.6g}" for v in e.by_seed)
    if e.less is not None:
        out |= {"less_best": e.less.value, "less_best_low": e.less.low, "less_best_high": e.less.high}
    out |= {UNITS.get(n, n): getattr(e, n) for n in NUMBERS}
    return out | {"problem": e.problem, "settings": " ".join(e.settings)}


def as_csv(t: Table) -> str:
    """One line a row, numbers unrounded; empty where there is none."""
    rows = [plain(t, e) for e in t.entries]
    heads = list(dict.fromkeys(k for r in rows for k in r))
    out = io.StringIO()
    writer = csv.DictWriter(out, heads, lineterminator="\n")
    writer.writeheader()
    for r in rows:
        writer.writerow({k: "" if v is None else v for k, v in r.items()})
    return out.getvalue()


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"$\sim$",
    "^": r"\^{}",
    "◆": r"$\blacklozenge$",
}


def tex(text: str) -> str:
    """Text as LaTeX shows it; needs amssymb for the mark of the front."""
    return "".join(_TEX.get(c, c) for c in text)


def as_latex(t: Table) -> str:
    """A tabular for booktabs: quality, difference, loss, general text, trained, memory, latency."""
    cols = [c for c in columns(t) if c.head not in ("rate", "tokens", "seeds", "training")]
    lines = [
        r"% needs \usepackage{booktabs,amssymb}",
        r"\begin{tabular}{l" + "r" * (len(cols) - 1) + "}",
        r"\toprule",
        " & ".join(tex(c.head) for c in cols) + r" \\",
        r"\midrule",
    ]
    lines += [" & ".join("--" if (said := c.cell(t, e)) == DASH else tex(said) for c in cols) + r" \\" for e in t.rows]
    if t.baselines:
        lines.append(r"\midrule")
        lines += [" & ".join("--" if (said := c.cell(t, e)) == DASH else tex(said) for c in cols) + r" \\" for e in t.baselines]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"
