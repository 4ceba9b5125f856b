"""luthier train: one run, from a file or a data set to an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import heavy

if TYPE_CHECKING:
    from ..policy import Policy
    from ..running.progress import Reporter
    from ..settings.run import Run
    from ..staging.stages import Stages

RUN_FILES = (".yaml", ".yml")


def command(
    what: Annotated[list[str] | None, typer.Argument(help="A run file (.yaml), or training data (a file, folder or Hub id); then key=value settings.")] = None,
    model: Annotated[str | None, typer.Option(help="The base: fiddle, a folder or a Hub id; short for model.id=...")] = None,
    method: Annotated[str | None, typer.Option(help="What trains: short for method=...")] = None,
    objective: Annotated[str | None, typer.Option(help="What the loss is: short for objective=...")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder, bit for bit.")] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="With --resume: go on although settings have changed; stages that are stale are trained again.")
    ] = False,
    stage: Annotated[str | None, typer.Option(help="Of a run file with stages: train this one alone; what it needs must be there.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what would be trained, without weights and without data, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Train: `luthier train my.jsonl --model ID`, `luthier train run.yaml method.rank=16`, `luthier train --resume runs/NAME`.

    Writes runs/NAME/: run.yaml (all settings as resolved), metrics.jsonl, samples.jsonl, checkpoints/, adapter/ (or model/), result.json.

    A run file with `stages` trains them in order into runs/NAME/1-FIRST, 2-SECOND, ...; stages.NAME.KEY=VALUE changes one, stages.all.KEY=VALUE each of them.
    """
    from ..settings.config import ConfigError, load_run
    from ..staging.stages import has_stages

    file, data, settings = asked(what or [], model, method, objective)
    staged = file or (str(resume / "run.yaml") if resume is not None and (resume / "run.yaml").is_file() else None)
    if staged is not None and has_stages(staged):
        if data:
            raise ConfigError(f"{data[0]!r} beside {staged}: a file with stages names the data of each; say stages.NAME.data={data[0]}")
        _train_stages(staged, settings, resume, stage, accept_changes, dry_run, quiet)
        return
    if stage is not None:
        raise ConfigError(f"--stage {stage}: {staged or 'this run'} has no stages; it is trained as a whole, without --stage")
    if resume is not None:
        if file or data:
            raise ConfigError(f"--resume goes on with the run in {resume}; {file or data[0]!r} beside it says nothing. Give only key=value settings with it")
        file = str(resume / "run.yaml")
        if not Path(file).is_file():
            raise ConfigError(f"{resume}: no run.yaml here, so it is no run folder; runs are in runs/")
    run = load_run(file, settings)

    heavy("running.starting")
    from ..devices.launched import launched
    from ..running.progress import Reporter

    reporter = Reporter(quiet=quiet or not launched().leads)
    if dry_run:
        _count(run, reporter)
        return
    from ..running.starting import execute

    result = execute(run, resume=resume, accept_changes=accept_changes, reporter=reporter)
    reporter.result(result)
    _say_next(run, result.artefact, reporter)


def _say_next(run: Run, where: Path, reporter: Reporter) -> None:
    """What to do with what was trained."""
    if run.objective.renders in ("label", "ranked") or not getattr(run.objective, "reads_head", True):
        reporter.note(f"try it:      luthier predict {where} FILE    or    luthier eval {where} --data FILE")
    elif run.objective.renders != "masked":
        reporter.note(f'try it:      luthier chat {where}    or    luthier generate {where} --prompt "..."')
    if where.name == "adapter":  # a whole model has nothing to merge
        reporter.note(f"merge it:    luthier merge {where} --output merged/")


