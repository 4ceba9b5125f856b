"""Where rewards come from: reward models, classifiers, tasks and Python functions, by one name each, weighted and added.

    runs/reward          a run or adapter trained with objective: reward; on the policy's own base a voice of it, else a model of its own
    runs/stars:good      one trained with objective: classify; the log-odds of that label for the answer
    bleu, exact_match    a task, against the references of the prompt's record; `instruments:facts` for one of its scores, `exact_match after="Answer:"` with
                         settings, quoted as in a shell
    ./mine.py            your function reward(prompt, answer, row) -> a number, or your Task; ./mine.py:name for another function, or a score of the Task

The same names serve `objective.watch`, whose scores are only looked at.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import opening, remembered, voices
from ..core import Answer, LuthierError, Row, join
from ..data.labels import Labelled
from ..data.preferences import Judged
from ..data.shapes import Chat
from ..measuring.by_name import task_and_part
from ..measuring.evaluate import Score
from ..measuring.measure import predict, predict_texts, rewards, score_labels
from ..policy import Policy
from ..reading import form_of, read_data
from ..saving import adapter
from ..settings.plugins import kinds

Scoring = Callable[[Sequence[Answer]], list[float]]
LEAST_ODDS = 1e-6


class Judge:
    """All sources of a run: fills the scores of answers."""

    def __init__(self, rewarded: Mapping[str, float], watched: Sequence[str], policy: Policy):
        self.weights = dict(rewarded)
        self.sources = {name: open_source(name, policy, f"reward{i}") for i, name in enumerate(dict.fromkeys([*rewarded, *watched]))}
        self.watched = tuple(watched)
        short = short_names(list(self.sources))
        self.names = {n: s if n in self.weights else f"watch_{s}" for n, s in short.items()}

    def __call__(self, answers: Sequence[Answer]) -> None:
        """Score answers: each source's score by its short name, and their weighted sum. Raises LuthierError for a score that is no finite number."""
        for a in answers:
            a.score = 0.0
        for name, source in self.sources.items():
            for a, score in zip(answers, source(answers), strict=True):
                if not math.isfinite(score):
                    raise LuthierError(f"reward {name}: gave {score} for an answer to {a.prompt.where}: {a.text[:80]!r}; a finite number is needed")
                a.scores[self.names[name]] = score
                a.score += self.weights.get(name, 0.0) * score


def short_names(names: Sequence[str]) -> dict[str, str]:
    """A source's name for logs: the last part of its path, the whole where two would be alike."""
    short = {n: n if _task_kind(n) else _last(n) for n in names}
    return {n: s if list(short.values()).count(s) == 1 else n for n, s in short.items()}


def _last(name: str) -> str:
    """ "stars:good" of runs/stars/adapter:good; "mine" of ./mine.py."""
    where, part = _parts(name)
    path = Path(where)
    folder = path.parent.name if path.name in ("adapter", "model") else path.name
    return folder.removesuffix(".py") + (f":{part}" if part else "")


def _parts(name: str) -> tuple[str, str]:
    """A path and what follows its last colon; a path with a colon in it is one where it exists."""
    where, colon, part = name.rpartition(":")
    return (where, part) if colon and not Path(name).expanduser().exists() else (name, "")


def _task_kind(name: str) -> str:
    """The task that a name begins with, "" for a path."""
    kind = name.split(maxsplit=1)[0].partition(":")[0] if name.strip() else ""
    return kind if kind in kinds("tasks") else ""


def open_source(name: str, policy: Policy, voice: str) -> Scoring:
    """A source by its name; ``voice``: what a delta on the policy's base is called there. Raises LuthierError where there is no such source."""
    if _task_kind(name):
        return of_task(name)
    where, part = _parts(name)
    path = Path(where).expanduser()
    if where.endswith(".py"):
        return own(path, part, name)
    if where.strip() and (folder := adapter.artefact(path)) is not None:
        return of_model(folder, part, policy, voice, name)
    raise LuthierError(
        f"rewards: {name!r} is no source of reward; accepted are a folder of a run or adapter trained with objective reward or classify "
        f"(runs/reward, runs/stars:good), a task ({', '.join(kinds('tasks'))}), or your own ./file.py"
    )


# --- models ----------------------------------------------------------------------------------------------------------


