"""luthier data preview: training data as the model will see it, before anything is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import heavy


def command(
    file: Annotated[str, typer.Argument(metavar="DATA", help="A file, a folder, or a Hub data set id.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of a run, e.g. data.max_tokens=512.")] = None,
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template are used.")] = "fiddle",
    objective: Annotated[
        str, typer.Option(help="sft: learn responses; text: the text itself; classify: labels; masked_text: hidden parts; reward, dpo, kto: judged answers.")
    ] = "sft",
    rows: Annotated[int, typer.Option(min=0, help="So many rows are shown.")] = 3,
) -> None:
    """Which shape the data has, what is trained, what is cut and what is wrong with it."""
    from rich.console import Console
    from rich.text import Text

    heavy("build")
    from ...build import load, load_tokenizer
    from ...core import LuthierError
    from ...data.preview import show
    from ...reading import form_of, read_data
    from ...settings.config import load_run
    from ...settings.plugins import plugin

    for setting in settings or []:
        if "=" not in setting:
            raise LuthierError(f"{setting!r} is neither an option nor a setting. One DATA is shown at a time; settings are written KEY=VALUE.")
    run = load_run({"data": {"train": [file]}}, [f"model.id={model}", f"objective={objective}", *(settings or [])])
    console = Console(highlight=False)
    tokenizer = load_tokenizer(run.model)
    form = form_of(load(run.model, precision=plugin("precision", "float32")(), weights=False))  # counted, not loaded
    prepared = read_data(run, tokenizer, positions=tokenizer.model_max_length, say=lambda text: console.print(Text(text), soft_wrap=True), form=form)
    show(prepared.train[:rows], tokenizer, prepared.facts, console)