def _train_stages(file: str, settings: list[str], resume: Path | None, stage: str | None, accept_changes: bool, dry_run: bool, quiet: bool) -> None:
    """A run file with stages: all of them, or one; and one report over all."""
    from ..devices.launched import launched
    from ..errors import LuthierError
    from ..running.progress import Reporter
    from ..staging.stages import load_stages

    if launched().size > 1:
        raise LuthierError(f"{file}: a file with stages is trained by one process; make each stage a run file of its own to train it with torchrun")
    stages = load_stages(file, settings)
    reporter = Reporter(quiet=quiet)
    if dry_run:
        _count_stages(stages, stage, reporter)
        return
    heavy("staging.relay")
    from ..staging import overview
    from ..staging.ledger import Ledger
    from ..staging.relay import train_stages

    outcome = train_stages(stages, resume=resume, only=stage, accept_changes=accept_changes, reporter=reporter)
    ledger = Ledger.read(outcome.folder)
    overview.show(stages, ledger, reporter.console)
    last = stages.stage(stage) if stage is not None else stages.stages[-1]
    if (there := ledger.where(last) / Path(ledger.record(last).artefact).name).is_dir():
        _say_next(last.asked, there, reporter)


def asked(what: list[str], model: str | None, method: str | None, objective: str | None) -> tuple[str | None, list[str], list[str]]:
    """(run file, data, key=value settings) of the free arguments and the short options, which come first, so that a setting spelled out counts."""
    file, data, settings = _sort(what)
    short = [f"{k}={v}" for k, v in (("model.id", model), ("method", method), ("objective", objective)) if v is not None]
    if data:
        short.append(f"data.train=[{', '.join(map(_quoted, data))}]")
    return file, data, [*short, *settings]


def _sort(what: list[str]) -> tuple[str | None, list[str], list[str]]:
    """(run file, data, key=value settings) of the free arguments."""
    from ..settings.config import ConfigError

    files = [w for w in what if w.endswith(RUN_FILES)]
    settings = [w for w in what if "=" in w and not w.endswith(RUN_FILES) and not Path(w).exists()]
    data = [w for w in what if w not in files and w not in settings]
    if len(files) > 1:
        raise ConfigError(f"one run file at a time; found {', '.join(files)}")
    if files and not Path(files[0]).is_file():
        raise ConfigError(f"{files[0]}: no such run file")
    return (files[0] if files else None), data, settings


def _quoted(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _count(run: Run, reporter: Reporter) -> None:
    """What would be trained, from configurations alone."""
    from dataclasses import replace

    import torch

    from .. import build
    from ..forgetting import against, difficulty
    from ..planning.microbatch import lacks_labels, with_labels

    run, _ = build.resolve(run)
    against.check(run)
    difficulty.check(run)
    if lacks_labels(run.objective):
        run = replace(run, objective=with_labels(run.objective))
        reporter.note("the labels are in the data, which is not read here: counted with two of them")
    base = build.load(run.model, precision=run.precision, device=torch.device("meta"), weights=False, trains_base=run.method.edits == "weights")
    reporter.base(base)  # before the delta's own parameters are there
    policy, _ = build.assemble(run, base)
    _say_counts(run, policy, reporter)


def _count_stages(stages: Stages, only: str | None, reporter: Reporter) -> None:
    """What each stage would train, from configurations alone; the model an earlier stage leaves has the modules of the one it begins from."""
    from ..staging.rehearsal import assemble, check_handed
    from ..staging.stages import handed

    for note in stages.notes:
        reporter.note(note)
    for stage in stages.stages if only is None else (stages.stage(only),):
        check_handed(stages, stage)
        tried = assemble(stages, stage, {})
        on = f" on {handed(stage.asked.model.id, {n: f'what {n} leaves' for n in stage.needs})}"
        reporter.head(
            f"stage {stage.place} of {len(stages.stages)}, {stage.name}: objective {_kind(stage.asked.objective)}{on}, {stages.folder / stage.folder}"
        )
        _say_counts(tried.run, tried.policy, reporter)


def _say_counts(run: Run, policy: Policy, reporter: Reporter) -> None:
    from .. import counts

    trained, whole = counts.total(policy)
    reporter.head(f"method {_kind(run.method)}: {trained:,} trained parameters, {trained / whole:.3%} of {whole:,}")
    for c in counts.table(policy):
        reporter.note(f"{c.modules} x {c.module}{f' {c.shape[0]} x {c.shape[1]}' if c.shape else ''}: {counts.sentence(c)}")


def _kind(plug: object) -> str:
    from ..settings.plugins import kind_of

    return kind_of(plug)
