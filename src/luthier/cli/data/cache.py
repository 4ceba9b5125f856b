"""luthier data cache: what prepared data is kept on disk, where, and how to be rid of it."""

from __future__ import annotations

from typing import Annotated

import typer


def command(clear: Annotated[bool, typer.Option("--clear", help="Delete all of it; the next run prepares its data anew.")] = False) -> None:
    """Show the prepared data that is kept on disk; `--clear` deletes it.

    Runs keep what they make of their data (data.cache) and find it again while the files, the tokenizer, the template, the settings and the program are
    the same. LUTHIER_CACHE names the folder; LUTHIER_DATA_CACHE_GB says how much may be kept, 10 where it is not set: what was unused the longest goes first.
    """
    from datetime import datetime

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ...data import kept, rowfile

    console = Console(highlight=False)
    line = lambda text: console.print(Text(text), soft_wrap=True)  # noqa: E731
    if clear:
        count, size = kept.clear()
        line(f"{count:,} {'file' if count == 1 else 'files'} deleted from {kept.place()}, {size / 1e6:,.1f} MB")
        return
    room = kept.most() / 1e9
    entries = kept.entries()
    if not entries:
        line(f"nothing is kept in {kept.place()}; at most {room:g} GB will be (LUTHIER_DATA_CACHE_GB)")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, side in (("data", "left"), ("read as", "left"), ("rows", "right"), ("MB", "right"), ("made", "left"), ("last used", "left")):
        table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    for path in reversed(entries):
        about, there = rowfile.about(path), path.stat()
        used = datetime.fromtimestamp(there.st_mtime).strftime("%Y-%m-%d %H:%M")
        rows = f"{int(about['rows']):,}" if about.get("rows", "").isdigit() else "?"
        row = (about.get("data", f"damaged: {path.name}"), about.get("renders", "?"), rows, f"{there.st_size / 1e6:,.1f}", about.get("made", "?"), used)
        table.add_row(*map(Text, row))
    console.print(table)
    total = sum(p.stat().st_size for p in entries)
    line(f"{total / 1e9:,.2f} GB of at most {room:g} GB (LUTHIER_DATA_CACHE_GB) in {kept.place()}; luthier data cache --clear deletes it")
