"""luthier plan: what a run would train and the memory it takes, predicted from its settings, without weights and without data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .train import asked

if TYPE_CHECKING:
    from ..memory import Plan, Prediction
    from ..run import Run
    from ..stages import Stage, Stages

SIZES = "12GB,24GB,48GB,80GB"
TIGHT = 0.05  # of the memory: less than this to spare is little
WORTH = 0.01  # of the total: a change that saves less is not named


def command(
    what: Annotated[list[str] | None, typer.Argument(help="A run file (.yaml), or training data; then key=value settings, as for train.")] = None,
    model: Annotated[str | None, typer.Option(help="The base: a folder with config.json is enough; short for model.id=...")] = None,
    method: Annotated[str | None, typer.Option(help="What trains: short for method=...")] = None,
    objective: Annotated[str | None, typer.Option(help="What the loss is: short for objective=...")] = None,
    stage: Annotated[str | None, typer.Option(help="Of a run file with stages: plan this one. Default: all of them, a line each.")] = None,
    on: Annotated[str | None, typer.Option(help=f"GPUs to judge by, by their memory. Default: {SIZES}, without advice for those that are too small.")] = None,
) -> None:
    """Predict the memory of a run: `luthier plan run.yaml recompute=blocks`, `luthier plan --model FOLDER method.rank=64 --on 24GB`.

    The micro-batch is the largest that the settings allow. 1 GB is 10^9 bytes; a GPU sold as 24 GB has a little more.
    """
    from ..config import ConfigError, load_run
    from ..stages import has_stages, load_stages

    rooms = _rooms(on or SIZES)
    file, _, settings = asked(what or [], model, method, objective)
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

    from .. import build
    from ..memory import machine

    run, notes = build.resolve(run)
    for note in notes:
        typer.echo(note)
    planner = Planner()
    here = run.place.device
    p = planner.predict(run, here.type)
    for line in table(run, planner.plan(run), p):
        typer.echo(line)
    everything, free = machine(here)
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


def _of_stage(stages: Stages, stage: Stage) -> Run:
    """The run of a stage; what an earlier stage will leave has the modules of the model that one begins from."""
    from ..rehearsal import check_handed, standing_in

    check_handed(stages, stage)
    return standing_in(stages, stage, {})[0]


def _each(stages: Stages, rooms: dict[str, int], file: str) -> None:
    """The peak of every stage, and which devices it fits."""
    from .. import build
    from ..memory import machine

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


def size(n: float) -> str:
    """ "12.3 GB", or "45 MB"."""
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.0f} MB"


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
    from ..plugins import kind_of

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


class Planner:
    """Predictions, each made once; runs whose modules are the same share them."""

    def __init__(self) -> None:
        self.plans: dict[str, Plan] = {}
        self.made: dict[str, Prediction] = {}

    def plan(self, run: Run) -> Plan:
        """The modules of a run on the meta device."""
        from ..memory import Plan

        key = repr((run.model, run.method, run.objective, run.precision, run.tokens, run.seed))
        if key not in self.plans:
            self.plans[key] = Plan(run)
        return self.plans[key]

    def predict(self, run: Run, device: str) -> Prediction:
        """See memory.predict."""
        key = repr((run, device))
        if key not in self.made:
            self.made[key] = self.plan(run).predict(run, device)
        return self.made[key]


@dataclass(frozen=True)
class Change:
    """A setting that takes less memory."""

    setting: str
    price: str
    most: int  # bytes it could save at best
    run: Run


def changes(run: Run, p: Prediction) -> Iterator[Change]:
    """Changes to a run, the cheapest first."""
    o, s, edits = run.optim, p.shape, run.method.edits
    longest, work = max(s.lengths), p.moments[p.worst].bytes
    trained, frozen = (sum(n for name, n in p.standing.items() if name.startswith(what)) for what in (("trained", "gradients", "moments"), "frozen"))
    if p.worst == "answers" and run.evaluate.tasks:
        yield Change("evaluate.tasks=[]", "no task is scored", work, replace(run, evaluate=replace(run.evaluate, tasks=())))
    elif p.worst == "answers":
        yield Change("evaluate.samples=0", "no sample answers are written", work, replace(run, evaluate=replace(run.evaluate, samples=0)))
    if len(s.lengths) > 1:
        fewer = max(longest * s.texts, s.tokens // 2)
        yield Change(f"optim.micro_tokens={fewer}", "the same results, a little slower", work, replace(run, optim=replace(o, micro_tokens=fewer)))
    if run.recompute == "none":
        yield Change("recompute=blocks", "the same results, a third to a half more time", work, replace(run, recompute="blocks"))
    if o.state == "float32" and p.device == "cuda":
        yield Change("optim.state=8bit", "moments in 8 bits, by bitsandbytes", trained // 2, replace(run, optim=replace(o, state="8bit")))
    if not run.precision.packed and edits != "weights":
        yield Change("precision=nf4", "a base in 4 bits, a little worse and slower", frozen, replace(run, precision=_plugin("precision", "nf4")))
    if longest > 256:
        yield Change(f"data.max_tokens={longest // 2}", "longer examples are cut", work, replace(run, data=replace(run.data, max_tokens=longest // 2)))
    if getattr(run.method, "rank", 0) > 4:
        rank = run.method.rank // 2
        yield Change(f"method.rank={rank}", "learns a little less", trained, replace(run, method=replace(run.method, rank=rank)))
    if edits == "weights":
        yield Change("method=lora", "another method, which may learn less", p.total, replace(run, method=_plugin("methods", "lora")))


def _plugin(package: str, kind: str) -> Any:
    from ..plugins import plugin

    return plugin(package, kind)()


def _advise(planner: Planner, run: Run, device: str, name: str, room: int) -> None:
    """The changes that help, each with what it saves; and the cheapest of them together that fit."""
    from ..errors import LuthierError

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
        from ..memory import THRESHOLD

        saved = p.standing["allocator"]
        typer.echo(f"  {THRESHOLD + '=1000000':<30} saves {size(saved):>9}   in the environment: the same results, a quarter to a half more time")
    said, total = together(run, lambda r: planner.predict(r, device), room)
    if not said:
        typer.echo("nothing of this helps; use a smaller base")
    elif total <= room:
        typer.echo(f"together they fit, in {size(total)}: {' '.join(said)}")
    else:
        typer.echo(f"all of it together takes {size(total)}, {size(total - room)} too much: {' '.join(said)}; use a smaller base or a larger device")


def together(run: Run, predict: Callable[[Run], Prediction], room: int) -> tuple[list[str], int]:
    """(settings, total): changes one after another, the cheapest first and each as far as it goes, until the run fits. One that does not help is left out."""
    from ..errors import LuthierError

    said: dict[str, str] = {}
    now, passed = predict(run), set[str]()
    while now.total > room:
        change = next((c for c in changes(run, now) if c.setting.partition("=")[0] not in passed), None)
        if change is None:
            break
        key = change.setting.partition("=")[0]
        if change.most <= WORTH * now.total:
            passed.add(key)
            continue
        try:
            then = predict(change.run)
        except LuthierError:
            passed.add(key)
            continue
        if now.total - then.total <= WORTH * now.total:
            passed.add(key)
            continue
        run, now = change.run, then
        said[key] = change.setting
    return list(said.values()), now.total
