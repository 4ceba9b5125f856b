"""The data of a run, as its settings say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .core import Base, LuthierError
from .data.kept import prepare_or_read
from .data.prepare import DECODER, Prepared
from .data.rows import Form
from .run import Run


def form_of(base: Base) -> Form:
    """What kind of model the rows are for."""
    config: Any = base.model.config.get_text_config()  # type: ignore[operator, union-attr]
    two = (getattr(config, "type_vocab_size", None) or 0) > 1
    return Form(kind=base.anatomy.kind, start=base.anatomy.decoder_start, token_types=base.anatomy.kind == "encoder" and two)


def read_data(run: Run, tokenizer: Any, *, positions: int, say: Callable[[str], None], form: Form = DECODER) -> Prepared:
    """Read, render and divide what ``data`` names. ``positions``: how many tokens the model can see; ``say`` gets what was found, line by line.

    ``form``: what kind of model the rows are for. Raises Incompatible where the objective does not serve that kind.
    """
    d = run.data
    if not d.train:
        raise LuthierError("data.train: names no file; say luthier train FILE, or data.train=FILE")
    if serves := getattr(run.objective, "serves", None):
        serves(form.kind)
    room = getattr(run.objective, "max_new", 0) if form.kind == "decoder" else 0  # what is answered takes positions too
    if room >= positions:
        raise LuthierError(f"objective.max_new: answers of {room} tokens leave no room for a prompt in the {positions} positions of this model")
    known: dict[str, Any] = {"problem": run.objective.problem, "labels": run.objective.labels} if run.objective.renders == "label" else {}
    if run.objective.renders == "prompts":
        known["beginning"] = run.objective.beginning
    return prepare_or_read(
        d.train,
        tokenizer,
        renders=run.objective.renders,
        form=form,
        template=run.model.template,
        shape=d.shape,
        columns=d.columns,
        split=d.split,
        languages=d.languages,
        limit=d.limit,
        max_tokens=min(d.max_tokens or 2048, positions - room),
        over_length=d.over_length,
        train_on=d.train_on,
        on_bad_row=d.on_bad_row,
        validation=d.validation,
        validation_share=d.validation_share,
        validation_rows=d.validation_rows,
        seed=run.seed,
        keep=d.cache,
        say=say,
        **known,
    )


def fitted(run: Run, prepared: Prepared) -> Run:
    """The run with what its objective learned from the data: the names of the labels."""
    fit = getattr(run.objective, "fitted", None)
    return run if fit is None else replace(run, objective=fit(prepared.facts))
