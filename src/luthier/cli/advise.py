"""luthier advise: which method to use, why, what it would take, and the run file for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..amounts import clock, seconds, size
from . import heavy
from .train import asked

if TYPE_CHECKING:
    from ..data.prepare import Prepared
    from ..planning.advising import Candidate, Situation
    from ..planning.fitting import Planner
    from ..settings.run import Run

NEEDS = "many-tasks, no-latency, tiny-files, frequent-updates, new-facts, new-behaviour, keep-abilities"


def command(
    what: Annotated[list[str] | None, typer.Argument(help="A run file (.yaml), or training data; then key=value settings, as for train.")] = None,
    model: Annotated[str | None, typer.Option(help="The base: a folder with config.json is enough; short for model.id=...")] = None,
    objective: Annotated[str | None, typer.Option(help="What is learned: short for objective=... Default: what the data is for.")] = None,
    need: Annotated[list[str] | None, typer.Option(help=f"What matters; may be given several times: {NEEDS}.")] = None,
    on: Annotated[str | None, typer.Option(help="The memory of the GPU it shall run on, for example 24GB. Default: what is free here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the run file here.")] = None,
) -> None:
    """Advise a method: `luthier advise data.jsonl --model FOLDER --need many-tasks --out run.yaml`.

    Rules with their sources are added up; what they put first is tried on the planner, and what cannot run or does not fit is passed over, with the reason.
    """
    from ..errors import ConfigError

    needs = _needs(need or [])
    if out is not None and out.exists():
        raise ConfigError(f"--out {out}: is there already; choose another name")
    run, guessed = _run(what or [], model, objective)

    heavy("build")
    from .. import build
    from ..planning import advising
    from ..planning.fitting import Planner
    from ..planning.memory import machine
    from .plan import _read, _rooms

    asked_for, (run, _) = run, build.resolve(run)
    planner = Planner()
    plan = planner.plan(run)
    prepared = _read(run, plan) if run.data.files else None
    if prepared is not None:
        run = _as_read(run, prepared)
    device, room = ("cuda", next(iter(_rooms(on).values()))) if on else (run.place.device.type, machine(run.place.device)[1])
    situation = _situation(run, plan, prepared, needs)
    typer.echo(_case(run, situation, guessed, device, room, on))
    found = advising.choose(advising.ranked(situation), run, planner, device=device, room=room)
    if not found or (found[0].prediction is not None and "precision=nf4" in found[0].made):  # in codes, other rules count
        from dataclasses import replace

        situation = replace(situation, packed=True)
        found = advising.choose(advising.ranked(situation), run, planner, device=device, room=room)
    _say(found, advising.ranked(situation), situation, run, planner, prepared, here=on is None)
    if found and out is not None:
        _write(out, asked_for, found[0], situation)


def _needs(named: list[str]) -> tuple[str, ...]:
    from ..errors import ConfigError
    from ..planning.advising import NEEDS as THERE
    from ..settings.names import nearest

    for name in named:
        if name not in THERE:
            guess = nearest(name, THERE)
            raise ConfigError(f"--need {name}: there is no such need; " + (f"did you mean {guess}? " if guess else "") + f"There are {', '.join(THERE)}")
    return tuple(dict.fromkeys(named))


def _run(what: list[str], model: str | None, objective: str | None) -> tuple[Run, bool]:
    """The run that was asked for, and whether its objective was told from the data."""
    from ..settings.config import load_run

    file, data, settings = asked(what, model, None, objective)
    given = file is not None or objective is not None or any(s.startswith("objective") for s in settings)
    guessed = [] if given or not data else [f"objective={_meant(data[0])}"]
    return load_run(file, [*guessed, *settings]), bool(guessed)


def _meant(file: str) -> str:
    """The usual objective for a file."""
    from ..data.guess import OBJECTIVES
    from ..data.steps import files_for, kind_of

    return OBJECTIVES[kind_of(files_for([file], "train", "train")[0], "train", {})]


def _as_read(run: Run, prepared: Prepared) -> Run:
    """With what the data tells: labels, and its longest example."""
    from ..planning.foresight import as_long
    from ..reading import fitted

    return as_long(fitted(run, prepared), prepared.facts.get("longest"))


def _situation(run: Run, plan: Any, prepared: Prepared | None, needs: tuple[str, ...]) -> Situation:
    from ..planning.advising import Situation
    from ..settings.plugins import kind_of

    rows = len(prepared.train) if prepared is not None else None
    return Situation(kind_of(run.objective), plan.policy.base.anatomy.kind, plan.whole, rows, needs)


def _case(run: Run, s: Situation, guessed: bool, device: str, room: int, on: str | None) -> str:
    from ..planning.advising import NEEDS as THERE

    kind = s.kind.replace("_", "-")
    rows = "" if s.examples is None else f" on {s.examples:,} examples"
    where = f"a GPU with {size(room)}" if on else f"this machine, {size(room)} free on {device}"
    needed = "; needed: " + ", ".join(THERE[n] for n in s.needs) if s.needs else "; no needs named (--need)"
    said = " (told from the data)" if guessed else ""
    return f"for objective {s.objective}{said}{rows}, base {run.model.id} ({kind}, {s.parameters:,} parameters), {where}{needed}"


def _say(found: list[Candidate], every: list[Candidate], s: Situation, run: Run, planner: Planner, prepared: Prepared | None, *, here: bool) -> None:
    from ..planning.advising import extras

    if not found:
        typer.echo("\nno method that the rules speak for fits: use a smaller base, or a larger device")
    for i, c in enumerate(found):
        typer.echo(f"\n{'advised' if i == 0 else 'then'}: {c.method}{_with(c)}, {c.points:+d} points")
        for points, rule in c.reasons if i == 0 else c.reasons[:2]:
            typer.echo(f"  {points:+d}  {rule.because}\n      {rule.source}")
        typer.echo(f"  takes {_cost(c, planner, prepared if i == 0 else None, here and i == 0)}")
    if found:
        for key, (value, rule) in extras(s).items():
            typer.echo(f"\nalso: {key}={_spelled(value)}, because {rule.because}\n      {rule.source}")
    worse = [c for c in every if c not in found and c.method != "crafted_prompt"]
    first = found[0].points if found else 0
    refused = {c.method: c.refused for c in worse if c.refused}
    for c in worse:
        if c.points >= first and c.method in refused:
            typer.echo(f"\n{c.method} has {c.points:+d} points and was passed over: {c.refused}")
    typer.echo("\nthe baseline to beat: method=crafted_prompt, instructions and examples chosen on held-out data, which trains nothing")
    typer.echo("these rules come from other data than yours: luthier compare tries the methods on yours")


def _with(c: Candidate) -> str:
    said = [*(f"{k} {_spelled(v)}" for k, v in c.settings.items()), *c.made]
    return f" ({', '.join(said)})" if said else ""


def _spelled(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def _cost(c: Candidate, planner: Planner, prepared: Prepared | None, timed: bool) -> str:
    """What the planner says."""
    from ..planning.foresight import feed_for, foresee
    from ..saving.adapter import writes

    assert c.run is not None and c.prediction is not None
    plan, p = planner.plan(c.run), c.prediction
    policy = plan.policy
    file = sum(t.nbytes for t in policy.lm.parameters()) if writes(c.run.method) == "model" else 4 * p.trained
    said = [f"{p.trained:,} trained parameters ({p.trained / p.whole:.2%})", f"files of about {size(file)}", f"{size(p.total)} of memory"]
    if timed and "rollouts" not in c.run.objective.needs:
        feed = feed_for(c.run, prepared, plan) if prepared is not None else None
        time = foresee(c.run, prepared, feed, plan=plan, memory=False).time
        if time is not None:
            said.append(f"{seconds(time.step)} a step" + (f", {clock(time.training)} for {time.steps:,} steps" if time.training is not None else ""))
    return ", ".join(said)


def _write(out: Path, run: Run, c: Candidate, s: Situation) -> None:
    """The run file, with what was advised and why."""
    from dataclasses import replace

    from .. import atomic
    from ..planning.advising import extras
    from ..report.recording import changed
    from ..settings.config import load_run

    assert c.run is not None
    made = {k: getattr(c.run, k) for k in ("recompute", "optim")} | ({"precision": c.run.precision} if c.run.precision.packed else {})
    advised = replace(run, method=c.run.method, **made)
    settings = dict(changed(advised))
    for key, (value, _) in extras(s).items():
        settings[key] = value
    lines = list(_lines(settings))
    why = [f"# {points:+d}  {rule.because} ({rule.source})" for points, rule in c.reasons]
    text = "\n".join([f"# Advised: {c.method}. Run it with: luthier train {out}", *why, *lines]) + "\n"
    atomic.text(out, text)
    load_run(str(out))  # it can be read
    typer.echo(f"\nwritten: {out}; next: luthier train {out}")


def _lines(settings: dict[str, Any]) -> Iterator[str]:
    import yaml

    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    yield from yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=150).splitlines()
