"""luthier predict: labels of texts, with their probabilities, as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..data.labels import Labelled

WINDOW = 512  # texts read, labelled and written at a time


def command(
    what: Annotated[str, typer.Argument(help="A run's folder, an adapter or a model that was trained with objective: classify.")],
    texts: Annotated[
        str, typer.Argument(metavar="[FILE]", help="Texts: .txt, one a line; .jsonl .csv .tsv .parquet with a text column. Default: standard input.")
    ] = "-",
    output: Annotated[Path | None, typer.Option(help="Write the lines to this file. Default: standard output.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="Which column is which: text=NAME, and pair=NAME for a second text.")] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Add the probability of every label.")] = False,
    model: Annotated[str | None, typer.Option(help="The adapter's base, where it is not where the adapter says.")] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine does fast.")] = "auto",
) -> None:
    """Predict: `luthier predict runs/NAME texts.txt`, or `echo "a fine film" | luthier predict runs/NAME`."""
    from ..errors import LuthierError
    from ..opening import load

    for setting in column or []:
        if setting.partition("=")[0] not in ("text", "pair") or not setting.partition("=")[2]:
            raise LuthierError(f"--column {setting}: say text=NAME, or pair=NAME for a second text")
    items = _items(texts, dict(setting.split("=", 1) for setting in column or []))
    policy = load(what, model=model, precision=precision)
    with output.open("w", encoding="utf-8") if output is not None else nullcontext(sys.stdout) as out:
        while some := list(islice(items, WINDOW)):
            _write(policy, some, out, probabilities)


def _write(policy: Any, some: list[Labelled], out: Any, probabilities: bool) -> None:
    from ..measure import predict_texts

    for item, said in zip(some, predict_texts(policy, some), strict=True):
        line: dict[str, Any] = dict(zip(("text", "pair"), item.texts, strict=False)) | {"label": said["label"]}
        for name, wanted in (("probability", True), ("probabilities", probabilities)):
            if wanted and name in said:
                p = said[name]
                line[name] = {k: round(v, 4) for k, v in p.items()} if isinstance(p, dict) else round(p, 4)
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
    out.flush()


def _items(source: str, columns: dict[str, str]) -> Iterator[Labelled]:
    """Texts without labels; a line that is empty is skipped. Raises LuthierError where a file cannot be read or has no text column."""
    from ..data.formats import Bad
    from ..data.labels import Labelled, convert_labelled, detect_labelled
    from ..data.sources import files_of, read

    if source == "-" or source.endswith(".txt"):
        if source != "-":
            files_of(source)  # says what is wrong with the path
        with nullcontext(sys.stdin) if source == "-" else Path(source).expanduser().open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Labelled((line.strip(),), None, f"{'input' if source == '-' else source}:{number}")
        return
    bad = Bad("fatal")
    records = read(source, bad=bad)
    first = list(islice(records, 100))
    shape = detect_labelled(first, columns=columns, labelled=False)
    for record in [*first, *records]:
        yield from convert_labelled(record, shape, bad)
