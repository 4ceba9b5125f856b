"""Several runs in one file: its stages, one after another, each a run of its own that may begin from what an earlier one left.

    stages = load_stages("assistant.yaml", ["seed=1", "stages.sft.optim.lr=1e-3"])

Everything beside ``stages`` is shared; a stage's own settings are laid over it, as overrides are over a file. ``stage:NAME`` in a stage, as a value or as a
key, stands for the folder of what that earlier stage left: its adapter, or its model where every weight was trained. What follows a second colon is kept
behind the folder (a reward's label: ``stage:stars:good``).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..settings import runfile
from ..settings.config import error_at, is_plug, override, run_of, spell_out, tree_of
from ..settings.names import nearest
from ..settings.plugins import hints
from ..settings.runfile import Key, Mark, Tree

if TYPE_CHECKING:
    from ..settings.run import Run

PREFIX = "stage:"
ALL = "all"  # stages.all.KEY=VALUE is said to every stage
WHOLE = ("name", "out")  # of all stages together: where their folders lie
OF_ITS_MODEL = ("revision", "random")  # said of one model: they go when a stage names another
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_Setting = tuple[str, list[str], str]  # what the user wrote, its keys, the text of its value


@dataclass(frozen=True)
class Stage:
    """One stage: its settings with the shared ones below them; what earlier stages leave is still called stage:NAME in them."""

    name: str
    place: int  # 1 for the first
    tree: Tree
    asked: Run

    @property
    def folder(self) -> str:
        """The name of its folder in the run's."""
        return f"{self.place}-{self.name}"

    @property
    def needs(self) -> tuple[str, ...]:
        """Earlier stages whose artefacts it is handed, in the order it names them."""
        return tuple(dict.fromkeys(name for _, name in mentions(self.tree.values)))

    @property
    def model_from(self) -> str | None:
        """The stage whose model is its base."""
        return _stage(self.asked.model.id)

    @property
    def delta_from(self) -> str | None:
        """The stage whose delta its own begins from."""
        return _stage(getattr(self.asked.method, "from_", None))

    def run(self, artefacts: Mapping[str, Path | str]) -> Run:
        """Its Run, with the folders of these artefacts in place of stage:NAME. Raises ConfigError."""
        return run_of(Tree(handed(self.tree.values, {n: str(p) for n, p in artefacts.items()}), self.tree.marks))


@dataclass(frozen=True)
class Stages:
    """All stages of a file, in order."""

    name: str
    out: str
    stages: tuple[Stage, ...]
    values: dict[str, Any]  # plain, as written and overridden
    notes: tuple[str, ...] = ()  # what to tell the user about the settings

    @property
    def folder(self) -> Path:
        """The folder that holds the stages' own."""
        return Path(self.out) / self.name

    def stage(self, name: str) -> Stage:
        """The stage of a name. Raises ConfigError with the nearest one."""
        return next(s for s in self.stages if s.name == known(name, [s.name for s in self.stages]))

    def dump(self) -> str:
        """YAML that reads back as these stages, at this place."""
        return runfile.write({**self.values, "name": self.name, "out": self.out})


def has_stages(path: str | Path) -> bool:
    """Whether a run file holds stages. Raises ConfigError for what is no run file."""
    return "stages" in runfile.read_file(Path(path)).values


