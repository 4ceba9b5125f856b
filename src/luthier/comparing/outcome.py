"""From the numbers of the jobs to the rows of the table: means over seeds, intervals, differences from the best on the same test rows, the front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from ..nn.intervals import Interval
from ..settings.plugins import kind_of, plugin
from . import scoring
from .conduct import Found, Standing
from .pareto import front
from .scoring import LOSS, Counted

SHARE = 0.95  # of the best: the target where none is named
SAME_LATENCY = 1.1  # latencies closer than this factor count as equal on the front
SAME_TEXT = 0.01  # nats a token of general text, likewise
BASELINES = {
    "base": "the base, untouched",
    "copy": "copying the nearest training answer",
    "commonest": "always the commonest label",
}
MAIN = {"regression": "pearson"}  # of a problem whose first score is not the one to look at


@dataclass
class Entry:
    """A row of the table."""

    name: str
    baseline: bool = False
    problem: str = ""  # why it has no numbers
    settings: tuple[str, ...] = ()
    seeds: int = 0
    quality: Interval | None = None
    by_seed: list[float] = field(default_factory=list)
    scores: dict[str, Interval] = field(default_factory=dict)  # the quality too; the loss under scoring.LOSS
    general: float | None = None
    forgotten: float | None = None  # rise of the loss on general text over the base's
    trained: int | None = None
    share: float | None = None
    lr: float | None = None
    searched: bool = False
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None  # of training
    step: float | None = None  # seconds
    peak: int | None = None
    bytes: int | None = None
    prefill: float | None = None  # seconds, beside its base
    token: float | None = None
    merged_prefill: float | None = None
    merged_token: float | None = None
    target_tokens: float | None = None
    target_seconds: float | None = None
    less: Interval | None = None  # this one less the best, on the same test rows
    clearly_worse: bool | None = None
    front: bool = False
    curves: list[list[dict[str, Any]]] = field(default_factory=list)  # one a seed
    folders: list[str] = field(default_factory=list)


@dataclass
class Table:
    """The whole comparison."""

    entries: list[Entry]  # the best first, then baselines, then those without numbers
    measure: str
    unit: str  # of the curves: "score" or "loss"
    target: float | None
    target_said: str
    best: Entry | None
    tests: str  # what the test rows are
    chosen_on: int
    notes: list[str]
    about: dict[str, Any]  # base, data, budget: for the head of the page

    @property
    def rows(self) -> list[Entry]:
        """Those that were compared."""
        return [e for e in self.entries if not e.baseline and not e.problem]

    @property
    def baselines(self) -> list[Entry]:
        """What has to be beaten."""
        return [e for e in self.entries if e.baseline]

    @property
    def lower(self) -> bool:
        """Whether less is better."""
        return self.measure in scoring.LOWER


def table_of(found: Found, target: float | None = None) -> Table:
    """The table of a comparison."""
    made = [_Row.of(s, found.grounds[s.ground]) for s in found.rows]
    first = next(iter(found.grounds.values()))
    measure = next((r.measure for r in made if r.statistics), LOSS)
    entries = [r.entry for r in made]
    several = len(found.grounds) > 1
    for number, ground in enumerate(found.grounds.values()):
        made += _baselines(ground, f" ({number + 1})" if several else "")
    entries = [r.entry for r in made]
    for r in made:
        r.fill(measure)
    done = [r for r in made if not r.entry.problem and not r.entry.baseline and r.entry.quality is not None]
    order = (lambda r: r.entry.quality.value) if measure in scoring.LOWER else (lambda r: -r.entry.quality.value)
    done.sort(key=order)
    best = done[0] if done else None
    for r in made:
        if best is not None:
            _against(r, best, measure)
    t = Table(
        [*(r.entry for r in done), *(e for e in entries if e.baseline and e.quality is not None), *(e for e in entries if e.problem)],
        measure, "loss", None, "", None if best is None else best.entry, first["test_said"], first["chosen_on"], list(found.notes), _about(found, first),
    )  # fmt: skip
    if (uneven := _uneven(t.rows)) and found.equal == "tokens":
        t.notes.insert(0, uneven)
        t.about["equal"] = "uneven"
    _front(t)
    _target(t, target)
    return t


def _uneven(rows: Sequence[Entry]) -> str:
    """What to say where rows that were to learn from as much did not; "" where they did."""
    tokens = {e.name: e.tokens for e in rows if e.tokens}
    if not tokens or max(tokens.values()) <= 1.1 * min(tokens.values()):
        return ""
    most, least = (pick(tokens, key=lambda n: tokens[n]) for pick in (max, min))
    return (
        f"not all rows learned from as much ({most} {tokens[most]:,} tokens, {least} {tokens[least]:,}): the machine became slower on the way, and "
        "those that came later got fewer steps; what separates them may be that"
    )


@dataclass
class _Row:
    """An entry with its statistics over test rows."""

    entry: Entry
    key: str = ""  # of the test rows: only equal ones are paired
    measure: str = LOSS
    statistics: dict[str, tuple[int, Counted, list[float]]] = field(default_factory=dict)  # name -> n, mean over seeds, each seed's value

    @classmethod
    def of(cls, s: Standing, ground: Mapping[str, Any]) -> _Row:
        """A row of the comparison."""
        e = Entry(s.row.name, problem=s.problem, settings=s.row.settings, seeds=len(s.runs))
        if not s.runs:
            e.problem = s.problem or "not run: the time was used up; go on with --resume and more --minutes"
            return cls(e)
        one, avg = s.runs[0], lambda key: mean(r[key] for r in s.runs)
        e.trained, e.share = one["trained"], one["trained"] / one["whole"]
        e.bytes, e.peak, e.seconds = one["bytes"], max(r["peak"] for r in s.runs), avg("seconds")
        e.curves, e.folders = [r["curve"] for r in s.runs], [r["folder"] for r in s.runs]
        if not s.chooses:
            e.lr, e.searched, e.steps, e.tokens, e.step = s.search["lr"], s.search["searched"], one["steps"], round(avg("tokens")), avg("step")
        texts = [r["general"]["value"] for r in s.runs if r["general"]]
        if texts and ground["general"]:
            e.general, e.forgotten = mean(texts), mean(texts) - ground["general"]["value"]
        for name, way in (("", "attached"), ("merged_", "merged")):
            found = [r["latency"][way] for r in s.runs if r["latency"].get(way)]
            if found:
                setattr(e, f"{name}prefill", mean(f["prefill"] for f in found))
                setattr(e, f"{name}token", mean(f["token"] for f in found) if all(f["token"] is not None for f in found) else None)
        return _with_statistics(cls(e), ground, [r["answers"] for r in s.runs], [r["losses"] for r in s.runs])

    def fill(self, measure: str) -> None:
        """Every score with its interval."""
        for name, (n, statistic, _) in self.statistics.items():
            self.entry.scores[name] = scoring.interval(n, statistic)
        if measure in self.statistics:
            self.entry.quality, self.entry.by_seed = self.entry.scores[measure], self.statistics[measure][2]
        elif not self.entry.baseline and not self.entry.problem:
            self.entry.problem = f"it has no {measure}"


def _with_statistics(row: _Row, ground: Mapping[str, Any], answers: Sequence[Sequence[str]], losses: Sequence[Any]) -> _Row:
    import numpy as np

    row.key = repr((ground["test_said"], len(ground["records"]), [str(r["prompt"]) for r in ground["records"][:3]]))
    if ground["task"] and all(answers):
        task = plugin("tasks", ground["task"])(**({"problem": ground["problem"]} if ground["task"] == "classification" else {}))
        each = [scoring.counted(task, ground["records"], a) for a in answers]
        n = len(ground["records"])
        for name in each[0]:
            parts = [c[name] for c in each]
            row.statistics[name] = n, scoring.averaged(parts), [float(p(np.ones((1, n)))[0]) for p in parts]
        row.measure = MAIN.get(ground["problem"] or "", next(iter(each[0])))
    if losses and all(losses):
        parts = [scoring.loss_counted(x) for x in losses]
        n = len(losses[0])
        row.statistics[LOSS] = n, scoring.averaged(parts), [float(p(np.ones((1, n)))[0]) for p in parts]
    return row


def _baselines(ground: Mapping[str, Any], suffix: str) -> list[_Row]:
    out = []
    for kind, name in BASELINES.items():
        of_base = ground["base"] if kind == "base" else None
        if kind not in ground["answers"] and of_base is None:
            continue
        e = Entry(name + suffix, baseline=True, trained=0, share=0.0)
        if of_base is not None:
            e.general, e.forgotten = (of_base["general"] or {}).get("value"), 0.0 if of_base["general"] else None
            alone = of_base["latency"]["merged"] or {}
            e.merged_prefill, e.merged_token = alone.get("prefill"), alone.get("token")
        row = _with_statistics(_Row(e), ground, [ground["answers"].get(kind, [])], [of_base["losses"]] if of_base else [])
        out.append(row)
    return out


def _against(r: _Row, best: _Row, measure: str) -> None:
    if r is best or measure not in r.statistics or r.key != best.key:
        return
    n, mine, _ = r.statistics[measure]
    m, theirs, _ = best.statistics[measure]
    if n == m:
        r.entry.less = scoring.difference(n, mine, theirs)
        r.entry.clearly_worse = scoring.clearly_worse(measure, r.entry.less)


def _front(t: Table) -> None:
    """Quality, trained parameters, what was forgotten, latency beside the base (merged, where there is no beside); each where all rows have it."""
    points: dict[str, list[float | None]] = {}
    for e in t.rows:
        assert e.quality is not None
        token = e.token if e.token is not None else e.merged_token
        wait = token if token is not None else e.prefill if e.prefill is not None else e.merged_prefill
        points[e.name] = [
            e.quality.value if t.lower else -e.quality.value,
            e.trained,
            None if e.forgotten is None else round(max(0.0, e.forgotten) / SAME_TEXT),
            None if not wait else round(math.log(wait) / math.log(SAME_LATENCY)),
        ]
    on = set(front(points))
    for e in t.rows:
        e.front = e.name in on


def _target(t: Table, asked: float | None) -> None:
    """When each row reached the target, on its curve: between two points by a straight line."""
    scored = [e for e in t.rows if any("score" in p for c in e.curves for p in c)]
    t.unit = "score" if scored else "loss"
    lower = t.lower if t.unit == "score" else True
    ends = [(p[t.unit], c) for e in t.rows for c in e.curves for p in c if t.unit in p]
    if not ends:
        return
    best, curve = min(ends, key=lambda x: x[0] if lower else -x[0])
    on = "rows to choose by"
    if asked is not None and t.unit == "loss" and t.measure != LOSS:
        t.notes.append(f"--target {asked:g} is of {t.measure}, which there was no time to follow during training; give more --minutes")
        return
    if asked is not None:
        t.target, t.target_said = asked, f"{t.measure} {asked:g}, on {on}"
    elif t.unit == "score" and not lower:
        t.target, t.target_said = SHARE * best, f"{SHARE:.0%} of the best {t.measure} ({SHARE * best:.3g}), on {on}"
    else:
        start = next((p["loss"] for p in curve if "loss" in p), best) if t.unit == "loss" else best
        t.target = start - SHARE * (start - best)
        t.target_said = f"held-out loss {t.target:.3f}, which is {SHARE:.0%} of the way from {start:.3f} to the best, on {on}"
    for e in t.rows:
        when = [reached([(p["tokens"], p["seconds"], p[t.unit]) for p in c if t.unit in p], t.target, lower) for c in e.curves]
        if when and all(w is not None for w in when):
            e.target_tokens, e.target_seconds = (mean(w[i] for w in when if w) for i in (0, 1))


def reached(points: Sequence[tuple[float, float, float]], target: float, lower: bool) -> tuple[float, float] | None:
    """(tokens, seconds) at which a curve of (tokens, seconds, value) first meets a target; None where it does not."""
    meets = (lambda v: v <= target) if lower else (lambda v: v >= target)
    for i, (tokens, seconds, value) in enumerate(points):
        if not meets(value):
            continue
        if i == 0:
            return tokens, seconds
        t0, s0, v0 = points[i - 1]
        part = 1.0 if value == v0 else (target - v0) / (value - v0)
        return t0 + part * (tokens - t0), s0 + part * (seconds - s0)
    return None


def _about(found: Found, ground: Mapping[str, Any]) -> dict[str, Any]:
    run = found.rows[0].row.run
    keys = ("parameters", "test_rows", "chosen_on", "train_rows", "device", "threads", "renders", "no_base")
    return {
        "base": run.model.id, "data": ", ".join(run.data.train), "objective": kind_of(run.objective), "minutes": found.minutes,
        "spent": found.spent, "equal": found.equal, "seeds": found.seeds, "records": len(ground["records"]), **{k: ground[k] for k in keys},
    }  # fmt: skip
