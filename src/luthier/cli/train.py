"""luthier train: one run, from a file or a data set to an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RUN_FILES = (".yaml", ".yml")


def command(
    what: Annotated[list[str] | None, typer.Argument(help="A run file (.yaml), or training data (a file, folder or Hub id); then key=value settings.")] = None,
    model: Annotated[str | None, typer.Option(help="The base: fiddle, a folder or a Hub id; short for model.id=...")] = None,
    method: Annotated[str | None, typer.Option(help="What trains: short for method=...")] = None,
    objective: Annotated[str | None, typer.Option(help="What the loss is: short for objective=...")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder, bit for bit.")] = None,
    accept_changes: Annotated[bool, typer.Option("--accept-changes", help="With --resume: go on although settings have changed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what would be trained, without weights and without data, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Train: `luthier train my.jsonl --model ID`, `luthier train run.yaml method.rank=16`, `luthier train --resume runs/NAME`.

    Writes runs/NAME/: run.yaml (all settings as resolved), metrics.jsonl, samples.jsonl, checkpoints/, adapter/ (or model/), result.json.
    """
    from ..config import ConfigError, load_run

    file, data, settings = asked(what or [], model, method, objective)
    if resume is not None:
        if file or data:
            raise ConfigError(f"--resume goes on with the run in {resume}; {file or data[0]!r} beside it says nothing. Give only key=value settings with it")
        file = str(resume / "run.yaml")
        if not Path(file).is_file():
            raise ConfigError(f"{resume}: no run.yaml here, so it is no run folder; runs are in runs/")
    run = load_run(file, settings)

    from ..progress import Reporter

    reporter = Reporter(quiet=quiet)
    if dry_run:
        _count(run, reporter)
        return
    from ..session import execute

    result = execute(run, resume=resume, accept_changes=accept_changes, reporter=reporter)
    reporter.result(result)
    where = result.artefact
    if run.objective.renders in ("label", "ranked"):
        reporter.note(f"try it:      luthier predict {where} FILE    or    luthier eval {where} --data FILE")
    elif run.objective.renders != "masked":
        reporter.note(f'try it:      luthier chat {where}    or    luthier generate {where} --prompt "..."')
    if where.name == "adapter":  # a whole model has nothing to merge
        reporter.note(f"merge it:    luthier merge {where} --output merged/")


def asked(what: list[str], model: str | None, method: str | None, objective: str | None) -> tuple[str | None, list[str], list[str]]:
    """(run file, data, key=value settings) of the free arguments and the short options, which come first, so that a setting spelled out counts."""
    file, data, settings = _sort(what)
    short = [f"{k}={v}" for k, v in (("model.id", model), ("method", method), ("objective", objective)) if v is not None]
    if data:
        short.append(f"data.train=[{', '.join(map(_quoted, data))}]")
    return file, data, [*short, *settings]


def _sort(what: list[str]) -> tuple[str | None, list[str], list[str]]:
    """(run file, data, key=value settings) of the free arguments."""
    from ..config import ConfigError

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


def _count(run: object, reporter: object) -> None:
    """What would be trained, from configurations alone."""
    from dataclasses import replace

    import torch

    from .. import build, counts
    from ..microbatch import with_labels
    from ..plugins import kind_of
    from ..progress import Reporter
    from ..run import Run

    assert isinstance(run, Run) and isinstance(reporter, Reporter)
    run, _ = build.resolve(run)
    if run.objective.renders == "label" and not run.objective.labels:
        run = replace(run, objective=with_labels(run.objective))
        reporter.note("the labels are in the data, which is not read here: counted with two of them")
    base = build.load(run.model, precision=run.precision, device=torch.device("meta"), weights=False, trains_base=run.method.edits == "weights")
    reporter.base(base)  # before the delta's own parameters are there
    policy, _ = build.assemble(run, base)
    trained, whole = counts.total(policy)
    reporter.head(f"method {kind_of(run.method)}: {trained:,} trained parameters, {trained / whole:.3%} of {whole:,}")
    for c in counts.table(policy):
        reporter.note(f"{c.modules} x {c.module}{f' {c.shape[0]} x {c.shape[1]}' if c.shape else ''}: {counts.sentence(c)}")
