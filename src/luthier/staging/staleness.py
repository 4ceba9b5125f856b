"""Which stages are to run: those that are not done, and, where that was said to be wanted, those that have changed or came of something that has."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import LuthierError
from .ledger import Ledger, Standing
from .stages import Stage, Stages


def due(stages: Stages, standing: Mapping[str, Standing], only: str | None, accept: bool) -> set[str]:
    """The stages to train. Raises LuthierError where some would have to be trained again, and that was not said to be wanted."""
    wanted = {stages.stage(only).name} if only is not None else set(standing)
    todo = {n for n in wanted if standing[n].record.state != "done" or standing[n].again}
    later = {n for s in stages.stages for n in s.needs}
    for stage in reversed(stages.stages):  # of what is gone, what is needed, and what nothing else came of
        used = any(stage.name in stages.stage(n).needs for n in todo)
        if standing[stage.name].gone and stage.name in wanted and (used or stage.name not in later or stage.name == only):
            todo.add(stage.name)
    used_now = {n for t in todo for n in stages.stage(t).needs}
    altered = [n for n in standing if standing[n].altered and n in used_now and n not in todo]
    if not accept and (said := _changed([standing[n] for n in standing if n in wanted], altered)):
        raise LuthierError(f"{said}; put that back as it was, or say --accept-changes{_consequence(standing, todo, altered)}")
    for name in altered:
        standing[name].record.sha256 = standing[name].left
    return todo


def check_alone(stage: Stage, standing: Mapping[str, Standing], ledger: Ledger, *, goes_on: bool) -> None:
    """What a stage that is run alone needs is there, and the stage is not begun already."""
    for name in stage.needs:
        earlier = standing[name]
        first = f"train that first: --stage {name}"
        if earlier.record.state != "done" or earlier.gone:
            how = "is not there yet" if earlier.record.state == "waiting" else "is not finished" if earlier.record.state == "running" else "is gone"
            raise LuthierError(f"stage {stage.name} needs what stage {name} leaves, which {how}; {first}, or train all stages")
        if earlier.again:
            raise LuthierError(f"stage {stage.name} needs what stage {name} left, and of that stage {_why(earlier)}; {first}, or put that back as it was")
    state, where = standing[stage.name].record.state, ledger.where(stage)
    if state == "done" and not standing[stage.name].again and not standing[stage.name].gone and not goes_on:
        raise LuthierError(f"{where}: stage {stage.name} is done already; delete that folder to train it again")
    if state == "running" and not goes_on:
        raise LuthierError(f"{where}: stage {stage.name} was interrupted; go on with it: luthier train --resume {ledger.folder} --stage {stage.name}")


def _why(s: Standing) -> str:
    """What has changed with a stage, as a clause."""
    parts = [f"its settings have changed ({'; '.join(s.settings[:4])}{' and more' if len(s.settings) > 4 else ''})"] if s.settings else []
    parts += ["; ".join(s.inputs[:4])] if s.inputs else []
    parts += [f"what it began from, {' and '.join(s.stale)}, is another now"] if s.stale else []
    return ", and ".join(parts)


def _changed(standing: list[Standing], altered: list[str]) -> str:
    """What has changed since stages were trained, as one sentence; "" where nothing has."""
    said = [f"stage {s.stage.name} is not as it was trained: {_why(s)}" for s in standing if s.again and (s.settings or s.inputs)]
    said += [f"what stage {n} left has been changed since, on disk" for n in altered]
    stale = [s.stage.name for s in standing if s.again and not s.settings and not s.inputs]
    if stale:
        said.append(f"{' and '.join(stale)} began from what is, or will be, another, so {'they are' if len(stale) > 1 else 'it is'} stale")
    return "; ".join(said)


def _consequence(standing: Mapping[str, Standing], todo: set[str], altered: list[str]) -> str:
    """What --accept-changes would do."""
    begun = [s for s in standing.values() if s.stage.name in todo and s.again]
    again, on = ([s.stage.name for s in begun if _may_go_on(s) is may] for may in (False, True))
    parts = [f"to train {', '.join(again)} again (the folders that are there are kept, renamed)"] if again else []
    parts += [f"to go on with {', '.join(on)} from the last checkpoint under the new settings"] if on else []
    parts += [f"to use what is in the folder of {', '.join(altered)} now"] if altered and not parts else []
    return " " + " and ".join(parts)


def _may_go_on(s: Standing) -> bool:
    """Whether an interrupted stage can go on from its checkpoint: with other settings perhaps, but from the same files."""
    return s.record.state == "running" and not s.inputs and not s.stale
