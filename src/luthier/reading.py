"""The data of a run, as its settings say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .core import LuthierError
from .data.prepare import Prepared, prepare
from .run import Run


def read_data(run: Run, tokenizer: Any, *, positions: int, say: Callable[[str], None]) -> Prepared:
    """Read, render and divide what ``data`` names. ``positions``: how many tokens the model can see; ``say`` gets what was found, line by line."""
    d = run.data
    if not d.train:
        raise LuthierError("data.train: names no file; say luthier train FILE, or data.train=FILE")
    return prepare(
        d.train,
        tokenizer,
        renders=run.objective.renders,
        template=run.model.template,
        shape=d.shape,
        columns=d.columns,
        split=d.split,
        limit=d.limit,
        max_tokens=min(d.max_tokens or 2048, positions),
        over_length=d.over_length,
        train_on=d.train_on,
        on_bad_row=d.on_bad_row,
        validation=d.validation,
        validation_share=d.validation_share,
        validation_rows=d.validation_rows,
        seed=run.seed,
        say=say,
    )
