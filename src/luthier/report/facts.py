"""A run's folder, read: what was asked, what happened, how it stands. Without torch, so that listing runs takes no time.

Whatever is missing or damaged is left out and told in a sentence; only a folder without settings is no run.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LuthierError
from ..settings.runfile import read_file

FACTS, FAILED, STAGES = "facts.json", "failed.json", "stages.json"


@dataclass(frozen=True)
class Number:
    """A measured number, over how many, and its 95 % interval where one was computed."""

    value: float
    n: int | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    places: int | None = None  # decimal places to show; None: as many as suit it

    @property
    def digits(self) -> int:
        """Decimal places worth showing."""
        if self.places is not None:
            return self.places
        if self.low is None:
            return 4
        return 1 if max(abs(self.value), abs(self.high or 0.0)) > 1.5 else 3

    def __str__(self) -> str:
        """ "45.9 [44.8, 47.0]", or "2.1234"."""
        d = self.digits
        interval = "" if self.low is None or self.high is None else f" [{self.low:.{d}f}, {self.high:.{d}f}]"
        return f"{self.value:.{d}f}{interval}"


@dataclass
class Facts:
    """What a run's folder says."""

    folder: Path
    settings: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl
    samples: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)  # facts.json
    failed: dict[str, Any] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)  # measures before training, of a run that has not finished
    kept: int | None = None  # the step of the newest checkpoint
    problems: list[str] = field(default_factory=list)  # a sentence for each file that is missing or damaged

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.folder.resolve().name

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return bool(self.result)

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        done = self.result.get("steps")
        return int(done) if isinstance(done, int) else max((int(x["step"]) for x in self.lines), default=0)

    @property
    def planned(self) -> int | None:
        """Optimizer steps that were asked for; None where it is not recorded."""
        steps = self.told.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def state(self) -> str:
        """ "finished", "stopped early at step 40", "interrupted at step 7", "failed at step 7", "running, step 7"."""
        if self.finished:
            return f"stopped early at step {self.steps:,}" if self.result.get("stopped") else "finished"
        if self.failed:
            return f"failed at step {self.steps:,}"
        if _alive(self.told.get("process"), self.folder / FACTS):
            return f"running, step {self.steps:,}"
        return f"interrupted at step {self.steps if self.kept is None else self.kept:,}"

    @property
    def began(self) -> datetime | None:
        """When it began."""
        said = self.told.get("began") or self.environment.get("started")
        try:
            return datetime.fromisoformat(said) if isinstance(said, str) else None
        except ValueError:
            return None

    @property
    def data(self) -> dict[str, Any]:
        """What reading the data came to."""
        return mapping(self.environment.get("data"))

    def kind(self, axis: str) -> str:
        """The kind of a plug-in: method, objective, precision or place."""
        said = self.settings.get(axis)
        return str(said.get("kind", "")) if isinstance(said, dict) else str(said or "")

    @property
    def model(self) -> str:
        """The base, as asked."""
        said = self.settings.get("model")
        return str(mapping(said).get("id", "fiddle")) if isinstance(said, dict) else str(said or "fiddle")

    @property
    def artefact(self) -> Path | None:
        """The folder of what was trained."""
        return next((self.folder / n for n in ("adapter", "model") if (self.folder / n).is_dir()), None) if self.finished else None

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """The alarms that the run raised: step, alarm, said, advice."""
        return [x for x in self.events("alarm") if all(isinstance(x.get(k), str) for k in ("alarm", "said", "advice"))]

    def events(self, event: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one kind."""
        return [x for x in self.lines if x.get("event") == event]

    def measures(self) -> tuple[dict[str, Number], dict[str, Number]]:
        """Before, and after (of a run that has not finished: at its last evaluation), by name: "held-out loss", "loss on general text", scores."""
        before = _measures(mapping(self.result.get("before")) or self.first) or _flat(next(iter(self.events("before")), {}))
        after = _measures(mapping(self.result.get("after"))) if self.finished else _flat(next(iter(reversed(self.events("evaluation"))), {}))
        return before, after


HELD_OUT, GENERAL = "held-out loss", "loss on general text"
SUITE = {"instructions": "loss on instructions", "sampled": "loss on text by fiddle", "moved": "KL from before", "facts": "known facts kept"}
IN_LINES = {
    "loss": HELD_OUT,
    "general_loss": GENERAL,
    "instructions_loss": SUITE["instructions"],
    "sampled_loss": SUITE["sampled"],
    "general_kl": SUITE["moved"],
    "known_facts": SUITE["facts"],
}  # as metrics.jsonl names them
RETAINED = "retained/"  # before the name of a score that is to be kept


def is_kept(name: str) -> bool:
    """Whether a measure is of what the base could do, and not of what is learned."""
    return name == GENERAL or name in SUITE.values() or name.startswith(RETAINED)


def read(folder: Path) -> Facts:
    """The facts of a run's folder. Raises LuthierError where it is none, or where its settings cannot be read."""
    if not folder.is_dir():
        raise LuthierError(f"{folder}: there is no such folder; luthier runs lists the runs there are")
    if not (folder / "run.yaml").is_file():
        raise LuthierError(f"{folder}: no run.yaml here, so it is no run folder; luthier runs lists the runs there are")
    try:
        settings = read_file(folder / "run.yaml").values
    except (ConfigError, OSError) as e:
        raise LuthierError(f"{folder}: its settings cannot be read ({e}); put a copy of run.yaml back") from None
    out = Facts(folder, settings)
    out.lines = _lines(folder / "metrics.jsonl", out.problems)
    out.samples = _lines(folder / "samples.jsonl", out.problems)
    out.result = _json(folder / "result.json", out.problems, needed=False)
    out.environment = _json(folder / "environment.json", out.problems)
    out.told = _json(folder / FACTS, out.problems, needed=False)
    out.failed = {} if out.result else _json(folder / FAILED, out.problems, needed=False)
    out.kept, out.first = _checkpoint(folder)
    return out


def found(where: Path) -> Iterator[Path]:
    """The folders of runs below a folder, those of stages after the folder that holds them; by name."""
    if not where.is_dir():
        return
    for folder in sorted(p for p in where.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if (folder / "run.yaml").is_file():
            yield folder
            if (folder / STAGES).is_file():
                yield from (p for p in found(folder))


def mapping(value: Any) -> dict[str, Any]:
    """A mapping, or an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, or None in place of anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Settings by their dotted keys."""
    if not isinstance(settings, dict) or not settings:
        return {path: settings} if path else {}
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= flat(value, f"{path}.{key}" if path else str(key))
    return out


def _measures(m: Mapping[str, Any]) -> dict[str, Number]:
    out = {}
    for name, key in ((HELD_OUT, "loss"), (GENERAL, "general")):
        if (made := _number(mapping(m.get(key)))) is not None:
            out[name] = made
    suite = {name: mapping(m.get("suite")).get(key) for key, name in SUITE.items()}
    retained = {f"{RETAINED}{name}": s for name, s in mapping(m.get("retained")).items()}
    for name, s in (mapping(m.get("scores")) | suite | retained).items():
        if (made := _number(mapping(s))) is not None:
            out[name] = made
    return out


def _number(m: Mapping[str, Any]) -> Number | None:
    value, n = number(m.get("value")), m.get("n")
    return None if value is None else Number(value, n if isinstance(n, int) else None, str(m.get("unit", "")), number(m.get("low")), number(m.get("high")))


def _flat(line: Mapping[str, Any]) -> dict[str, Number]:
    """The measures of a line of metrics.jsonl, which does not say over how many they are."""
    out = {}
    for key, given in line.items():
        value = number(given)
        if value is None or key == "step" or (key.endswith(("_low", "_high")) and key.rpartition("_")[0] in line):
            continue
        name = IN_LINES.get(key, key)
        out[name] = Number(value, low=number(line.get(f"{key}_low")), high=number(line.get(f"{key}_high")))
    return out


def _json(path: Path, problems: list[str], *, needed: bool = True) -> dict[str, Any]:
    if not path.is_file():
        if needed:
            problems.append(f"{path.name} is missing")
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        problems.append(f"{path.name} is damaged: {e}")
        return {}
    if not isinstance(told, dict):
        problems.append(f"{path.name} is damaged: it holds no mapping")
    return mapping(told)


def _lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        problems.append(f"{path.name} is missing")
        return []
    out, bad = [], 0
    for line in path.read_bytes().splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            told = None
        if isinstance(told, dict) and isinstance(told.get("step"), int):
            out.append(told)
        else:
            bad += 1
    if bad:
        problems.append(f"{path.name}: {bad} {'line' if bad == 1 else 'lines'} of {bad + len(out)} cannot be read")
    return out


def _checkpoint(folder: Path) -> tuple[int | None, dict[str, Any]]:
    """The step of the newest checkpoint, and the measures before training that it carries."""
    steps = [int(n) for p in folder.glob("checkpoints/step-*") if (n := p.name.removeprefix("step-")).isdigit()]
    if not steps:
        return None, {}
    kept = _json(folder / "checkpoints" / f"step-{max(steps)}" / "state.json", [])
    return max(steps), mapping(mapping(kept.get("progress")).get("before"))


def _alive(process: Any, written: Path) -> bool:
    """Whether the process that wrote a file is still running here: the same number, on this machine, begun before the file was written."""
    told = mapping(process)
    if told.get("host") != platform.node() or not isinstance(told.get("id"), int):
        return False
    import psutil

    try:
        return bool(psutil.Process(told["id"]).create_time() <= written.stat().st_mtime)
    except (psutil.Error, OSError):
        return False