def of_model(folder: Path, label: str, policy: Policy, voice: str, name: str) -> Scoring:
    """A reward model or a classifier: a voice of the policy's base where it belongs to it and that base stays as it is, else a model of its own in memory."""
    ours = json.loads((folder / adapter.OURS).read_text()) if (folder / adapter.OURS).is_file() else {}
    theirs = (ours.get("base") or {}).get("hash")
    same = adapter.is_adapter(folder) and theirs == policy.base.hash and not voices.moves_base(policy.method)
    model: Any = voices.add_reader(policy, folder, voice) if same else opening.load(folder)
    if same:
        remembered.recall(model, folder)
    renders = getattr(model.objective, "renders", "")
    if renders == "ranked":
        if label:
            raise LuthierError(f"rewards: {name!r}: a reward model has no labels; name its folder alone")
        return _by_tokens(model, name) if same else _by_text(model, _template(ours))
    if renders == "label":
        return _by_label(model, label, name)
    raise LuthierError(f"rewards: {folder} was not trained to score answers; name a run or adapter trained with objective: reward or classify")


def _template(ours: Mapping[str, Any]) -> str | None:
    """The chat template that a saved model was trained with, where its run named one."""
    found: str | None = (((ours.get("training") or {}).get("run") or {}).get("model") or {}).get("template")
    return found


def _by_tokens(model: Any, name: str) -> Scoring:
    """The reward of prompt and answer as they were sampled: reward model and policy read the same tokens. An encoder-decoder's encoder reads both."""
    if model.base.anatomy.kind == "encoder_decoder":
        return _by_text(model, None)

    def score(answers: Sequence[Answer]) -> list[float]:
        whole = [np.concatenate([a.prompt.ids, np.array(a.ids, dtype=np.int32)]) for a in answers]
        if (longest := max(map(len, whole), default=0)) > model.limit:
            raise LuthierError(
                f"reward {name}: reads {model.limit} tokens, and a prompt with its answer has {longest}; lower data.max_tokens or objective.max_new"
            )
        rows = [join([Row(ids, np.arange(len(ids)) == len(ids) - 1)], ranks=(), margin=0.0, good=None) for ids in whole]
        return [said["scores"][0] for said in predict(model, model.objective, rows)]

    return score


def _by_text(model: Any, template: str | None) -> Scoring:
    """The reward of the conversation, rendered by the reward model's own template. An answer of no text gets the least of the others."""

    def score(answers: Sequence[Answer]) -> list[float]:
        judged = [
            Judged((Chat([*_messages(a), {"role": "assistant", "content": a.text}]),), len(_messages(a)), where=a.prompt.where)
            for a in answers
            if a.text.strip()
        ]
        found = iter([s[0] for s in rewards(model, judged, template=template)])
        scores = [next(found) if a.text.strip() else math.nan for a in answers]
        least = min((s for s in scores if not math.isnan(s)), default=0.0)
        return [least if math.isnan(s) else s for s in scores]

    return score


def _by_label(model: Any, label: str, name: str) -> Scoring:
    labels = tuple(model.objective.labels)
    if model.objective.problem != "single" or label not in labels:
        listed = f"its labels are {', '.join(labels)}" if labels else "it gives numbers, not labels"
        raise LuthierError(f"rewards: {name!r}: say which label is rewarded, {name.split(':')[0]}:LABEL; {listed}")

    def score(answers: Sequence[Answer]) -> list[float]:
        texts = [a.text if isinstance(_task(a)["prompt"], list) else f"{_task(a)['prompt']}{a.text}" for a in answers]
        out = []
        for said in predict_texts(model, [Labelled((t or " ",), None) for t in texts]):
            p = min(1 - LEAST_ODDS, max(LEAST_ODDS, said["probabilities"][label]))
            out.append(math.log(p / (1 - p)))
        return out

    return score


# --- tasks and functions ---------------------------------------------------------------------------------------------


def of_task(name: str) -> Scoring:
    """A task's score of each answer by itself: the first it gives, or the one named. Raises LuthierError for settings the task does not have."""
    task, part = task_and_part(name, "rewards")
    return _by_task(task, part, name)


def _by_task(task: Any, part: str, name: str) -> Scoring:
    """The score ``part`` of every answer, the first where none is named."""

    def score(answers: Sequence[Answer]) -> list[float]:
        out = []
        for a in answers:
            try:
                said = task.score(_task(a), a.text)
            except LuthierError as e:
                raise LuthierError(f"rewards: {name!r} cannot score an answer to {a.prompt.where}: {e}") from None
            if not said or (part and part not in said):
                raise LuthierError(f"rewards: {name!r}: the task scored {a.prompt.where} with {', '.join(said) or 'nothing'}, so it cannot reward this answer")
            out.append(float(said[part] if part else next(iter(said.values()))))
        return out

    return score


