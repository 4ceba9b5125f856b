"""What a run will take, said before its first step, and how far that was off, said after its last."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import atomic, build
from ..amounts import clock, off, seconds, size
from ..core import LuthierError
from ..data.feed import Batches
from ..data.prepare import Prepared
from ..data.rows import sides
from ..reading import batches_of
from ..report.facts import FACTS
from ..settings.run import Run
from .forecast import Clock, Forecast
from .memory import Plan, Prediction

LOOKED_AT = 3  # steps whose micro-batches stand for all
WORTH = 15.0  # seconds of training from which on a prediction, which takes about two, is made
ROUGHLY = {"cpu": 2e11, "cuda": 1e14, "mps": 5e12}  # floating point operations a second, to tell long runs from short ones


def is_long(run: Run, whole: int, tokens: float, steps: int) -> bool:
    """Whether a run of so many steps, each of so many tokens through ``whole`` parameters, is worth a prediction."""
    return 4.0 * whole * tokens * steps / ROUGHLY.get(run.place.device.type, 2e11) > WORTH


@dataclass(frozen=True)
class Foresight:
    """Memory and time of a run; None what could not be told, with the reason in ``why``."""

    memory: Prediction | None
    time: Forecast | None
    longest: int | None  # tokens of the longest row of the data, by which memory was predicted
    why: tuple[str, ...] = ()

    def said(self) -> str:
        """Before training."""
        parts = []
        if self.memory is not None:
            parts.append(f"{size(self.memory.total)} of memory at its peak")
        if self.time is not None:
            parts.append(f"{seconds(self.time.step)} a step")
            if self.time.training is not None and self.time.total is not None:
                parts += [f"{clock(self.time.training)} of training", f"{clock(self.time.total - self.time.training)} of held-out loss"]
        return "; ".join([*(["predicted: " + ", ".join(parts)] if parts else []), *self.why])

    def against(self, *, peak: int, training: float, steps: int) -> str:
        """After training: what was measured, and by how much the prediction was off."""
        parts = []
        if self.memory is not None:
            parts.append(f"{size(peak)} of memory where {size(self.memory.total)} were predicted ({off(self.memory.total, peak)})")
        if self.time is not None and steps:
            parts.append(f"{seconds(training / steps)} a step where {seconds(self.time.step)} were predicted ({off(self.time.step, training / steps)})")
        return "; ".join(parts)

    def facts(self) -> dict[str, Any]:
        """For facts.json."""
        out: dict[str, Any] = {}
        if (p := self.memory) is not None:
            parts = dict(p.standing) | {f"{k}, {p.worst}": n for k, n in p.moments[p.worst].parts.items()}
            out["memory"] = {"total": p.total, "parts": parts, "batch": str(p.shape), "longest": self.longest, "device": p.device}
        if (t := self.time) is not None:
            out["time"] = {"step": t.step, "training": t.training, "total": t.total, "tokens": t.tokens}
        return out


def foresee(run: Run, prepared: Prepared | None, feed: Any = None, *, program: int | None = None, plan: Plan | None = None, memory: bool = True) -> Foresight:
    """Predict a run on this machine. ``prepared``: its data, where that has been read; ``feed``: its micro-batches, of which some are looked at and put back;
    ``program``: bytes that the process took before it loaded the model; ``memory``: whether it is asked for. What cannot be told is left out, with the reason.
    """
    run, _ = build.resolve(run)
    device, why = run.place.device, []
    longest = prepared.facts.get("longest") if prepared is not None else None
    fitting = as_long(run, longest)
    plan = plan or Plan(fitting)
    needed, time = None, None
    try:
        needed = plan.predict(fitting, device.type, program=program).here(device) if memory else None
    except LuthierError as e:
        why.append(f"memory is not predicted: {e}")
    try:
        held_out = sum(sum(sides(r)) for r in prepared.validation) if prepared is not None else 0
        steps = None if feed is None else feed.steps
        time = Clock(device).forecast(plan, run, _some(feed), held_out=held_out, total_steps=steps or run.optim.steps)
    except LuthierError as e:
        why.append(f"time is not predicted: {e}")
    return Foresight(needed, time, longest, tuple(why))


def feed_for(run: Run, prepared: Prepared, plan: Plan) -> Batches:
    """The micro-batches of a run whose modules ``plan`` has."""
    base = plan.policy.base
    return batches_of(run, prepared, plan.objective, pad=base.tokenizer.pad_token_id or 0, packed=base.packs and run.data.pack != "no")


def as_long(run: Run, longest: Any) -> Run:
    """The run with examples as long as the longest of its data, where that is known."""
    return replace(run, data=replace(run.data, max_tokens=longest)) if isinstance(longest, int) and longest >= 8 else run


def add_memory(folder: Path, run: Run) -> None:
    """Add the predicted memory to the facts.json of a run that was not predicted when it began. Raises LuthierError where it cannot be."""
    told, environment = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (FACTS, "environment.json"))
    longest = environment.get("data", {}).get("longest")
    plan = Plan(as_long(run, longest))
    found = Foresight(plan.predict(plan.run, run.place.device.type), None, longest)
    atomic.as_json(folder / FACTS, told | found.facts())


def _some(feed: Any) -> list[Any]:
    """The first steps of a feed, which then stands where it stood."""
    if feed is None or not hasattr(feed, "load_state_dict") or hasattr(feed, "judge"):
        return []
    before = feed.state_dict()
    try:
        return list(itertools.islice(feed, LOOKED_AT))
    finally:
        feed.load_state_dict(before)
