"""luthier data check: what is wrong with data, before anything is trained on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import heavy

if TYPE_CHECKING:
    from rich.console import Console

    from ...data.inspection import Inspection, Report
    from ...data.quality import Split
    from ...data.steps import File
    from ...settings.run import Run

CLEAN, WARNINGS, ERRORS = 0, 3, 4  # 1 is a fault of the program and 2 one of the command line, as everywhere
EVERY = 10.0  # seconds between lines where there is no terminal to draw a bar on
ROLES: dict[str, Split] = {"valid": "validation", "validation": "validation", "val": "validation", "dev": "validation", "test": "test"}


def command(
    what: Annotated[
        list[str],
        typer.Argument(metavar="FILES [KEY=VALUE]...", help="Files, folders or Hub data set ids; then settings of the run, e.g. data.max_tokens=512."),
    ],
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template are used.")] = "fiddle",
    objective: Annotated[str, typer.Option(help="What the rows are for: sft, text, classify, dpo, kto, ...; auto: told from their columns.")] = "auto",
    validation: Annotated[list[str] | None, typer.Option(help="Held-out rows, which training must not have. May be given several times.")] = None,
    test: Annotated[list[str] | None, typer.Option(help="Test rows, the same.")] = None,
    against: Annotated[list[str] | None, typer.Option(help="A benchmark's file, of any shape: are its questions in the training data?")] = None,
    near: Annotated[float, typer.Option(min=0.3, max=1.0, help="How much of two rows is the same where they are near duplicates.")] = 0.8,
    ngram: Annotated[int, typer.Option(min=4, max=50, help="Words in a row that make a leak.")] = 13,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page, one file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, for machines.")] = False,
    fix: Annotated[
        Path | None,
        typer.Option(help="Write the training rows without what is wrong (JSON lines; a folder for several files), and beside it what was removed and why."),
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="A finding whose rows --fix leaves as they are, by its name, e.g. near_duplicates.")] = None,
) -> int:
    """Find what is wrong with data: `luthier data check train.jsonl --model Qwen/Qwen3-0.6B --test test.jsonl --html report.html`.

    Of several files, those that are called valid or test, as in a folder of splits, are held out.

    Exit code: 0 clean (notes at most), 3 warnings, 4 errors; 2 where files or options cannot be read.
    """
    from rich.console import Console

    from ...core import LuthierError
    from ...findings.plain import plain
    from ...findings.terminal import show

    if keep and fix is None:
        raise LuthierError("--keep says what --fix leaves as it is; give --fix OUT too")
    console = Console(highlight=False)
    inspection = _inspection(what, model, objective, {"validation": validation, "test": test, "against": against}, near, ngram)
    if fix is not None:
        from ...data.cleaning import targets

        targets(inspection.files, fix)  # a wrong name is said before the work
    with _bar("looking", inspection.setting.expected) as (progress, phase):
        report = inspection.run(progress, lambda: phase("comparing"))
    data = plain(report)
    if fix is not None:
        data["fixed"] = _fix(inspection, report, fix, keep or [])
    if html is not None:
        from ...atomic import text
        from ...findings.page import page

        text(html, page(data, " ".join(["luthier data check", *sys.argv[3:]] if sys.argv[1:3] == ["data", "check"] else ["luthier data check", *what])))
    if json:
        import json as writer

        typer.echo(writer.dumps(data, indent=2, ensure_ascii=False))
    else:
        show(data, console)
        _said(data, html, console)
    return {"error": ERRORS, "warning": WARNINGS}.get(report.worst, CLEAN)


def _inspection(
    what: Sequence[str], model: str, objective: str, held: dict[str, list[str] | None], near: float, ngram: int
) -> Inspection:  # fmt: skip
    """What is to be looked at, and how rows are made of it."""
    heavy("build")
    from ...build import load, load_tokenizer
    from ...data.inspection import Inspection
    from ...data.prepare import Reader
    from ...data.quality import Setting
    from ...data.steps import expected_rows
    from ...reading import form_of, made_of
    from ...settings.config import load_run
    from ...settings.plugins import kind_of, plugin

    sources = [w for w in what if "=" not in w or Path(w).exists()]
    settings = [w for w in what if w not in sources]
    run = load_run({}, [f"model.id={model}", f"objective={'sft' if objective == 'auto' else objective}", *settings])
    files = _files(sources, run, held)
    if objective == "auto":
        run = load_run({}, [f"model.id={model}", f"objective={_guessed(files, run)}", *settings])
    tokenizer = load_tokenizer(run.model)
    form = form_of(load(run.model, precision=plugin("precision", "float32")(), weights=False))  # counted, not loaded
    if serves := getattr(run.objective, "serves", None):
        serves(form.kind)
    made = made_of(run, positions=tokenizer.model_max_length, form=form)
    reader = Reader(tokenizer, **made)
    setting = Setting(
        renderer=reader.how.renderer, renders=made["renders"], form=form, max_tokens=made["max_tokens"], over_length=made["over_length"],
        positions=tokenizer.model_max_length, near=near, ngram=ngram, expected=expected_rows([f for f in files if f.split == "train"]),
        objective=kind_of(run.objective),
    )  # fmt: skip
    return Inspection(files, reader, setting, limit=run.data.limit)


def _files(sources: Sequence[str], run: Run, held: dict[str, list[str] | None]) -> list[File]:
    """All files and their roles. Of several, names tell which are held out; a folder of splits brings its own."""
    from dataclasses import replace

    from ...core import LuthierError
    from ...data.sources import splits_of
    from ...data.steps import files_for

    if not sources:
        raise LuthierError("no data to check: name a file, a folder or a Hub data set id")
    files = files_for(sources, run.data.split, "train")
    told = [replace(f, split=ROLES.get(_role(f.name), "train")) for f in files]
    if any(f.split == "train" for f in told):
        files = told
    for source in sources:
        if Path(source).is_dir() and run.data.split == "train":
            for role in ("validation", "test"):
                files += files_for([str(p) for p in splits_of(Path(source)).get(role, []) if p.stat().st_size], role, role)  # type: ignore[arg-type]
    for role, named in held.items():
        files += files_for(named or [], role, role)  # type: ignore[arg-type]
    files += files_for(run.data.validation, "validation", "validation")
    if not any(f.split == "train" for f in files):
        raise LuthierError(f"all of {', '.join(f.name for f in files)} are held-out files; name the training data too")
    return list(dict.fromkeys(files))


def _role(name: str) -> str:
    import re

    words = re.split(r"[-_.]", Path(name).name.lower())
    return next((w for w in (words[0], *words[1:-1]) if w in ROLES), "")


def _guessed(files: Sequence[File], run: Run) -> str:
    """The objective that the files are for. Raises LuthierError where they are for different ones."""
    from ...core import LuthierError
    from ...data.guess import OBJECTIVES
    from ...data.steps import kind_of

    kinds = {f.name: kind_of(f, run.data.split, dict(run.data.columns)) for f in files if f.split == "train"}
    if len(set(kinds.values())) > 1:
        each = "; ".join(f"{name} is for {OBJECTIVES[kind]}" for name, kind in kinds.items())
        raise LuthierError(f"these files are for different objectives ({each}), which read rows differently; check them one by one, or say --objective")
    return OBJECTIVES[next(iter(kinds.values()))]


def _fix(inspection: Inspection, report: Report, out: Path, keep: Sequence[str]) -> list[dict[str, Any]]:
    from ...data.cleaning import clean, fixable

    with _bar("writing", len(report.places)) as (progress, _):
        done = clean(inspection, report, fixable(report.findings, keep), out, progress)
    return [
        {"file": c.file, "out": str(c.out), "record": str(c.record), "written": c.written, "removed": dict(c.removed), "changed": dict(c.changed)} for c in done
    ]


def _said(data: dict[str, Any], html: Path | None, console: Console) -> None:
    """Where things were written, and what could be done next."""
    from rich.text import Text

    say = lambda text: console.print(Text(text), soft_wrap=True)  # noqa: E731
    for c in data.get("fixed", ()):
        removed = ", ".join(f"{n:,} {name}" for name, n in c["removed"].items()) or "nothing"
        changed = "".join(f"; changed: {n:,} {name}" for name, n in c["changed"].items())
        say(f"{c['out']}: {c['written']:,} rows written; left out: {removed}{changed}; why is in {c['record']}")
    if html is not None:
        say(f"page: {html}")
    if "fixed" not in data and any(f["fixable"] for f in data["findings"]):
        say("--fix OUT writes the rows without what can be fixed: " + ", ".join(f["name"] for f in data["findings"] if f["fixable"]))


@contextmanager
def _bar(what: str, expected: int) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """Rows done, rows a second and the time left, on stderr; a line now and then where that is no terminal."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        start = last = time.monotonic()
        done = 0

        def line(n: int) -> None:
            nonlocal done, last
            done += n
            now = time.monotonic()
            if now - last >= EVERY:
                last = now
                rate = done / (now - start)
                left = f", about {max(0, expected - done) / rate:.0f} s left" if expected else ""
                console.print(f"{what}: {done:,} rows, {rate:,.0f} rows/s{left}", markup=False)

        yield line, lambda name: console.print(f"{name}: {done:,} rows") if last > start else None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} rows, {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=expected or None, rate="")
        start = time.monotonic()

        def advance(n: int) -> None:
            rate = (bar.tasks[0].completed + n) / max(1e-6, time.monotonic() - start)
            bar.update(task, advance=n, rate=f"{rate:,.0f} rows/s")

        yield advance, lambda name: bar.update(task, description=name)
