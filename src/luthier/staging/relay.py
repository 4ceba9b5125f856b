"""Running the stages of a file, one after another: each is a run of session.py in a folder of its own, handed what earlier ones left, and recorded.

What a stage leaves does not depend on the stages before it in the process: it is the same, bit for bit, as when it is run alone or resumed.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from .. import atomic, build
from ..errors import ConfigError, Interrupted, LuthierError
from ..running.progress import Reporter
from ..running.result import Result
from ..running.starting import execute
from ..saving import adapter, checkpoint
from ..settings import config
from ..settings.plugins import kind_of
from ..settings.run import Run
from . import overview
from .ledger import FILE, Ledger, Record, artefact_hashes, digest, inputs_of, settings_changed
from .rehearsal import rehearse
from .stages import PREFIX, Stage, Stages, handed, has_stages, load_stages
from .staleness import check_alone, due


@dataclass
class Outcome:
    """What the stages came to."""

    folder: Path
    records: list[Record]  # of every stage, in order
    results: dict[str, Result] = field(default_factory=dict)  # of those that were trained now

    @property
    def artefact(self) -> Path | None:
        """What the last finished stage left."""
        done = [r for r in self.records if r.state == "done"]
        return self.folder / done[-1].artefact if done else None


def train_stages(
    source: Stages | str | Path | Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
    *,
    resume: str | Path | None = None,
    only: str | None = None,
    accept_changes: bool = False,
    reporter: Reporter | None = None,
) -> Outcome:
    """Train the stages of a run file, a plain tree or `load_stages`, in order, into OUT/NAME/1-FIRST, 2-SECOND, ...

    ``resume``: the folder of an earlier call: finished stages are skipped, an interrupted one goes on bit for bit; without ``source`` its own run.yaml is
    read. ``only``: this stage alone. ``accept_changes``: stages whose settings or inputs have changed since they were trained are trained again.
    Raises LuthierError for what the user can put right, Interrupted after Ctrl-C.
    """
    say = reporter or Reporter()
    stages = _read(source, overrides, None if resume is None else Path(resume))
    for note in stages.notes:
        say.note(note)
    folder = stages.folder
    goes_on = resume is not None or (only is not None and (folder / FILE).is_file())
    if not goes_on and folder.exists() and any(folder.iterdir()):
        raise LuthierError(
            f"{folder}: there is a run of this name already; choose another (name=...), delete it, or go on with it: luthier train --resume {folder}"
        )
    ledger = Ledger.read(folder)
    standing = ledger.standing(stages)
    if only is not None:
        check_alone(stages.stage(only), standing, ledger, goes_on=resume is not None)
    todo = due(stages, standing, only, accept_changes)
    made = {n: _artefact(ledger, s.stage) for n, s in standing.items() if s.left and n not in todo}
    rehearse(stages, [s for s in stages.stages if s.name in todo], made, say=say.note)
    _begin(stages, ledger, goes_on)
    relay = _Relay(stages, ledger, say, accept_changes)
    for stage in stages.stages:
        if stage.name in todo:
            relay.train(stage)
            todo |= relay.stale_now(stage, todo)
        elif only is None:
            say.note(
                f"stage {stage.name} is done" + (f": {made[stage.name]}" if stage.name in made else "; what it left is gone, and nothing needs it any more")
            )
    relay.report()
    return Outcome(folder, [ledger.record(s) for s in stages.stages], relay.results)


def _read(source: Any, overrides: Iterable[str], resume: Path | None) -> Stages:
    if source is None:
        if resume is None:
            raise ConfigError("train_stages: give a run file with stages, or resume=FOLDER")
        source = resume / "run.yaml"
    stages = source if isinstance(source, Stages) else load_stages(source, overrides)
    if resume is None:
        return stages
    if not (resume / "run.yaml").is_file():
        raise ConfigError(f"{resume}: no run.yaml here, so it is no run folder; runs are in runs/")
    if not has_stages(resume / "run.yaml"):
        raise ConfigError(f"{resume}: this run has no stages; go on with it by itself: luthier train --resume {resume}")
    whole = resume if resume.name else resume.resolve()
    return replace(stages, out=str(whole.parent), name=whole.name)


def _artefact(ledger: Ledger, stage: Stage) -> Path:
    return ledger.where(stage) / adapter.writes(stage.asked.method)


def _begin(stages: Stages, ledger: Ledger, goes_on: bool) -> None:
    """Write the settings, and with a new folder its ledger: a folder is there with both, or not at all."""
    folder = ledger.folder
    for stage in stages.stages:
        _describe(ledger.record(stage), stage)
    if goes_on:
        atomic.text(folder / "run.yaml", stages.dump())
        ledger.write(stages)
        return
    if folder.exists():
        folder.rmdir()  # empty
    with atomic.folder(folder) as new:
        atomic.text(new / "run.yaml", stages.dump())
        Ledger(new, ledger.records.values()).write(stages)


def _describe(record: Record, stage: Stage) -> None:
    if record.state == "waiting":
        record.folder = stage.folder
        record.objective, record.method = kind_of(stage.asked.objective), kind_of(stage.asked.method)


# --- one stage ------------------------------------------------------------------------------------------------------


class _Relay:
    """Stages that are under way."""

    def __init__(self, stages: Stages, ledger: Ledger, say: Reporter, accept_changes: bool):
        self.stages, self.ledger, self.say, self.accept_changes = stages, ledger, say, accept_changes
        self.results: dict[str, Result] = {}
        self.threads = torch.get_num_threads()

    def train(self, stage: Stage) -> None:
        """Train a stage, or go on with it, and record it."""
        record, folder = self.ledger.record(stage), self.ledger.where(stage)
        artefacts = {n: _artefact(self.ledger, self.stages.stage(n)).resolve() for n in stage.needs}
        given = {n: artefact_hashes(p) for n, p in artefacts.items()}
        inputs = inputs_of(stage.asked)
        same = not settings_changed(record, stage.asked) and record.inputs == inputs
        if record.state == "done" and same and record.handed == given and artefact_hashes(self.ledger.folder / record.artefact) == record.sha256:
            self.say.note(f"stage {stage.name} stays as it is: what it is handed came out the same again")
            return
        going_on = record.state == "running" and record.handed == given and record.inputs == inputs and bool(checkpoint.steps(folder))
        self._head(stage, given)
        if not going_on:
            self._clear(record, folder)
            record.folder, record.started = stage.folder if not (self.ledger.folder / stage.folder).exists() else record.folder, _now()
            folder = self.ledger.where(stage)
        run, moved = (self._resumed(stage, record, folder, artefacts)) if going_on else (stage.run(artefacts), False)
        run = run if going_on else replace(run, name=record.folder, out=str(self.ledger.folder))
        record.sha256 = record.sha256 if same and record.handed == given else {}
        record.state, record.finished, record.result = "running", None, {}
        record.settings, record.digest = config.plain(stage.asked), digest(stage.asked)
        record.handed, record.inputs = given, inputs
        record.objective, record.method = kind_of(stage.asked.objective), kind_of(stage.asked.method)
        record.artefact = f"{record.folder}/{adapter.writes(stage.asked.method)}"
        self.ledger.write(self.stages)
        gc.collect()  # what the stage before held, or trying them out
        alone = as_fresh(run, self.threads)
        result = self._execute(stage, run, folder if going_on else None, moved)
        record.state, record.finished, record.sha256 = "done", _now(), artefact_hashes(self.ledger.folder / record.artefact)
        record.result = _told(result, alone)
        self.results[stage.name] = result
        self.ledger.write(self.stages)
        self.say.result(result)
        self.report()

    def report(self) -> None:
        """Write the report over all stages so far."""
        atomic.text(self.ledger.folder / "report.md", overview.markdown(self.stages, self.ledger))

    def stale_now(self, stage: Stage, todo: set[str]) -> set[str]:
        """Finished stages that were handed other bits than this one has just left. Raises LuthierError where training them again was not said to be wanted."""
        now, records = self.ledger.record(stage).sha256, [self.ledger.record(s) for s in self.stages.stages]
        stale = {r.name for r in records if r.state == "done" and r.name not in todo and r.handed.get(stage.name, now) != now}
        if stale and not self.accept_changes:
            names = ", ".join(sorted(stale))
            raise LuthierError(
                f"stage {stage.name} was made again and came out with other bits than before (another machine, or another number of threads); {names} came of "
                f"the earlier ones: say --accept-changes to train {names} again"
            )
        return stale

    def _execute(self, stage: Stage, run: Run, resume: Path | None, moved: bool) -> Result:
        go_on = f"go on with: luthier train --resume {self.ledger.folder}"
        try:
            return execute(run, resume=resume, accept_changes=self.accept_changes or moved, reporter=self.say)
        except Interrupted as e:
            raise Interrupted(f"stage {stage.name}: {str(e).partition('; go on with')[0]}; {go_on}") from None
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted in stage {stage.name}; what was saved is kept; {go_on}") from None
        except LuthierError as e:
            kept = "" if stage.place == 1 else "; the stages before it are kept"
            raise LuthierError(f"stage {stage.name}: {e}{kept}; when this is put right, {go_on}") from e
        finally:
            if not self.ledger.where(stage).exists():  # nothing was saved, so nothing has begun
                self.ledger.record(stage).state = "waiting"
                with suppress(LuthierError):  # what went wrong is said already
                    self.ledger.write(self.stages)

    def _head(self, stage: Stage, given: Mapping[str, Mapping[str, str]]) -> None:
        self.say.console.print()
        begins = "; ".join(f"from what {n} left: {', '.join(f'{f} {h[:12]}' for f, h in files.items())}" for n, files in given.items())
        self.say.head(f"stage {stage.place} of {len(self.stages.stages)}: {stage.name}" + (f" ({begins})" if begins else ""))

    def _clear(self, record: Record, folder: Path) -> None:
        """Make room for a stage that starts from its beginning: what was finished or saved before is kept under another name."""
        if not folder.exists():
            return
        if not checkpoint.steps(folder) and not (folder / "result.json").is_file():
            shutil.rmtree(folder)
            return
        number = next(i for i in range(1, 10**6) if not folder.with_name(f"{folder.name}.{i}").exists())
        kept = folder.rename(folder.with_name(f"{folder.name}.{number}"))
        self.say.note(f"what was in {folder} is kept in {kept}")

    def _resumed(self, stage: Stage, record: Record, folder: Path, artefacts: Mapping[str, Path]) -> tuple[Run, bool]:
        """The resolved run of an interrupted stage, with the settings that have been changed since; and whether the folder of the stages was moved."""
        resolved = config.plain(config.load_run(folder / "run.yaml"))
        asked = config.plain(stage.asked)
        tree = _place(_carried(record.settings, asked, resolved), asked, {n: str(p) for n, p in artefacts.items()})
        if Path(tree["out"]).resolve() != self.ledger.folder.resolve():
            tree["out"] = str(self.ledger.folder)
        moved = tree != resolved and not settings_changed(record, stage.asked)
        return config.load_run({**tree, "name": resolved["name"]}), moved


def _carried(then: Any, now: Any, resolved: Any) -> Any:
    """What a run was resolved to, and where a setting has been changed since, the new one."""
    if then == now:
        return resolved
    if isinstance(then, dict) and isinstance(now, dict) and isinstance(resolved, dict) and then.get("kind") == now.get("kind"):
        return {k: _carried(then.get(k), v, resolved.get(k, v)) for k, v in now.items()}
    return now


def _place(tree: Any, asked: Any, artefacts: Mapping[str, str]) -> Any:
    """Settings in which whatever was asked for as stage:NAME is the artefact's folder of now."""
    if isinstance(asked, dict) and isinstance(tree, dict) and not any(isinstance(k, str) and k.startswith(PREFIX) for k in asked):
        return {k: _place(v, asked.get(k), artefacts) for k, v in tree.items()}
    names = asked if isinstance(asked, dict | list) else [asked]
    return handed(asked, artefacts) if any(isinstance(n, str) and n.startswith(PREFIX) for n in names) else tree


def _told(r: Result, alone: bool) -> dict[str, Any]:
    numbers = {k: getattr(r, k) for k in ("steps", "best_step", "tokens", "trained", "total", "peak_bytes", "stopped")}
    numbers["alarms"] = [asdict(a) for a in r.alarms]
    return {**numbers, "peak_is_its_own": alone, "seconds": round(r.seconds, 1), "before": asdict(r.before), "after": asdict(r.after)}


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")


def as_fresh(run: Run, threads: int) -> bool:
    """Put this process into the state in which a stage run alone finds it, so that it gives the same bits; whether its peak of memory is counted anew."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    build.seed_everything(run.seed)
    if run.place.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.place.device)
        return True
    if not sys.platform.startswith("linux"):
        return False
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what the stage before freed
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    except OSError:
        return False
    return True
