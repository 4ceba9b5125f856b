"""A report on data in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

COLOURS = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}
ROLES = {"train": "training", "against": "benchmark"}
BAR = 36
WIDE = 160  # characters of a table where there is no terminal to fit into


def show(data: dict[str, Any], console: Console) -> None:
    """The page: what the data is, how long its rows are, and what was found."""
    console.print(_files(data), width=None if console.is_terminal else WIDE)
    console.print()
    for line in facts(data):
        console.print(Text(line), soft_wrap=not console.is_terminal)
    if data["histogram"]:
        console.print()
        console.print(_histogram(data))
    for finding in data["findings"]:
        console.print()
        _show(finding, console)
    console.print()
    console.print(Text(verdict(data), style="bold"))


def facts(data: dict[str, Any]) -> Iterator[str]:
    """What is said of all rows, line by line."""
    trained = data["trained_tokens"]
    share = f", {trained / data['tokens']:.0%} of them trained" if trained is not None and data["tokens"] else ""
    template = f", chat template: {data['template']}" if data["template"] else ""
    yield f"{data['rows']:,} row{'s' if data['rows'] != 1 else ''} to train with objective {data['objective']}, {data['tokens']:,} tokens{share}{template}"
    if data["lengths"]:
        yield "length of a row in tokens: " + ", ".join(f"{name} {n:,}" for name, n in data["lengths"].items())
    yield f"too long (data.over_length={data['over_length']}, data.max_tokens={data['max_tokens']}): {data['over_limit']['said']}"


def verdict(data: dict[str, Any]) -> str:
    """The last line."""
    counts = data["counts"]
    named = ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts.items() if n)
    return "clean: nothing was found" if not named else f"{'clean: ' if data['verdict'] == 'clean' else ''}{named}"


def _files(data: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    odd = any(f["unusable"] for f in data["files"])
    for name in ("file", "role", "rows", *(("unusable",) if odd else ()), "shape"):
        table.add_column(name, justify="right" if name in ("rows", "unusable") else "left", overflow="fold")
    for f in data["files"]:
        table.add_row(f["file"], ROLES.get(f["role"], f["role"]), f"{f['rows']:,}", *((f"{f['unusable']:,}",) if odd else ()), Text(f["shape"]))
    return table


def _histogram(data: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    most = max(b["rows"] for b in data["histogram"])
    for b in data["histogram"]:
        span = f"{b['from']:,} to {b['to']:,}" if b["to"] is not None else f"{b['from']:,} and more"
        beyond = b["to"] is None or b["to"] > data["max_tokens"]
        style = "yellow" if beyond and data["over_limit"]["over"] else "green"
        n = round(BAR * b["rows"] / most)
        table.add_row(span, Text(("█" * n) or ("▏" if b["rows"] else ""), style=style), f"{b['rows']:,}")
    return table


def _show(f: dict[str, Any], console: Console) -> None:
    head = Text()
    head.append(f["severity"], style=COLOURS[f["severity"]])
    head.append(f"  {f['title']}", style="bold")
    head.append(f": {f['count']:,} {f['unit']}  ")
    head.append(f["name"], style="dim")
    wrap = not console.is_terminal
    console.print(head, soft_wrap=wrap)
    for label, text in (("", f["said"]), ("do: ", f["fix"])):
        console.print(Padding(Text(label + text), (0, 0, 0, 2)) if not wrap else Text(f"  {label}{text}"), soft_wrap=wrap)
    for e in f["examples"]:
        line = Text("  - ")
        line.append(e["where"], style="cyan")
        line.append(f" and {e['like']}" if e["like"] else "")
        said = " | ".join(t for t in (e["found"], e["text"] if e["found"] != e["text"] else None) if t)
        line.append(f": {said}" if said else "")
        console.print(line, soft_wrap=wrap)
