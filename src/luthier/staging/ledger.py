"""stages.json: what each stage was asked, what it was handed and what it left, by hashes; and what has changed since.

A stage is done where its result.json and its artefact are there, its settings and its input files are the ones recorded, and what it was handed is what the
earlier stages' folders hold now. Nothing is judged by dates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from .. import __version__, atomic
from ..data.sources import files_of
from ..errors import LuthierError
from ..hub import fingerprint, locate
from ..saving.adapter import artefact
from ..settings import config
from ..settings.plugins import is_path
from ..settings.run import Run
from .stages import PREFIX, Stage, Stages

FILE = "stages.json"
NO_MATTER = ("name", "out", "log", "checkpoint")  # settings that change nothing of what a stage leaves
Hashes = dict[str, str]  # file -> SHA-256


@dataclass
class Record:
    """One stage in stages.json."""

    name: str
    folder: str  # in the run's folder, as artefact is
    objective: str = ""
    method: str = ""
    state: Literal["waiting", "running", "done"] = "waiting"  # running: begun and not finished
    artefact: str = ""
    sha256: Hashes = field(default_factory=dict)  # of the artefact's safetensors; while it is made again under the same settings, what they were
    handed: dict[str, Hashes] = field(default_factory=dict)  # by earlier stages: their artefacts' safetensors when it began
    inputs: Hashes = field(default_factory=dict)  # its files; of the base a fingerprint
    digest: str = ""  # SHA-256 of the settings that matter
    settings: dict[str, Any] = field(default_factory=dict)  # as asked
    started: str | None = None
    finished: str | None = None
    result: dict[str, Any] = field(default_factory=dict)  # what overview.py shows


@dataclass(frozen=True)
class Standing:
    """How a stage stands: what is recorded, and what has changed since."""

    stage: Stage
    record: Record
    settings: tuple[str, ...] = ()  # changed, a line each
    inputs: tuple[str, ...] = ()  # files that have changed
    stale: tuple[str, ...] = ()  # stages it was handed something by that is, or will be, another
    left: Hashes = field(default_factory=dict)  # its artefact as it is now; {} where it is gone or not made

    @property
    def gone(self) -> bool:
        """Whether its artefact is not there any more."""
        return self.record.state == "done" and not self.left

    @property
    def altered(self) -> bool:
        """Whether its artefact is not what it wrote."""
        return bool(self.left) and self.left != self.record.sha256

    @property
    def again(self) -> bool:
        """Whether it was begun and cannot stay as it is."""
        return self.record.state != "waiting" and bool(self.settings or self.inputs or self.stale)


class Ledger:
    """The records of a run's stages, in its folder."""

    def __init__(self, folder: Path, records: Iterable[Record] = ()):
        self.folder = folder
        self.records = {r.name: r for r in records}

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """From stages.json; empty where there is none. Raises LuthierError where it is damaged."""
        path = folder / FILE
        if not path.is_file():
            return cls(folder)
        try:
            told = json.loads(path.read_text(encoding="utf-8"))["stages"]
            names = {f.name for f in fields(Record)}
            return cls(folder, [Record(**{k: v for k, v in r.items() if k in names}) for r in told])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
            raise LuthierError(f"{path}: damaged ({e}); without it nothing says which stages are done: put a copy back, or train into another folder") from None

    def record(self, stage: Stage) -> Record:
        """The record of a stage; made where there is none."""
        if stage.name not in self.records:
            self.records[stage.name] = Record(stage.name, stage.folder)
        return self.records[stage.name]

    def where(self, stage: Stage) -> Path:
        """The folder of a stage."""
        return self.folder / self.record(stage).folder

    def write(self, stages: Stages) -> None:
        """Write stages.json whole or not at all: the stages in their order, then those that are no longer in the file.

        Its ``artefact`` is what the last stage left, null before that is done: what the run's folder stands for.
        """
        now = [s.name for s in stages.stages]
        order = [*now, *(n for n in self.records if n not in now)]
        told = [asdict(self.records[n]) for n in order if n in self.records]
        last = self.records.get(now[-1])
        left = last.artefact if last is not None and last.state == "done" else None
        atomic.as_json(self.folder / FILE, {"luthier": __version__, "name": stages.name, "artefact": left, "stages": told})

    def standing(self, stages: Stages) -> dict[str, Standing]:
        """How every stage stands, in order; reads the artefacts and the input files of what has begun."""
        out: dict[str, Standing] = {}
        for stage in stages.stages:
            record = self.record(stage)
            if record.state == "waiting":
                out[stage.name] = Standing(stage, record)
                continue
            there = record.state == "done" and (self.where(stage) / "result.json").is_file()
            left = artefact_hashes(self.folder / record.artefact) if there else {}
            stale = [n for n, was in record.handed.items() if n in out and _is_another(out[n], was)]
            settings = settings_changed(record, stage.asked)
            inputs = tuple(_inputs_changed(record.inputs, inputs_of(stage.asked)))
            out[stage.name] = Standing(stage, record, settings, inputs, tuple(stale), left)
        return out


