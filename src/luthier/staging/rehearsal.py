"""Every stage tried before the first one starts, so that the third hour does not end at a slip of typing.

What an earlier stage will leave is stood in for by the model that stage starts from: it has the same modules. On the meta device, from configurations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import build, references
from ..core import Base, LuthierError
from ..data.prepare import Prepared
from ..data.sources import files_of
from ..feedback import rewards
from ..forgetting import against, difficulty
from ..hub import fingerprint, locate
from ..modelling import vocabulary
from ..planning.microbatch import lacks_labels, with_labels
from ..policy import Policy
from ..reading import form_of, read_data
from ..saving import adapter
from ..settings.plugins import is_path, kind_of
from ..settings.run import Model, Run
from .stages import PREFIX, Stage, Stages, mentions

FIRST = 200  # records read of each file: shapes, columns and templates show there

Made = Mapping[str, Path]  # the artefacts that are there, by their stage


@dataclass(frozen=True)
class Tried:
    """A stage put together on the meta device."""

    stage: Stage
    run: Run  # with a model that is there
    policy: Policy
    base: Base


def writes(stage: Stage) -> str:
    """What a stage leaves: "adapter" or "model"."""
    return adapter.writes(stage.asked.method)


def standing_in(stages: Stages, stage: Stage, made: Made) -> tuple[Run, tuple[tuple[str, ...], ...]]:
    """A stage's run on a model that is there: what it was handed, or the model which that began from; and the tokens added on the way from there."""
    artefacts = {n: str(made.get(n, f"the {writes(stages.stage(n))} of stage {n}")) for n in stage.needs}
    run = stage.run(artefacts)
    if stage.model_from is None or stage.model_from in made:
        return run, ()
    earlier, tokens = standing_in(stages, stages.stage(stage.model_from), made)
    model = replace(run.model, id=earlier.model.id, revision=earlier.model.revision, offline=run.model.offline or earlier.model.offline)
    if earlier.model.trust_remote_code:
        model = replace(model, trust_remote_code=True)
    return replace(run, model=model), (*tokens, *([earlier.tokens] if earlier.tokens else []))


def assemble(stages: Stages, stage: Stage, made: Made) -> Tried:
    """Put a stage together on meta. Raises LuthierError where its choices cannot go together."""
    run, added = standing_in(stages, stage, made)
    run, _ = build.resolve(run)
    if lacks_labels(run.objective):
        run = replace(run, objective=with_labels(run.objective))
    base = build.load(run.model, precision=run.precision, device=torch.device("meta"), weights=False, trains_base=run.method.edits == "weights")
    for tokens in added:  # they are in the model that it will be handed
        vocabulary.extend(base, tokens)
        base.tokens = ()
    begun = getattr(run.method, "from_", None) is not None  # the delta it begins from has the same tensors, and may not be there yet
    policy, _ = build.assemble(replace(run, method=replace(run.method, from_=None)) if begun else run, base)
    return Tried(stage, run, policy, base)


def rehearse(stages: Stages, todo: Iterable[Stage], made: Made, *, say: Callable[[str], None] = lambda _: None) -> list[Tried]:
    """Try the stages that are to run: files, models, compositions, the first records. Raises LuthierError, with the stage, for the first that cannot run."""
    out = []
    for stage in todo:
        try:
            check_handed(stages, stage)
            _check_files(stage)
            tried = assemble(stages, stage, made)
            _check_start(stages, tried, made)
            _check_rows(tried)
        except LuthierError as e:
            raise LuthierError(f"stage {stage.name}: {e}") from e
        out.append(tried)
        say(f"stage {stage.name}: its settings, files and first records are in order")
    return out


def check_handed(stages: Stages, stage: Stage) -> None:
    """A model begins from a model, a delta from a delta of the same kind on the same base. Raises LuthierError where that is not so."""
    if stage.model_from is not None and writes(source := stages.stage(stage.model_from)) != "model":
        what = f"stage {source.name} leaves an adapter ({kind_of(source.asked.method)}), which is no model by itself"
        on = source.asked.model.id
        raise LuthierError(
            f"model.id: {what}; go on training it with model: {on} and method: {{kind: {kind_of(source.asked.method)}, from: stage:{source.name}}}"
        )
    for name in (n for _, n in mentions(dict.fromkeys(_scored_by(stage.asked)))):
        if (source := stages.stage(name)).asked.objective.renders not in ("ranked", "label"):
            how = kind_of(source.asked.objective)
            raise LuthierError(f"objective.rewards: stage {name} learns {how}, which scores no answers; name one with objective reward or classify")
    if stage.delta_from is None:
        return
    source = stages.stage(stage.delta_from)
    if writes(source) != "adapter":
        raise LuthierError(f"method.from: stage {source.name} leaves a whole model ({kind_of(source.asked.method)}); name it as model: stage:{source.name}")
    theirs, ours = kind_of(source.asked.method), kind_of(stage.asked.method)
    if theirs != ours:
        raise LuthierError(f"method.from: stage {source.name} leaves a delta of {theirs}, and this stage's method is {ours}")
    if source.asked.tokens != stage.asked.tokens:
        said = [", ".join(s.asked.tokens) or "none" for s in (source, stage)]
        raise LuthierError(f"tokens: stage {source.name} adds {said[0]} and this stage {said[1]}; what goes on from its delta adds the same")
    if not _one_base(source.asked.model, stage.asked.model):
        raise LuthierError(
            f"method.from: stage {source.name} trains on {source.asked.model.id} and this stage on {stage.asked.model.id}; a delta only fits its own base, so "
            f"set model: {source.asked.model.id}"
        )


