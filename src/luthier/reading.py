"""The data of a run, as its settings say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .core import Base, LuthierError
from .data.feed import Batches
from .data.kept import prepare_or_read
from .data.mixing import Drawn, Mixture, Rows, rates
from .data.prepare import DECODER, Prepared
from .data.rows import Form
from .data.sources import files_of
from .data.streaming import Streamed
from .modelling.context import splitting
from .settings.mix import Mix, Source
from .settings.run import Run


def form_of(base: Base) -> Form:
    """What kind of model the rows are for."""
    config: Any = base.model.config.get_text_config()  # type: ignore[operator, union-attr]
    two = (getattr(config, "type_vocab_size", None) or 0) > 1
    return Form(kind=base.anatomy.kind, start=base.anatomy.decoder_start, token_types=base.anatomy.kind == "encoder" and two)


def look(run: Run) -> None:
    """Raise LuthierError where a file of the data is not there, is empty or is of no known kind: before a model is opened, which may take a minute."""
    if not run.data.files:
        raise LuthierError("data.train: names no file; say luthier train FILE, or data.train=FILE")
    for source in (*run.data.files, *run.data.held_out):
        if not Path(source).expanduser().is_dir():  # what a folder holds of a split is seen when it is read
            files_of(source)


def read_data(run: Run, tokenizer: Any, *, positions: int, say: Callable[[str], None], form: Form = DECODER) -> Prepared:
    """Read, render and divide what ``data`` names. ``positions``: how many tokens the model can see; ``say`` gets what was found, line by line.

    ``form``: what kind of model the rows are for. Raises Incompatible where the objective does not serve that kind.
    """
    look(run)
    d = run.data
    if d.mix is None and run.objective.renders == "mixed":
        raise LuthierError("objective: multitask learns the sources of data.mix, and there is none; name them, or set the objective of one task")
    if serves := getattr(run.objective, "serves", None):
        serves(form.kind)
    how = partial(_read, run, tokenizer=tokenizer, positions=positions, form=form)
    if d.mix is None:
        return how(Source(files=d.train, columns=d.columns, shape=d.shape, validation=d.validation), objective=run.objective, say=say)
    return _read_mix(run, d.mix, how, say)


def _read(run: Run, source: Source, *, objective: Any, tokenizer: Any, positions: int, say: Callable[[str], None], form: Form) -> Prepared:
    """One source under one objective; what the source does not say is as in data."""
    d = run.data
    room = getattr(objective, "max_new", 0) if form.kind == "decoder" else 0  # what is answered takes positions too
    if room >= positions:
        raise LuthierError(f"objective.max_new: answers of {room} tokens leave no room for a prompt in the {positions} positions of this model")
    known: dict[str, Any] = {"problem": objective.problem, "labels": objective.labels} if objective.renders == "label" else {}
    if objective.renders == "prompts":
        known["beginning"] = objective.beginning
    return prepare_or_read(
        source.files,
        tokenizer,
        **made_of(run, positions=positions - room, form=form, source=source, objective=objective),
        limit=source.limit or d.limit,
        on_bad_row=source.on_bad_row or d.on_bad_row,
        validation=source.validation,
        validation_share=d.validation_share,
        validation_rows=source.validation_rows or d.validation_rows,
        templates=[(t.prompt, t.completion) for t in source.templates],
        stream=source.buffer if source.stream else None,
        seed=run.seed,
        keep=d.cache,
        say=say,
        **known,
    )


def made_of(run: Run, *, positions: int, form: Form, source: Source | None = None, objective: Any = None) -> dict[str, Any]:
    """The settings that say how a record becomes rows, under the names that ``data/prepare.py`` has for them; of a source, what it says itself."""
    d, goal = run.data, objective or run.objective
    of = source or Source(files=d.train, columns=d.columns, shape=d.shape)
    return {
        "renders": goal.renders, "form": form, "template": run.model.template, "shape": of.shape, "columns": of.columns, "split": of.split or d.split,
        "languages": d.languages, "max_tokens": min(d.max_tokens or 2048, positions), "over_length": d.over_length, "train_on": d.train_on,
    }  # fmt: skip


# --- mixtures -------------------------------------------------------------------------------------------------------


def _read_mix(run: Run, mix: Mix, how: Callable[..., Prepared], say: Callable[[str], None]) -> Prepared:
    """Every source by itself, its rows marked with the part that learns them."""
    if run.objective.renders == "prompts":
        raise LuthierError("data.mix: this objective answers prompts, which it takes in turns and not by a rule; name the files in data.train")
    out = Prepared([], [], [])
    shared: dict[str, str] = {}
    parts: dict[str, Any] = {}
    for name, source in mix.sources.items():
        part, objective = part_of(run, name)
        if objective.renders == "label" and not objective.labels and part in shared:
            which = "objective" if part == "" else f"objective.parts.{part}"
            raise LuthierError(
                f"data.mix.sources.{name}: its labels would be learned by the same head as those of {shared[part]}; say which there are in all of them "
                f"({which}.labels=[...])" + ("" if part else ", or give each a head of its own with objective: multitask")
            )
        shared[part] = name
        if source.templates and objective.renders != "chat":
            raise LuthierError(f"data.mix.sources.{name}.templates: they make prompts with completions, for objective sft, and this source's is another")
        say(f"source {name}" + (f", learned by {part}:" if part else ":"))
        got = how(source, objective=objective, say=lambda text: say(f"  {text}"))
        if part:
            got.train[:], got.validation[:] = ([replace(r, task=part) for r in rows] for rows in (got.train, got.validation))
            parts[part] = got.facts
        out.sources[name] = got
    together(out)
    first = next(iter(out.sources.values())).facts
    out.facts = {k: first[k] for k in ("max_tokens", "over_length", "problem", "labels") if k in first} | {
        "renders": run.objective.renders,
        "rows": len(out.train),
        "tokens": sum(s.facts["tokens"] for s in out.sources.values()),
        "sources": {name: s.facts for name, s in out.sources.items()},
        "parts": parts,
    }
    return out


def part_of(run: Run, source: str) -> tuple[str, Any]:
    """(the part's name, its objective) that learns a source of the mixture; ("", the run's objective) where that has no parts."""
    assert run.data.mix is not None
    if not hasattr(run.objective, "part_of"):
        return "", run.objective
    name = run.objective.part_of(source, run.data.mix.sources[source].objective)
    return name, run.objective.parts[name]


def together(prepared: Prepared) -> None:
    """Fill the lists of a mixture from its sources'."""
    for name in ("train", "validation", "validation_records"):
        getattr(prepared, name)[:] = [x for s in prepared.sources.values() for x in getattr(s, name)]


