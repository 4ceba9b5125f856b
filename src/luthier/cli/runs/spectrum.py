"""luthier runs spectrum: the singular spectra of what a run learned, and the rank that they take."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from .. import heavy
from .finding import table


def command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A run's name, or the path of its folder; also of an adapter or a trained model.")],
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Of full fine-tuning: the base, where it is not where it was.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every matrix with its singular values, as JSON.")] = None,
) -> None:
    """Of LoRA how much of its rank is used; of full fine-tuning which rank would have held the change."""
    heavy("forgetting.spectrum")
    from ... import atomic
    from ...forgetting import spectrum
    from ...running.progress import LINE_EVERY, Reporter
    from .finding import folder

    path = Path(name) if Path(name).is_dir() else folder(name, context.obj)
    reporter, quiet = Reporter(), time.monotonic() + LINE_EVERY
    found = spectrum.learned(path, base=base, tick=lambda done, of: reporter.tick("matrices", done, of) if time.monotonic() > quiet else None)
    rows = spectrum.table(found)
    given = any(r.given is not None for r in rows)
    columns = [
        "matrix",
        "how many",
        "shape",
        *([] if given else ["change / weight"]),
        "stable rank",
        "rank of 90 %",
        "at most",
        *(["of rank"] if given else []),
    ]
    table(columns, (_cells(r, given) for r in rows), words=("matrix",))
    for sentence in spectrum.sentences(found):
        typer.echo(sentence)
    if output is not None:
        atomic.text(output, json.dumps(spectrum.as_json(found), indent=1) + "\n")
        typer.echo(f"wrote {output}")


def _cells(r: object, given: bool) -> list[str]:
    from ...forgetting.spectrum import Row

    assert isinstance(r, Row)
    size = [] if given else ["" if r.size is None else f"{r.size:.2%}"]
    return [
        r.kind, str(r.matrices), f"{r.shape[0]:,} x {r.shape[1]:,}", *size, f"{r.stable:.1f}", str(r.typical), str(r.most), *([str(r.given)] if given else [])
    ]  # fmt: skip
