"""luthier predict: labels of texts, with their probabilities, or rewards of answers, as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import heavy

if TYPE_CHECKING:
    from ..data.labels import Labelled
    from ..data.preferences import Judged

WINDOW = 512  # texts read, labelled and written at a time


def command(
    what: Annotated[str, typer.Argument(help="A run's folder, an adapter or a model that was trained with objective: classify or reward.")],
    texts: Annotated[
        str,
        typer.Argument(
            metavar="[FILE]",
            help="Texts: .txt, one a line; .jsonl .csv .tsv .parquet with a text column, or for a reward model with prompts and answers. "
            "Default: standard input.",
        ),
    ] = "-",
    output: Annotated[Path | None, typer.Option(help="Write the lines to this file. Default: standard output.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="Which column is which: text=NAME, and pair=NAME for a second text; of answers OURS=YOURS.")] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Add the probability of every label.")] = False,
    model: Annotated[str | None, typer.Option(help="The adapter's base, where it is not where the adapter says.")] = None,
    template: Annotated[str | None, typer.Option(help="Chat template of prompts and answers: a name or a .jinja file. Default: the model's own.")] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine does fast.")] = "auto",
    part: Annotated[str | None, typer.Option(help="Of a model that learned several tasks (objective: multitask): which of them.")] = None,
) -> None:
    """Predict: `luthier predict runs/NAME texts.txt`, or `echo "a fine film" | luthier predict runs/NAME`."""
    heavy("opening")
    from ..errors import LuthierError
    from ..measuring.measure import learned
    from ..opening import load

    policy = load(what, model=model, precision=precision)
    rewards = getattr(learned(policy, part), "renders", "") == "ranked"
    for setting in column or []:
        if not all(setting.partition("=")) or (not rewards and setting.partition("=")[0] not in ("text", "pair")):
            said = "OURS=YOURS, for example completion=answer" if rewards else "text=NAME, or pair=NAME for a second text"
            raise LuthierError(f"--column {setting}: say {said}")
    columns = dict(setting.split("=", 1) for setting in column or [])
    items: Iterator[Any] = _judged(texts, columns) if rewards else _items(texts, columns)
    with output.open("w", encoding="utf-8") if output is not None else nullcontext(sys.stdout) as out:
        while some := list(islice(items, WINDOW)):
            if rewards:
                _write_rewards(policy, some, out, template, part)
            else:
                _write(policy, some, out, probabilities, part)


def _write_rewards(policy: Any, some: list[Judged], out: Any, template: str | None, part: str | None) -> None:
    from ..measuring.measure import rewards

    for item, scores in zip(some, rewards(policy, some, template=template, part=part), strict=True):
        line = {"prompt": item.chats[0].messages[: item.prompt], "answers": item.answers(), "rewards": [round(x, 4) for x in scores]}
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
    out.flush()


def _judged(source: str, columns: dict[str, str]) -> Iterator[Judged]:
    """Prompts with their answers. Raises LuthierError where a file cannot be read or has no answers."""
    from ..data.formats import Bad
    from ..data.preferences import convert_preferences, detect_preferences
    from ..data.sources import read
    from ..errors import LuthierError

    if source == "-" or source.endswith(".txt"):
        raise LuthierError(
            "a reward model scores answers to prompts: name a file (.jsonl .csv .parquet) with columns prompt and completion, or chosen and rejected"
        )
    bad = Bad("fatal")
    records = read(source, bad=bad)
    first = list(islice(records, 100))
    shape = detect_preferences(first, renders="ranked", columns=columns, judged=False)
    for record in [*first, *records]:
        yield from convert_preferences(record, shape, bad, renders="ranked")


def _write(policy: Any, some: list[Labelled], out: Any, probabilities: bool, part: str | None) -> None:
    from ..measuring.measure import predict_texts

    for item, said in zip(some, predict_texts(policy, some, part=part), strict=True):
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
