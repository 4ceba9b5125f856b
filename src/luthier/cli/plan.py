"""luthier plan: what a run would train and the memory it takes, predicted from its settings, without weights and without data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..amounts import clock, seconds, size
from . import heavy
from .train import asked

if TYPE_CHECKING:
    from ..data.prepare import Prepared
    from ..planning.fitting import Planner
    from ..planning.memory import Plan, Prediction
    from ..settings.run import Run
    from ..staging.stages import Stage, Stages

SIZES = "12GB,24GB,48GB,80GB"
TIGHT = 0.05  # of the memory: less than this to spare is little


def command(
    what: Annotated[list[str] | None, typer.Argument(help="A run file (.yaml), or training data; then key=value settings, as for train.")] = None,
    model: Annotated[str | None, typer.Option(help="The base: a folder with config.json is enough; short for model.id=...")] = None,
    method: Annotated[str | None, typer.Option(help="What trains: short for method=...")] = None,
    objective: Annotated[str | None, typer.Option(help="What the loss is: short for objective=...")] = None,
    stage: Annotated[str | None, typer.Option(help="Of a run file with stages: plan this one. Default: all of them, a line each.")] = None,
    data: Annotated[bool, typer.Option(help="Read the data, for the lengths of its examples and the number of steps.")] = True,
    ranks: Annotated[int | None, typer.Option(help="Plan for so many ranks, a GPU each: memory, traffic and time by choice of place.shard.")] = None,
    nodes: Annotated[int, typer.Option(help="They are on so many machines.")] = 1,
    gpu: Annotated[str, typer.Option(help="What they are, with numbers of your own behind it: h100,network=25.")] = "h100",
    on: Annotated[str | None, typer.Option(help=f"GPUs to judge by, by their memory. Default: {SIZES}, without advice for those that are too small.")] = None,
) -> None:
    """Predict the memory and the time of a run: `luthier plan run.yaml recompute=blocks`, `luthier plan --model FOLDER method.rank=64 --on 24GB`.

    No weights are read: config.json is enough. Memory is that of the largest micro-batch that the settings (and the data, where it is named) allow. Time is for
    this machine, as busy as it is now. 1 GB is 10^9 bytes; a GPU sold as 24 GB has a little more. For many devices: `luthier plan --model FOLDER --ranks 64
    --nodes 8 place.shard=full --on 80GB`.
    """
    from ..settings.config import ConfigError, load_run
    from ..staging.stages import has_stages, load_stages

    rooms = _rooms(on or SIZES)
    file, _, settings = asked(what or [], model, method, objective)
    if ranks is not None:
        _many(file, settings, ranks, nodes, gpu, None if on is None else rooms)
        return
    if file is not None and has_stages(file):
        stages = load_stages(file, settings)
        if stage is None:
            _each(stages, rooms, file)
            return
        run = _of_stage(stages, stages.stage(stage))
    elif stage is not None:
        raise ConfigError(f"--stage {stage}: {file or 'this run'} has no stages; it is planned as a whole, without --stage")
    else:
        run = load_run(file, settings)

    heavy("build")
    from .. import build
    from ..planning.fitting import Planner, fitted
    from ..planning.foresight import as_long
    from ..planning.memory import machine

    run, notes = build.resolve(run)
    for note in notes:
        typer.echo(note)
    planner = Planner()
    here = run.place.device
    everything, free = machine(here)
    prepared = _read(run, planner.plan(run)) if data and run.data.files else None
    run = as_long(run, prepared.facts.get("longest") if prepared is not None else None)
    if run.place.ceiling is not None:
        run, said = fitted(run, planner, ceiling=run.place.ceiling)
        for note in said:
            typer.echo(note)
    p = planner.predict(run, here.type)
    for line in table(run, planner.plan(run), p):
        typer.echo(line)
    for line in times(run, planner.plan(run), prepared) if p.total <= free else ("\ntime is not predicted: the run does not fit here",):
        typer.echo(line)
    typer.echo(f"\nthis machine, {size(free)} free of {size(everything)} on {here.type}: {verdict(p, free)}")
    q = p if here.type == "cuda" else planner.predict(run, "cuda")
    if q is not p:
        typer.echo(f"on a GPU {size(q.total)}, with its own kernels, context and allocator:")
    for name, room in rooms.items():
        typer.echo(f"  {name:<6} {verdict(q, room)}")
    if p.total > free:
        _advise(planner, run, here.type, "this machine", free)
    for name, room in rooms.items() if on is not None else ():
        if q.total > room:
            _advise(planner, run, "cuda", name, room)


def _many(file: str | None, settings: list[str], ranks: int, nodes: int, name: str, rooms: dict[str, int] | None) -> None:
    """A plan for many ranks; nothing of this machine matters to it."""
    from ..planning.gpus import Mesh, gpu
    from ..settings.config import ConfigError, load_run
    from ..staging.stages import has_stages

    if file is not None and has_stages(file):
        raise ConfigError("--ranks plans one run, and this file has stages; name the run file of one")
    mesh, device = Mesh(ranks, nodes), gpu(name)
    if not any(s.startswith(("place.kind=", "place=")) for s in settings):
        settings = ["place.kind=fsdp", *settings]
    from .. import build
    from ..modelling import context
    from ..planning.outlook import lines, of_ranks

    run, notes = build.resolve(of_ranks(load_run(file, settings)))
    for note in notes:
        typer.echo(note)
    context.check(run)
    only = None if run.place.shard == "auto" else run.place.shard
    for line in lines(run, mesh, device, rooms or {f"{device.memory:g}GB": int(device.memory * 1e9)}, only):
        typer.echo(line)
    typer.echo("on paper: memory and traffic are counted, time is reckoned from data sheets (docs/scale.md)")


def _of_stage(stages: Stages, stage: Stage) -> Run:
    """The run of a stage; what an earlier stage will leave has the modules of the model that one begins from."""
    from ..staging.rehearsal import check_handed, standing_in

    check_handed(stages, stage)
    return standing_in(stages, stage, {})[0]


def _each(stages: Stages, rooms: dict[str, int], file: str) -> None:
    """The peak of every stage, and which devices it fits."""
    from .. import build
    from ..planning.fitting import Planner
    from ..planning.memory import machine

    planner = Planner()
    for note in stages.notes:
        typer.echo(note)
    for stage in stages.stages:
        run, _ = build.resolve(_of_stage(stages, stage))
        here = run.place.device
        p, q, free = planner.predict(run, here.type), planner.predict(run, "cuda"), machine(here)[1]
        fits = [name for name, room in rooms.items() if q.total <= room]
        typer.echo(f"stage {stage.place} {stage.name}: {p.trained:,} trained parameters; {size(p.total)} on this machine: {verdict(p, free)}")
        typer.echo(f"  {size(q.total)} on a GPU: " + (f"fits {', '.join(fits)}" if fits else f"fits none of {', '.join(rooms)}"))
    typer.echo(f"one stage in full: luthier plan {file} --stage {stages.stages[-1].name}")


def _read(run: Run, plan: Plan) -> Prepared | None:
    """The run's data; None where the model's folder holds no tokenizer to read it with."""
    from ..reading import form_of, read_data

    base = plan.policy.base
    if base.tokenizer is None:
        typer.echo(f"{run.model.id} has no tokenizer, so the data is not read: memory is for examples as long as may be, and steps are not counted")
        return None
    return read_data(run, base.tokenizer, positions=plan.policy.limit, say=lambda _: None, form=form_of(base))


def times(run: Run, plan: Plan, prepared: Prepared | None) -> Iterator[str]:
    """Steps, time and disk."""
    from ..planning.foresight import feed_for, foresee
    from ..reading import fitted
    from ..saving import checkpoint

    feed = None
    if prepared is not None and prepared.train and "rollouts" not in run.objective.needs:
        run = fitted(run, prepared)
        feed = feed_for(run, prepared, plan)
        rows, tokens = len(prepared.train), prepared.facts.get("tokens")
        yield f"\ndata: {rows:,} rows" + (f", {tokens:,} tokens" if tokens else "") + f"; {feed.steps:,} steps, {_passes(run, feed, rows)}"
    found = foresee(run, prepared, feed, plan=plan, memory=False)
    t = found.time
    if t is None:
        yield from (f"\n{why}" for why in found.why)
        return
    said = f"time on this machine: {seconds(t.step)} a step, {t.tokens / t.step:,.0f} tokens/s"
    if t.training is not None and t.total is not None:
        said += f"; {clock(t.training)} of training"
        if t.total > t.training:
            said += f", {clock(t.total - t.training)} to measure the held-out loss {t.evaluations} times"
    yield ("" if feed is not None else "\n") + said + "; writing answers, loading and saving come on top"
    if plan.optimizer is not None:
        one = checkpoint.size(plan.policy, plan.optimizer)
        yield f"disk: {size(one * (run.checkpoint.keep + 1))} for checkpoints while it runs"


def _passes(run: Run, feed: Any, rows: int) -> str:
    if run.optim.steps is None:
        return f"{run.optim.epochs:g} epoch{'s' if run.optim.epochs != 1 else ''}"
    return f"about {feed.steps * feed.rows_per_step / max(1, rows):.2g} epochs"


def _rooms(text: str) -> dict[str, int]:
    """Name -> bytes. Raises ConfigError for what is no size."""
    from ..errors import ConfigError

    out = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB?)?", name, re.IGNORECASE)
        if not found or float(found[1]) == 0:
            raise ConfigError(f"--on: {name!r} is no size of memory; accepted are gigabytes with commas between them, for example {SIZES}")
        out[f"{found[1]}GB"] = int(float(found[1]) * 1e9)
    return out


def table(run: Run, plan: Plan, p: Prediction) -> Iterator[str]:
    """What trains, and the memory by what takes it."""
    from ..settings.plugins import kind_of

    share = f", {p.trained / p.whole:.3%} of {p.whole:,}"
    yield f"base {run.model.id}: {plan.policy.base.anatomy.family}, {p.whole:,} parameters, precision {kind_of(run.precision)}"
    yield f"method {kind_of(run.method)}: {p.trained:,} trained parameters{share}; objective {kind_of(run.objective)}"
    yield f"a micro-batch at its largest: {p.shape}; recompute {run.recompute}"
    yield ""
    worst = p.moments[p.worst]
    rows = {k: n for k, n in p.standing.items() if k not in ("program", "allocator")} | {f"{k}, {p.worst}": n for k, n in worst.parts.items()}
    rows["freed and not given back"] = p.standing["allocator"]
    rows["Python and libraries" if p.device != "cuda" else "CUDA context"] = p.standing["program"]
    for name, n in rows.items():
        if n >= 1e6:
            yield f"  {name:<36}{size(n):>12}"
    yield f"  {'peak':<36}{size(p.total):>12}"
    others = [f"{size(worst.kept)} of it are kept from the forward for the backward"] if worst.kept else []
    others += [f"{moment} {size(sum(p.standing.values()) + peak.bytes)}" for moment, peak in p.moments.items() if moment != p.worst]
    if p.total == p.loading + p.standing["program"]:
        others.append(f"the peak is not {p.worst} but making the random weights, in float32")
    if others:
        yield "  " + "; ".join(others)


def verdict(p: Prediction, room: int) -> str:
    """Whether it fits."""
    if p.total > room:
        return f"does not fit, {size(p.total - room)} short"
    kept = p.kept_decoded(room)
    if p.total + kept > room:
        return f"fits with precision.resident=no, {size(room - p.total)} to spare; decoded weights kept beside the codes would take {size(kept)}"
    spare = room - p.total - kept
    said = f"fits, {size(spare)} to spare" if spare >= TIGHT * room else f"fits, but with only {size(spare)} to spare"
    return said + (f" beside {size(kept)} of weights that are kept decoded for speed" if kept else "")


# --- what would make it fit -------------------------------------------------------------------------------------------


def _advise(planner: Planner, run: Run, device: str, name: str, room: int) -> None:
    """The changes that help, each with what it saves; and the cheapest of them together that fit."""
    from ..errors import LuthierError
    from ..planning.fitting import WORTH, changes, together

    p = planner.predict(run, device)
    before = p.total
    typer.echo(f"\nto fit {name}, the cheapest first, each alone:")
    for change in changes(run, p):
        if change.most <= WORTH * before:
            continue
        try:
            saved = before - planner.predict(change.run, device).total
        except LuthierError:  # two choices that cannot go together
            continue
        if saved > WORTH * before:
            typer.echo(f"  {change.setting:<30} saves {size(saved):>9}   {change.price}")
    if device == "cpu" and p.standing["allocator"] > WORTH * before:
        from ..planning.memory import THRESHOLD

        saved = p.standing["allocator"]
        typer.echo(f"  {THRESHOLD + '=1000000':<30} saves {size(saved):>9}   in the environment: the same results, a quarter to a half more time")
    _, said, total = together(run, lambda r: planner.predict(r, device), room)
    if not said:
        typer.echo("nothing of this helps; use a smaller base")
    elif total <= room:
        typer.echo(f"together they fit, in {size(total)}: {' '.join(said)}")
    else:
        typer.echo(f"all of it together takes {size(total)}, {size(total - room)} too much: {' '.join(said)}; use a smaller base or a larger device")