def _one_base(a: Model, b: Model) -> bool:
    """Whether two models are one, as far as can be said before they are made."""
    if (a.id, a.revision) == (b.id, b.revision):
        return True
    try:
        return fingerprint(locate(replace(a, offline=True))) == fingerprint(locate(replace(b, offline=True)))
    except LuthierError:
        return False


def _check_files(stage: Stage) -> None:
    """Data and a base that no stage makes are where they are said to be; a base is fetched now."""
    run, d = stage.asked, stage.asked.data
    if not d.files:
        raise LuthierError("data.train: names no file; say data: FILE in the stage, or beside stages for all of them")
    for sources, split in ((d.files, d.split), (d.held_out, "validation"), (d.general, "train")):
        for source in sources:
            files_of(source, split)
    for source in (*getattr(run.objective, "ptx_data", ()), *getattr(run.objective, "pairs", ()), *(s for s in d.replay.source if s != "self")):
        files_of(source)
    for name in _scored_by(run):
        if is_path(name) and not name.startswith(PREFIX) and not any(Path(n).expanduser().exists() for n in (name, name.rpartition(":")[0]) if n):
            raise LuthierError(f"objective.rewards: there is no {name!r}; name a run's folder, an earlier stage (stage:NAME), a task or a Python file")
        rewards.check_own(name)
    if stage.model_from is None:
        locate(run.model, weights=not run.model.random)
    begins = getattr(run.method, "from_", None)
    if begins is not None and stage.delta_from is None:
        folder = adapter.artefact(Path(begins).expanduser())
        if folder is None:
            raise LuthierError(f"method.from: there is no folder {begins!r}; name an adapter's or a run's folder, or an earlier stage: stage:NAME")
        adapter.describe(folder)


def _scored_by(run: Run) -> list[str]:
    """Where the scores of an objective that learns from its own answers come from."""
    return [*getattr(run.objective, "rewards", ()), *getattr(run.objective, "watch", ())]


def _check_start(stages: Stages, tried: Tried, made: Made) -> None:
    """What a run refuses only once its modules are there."""
    stage, run, base = tried.stage, tried.run, tried.base
    if serves := getattr(run.objective, "serves", None):
        serves(form_of(base).kind)
    against.check(run)
    difficulty.check(run)
    if base.tokenizer is None:
        build.load_tokenizer(run.model)  # says what is missing
    started = getattr(run.method, "from_", None) is not None
    if getattr(run.objective, "reference", None) == "live":
        references.bring(tried.policy, run.objective, Prepared([], [], []), folder=Path(run.out), tokens=1, packed=False, started=started)
    if stage.delta_from is not None:
        _check_same_delta(assemble(stages, stages.stage(stage.delta_from), made), tried)


def _check_same_delta(source: Tried, tried: Tried) -> None:
    """What a stage goes on from has its own tensors, of its own sizes and scales."""
    for what, of in (("a tensor of", _sizes), ("a scale of", _scales)):
        theirs, ours = of(source), of(tried)
        for name in theirs | ours:
            if theirs.get(name) != ours.get(name):
                said = [f"{what} {sizes[name]} at {name}" if name in sizes else f"nothing at {name}" for sizes in (theirs, ours)]
                on = f"stage {source.stage.name}, whose delta this one goes on from, has {said[0]}, and this one {said[1]}"
                raise LuthierError(f"method: {on}; give it the settings of method in {source.stage.name}")


def _sizes(tried: Tried) -> dict[str, Any]:
    delta = tried.policy.delta
    assert delta is not None
    return {k: tuple(v.shape) for k, v in (dict(delta.params) | delta.buffers).items()}


def _scales(tried: Tried) -> dict[str, Any]:
    method: Any = tried.run.method
    return method.scales(tried.base) if hasattr(method, "scales") else {}


def _check_rows(tried: Tried) -> None:
    """The first records are read as the objective wants them. Where they fail, all are read before that is believed."""
    run, base = tried.run, tried.base
    if lacks_labels(tried.stage.asked.objective):
        run = replace(run, objective=tried.stage.asked.objective)  # its labels are in the data
    room = min(base.max_positions, base.tokenizer.model_max_length) - getattr(run.method, "shift", 0)
    read = lambda r: read_data(r, base.tokenizer, positions=room, say=lambda _: None, form=form_of(base))  # noqa: E731
    few = min(FIRST, run.data.limit or FIRST)
    try:
        mix = run.data.mix
        if mix is not None:
            mix = replace(mix, sources={n: replace(s, limit=min(few, s.limit or few)) for n, s in mix.sources.items()})
        read(replace(run, data=replace(run.data, limit=few, mix=mix)))
    except LuthierError:
        read(run)