def _is_another(earlier: Standing, was: Hashes) -> bool:
    """Whether what an earlier stage left is not, or will not be, what it handed on."""
    return earlier.again or (earlier.left or earlier.record.sha256) != was


# --- hashes ---------------------------------------------------------------------------------------------------------


def artefact_hashes(folder: Path) -> Hashes:
    """SHA-256 of each safetensors file of an adapter or model; {} where there is none."""
    return {p.name: sha256(p) for p in sorted(folder.glob("*.safetensors"))} if folder.is_dir() else {}


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def what_matters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings without those that change nothing of what a stage leaves."""
    return {k: v for k, v in settings.items() if k not in NO_MATTER}


def digest(run: Run) -> str:
    """SHA-256 of the settings of a stage that matter, what earlier stages leave by its name."""
    return hashlib.sha256(json.dumps(what_matters(config.plain(run)), sort_keys=True).encode()).hexdigest()


def inputs_of(run: Run) -> Hashes:
    """Hashes of what a stage's settings name beside earlier stages: files of data, templates, the user's own code, adapters; of a base, its fingerprint.

    What is not on this machine is left out.
    """
    out = {str(p): sha256(p) for p in dict.fromkeys([*_data(run), *_named(run)])}
    if not run.model.id.startswith(PREFIX):
        with suppress(LuthierError):
            out[f"model {run.model.id}"] = fingerprint(locate(replace(run.model, offline=True), weights=not run.model.random), random=run.model.random)
    return out


def _data(run: Run) -> Iterator[Path]:
    d = run.data
    for sources, split in ((d.files, d.split), (d.held_out, "validation"), (d.general, "train"), (d.replay.source, d.split)):
        for source in sources:
            with suppress(LuthierError):
                yield from files_of(source, split) or ()


def _named(run: Run) -> Iterator[Path]:
    """Files that other settings name, and the weights in folders they name."""
    settings = config.plain(run)
    for text in _texts([run.model.template, *(settings[k] for k in ("method", "objective", "precision", "place"))]):
        for name in () if text.startswith(PREFIX) else (text, text.rpartition(":")[0]):  # ./mine.py:name, runs/stars:good
            path = Path(name).expanduser()
            if is_path(name) and path.is_file():
                yield path
            elif is_path(name) and path.is_dir():
                with suppress(LuthierError):
                    yield from sorted((artefact(path) or path).glob("*.safetensors"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _texts(child)


# --- what has changed -----------------------------------------------------------------------------------------------


def settings_changed(record: Record, asked: Run) -> tuple[str, ...]:
    """The settings that matter and are not what they were, a line each. A setting that is new in this program has its default in what was asked before."""
    if record.digest == digest(asked):
        return ()
    was = record.settings
    with suppress(LuthierError):  # a setting that there is no more
        was = config.plain(config.load_run(was))
    return tuple(config.difference(what_matters(was), what_matters(config.plain(asked))))


def _inputs_changed(was: Hashes, now: Hashes) -> Iterator[str]:
    """What is there and is another. A file that is gone cannot be compared."""
    for name, value in now.items():
        if name not in was:
            yield f"{name} is new"
        elif was[name] != value:
            yield f"{name} is not what it was"
