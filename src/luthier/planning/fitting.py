"""What would make a run fit in memory: changes to its settings, the cheapest first, each with what it really saves, and those that cost nothing made unasked.

Every change is predicted from the run's own modules (memory.py) before it is named or made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..amounts import size
from ..core import LuthierError
from ..settings.plugins import plugin
from ..settings.run import Run
from .memory import Plan, Prediction, machine

WORTH = 0.01  # of the total: a change that saves less is not named
SAFE = 0.92  # of the memory that is free: what a prediction that fits may come to
LARGE = 30_000_000  # parameters from which on a run is looked at before it starts, however short it is


class Planner:
    """Predictions, each made once; runs whose modules are the same share them."""

    def __init__(self) -> None:
        self.plans: dict[str, Plan] = {}
        self.made: dict[str, Prediction] = {}

    def plan(self, run: Run) -> Plan:
        """The modules of a run on the meta device."""
        key = repr((run.model, run.method, run.objective, run.precision, run.tokens, run.seed))
        if key not in self.plans:
            self.plans[key] = Plan(run)
        return self.plans[key]

    def predict(self, run: Run, device: str, program: int | None = None) -> Prediction:
        """See memory.predict."""
        key = repr((run, device, program))
        if key not in self.made:
            self.made[key] = self.plan(run).predict(run, device, program=program)
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
        yield Change("precision=nf4", "a base in 4 bits, a little worse and slower", frozen, replace(run, precision=_plugged("precision", "nf4")))
    if longest > 256:
        yield Change(f"data.max_tokens={longest // 2}", "longer examples are cut", work, replace(run, data=replace(run.data, max_tokens=longest // 2)))
    if getattr(run.method, "rank", 0) > 4:
        rank, alpha = run.method.rank // 2, getattr(run.method, "alpha", None)
        scaled = {} if alpha is None else {"alpha": alpha / 2}  # the scale, alpha / rank, stays
        said = f"method.rank={rank}" + (f" method.alpha={alpha / 2:g}" if scaled else "")
        yield Change(said, "learns a little less", trained, replace(run, method=replace(run.method, rank=rank, **scaled)))
    if edits == "weights":
        yield Change("method=lora", "another method, which may learn less", p.total, replace(run, method=_plugged("methods", "lora")))


def _plugged(package: str, kind: str) -> Any:
    return plugin(package, kind)()


Changes = Callable[[Run, Prediction], Iterator[Change]]


def together(run: Run, predict: Callable[[Run], Prediction], room: int, which: Changes = changes) -> tuple[Run, list[str], int]:
    """(the run, settings, total): changes one after another, the cheapest first and each as far as it goes, until it fits. What does not help is left out."""
    said: dict[str, str] = {}
    now, passed = predict(run), set[str]()
    while now.total > room:
        change = next((c for c in which(run, now) if c.setting.partition("=")[0] not in passed), None)
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
    return run, list(said.values()), now.total


# --- unasked ------------------------------------------------------------------------------------------------------------


def equal(run: Run, p: Prediction) -> Iterator[Change]:
    """The changes that leave every result as it is."""
    for change in changes(run, p):
        if change.setting.partition("=")[0] in ("optim.micro_tokens", "recompute"):
            yield change


def _fewest(run: Run, blocks: int, predict: Callable[[Run], Prediction], room: int) -> tuple[Run, int]:
    """The run with as few blocks computed again as still fit, and what it takes; all of them fit."""
    low, high, best = 0, blocks, run  # so few do not fit; so many do
    while high - low > 1:
        middle = (low + high) // 2
        try:
            fits = predict(tried := replace(run, recompute=middle)).total <= room
        except LuthierError:  # a family that does it for all or none
            break
        low, high, best = (low, middle, tried) if fits else (middle, high, best)
    return best, predict(best).total


def fitted(run: Run, planner: Planner, *, ceiling: int | None = None, program: int | None = None) -> tuple[Run, list[str]]:
    """The run with smaller micro-batches and with recomputation (in as few blocks as will do), as far as is needed to stay below ``ceiling`` bytes (default:
    what is free here), and what to say of it. The results stay as they are. ``program``: bytes that the process took before it loaded the model.

    Raises LuthierError where a ceiling was asked for and no such change holds it.
    """
    device = run.place.device
    free = machine(device)[1]
    room = int(SAFE * free) if ceiling is None else ceiling

    def predict(r: Run) -> Prediction:
        return planner.predict(r, device.type, program)

    first = predict(run).total
    if first <= room:
        return run, []
    found, said, total = together(run, predict, room, equal)
    whose = f"place.memory is {size(room)}" if ceiling is not None else f"{size(free)} are free"
    if total <= room:
        if run.recompute == "none" and found.recompute == "blocks":
            found, total = _fewest(found, planner.plan(found).blocks, predict, room)
            said = [f"recompute={found.recompute}" if s.startswith("recompute=") else s for s in said]
        return found, [f"{whose}, and {size(first)} would be needed: {' '.join(said)} was set, which needs {size(total)} and gives the same results"]
    _, more, least = together(found, predict, room)
    advice = f"{' '.join(more)} would need {size(least)}" if more else "use a smaller base or a larger device"
    if ceiling is not None:
        tried = f" with {' '.join(said)}" if said else ""
        raise LuthierError(f"place.memory: {size(room)} were asked for, and the run needs {size(total)}{tried}; {advice} (see luthier plan)")
    return found, [f"{whose}, and about {size(total)} are needed{', with ' + ' '.join(said) if said else ''}: the run may end for want of memory; {advice}"]
