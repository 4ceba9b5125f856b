"""Alarms of a run: that it forgets what its base could do, and that it overfits.

**Forgetting** compares an evaluation with what was before training (retention.py measures it). It is raised where one of these holds:

1. the loss on general text is TENTH higher than it was. A tenth is much: by the scaling law of Kaplan et al., 2020 (arXiv 2001.08361, section 1.2: the loss
   of a language model goes with the power -0.076 of its size) a model that loses a tenth more is 1.1 ** (1 / 0.076) = 3.5 times smaller;
2. that loss is FORTIETH higher and rose by more nats a token than the held-out loss fell: more is lost than gained. Only where both are nats a token;
3. of the facts that were known THIRD are known no more, and the 95 % interval of that share (Wilson, 1927) lies above a tenth;
4. a task that is to be retained scores lower, and the two 95 % intervals do not meet.

The rise is of the same tokens both times, so it is no chance of the text; but a learning rate at its peak may shake a model that settles later. So it takes
two evaluations running, or the last one.

**Overfitting** compares an evaluation with the best one so far. It takes all of these, at two evaluations running:

1. the held-out loss is a hundredth higher than it was at its best, and the 95 % interval of its rise, on the same batches, lies above zero (evaluate.rise,
   Student's t);
2. the training loss fell meanwhile: its mean over the steps up to this evaluation lies two standard errors below that over the steps up to the best one.

The first alone is also what a learning rate too high for the task looks like, which warning of overfitting would not help. The best of several evaluations is
flattered a little, which is why one alone is no alarm. Fewer than FEWEST batches of held-out rows say too little; then overfitting is not watched.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..measuring.evaluate import Losses, rise
from ..measuring.measure import Measures
from ..nn.intervals import student
from ..nn.slick import wilson
from ..settings.run import Run

FORGETTING, OVERFITTING = "forgetting", "overfitting"
TENTH, FORTIETH, THIRD = 1 / 10, 1 / 40, 1 / 3
IN_A_ROW = 2  # evaluations
FEWEST, KNOWN = 8, 10  # batches of held-out rows; facts that were known
WINDOW, LONGEST = 8, 200  # steps whose training loss is averaged, at least and at most
SILENT = ("label", "ranked")  # objectives whose model writes no text any more, so that there is nothing it could forget to write


@dataclass(frozen=True)
class Alarm:
    """One alarm: what was seen at which step, and what to do."""

    kind: str
    step: int
    said: str
    advice: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.said}; {self.advice}"


@dataclass
class State:
    """What a checkpoint carries on; plain data."""

    raised: list[dict[str, Any]] = field(default_factory=list)
    running: dict[str, int] = field(default_factory=dict)  # evaluations running at which an alarm's conditions held
    best_step: int = 0
    best: dict[str, Any] = field(default_factory=dict)  # the held-out loss at its best, as Losses
    best_train: list[float] = field(default_factory=list)  # the training losses of the steps up to it
    train: list[float] = field(default_factory=list)  # of the steps since the last evaluation, at least WINDOW where there are as many


class Alarms:
    """Watches one run. ``before``: what was measured before training."""

    def __init__(self, run: Run, before: Measures):
        self.run, self.before = run, before
        self.state = State()
        self.forgets = False  # by the last evaluation
        self.recent: deque[float] = deque(maxlen=LONGEST)
        self.since = 0

    @property
    def raised(self) -> list[Alarm]:
        """Those raised so far."""
        return [Alarm(**a) for a in self.state.raised]

    def kept(self) -> dict[str, Any]:
        """For a checkpoint."""
        self.state.train = self._window()
        return asdict(self.state) | {"since": self.since}

    def recall(self, kept: dict[str, Any]) -> None:
        """Go on from a checkpoint; from one that knows no alarms, afresh."""
        if kept:
            self.since = kept["since"]
            self.state = State(**{k: v for k, v in kept.items() if k != "since"})
            self.recent.extend(self.state.train)

    def trained(self, loss: float) -> None:
        """Take a step's training loss."""
        if math.isfinite(loss):
            self.recent.append(loss)
            self.since += 1

    def see(self, step: int, now: Measures, held_out: Losses | None, *, last: bool) -> list[Alarm]:
        """Take an evaluation; the alarms that it raises, each kind once a run."""
        if self.run.evaluate.alarm == "off":
            return []
        why = self.forgotten(now)
        self.forgets = bool(why)
        over = self._overfits(step, held_out)
        out = []
        for kind, said, at_last in ((FORGETTING, why, last), (OVERFITTING, over, False)):
            self.state.running[kind] = self.state.running.get(kind, 0) + 1 if said else 0
            known = any(a["kind"] == kind for a in self.state.raised)
            if said and not known and (self.state.running[kind] >= IN_A_ROW or at_last):
                alarm = Alarm(kind, step, said, self._advice(kind, step))
                self.state.raised.append(asdict(alarm))
                out.append(alarm)
        self.since = 0
        return out

    # --- forgetting ---------------------------------------------------------------------------------------------------

    def forgotten(self, now: Measures) -> str:
        """What is lost since before training, in words, where that is too much; else ""."""
        if self.run.objective.renders in SILENT:
            return ""
        out = [*self._general(now), *self._facts(now), *self._tasks(now)]
        return "; ".join(out)

    def _general(self, now: Measures) -> list[str]:
        was, is_now = self.before.general, now.general
        if was is None or is_now is None:
            return []
        lost, gained = is_now.value - was.value, self._gained(now)
        much = lost >= TENTH * was.value
        more = gained is not None and lost >= FORTIETH * was.value and lost > gained
        if not (much or more):
            return []
        beside = f", while the held-out loss {'fell' if gained >= 0 else 'rose'} by {abs(gained):.3f}" if gained is not None else ""
        return [f"the loss on general text rose by {lost:.3f} nats a token, from {was.value:.3f} to {is_now.value:.3f}{beside}"]

    def _gained(self, now: Measures) -> float | None:
        """How far the held-out loss fell, where it is nats a token."""
        a, b = self.before.loss, now.loss
        return a.value - b.value if a is not None and b is not None and a.unit == b.unit == "tokens" else None

    def _facts(self, now: Measures) -> list[str]:
        known, still = self.before.suite.get("facts"), now.suite.get("facts")
        if known is None or still is None or known.n < KNOWN:
            return []
        lost = round((1 - still.value) * still.n)
        if lost < THIRD * still.n or wilson(lost, still.n)[0] < 0.1:
            return []
        return [f"{lost} of {still.n} facts that were known are known no more"]

    def _tasks(self, now: Measures) -> list[str]:
        pairs = ((k, a, now.retained[k]) for k, a in self.before.retained.items() if k in now.retained)
        return [f"{k}, which is to be retained, fell from {a} to {b}" for k, a, b in pairs if b.high < a.low]

    # --- overfitting --------------------------------------------------------------------------------------------------

    def _overfits(self, step: int, held_out: Losses | None) -> str:
        """Why this evaluation looks overfitted against the best one, in words; else "". Remembers the best."""
        s, window = self.state, self._window()
        if held_out is None or len(held_out.parts) < FEWEST:
            return ""
        best = _losses(s.best)
        if best is None or held_out.value < best.value:
            s.best, s.best_step, s.best_train = asdict(held_out), step, window
            return ""
        up, error = rise(best, held_out)
        sure = student(0.95, len(held_out.parts) - 1) * error
        if up - sure <= 0 or up < 0.01 * abs(best.value) or not _fell(s.best_train, window):
            return ""
        return (
            f"the held-out loss was lowest at step {s.best_step} ({best.value:.4f}) and is higher by {up:.4f} +- {sure:.4f} (95 %, on the same rows), "
            f"while the training loss fell from {_mean(s.best_train):.4f} to {_mean(window):.4f}"
        )

    def _window(self) -> list[float]:
        """Training losses up to now: of the steps since the last evaluation, and at least WINDOW where there are as many."""
        return list(self.recent)[-max(self.since, WINDOW) :]

    # --- what to do ---------------------------------------------------------------------------------------------------

    def _advice(self, kind: str, step: int) -> str:
        e, replay, rate = self.run.evaluate, self.run.data.replay, self.run.optim.lr
        lower = "lower optim.lr" + ("" if rate is None else f" (it is {rate:.3g})")
        if kind == OVERFITTING:
            kept = f"the weights of step {self.state.best_step} are kept (evaluate.best)" if e.best else "evaluate.best=true keeps the weights of the best step"
            return f"{kept}; to stop there: evaluate.alarm=stop, fewer optim.epochs or optim.steps; to get further: more or more varied data, or {lower}"
        rollouts = "rollouts" in self.run.objective.needs
        hold = (
            "raise objective.kl" if rollouts else "replay general text (data.replay=FILE, or self)" if not replay.source else "replay more (data.replay.share)"
        )
        kl = "" if rollouts or replay.kl else ", hold the model to what it was (data.replay.kl=0.1)"
        return f"if that matters: {hold}{kl}, {lower}, or train fewer steps"


def _losses(kept: dict[str, Any]) -> Losses | None:
    return Losses(kept["sums"], kept["counts"], kept["weights"], tuple((a, b) for a, b in kept["parts"])) if kept else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _fell(before: Sequence[float], now: Sequence[float]) -> bool:
    """Whether the mean of losses is two standard errors lower than it was."""
    if len(before) < 2 or len(now) < 2:
        return False
    error = math.sqrt(sum(sum((x - _mean(v)) ** 2 for x in v) / (len(v) - 1) / len(v) for v in (before, now)))
    return _mean(before) - _mean(now) > 2 * error