def own(path: Path, part: str, name: str) -> Scoring:
    """The user's file: its function ``part`` (default: reward) of (prompt, answer, row) -> a number, or the score ``part`` (default: the first) of its Task.

    prompt: a text or messages; row: the prompt's record, with "refs" where it has answers. Raises LuthierError for a file without either.
    """
    if not path.is_file():
        raise LuthierError(f"rewards: there is no file {path}; paths are read from the current folder")
    spec = importlib.util.spec_from_file_location(f"luthier_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise LuthierError(f"{path}: does not import: {type(e).__name__}: {e}") from e
    found, function = getattr(module, part or "reward", None), part or "reward"
    if isinstance(found, type) and found.__name__ == "Task":
        return _by_task(found(), "", name)
    if not callable(found):
        if hasattr(module, "Task"):
            return _by_task(module.Task(), part, name)
        defined = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise LuthierError(f"{path}: defines no function {function} and no Task; it defines {', '.join(defined) or 'none'}; name a function: {path}:NAME")
    own = found

    def score(answers: Sequence[Answer]) -> list[float]:
        out = []
        for a in answers:
            try:
                out.append(float(own(_task(a)["prompt"], a.text, _task(a))))
            except Exception as e:
                raise LuthierError(f"{path}: {function} failed on an answer to {a.prompt.where}: {type(e).__name__}: {e}") from e
        return out

    return score


def check_own(name: str) -> None:
    """Raise LuthierError where a source is a Python file that gives no reward; other sources are not looked at."""
    where, part = _parts(name)
    if not _task_kind(name) and where.endswith(".py"):
        own(Path(where).expanduser(), part, name)


def _task(a: Answer) -> dict[str, Any]:
    return dict(a.prompt.extras["task"])  # a copy: what a function does to it must not reach the next answer


def _messages(a: Answer) -> list[dict[str, Any]]:
    prompt = _task(a)["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


# --- whether a reward model can be trusted ---------------------------------------------------------------------------


def proven(name: str, judge: Judge, run: Any) -> str:
    """How well a reward model tells held-out answers apart, in a sentence; "" for other sources.

    Raises LuthierError where it does not beat chance: its 95 % interval reaches one half, or nothing is known of it.
    """
    folder = adapter.artefact(Path(name).expanduser()) if not name.endswith(".py") else None
    if folder is None or ":" in name or not _is_reward(folder):
        return ""
    found, where = _measured(folder, run) if run.objective.pairs else _trained(folder)
    if found is None:
        raise LuthierError(
            f"rewards: nothing is known of how well {folder} tells held-out answers apart; name pairs it was not trained on, objective.pairs=[FILE], "
            "or set objective.check_rewards=no"
        )
    if found.low <= 0.5:
        raise LuthierError(
            f"rewards: {folder} puts {found} of held-out pairs in order ({where}), which is no better than chance, so the policy would learn noise; train "
            "it on more or clearer pairs, from a better base, or set objective.check_rewards=no to go on all the same"
        )
    return f"{judge.names[name]}: {found} of held-out pairs in order ({where})"


def _is_reward(folder: Path) -> bool:
    objective = adapter.objective_of(folder)
    return getattr(objective, "renders", "") == "ranked"


def _trained(folder: Path) -> tuple[Score | None, str]:
    """What its own run found."""
    ours = json.loads((folder / adapter.OURS).read_text()) if (folder / adapter.OURS).is_file() else {}
    said = ((ours.get("training") or {}).get("after") or {}).get("scores", {}).get("accuracy")
    return (Score(**said) if said else None), "its own training's held-out pairs"


def _measured(folder: Path, run: Any) -> tuple[Score, str]:
    """On the pairs that the run names."""
    model = opening.load(folder)
    pairs = tuple(run.objective.pairs)
    data = replace(run.data, train=pairs, validation=pairs, validation_rows=2000, shape="auto", columns={}, limit=None)
    template = _template(json.loads((folder / adapter.OURS).read_text())) if (folder / adapter.OURS).is_file() else None
    reads = replace(run, objective=model.objective, data=data, model=replace(run.model, template=template))
    prepared = read_data(reads, model.base.tokenizer, positions=model.limit, say=lambda _: None, form=form_of(model.base))
    scores, _ = score_labels(model, model.objective, prepared.validation, prepared.validation_records, "preference", run.seed)
    return scores["accuracy"], ", ".join(run.objective.pairs)
