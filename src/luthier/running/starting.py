"""From settings to a run that is under way: its base, its data, what fits in memory, its folder, and where an interrupted one goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import build
from ..core import LuthierError
from ..data.prepare import Prepared
from ..devices.launched import launched
from ..forgetting import against, difficulty
from ..modelling import context, vocabulary
from ..modelling.anatomy import numbers
from ..planning import fitting
from ..planning.foresight import as_long
from ..planning.memory import resident
from ..reading import fitted, form_of, look, read_data
from ..report import recording
from ..saving import checkpoint, elastic
from ..settings import config
from ..settings.plugins import kind_of
from ..settings.run import Run
from .progress import Reporter
from .result import Result
from .session import Session, report


def execute(
    run: Run,
    *,
    resume: Path | None = None,
    accept_changes: bool = False,
    reporter: Reporter | None = None,
    read: Callable[..., Prepared] = read_data,
) -> Result:
    """Train ``run`` and write its folder. ``resume``: continue the run in that folder, bit for bit. ``read``: what reads its data, called as `read_data`.

    Raises LuthierError for what the user can put right, Interrupted after Ctrl-C.
    """
    say, asked, program = reporter or Reporter(quiet=not launched().leads), run, resident()
    run, notes = build.resolve(run)
    run.place.start()
    begun = None
    if resume is None:
        begun, stands = run.place.share(_begun(asked) if run.place.leads else (None, False), "the folder to go on in")
        if stands:
            assert begun is not None
            notes.append(f"this launch was started again: going on in {begun}")
            resume, (run, _) = begun, build.resolve(config.load_run(begun / "run.yaml"))
    for note in notes:
        say.note(note)
    against.check(run)
    difficulty.check(run)
    context.check(run)
    state = _state(run, resume, accept_changes, say)
    if read is read_data:
        look(run)
    build.seed_everything(run.seed)  # random weights are drawn while the model is made
    if run.place.ceiling is not None and getattr(run.precision, "resident", "") == "auto":
        run = replace(run, precision=replace(run.precision, resident="no"))
        say.note("precision.resident=no: decoded weights are not kept in memory beside the codes, because place.memory limits it")
    base = build.open_base(run)
    if base.tokenizer is None:
        build.load_tokenizer(run.model)  # says what is missing
    say.base(base)
    if run.tokens:
        vocabulary.extend(base, run.tokens)
        say.note(f"{len(run.tokens)} tokens added to the vocabulary: {', '.join(run.tokens)}")
    room = min(base.max_positions, base.tokenizer.model_max_length) - getattr(run.method, "shift", 0)
    prepared = elastic.in_turn(run.place, lambda: read(run, base.tokenizer, positions=room, say=say.note, form=form_of(base)), "data")
    run = fitted(run, prepared)
    if resume is None:
        fit = run.place.share(_in_memory(run, base, prepared, program, say) if run.place.leads else run, "what fits in memory")
        run = replace(run, optim=fit.optim, recompute=fit.recompute)
    folder = resume or run.place.share(_new_folder(run, begun) if run.place.leads else Path(), "the folder of the run")
    if resume is None and run.place.leads:
        elastic.remember(asked, folder)
    elastic.all_see(run.place, folder)
    try:
        session = Session(run, folder, base, prepared, say, asked, program)
        return session.go(state)
    except BaseException as e:
        if not run.place.leads:
            raise
        if resume is None and not checkpoint.steps(folder):  # nothing half-written stays
            shutil.rmtree(folder, ignore_errors=True)
        elif (folder / recording.FACTS).is_file():
            recording.fail(folder, e)
            report(folder, say)
        raise


def _in_memory(run: Run, base: Any, prepared: Prepared, program: int, say: Reporter) -> Run:
    """The run as it fits in memory; small ones are not looked at unless a ceiling was asked for. One that goes on keeps what it began with."""
    ceiling = run.place.ceiling
    if run.place.memory == "off" or (ceiling is None and numbers(base.model) < fitting.LARGE):
        return run
    try:
        fit, notes = fitting.fitted(as_long(run, prepared.facts.get("longest")), fitting.Planner(), ceiling=ceiling, program=program)
    except LuthierError:
        if ceiling is not None:
            raise
        return run  # it cannot be counted, or what it goes on from is not there yet
    for note in notes:
        say.warn(note)
    return replace(run, optim=fit.optim, recompute=fit.recompute)


def _state(run: Run, resume: Path | None, accept_changes: bool, say: Reporter) -> checkpoint.State | None:
    """The checkpoint to go on from; refuses a changed run unless told."""
    if resume is None:
        return None
    state = checkpoint.newest(resume)
    if state is None:
        raise LuthierError(
            f"{resume}: no checkpoint to resume from; it holds {', '.join(sorted(p.name for p in resume.iterdir())) if resume.is_dir() else 'nothing'}"
        )
    if state.facts["digest"] != config.digest(run):
        was, now = state.facts["run"], config.plain(run)
        with suppress(LuthierError):  # a setting that there is no more
            was = config.plain(config.load_run(was))
        changed = config.difference(was | {"place": {}}, now | {"place": {}})  # what is learned does not depend on where, nor on how many ranks
        if changed and not accept_changes:
            raise LuthierError(
                "this run is not the one that was interrupted: "
                + "; ".join(changed)
                + ". Resume it unchanged, or say --accept-changes to go on with the new settings"
            )
        for line in changed:
            say.warn(f"resuming with a change: {line}")
    return state


def _begun(asked: Run) -> tuple[Path | None, bool]:
    """(the folder that this launch was in before, whether it can go on there)."""
    folder = elastic.begun(asked)
    return folder, folder is not None and folder.is_dir()


def _new_folder(run: Run, again: Path | None = None) -> Path:
    """``again``: the folder that this launch had before it was started again."""
    data = "mix" if run.data.mix is not None else Path(run.data.train[0]).stem.replace(" ", "_")[:40] if run.data.train else "data"
    name = run.name or f"{data}-{kind_of(run.method)}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = again or Path(run.out) / name
    if folder.exists() and any(folder.iterdir()):
        raise LuthierError(
            f"{folder}: there is a run of this name already; choose another (name=...), delete it, or go on with it: luthier train --resume {folder}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write").touch()
        (folder / ".write").unlink()
    except OSError as e:
        raise LuthierError(f"{folder}: cannot be written: {e.strerror}; choose another folder (out=FOLDER)") from None
    return folder