def sections(run: Run, prepared: Prepared) -> Iterator[tuple[str, Any, Prepared]]:
    """(source, objective, its rows) of a mixture; one of no name otherwise. The objective of a multitask part reads the heads of all parts."""
    if not prepared.sources:
        yield "", run.objective, prepared
    for name, rows in prepared.sources.items():
        part, objective = part_of(run, name)
        yield name, run.objective.part(part) if part else objective, rows


def order_of(run: Run, prepared: Prepared) -> Mixture | None:
    """The order in which a mixture's rows are drawn; None where there is no mixture."""
    mix = run.data.mix
    if mix is None:
        return None
    sources: list[Drawn] = []
    first = 0
    for name, rows in prepared.sources.items():
        of = mix.sources[name]
        if rows.stream is not None:
            told = {"rows": of.rows, "tokens": rows.facts["mean_tokens"], "task": part_of(run, name)[0], "variants": bool(of.templates)}
            sources.append(Streamed(name, rows.stream, run.seed, buffer=of.buffer, **told))
            continue
        sources.append(Rows(name, rows.train, run.seed, first=first, variants=bool(of.templates)))
        first += len(rows.train)
    sizes = [s.size or 1 for s in sources]  # where one is not known, the rule does not ask
    rate_M = rates(sizes, mix.rule, temperature=mix.temperature or 2.0, cap=mix.cap, weights=[s.weight or 0.0 for s in mix.sources.values()])
    streams = any(s.stream for s in mix.sources.values())
    return Mixture(sources, rate_M, run.seed, epoch_rows=None if streams else sum(n if mix.cap is None else min(n, mix.cap) for n in sizes))


def batches_of(run: Run, prepared: Prepared, objective: Any, *, pad: int, packed: bool, order: Any = None) -> Batches:
    """The micro-batches of the data, a step at a time; ``order``: of the rows, where it is not the run's own."""
    o = run.optim
    return Batches(
        prepared.train,
        splitting(objective.collate, run.place.sequence),
        order=order_of(run, prepared) if order is None else order,
        pad=pad,
        packed=packed,
        batch_tokens=o.batch_tokens,
        batch_examples=o.batch_examples,
        micro_tokens=o.micro_tokens,
        epochs=o.epochs,
        steps=o.steps,
        seed=run.seed,
        rank=run.place.lane,
        size=run.place.lanes,
    )


def fitted(run: Run, prepared: Prepared) -> Run:
    """The run with what its objective learned from the data: the names of the labels."""
    fit = getattr(run.objective, "fitted", None)
    return run if fit is None else replace(run, objective=fit(prepared.facts))
