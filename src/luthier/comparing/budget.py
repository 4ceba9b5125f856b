"""How the time of a comparison is spent: pure arithmetic, seconds in and steps out.

Of the time of the rows that train, SEARCH goes to finding each one's learning rate and the rest to the runs that count. Both are planned from what was measured
on this machine a moment before, and planned again before every run, since a machine may become slower while it works: first repetitions (seeds) are given up,
then steps of the runs that are left, and last whole runs. What was given up is said.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Equal = Literal["tokens", "time"]

SEARCH = 0.3  # of the time: looking for learning rates
RESERVE = 0.04  # of the whole time, kept for what no measurement foresees
WRITING = 8.0  # seconds: the tables, plots and the page
LOOKS = 8  # evaluations of a run that counts: the points of its curve
CALM = 1.5
SLOWEST = 4.0  # a machine is not taken to have become slower than this
SLACK = 0.05  # of the whole time, by which plans that were made may be late before anything is given up
PATIENT = SLOWEST  # times what a run was expected to take
LATEST = 1.08  # of the whole time: then whatever still runs is stopped
FEW = 8  # steps: a run of fewer teaches nothing; repetitions are given up before this
RUNG = 10  # steps of the shortest run of a search: on five the lowest rate looked best, whatever it was on a hundred
FACTORS = {1: (1.0,), 2: (1.0, 3.0), 3: (1 / 3, 1.0, 3.0), 4: (1 / 3, 1.0, 3.0, 10.0)}  # of a method's default rate
MOST_RATES = max(FACTORS)
LONGER = 2  # a rung's steps beside those of the rung before it


@dataclass(frozen=True)
class Cost:
    """What a row's runs take, in seconds; as measured."""

    fixed: float  # a run without its steps: starting, reading, measuring, saving, answering
    step: float
    tokens: float  # of a step
    most: int | None = None  # steps that were asked for, or that the epochs are


def rates_around(default: float, n: int, most: float = 1.0) -> list[float]:
    """Learning rates to try around a default: two digits each, none above ``most``, which is the largest that the settings take."""
    found = [min(most, float(f"{default * f:.1e}")) for f in FACTORS[n]]
    return sorted(dict.fromkeys(found))


def survivors(tried: Mapping[float, float], most: float = 1.0) -> list[float]:
    """The rates of the next rung: the better half (successive halving; Jamieson and Talwalkar, 2016, arXiv 1502.07943, of which Hyperband is made).

    ``tried``: rate -> held-out loss. One thing is added to the paper: where the best rate is the lowest or the highest that was tried, the next one beyond it
    takes the place of the worst survivor, because the best may lie outside. A loss that is no number is the worst.
    """
    order = sorted(tried, key=lambda r: (not math.isfinite(tried[r]), tried[r]))
    kept = order[: math.ceil(len(order) / 2)]
    low, high = min(tried), max(tried)
    if len(tried) > 1 and kept[0] in (low, high):
        beyond = float(f"{kept[0] / 3 if kept[0] == low else min(most, kept[0] * 3):.1e}")
        if beyond not in tried:
            kept = [kept[0], *kept[1 : max(1, len(kept) - 1)], beyond]
    return sorted(dict.fromkeys(kept))


def rungs(seconds: float, rates: int, *, step: float, run: float) -> list[int]:
    """Steps of each rung of a search that takes so many ``seconds``: of two rungs, the second LONGER times the first; of one; none where there is no time.

    ``step``: seconds of one; ``run``: of a short run without its steps.
    """
    if rates < 2:
        return []
    second = math.ceil(rates / 2) if rates > 2 else 2
    first = int((seconds - (rates + second) * run) / ((rates + LONGER * second) * step))
    if rates > 2 and first >= RUNG:
        return [first, LONGER * first]
    alone = int((seconds - rates * run) / (rates * step))
    return [alone] if alone >= RUNG else []


