"""luthier runs diff: the settings in which two runs differ, and their results side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .finding import folder, table

if TYPE_CHECKING:
    from ...report.facts import Facts

TELL_NOTHING = ("name", "out")  # settings that differ between any two runs
MISSING = "not there"
NOTHING: tuple[Any, ...] = (None, [], {})


def command(
    context: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", help="A run's name, or the path of its folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
) -> None:
    """What was asked differently of two runs, and what each came to."""
    from ...report.facts import read

    one, two = (read(folder(name, context.obj)) for name in (a, b))
    names = (one.name, two.name) if one.name != two.name else (a, b)
    rows = list(settings(one, two))
    typer.echo("settings that differ:" if rows else "no setting differs")
    if rows:
        table(["setting", *names], rows, words=("setting", *names))
    typer.echo("\nresults:")
    table(["", *names], results(one, two), words=("",))
    if _held(one) != _held(two):
        typer.echo("their data or their seeds differ, and with them perhaps their held-out rows: losses and scores then do not compare")
    for facts in (one, two):
        for problem in facts.problems:
            typer.echo(f"{facts.name}: {problem}")


def settings(one: Facts, two: Facts) -> Iterator[tuple[str, str, str]]:
    """(key, of the one, of the other) where they are not equal."""
    from ...report.facts import flat

    first, second = flat(one.settings), flat(two.settings)
    for key in [*first, *(k for k in second if k not in first)]:
        x, y = first.get(key, MISSING), second.get(key, MISSING)
        empty = MISSING in (x, y) and (x in NOTHING or y in NOTHING)  # a setting that one version has and that says nothing
        if x != y and key not in TELL_NOTHING and not empty:
            yield key, _said(x), _said(y)


def results(one: Facts, two: Facts) -> Iterator[tuple[str, ...]]:
    """(what, of the one, of the other)."""
    from ...report import verdict

    yield "state", one.state, two.state
    (before_1, after_1), (before_2, after_2) = one.measures(), two.measures()
    path = lambda a, b: f"{a} -> {b}" if a and b else str(b or a or "")  # noqa: E731
    for name in dict.fromkeys([*after_1, *after_2, *before_1, *before_2]):
        yield name, path(before_1.get(name), after_1.get(name)), path(before_2.get(name), after_2.get(name))
    yield "steps", f"{one.steps:,}", f"{two.steps:,}"
    for what, of in (("training time", lambda f: _clock(f.result.get("seconds"))), ("peak memory", lambda f: _size(verdict.memory(f)))):
        yield what, of(one), of(two)
    yield "trained parameters", *(f"{n:,}" if isinstance(n := f.told.get("trained"), int) else "" for f in (one, two))


def _clock(seconds: Any) -> str:
    from ...report.verdict import clock

    return clock(seconds) if isinstance(seconds, int | float) else ""


def _size(n: int | None) -> str:
    from ...report.verdict import size

    return "" if n is None else size(n)


def _held(facts: Facts) -> tuple[Any, ...]:
    """What the held-out rows hang on."""
    data = facts.settings.get("data")
    return (json.dumps(data, sort_keys=True), facts.settings.get("seed"))


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