def load_stages(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Stages:
    """The stages of a YAML file or a plain tree, and "key=value" settings, which win.

    ``seed=1`` changes the shared part, ``stages.sft.seed=1`` one stage, ``stages.all.seed=1`` every stage. Raises ConfigError.
    """
    shared = tree_of(source)
    own = _taken_apart(shared)
    to_shared, to_own = _sorted_out(overrides, list(own))
    override(shared, to_shared)
    for name, tree in own.items():
        override(tree, to_own[name])
        _refuse_whole(tree, name)
    values = {**copy.deepcopy(shared.values), "stages": {n: copy.deepcopy(t.values) for n, t in own.items()}}
    whole = run_of(Tree({k: shared.values.pop(k) for k in WHOLE if k in shared.values}, shared.marks))
    stages: list[Stage] = []
    used: dict[str, set[Key]] = {}
    for i, (name, tree) in enumerate(own.items()):
        laid, used[name] = _laid_over(shared, tree, name)
        stages.append(Stage(name, i + 1, laid, run_of(laid)))
        _check_references(stages[-1], list(own))
    stem = Path(source).stem if isinstance(source, str | Path) else "stages"
    name = whole.name or f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    return Stages(name, whole.out, tuple(stages), values, tuple(_unused(shared, used, to_shared)))


def known(name: str, names: list[str]) -> str:
    """The name of a stage there is. Raises ConfigError with the nearest one for another."""
    if name in names:
        return name
    near = nearest(name, names)
    raise ConfigError(f"there is no stage {name!r}; " + (f"did you mean {near}?" if near else f"there are {', '.join(names)}"))


def mentions(value: Any, path: Key = ()) -> Iterator[tuple[Key, str]]:
    """(where, NAME) of every stage:NAME in plain settings, values and keys."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            if (name := _stage(key)) is not None:
                yield (*path, key), name
            yield from mentions(child, (*path, key))
    elif isinstance(value, list | tuple):
        for i, child in enumerate(value):
            yield from mentions(child, (*path, i))
    elif (name := _stage(value)) is not None:
        yield path, name


def handed(value: Any, artefacts: Mapping[str, str]) -> Any:
    """Plain settings with the folder of each artefact in place of stage:NAME."""
    if isinstance(value, Mapping):
        return {handed(k, artefacts): handed(v, artefacts) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [handed(v, artefacts) for v in value]
    name = _stage(value)
    return value if name is None else artefacts[name] + value.removeprefix(PREFIX + name)


def _stage(value: Any) -> str | None:
    return value.removeprefix(PREFIX).partition(":")[0] if isinstance(value, str) and value.startswith(PREFIX) else None


# --- reading --------------------------------------------------------------------------------------------------------


def _taken_apart(tree: Tree) -> dict[str, Tree]:
    """Take the stages out of a file's tree: the tree of each, by its name."""
    named = tree.values.pop("stages", None)
    if not isinstance(named, dict) or not named:
        raise error_at(tree, ("stages",), "found no stage; write one below the other, `sft: {objective: sft, data: chats.jsonl}`")
    out = {}
    for name, values in named.items():
        path = ("stages", str(name))
        if not _NAME.fullmatch(path[1]):
            raise error_at(tree, path, "a stage's name is letters, digits, - and _, because its folder and its settings are named by it")
        if path[1] == ALL:
            raise error_at(
                tree, path, f"a stage cannot be called {ALL}, which means every stage (stages.{ALL}.seed=1); settings of all stages stand beside stages"
            )
        if values is not None and not isinstance(values, dict):
            raise error_at(tree, path, f"found {values!r}; a stage is a mapping of settings, as a run file is: {name}: {{objective: sft, data: chats.jsonl}}")
        own = Tree(dict(values or {}), {k[2:]: m for k, m in tree.marks.items() if k[:2] == path})
        spell_out(own)
        out[path[1]] = own
    return out


def _sorted_out(overrides: Iterable[str], names: list[str]) -> tuple[list[_Setting], dict[str, list[_Setting]]]:
    """Settings of the shared part, and of each stage."""
    shared: list[_Setting] = []
    own: dict[str, list[_Setting]] = {n: [] for n in names}
    for setting in overrides:
        keys, text = runfile.split(setting)
        if keys[0] != "stages":
            shared.append((setting, keys, text))
            continue
        if len(keys) < 3:
            raise ConfigError(f"{setting}: one setting of a stage at a time, for example stages.{names[0]}.optim.lr=1e-4; stages are added in the file")
        try:
            meant = names if keys[1] == ALL else [known(keys[1], names)]
        except ConfigError as e:
            raise ConfigError(f"{setting}: {e}") from None
        for name in meant:
            own[name].append((setting, keys[2:], text))
    return shared, own


def _refuse_whole(tree: Tree, name: str) -> None:
    for key in WHOLE:
        if key in tree.values:
            marked = Tree(tree.values, _above(tree, name))
            raise error_at(marked, (key,), f"a stage's folder is named by its place and its name, in the folder of all stages; {key} stands beside stages")


def _laid_over(shared: Tree, own: Tree, name: str) -> tuple[Tree, set[Key]]:
    """A stage's settings over the shared ones, a key at a time; and which of the shared ones are left.

    A new kind of plug-in drops the shared one's settings; another model drops what was said of the shared one's weights.
    """
    from ..settings.run import Run

    out = Tree(copy.deepcopy(shared.values), dict(shared.marks))
    marks = _above(own, name)
    left = {(s, *f) for s, v in shared.values.items() for f in ([(k,) for k in v] if isinstance(v, dict) and s in hints(Run) else [()])}

    def put(path: Key, value: Any) -> None:
        out.forget(path)
        node = out.values
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = copy.deepcopy(value)
        out.marks.update({k: m for k, m in marks.items() if k[: len(path)] == path})

    for section, value in own.values.items():
        there = out.values.get(section)
        if not isinstance(value, dict) or not isinstance(there, dict) or section not in hints(Run) or not _same_kind(section, there, value):
            left -= {k for k in left if k[0] == section}
            put((section,), value)
            continue
        if section == "model" and value.get("id", there.get("id")) != there.get("id"):
            for key in OF_ITS_MODEL:
                there.pop(key, None)
                out.forget((section, key))
                left.discard((section, key))
        for key, child in value.items():
            left.discard((section, key))
            put((section, key), child)
        if (section,) in marks:
            out.marks[section,] = marks[section,]
    if () in marks:
        out.marks[()] = marks[()]
    return out, left


def _same_kind(section: str, there: dict[str, Any], value: dict[str, Any]) -> bool:
    from ..settings.run import Run

    return not is_plug(section) or "kind" not in value or value["kind"] == there.get("kind", getattr(Run, section))


def _above(tree: Tree, name: str) -> dict[Key, Mark]:
    """The places of a stage's settings, with the stage in their keys."""
    return {k: replace(m, above=f"stages.{name}") for k, m in tree.marks.items()}


def _check_references(stage: Stage, names: list[str]) -> None:
    """Only earlier stages may be named."""
    earlier = names[: stage.place - 1]
    for path, name in mentions(stage.tree.values):
        if name in earlier:
            continue
        if name == stage.name:
            problem = "a stage cannot begin from itself"
        elif name in names:
            problem = f"stage {name} comes after {stage.name}, and a stage is only handed what earlier ones left; move {name} up"
        else:
            near = nearest(name, earlier)
            there = f"earlier ones are {', '.join(earlier)}" if earlier else f"{stage.name} is the first"
            problem = f"there is no stage {name!r}; " + (f"did you mean {PREFIX}{near}?" if near else there)
        raise error_at(stage.tree, path, problem)
    for path, value in ((("model", "id"), stage.asked.model.id), (("method", "from"), getattr(stage.asked.method, "from_", None))):
        if value in earlier and not Path(value).exists():
            raise error_at(stage.tree, path, f"there is no folder {value!r}, but a stage of that name; write {PREFIX}{value}")


def _unused(shared: Tree, used: Mapping[str, set[Key]], settings: list[_Setting]) -> Iterator[str]:
    """What to say of shared settings that some stages, or all, have their own of. Raises ConfigError for one on the command line that says nothing."""
    everyone = list(used)
    for setting, keys, _ in settings:
        if keys[0] in WHOLE:
            continue
        own = [n for n in everyone if not any(k[: len(keys)] == tuple(keys[: len(k)]) for k in used[n] if k[0] == keys[0])]
        if own == everyone:
            what = ".".join(keys) if any(k[0] == keys[0] for left in used.values() for k in left) else keys[0]
            raise ConfigError(
                f"{setting}: every stage has its own {what}; write stages.{everyone[-1]}.{setting} for one of them, stages.{ALL}.{setting} for all"
            )
        if own:
            yield f"{setting} is for {', '.join(n for n in everyone if n not in own)}; {', '.join(own)} {'have their' if len(own) > 1 else 'has its'} own"
    said = {tuple(keys[:2]) for _, keys, _ in settings}
    for section, value in shared.values.items():
        keys_here = [(section, k) for k in value] if isinstance(value, dict) else [(section,)]
        idle = [k for k in keys_here if k not in said and not any(k in left for left in used.values())]
        for key in [(section,)] if len(idle) == len(keys_here) > 0 else idle:
            mark = shared.mark(key)
            place = f" ({mark.origin})" if mark is not None else ""
            yield f"{'.'.join(key)} beside stages says nothing: every stage has its own{place}"
