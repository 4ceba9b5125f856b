"""luthier data: look at training data as the model will see it, find what is wrong with it, and collect judgements of answers, from people or from a model."""

from __future__ import annotations

import typer

from .cache import command as cache
from .check import command as check
from .judge import command as judge
from .knowledge import command as knowledge
from .prefer import command as prefer
from .preview import command as preview

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Look at data before it is trained on, find what is wrong with it, and collect preferences.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def data() -> None:
    """Look at data before it is trained on, find what is wrong with it, and collect preferences."""


app.command("preview")(preview)
app.command("check")(check)
app.command("prefer")(prefer)
app.command("judge")(judge)
app.command("knowledge")(knowledge)
app.command("cache")(cache)