def calm(name: str, probes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What was measured for a row, with what methods hardly differ in (all but the step) held to CALM times the median of all rows: a machine that was
    busy for a moment must not count as a slow method."""
    own = dict(probes[name])
    for key in ("start", "look", "score", "other", "run"):
        own[key] = min(own[key], CALM * statistics.median(p[key] for p in probes.values()))
    return own


def patience(expected: float, left: float) -> float:
    """Seconds after which a run that was expected to take so many is stopped, so that the others get theirs: at least 30 more, at most what is left."""
    return max(0.0, min(left, max(PATIENT * expected, expected + 30.0)))


def searching(left: float, rows: int) -> float:
    """Seconds for the search of each of so many rows, of the seconds that are left for searching and training."""
    return SEARCH * max(0.0, left) / max(1, rows)


def usable(minutes: float) -> float:
    """Seconds that may be planned with."""
    return minutes * 60 * (1 - RESERVE) - WRITING


def steps_of(costs: Mapping[str, Cost], runs: Mapping[str, int], left: float, equal: Equal = "tokens") -> dict[str, int]:
    """Steps of every row's runs, of which there are ``runs``, so that together they take ``left`` seconds: at least 0, at most what was asked for.

    tokens: all rows get the same number of tokens, the most that the time allows, so a slow method takes more of it. time: all take the same seconds, so a slow
    method gets fewer tokens.
    """
    here = {n: c for n, c in costs.items() if runs.get(n, 0)}
    if not here:
        return {}
    if equal == "time":
        share = left / sum(runs[n] for n in here)
        return {n: _bounded(int((share - c.fixed) / c.step), c) for n, c in here.items()}
    free = left - sum(runs[n] * c.fixed for n, c in here.items())
    tokens = free / sum(runs[n] * c.step / c.tokens for n, c in here.items())
    tokens = min([tokens, *(c.most * c.tokens for c in here.values() if c.most is not None)])
    return {n: _bounded(int(tokens / c.tokens + 1e-9), c) for n, c in here.items()}


def _bounded(steps: int, cost: Cost) -> int:
    return max(0, steps if cost.most is None else min(steps, cost.most))


def seconds_of(costs: Mapping[str, Cost], runs: Mapping[str, int], steps: Mapping[str, int]) -> float:
    """What runs of so many steps take."""
    return sum(n * (costs[name].fixed + steps[name] * costs[name].step) for name, n in runs.items() if n)


def repetitions(costs: Mapping[str, Cost], seeds: int, left: float, equal: Equal = "tokens", once: Sequence[str] = ()) -> int:
    """How many seeds there is time for: as many as asked, fewer while runs would have fewer than FEW steps; at least one. ``once``: rows that have only one."""
    for n in range(seeds, 1, -1):
        runs = {name: 1 if name in once else n for name in costs}
        wanted = {name: min(FEW, FEW if c.most is None else c.most) for name, c in costs.items()}
        if all(steps >= wanted[name] for name, steps in steps_of(costs, runs, left, equal).items()):
            return n
    return 1


@dataclass(frozen=True)
class Still:
    """What is to be done with the runs that are left: their steps by (row, repetition), and what is given up."""

    steps: dict[tuple[str, int], int]
    given_up: tuple[tuple[str, int], ...] = ()  # runs there is no time for
    shortened: bool = False


def again(costs: Mapping[str, Cost], planned: Mapping[tuple[str, int], int], left: float, slower: float = 1.0) -> Still:
    """The runs that are left, looked at again with the seconds that are left and how much ``slower`` the machine is than it was measured.

    As planned, where that fits; else without the last repetitions; else, where only first ones are left, with fewer steps for all of them alike; else
    without the last runs.
    """
    slower = min(SLOWEST, max(1.0, slower))
    now = {n: Cost(c.fixed * slower, c.step * slower, c.tokens, c.most) for n, c in costs.items()}
    runs, gone = dict(planned), list[tuple[str, int]]()
    total = lambda: sum(now[n].fixed + s * now[n].step for (n, _), s in runs.items())  # noqa: E731
    while total() > left and (last := max((r for _, r in runs), default=0)) > 0:
        drop = next(k for k in reversed(runs) if k[1] == last)
        gone.append(drop)
        del runs[drop]
    if total() <= left or not runs:
        return Still(runs, tuple(gone))
    while runs:
        fixed = sum(now[n].fixed for n, _ in runs)
        share = (left - fixed) / max(1e-9, total() - fixed)
        if share > 0 and all(int(s * share) >= min(s, 1) for s in runs.values()):
            return Still({k: int(s * share) for k, s in runs.items()}, tuple(gone), shortened=True)
        drop = next(reversed(runs))
        gone.append(drop)
        del runs[drop]
        if total() <= left:
            break
    return Still(runs, tuple(gone))
