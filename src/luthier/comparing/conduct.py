"""A comparison from its first job to its last: look at the base, find every row's learning rate, train and test. What is done already is not done again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import LuthierError
from ..quantising.quantised import LARGE
from ..settings import config
from ..settings.plugins import kind_of
from . import budget
from .budget import LOOKS, Cost
from .state import State
from .sweep import Asked, Row, text

LOOKING = 0.10  # of a row's time: at the rows to choose by
ANSWERING = 0.12  # of all time: answering test rows
SCORING = 0.08  # of a row's time: scores for its curve
SEARCH_LOOKS = 15  # of the short runs of a search
LEAST_ROWS, LEAST_SCORED, MOST_SCORED = 64, 8, 200
MOSTLY_FIXED = 0.5  # of the time that is left: where starting and measuring takes more, runs are not followed by scores
CHOOSING = 0.3  # of a row's time: choosing a prompt, where that is all there is to do
UNLIKE = 1.25  # what measuring a trained row takes beside measuring the base

Launch = Callable[[str, dict[str, Any], float], dict[str, Any]]  # a job's label, its task and the seconds it may take -> its numbers


@dataclass
class Standing:
    """A row while the comparison goes on."""

    row: Row
    ground: str
    told: dict[str, Any] = field(default_factory=dict)  # by the survey: trained, whole, lr, steps, chooses; or refused
    search: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)  # one a seed
    problem: str = ""  # why it has no numbers

    @property
    def chooses(self) -> bool:
        """Whether nothing is trained: a prompt is chosen."""
        return bool(self.told.get("chooses"))


@dataclass
class Found:
    """What a comparison came to."""

    rows: list[Standing]
    grounds: dict[str, dict[str, Any]]
    seeds: int
    asked_seeds: int
    notes: list[str]
    spent: float
    minutes: float
    equal: str
    searched_on: int = 0


class Conduct:
    """Runs the jobs in turn. ``launch`` runs one; ``clock`` tells seconds; ``say`` gets a line for each thing worth telling."""

    def __init__(self, asked: Asked, state: State, launch: Launch, *, say: Callable[[str], None] = lambda _: None, clock: Callable[[], float] = time.monotonic):
        self.asked, self.state, self.launch, self.say, self.clock = asked, state, launch, say, clock
        self.minutes, self.equal = float(state.asked["minutes"]), state.asked["equal"]
        self.test, self.rates = list(state.asked["test"]), int(state.asked["rates"])
        self.began, self.before = clock(), state.spent
        self.grounds: dict[str, dict[str, Any]] = {}
        self.notes = list(asked.notes)

    def spent(self) -> float:
        """Seconds of this comparison so far, earlier calls included."""
        return self.before + self.clock() - self.began

    def left(self) -> float:
        """Seconds that may still be planned with."""
        return budget.usable(self.minutes) - self.spent()

    def end(self) -> float:
        """Seconds after which nothing may run any more."""
        return budget.LATEST * self.minutes * 60 - budget.WRITING

    def job(self, name: str, task: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
        """A job's numbers: kept from before, or of a process that runs now, for ``limit`` seconds at most. Raises LuthierError, see the job; and after them."""
        if (kept := self.state.done(name, task)) is not None:
            return kept
        try:
            numbers = self.launch(name, task, max(0.0, self.end() - self.spent()) if limit is None else limit)
            self.state.keep(name, task, numbers)
        finally:
            self.state.save(self.spent())
        return numbers

    # --- the three parts --------------------------------------------------------------------------------------------

    def go(self) -> Found:
        """All of it. Raises LuthierError where nothing can be compared, Interrupted after Ctrl-C."""
        rows = self.look()
        able = [s for s in rows if not s.problem]
        trained = [s for s in able if not s.chooses]
        if not able:
            raise LuthierError("none of the rows can run: " + "; ".join(f"{s.row.name}: {s.problem}" for s in rows))
        self.refuse_too_little(trained, able)
        self.search(trained)
        seeds = self.train(able)
        return Found(rows, self.grounds, seeds, len(self.asked.seeds), self.notes, self.spent(), self.minutes, self.equal)

    def look(self) -> list[Standing]:
        """The base under every kind of data, model and objective that rows have; which rows can run."""
        rows = [Standing(r, self._ground_of(r)) for r in self.asked.rows]
        small = [Standing(r, self._ground_of(r)) for r in in_four_bits(self.asked)]
        names = list(dict.fromkeys(s.ground for s in rows))
        for number, name in enumerate(names):
            here = [s for s in [*rows, *small] if s.ground == name]
            answering = ANSWERING * budget.usable(self.minutes) / max(1, len(self.asked.seeds) * len(rows))
            task = {
                "kind": "ground",
                "rows": [{"name": s.row.name, "run": config.plain(s.row.run)} for s in here],
                "test": self.test,
                "seed": self.asked.seeds[0],
            }
            label = "base" if len(names) == 1 else f"base {number + 1}"
            self.grounds[name] = self.job(label, task | {"answering": answering, "out": str(self.state.folder / "runs")})
            for s in here:
                s.told = self.grounds[name]["rows"][s.row.name]
                s.problem = s.told.get("refused", "")
        if len(scored := {g["task"] or "the loss" for g in self.grounds.values()}) > 1:
            raise LuthierError(
                f"these rows are scored by {' and '.join(sorted(map(str, scored)))}, which do not compare; compare one kind of objective at a time"
            )
        large = [s for s in small if not s.problem and self.grounds[s.ground]["parameters"] >= LARGE]
        for s in rows:
            if s.problem:
                self.say(f"{s.row.name}: not compared: {s.problem}")
        return rows + large

    def _ground_of(self, row: Row) -> str:
        plain = config.plain(row.run)  # two objectives may have the same fields
        return json.dumps([*(plain[k] for k in ("model", "data", "objective", "tokens")), plain["evaluate"]["tasks"]])

    def refuse_too_little(self, trained: list[Standing], able: list[Standing]) -> None:
        """Raise LuthierError where starting the processes alone takes the time that was given."""
        least = sum(2 * g["loaded"] + sum(g["took"].values()) + budget.FEW * 3 * self._forward(g) * 2048 for g in (self.grounds[s.ground] for s in able))
        if "steps" not in self.state.decided and (need := least + self.spent() + budget.WRITING) > self.minutes * 60:
            raise LuthierError(
                f"--minutes {self.minutes:g} is too little for {len(able)} rows here: opening the model, reading the data and testing alone "
                f"take about {need / 60:.0f} minutes; give at least {1 + int(1.5 * need / 60)}, or compare fewer methods (methods=[lora,full])"
            )

    def search(self, trained: list[Standing]) -> None:
        """Every row's learning rate."""
        for i, s in enumerate(trained):
            default = float(s.told["lr"])
            rates = list(self.asked.rates) or ([float(s.row.run.optim.lr)] if s.row.run.optim.lr is not None else budget.rates_around(default, self.rates))
            testing = self._testing(s)
            starting, rows = self.grounds[s.ground]["loaded"], len(trained) - i
            seconds = starting + budget.searching(self.left() - (testing + starting) * rows, rows)
            task = self._task(s) | {
                "kind": "search",
                "rates": rates,
                "default": default,
                "seconds": seconds,
                "out": str(self.state.folder / "runs"),
                "folder": str(self.state.folder / "search" / _slug(s)),
            }
            try:
                s.search = self.job(f"search {s.row.name}", task)
            except LuthierError as e:
                s.problem = str(e)
                self.say(f"{s.row.name}: {s.problem}")
                continue
            tried = ", ".join(f"{t['lr']:g} {t['loss']:.3f}" for t in s.search["tried"])
            self.say(
                f"{s.row.name}: {s.search['probe']['step']:.2f} s a step; learning rate {s.search['lr']:g}"
                + (f" (rate and loss: {tried})" if tried else ", the default: no time to search" if len(rates) > 1 else ", the only one")
            )

    def train(self, able: list[Standing]) -> int:
        """The runs that count, a seed at a time over all rows; how many seeds every trained row has."""
        able = [s for s in able if not s.problem]
        by_name = {s.row.name: s for s in able}
        probes = {s.row.name: s.search["probe"] for s in able if not s.chooses}
        costs = {s.row.name: self._cost(s, probes) for s in able}
        if "steps" not in self.state.decided:
            if sum(c.fixed for c in costs.values()) * len(self.asked.seeds) > MOSTLY_FIXED * self.left():
                self._follow_no_scores()
                costs = {s.row.name: self._cost(s, probes) for s in able}
            self.state.decided |= self._decide(able, costs)
            self.state.save(self.spent())
        steps, seeds = self.state.decided["steps"], self.state.decided["seeds"]
        order = sorted(by_name, key=lambda n: by_name[n].chooses)  # what trains comes first
        planned = {(n, i): steps[n] for i in range(seeds) for n in order if i == 0 or not by_name[n].chooses}
        self.say(_plan_said(planned, costs, by_name, seeds))
        predicted = actual = 0.0
        while planned:
            key = next(iter(planned))
            name, i = key
            s, cost = by_name[name], costs[name]
            task = self._final(s, i, self.state.decided.get("cut", {}).get(f"{name} {i}", planned[key]))
            kept = self.state.done(_job(s, i), task)
            if kept is None:
                still = budget.again(costs, planned, self.left() + budget.SLACK * self.minutes * 60, actual / predicted if predicted else 1.0)
                self._give_up(still, planned)
                planned = dict(still.steps)
                if key not in planned:
                    continue
                task = self._final(s, i, planned[key])
            del planned[key]
            began, expected = self.clock(), cost.fixed + task["steps"] * cost.step
            try:
                s.runs.append(self.job(_job(s, i), task, budget.patience(expected, self.end() - self.spent())))
            except LuthierError as e:
                s.problem = s.problem or str(e)
                self.say(f"{name}: {e}")
                continue  # what was stopped says little of how slow the machine is
            if kept is None:
                predicted, actual = predicted + expected, actual + self.clock() - began
        return seeds

    # --- what it takes ----------------------------------------------------------------------------------------------

    def _decide(self, able: list[Standing], costs: Mapping[str, Cost]) -> dict[str, Any]:
        """Steps and seeds, once; they stay when the comparison goes on another day."""
        once = [s.row.name for s in able if s.chooses]
        left = self.left() - sum(costs[n].fixed for n in once)
        trained = {n: c for n, c in costs.items() if n not in once}
        seeds = budget.repetitions(trained, len(self.asked.seeds), left, self.equal)
        if seeds < len(self.asked.seeds):
            self.notes.append(
                f"{seeds} of the {len(self.asked.seeds)} seeds: with more, runs would have had fewer than {budget.FEW} steps; give more --minutes"
            )
        steps = budget.steps_of(trained, dict.fromkeys(trained, seeds), left, self.equal)
        steps = {n: max(k, min(budget.FEW, trained[n].most or budget.FEW)) for n, k in steps.items()}
        return {"seeds": seeds, "steps": steps | dict.fromkeys(once, 0)}

    def _give_up(self, still: budget.Still, planned: Mapping[tuple[str, int], int]) -> None:
        for name, i in still.given_up:
            self.say(f"{name}, seed {self.asked.seeds[i]}: not run, there is no time left for it; --resume with more --minutes runs it")
        if still.shortened and any(planned[k] != n for k, n in still.steps.items()):
            cut = self.state.decided.setdefault("cut", {})
            cut |= {f"{n} {i}": k for (n, i), k in still.steps.items()}
            self.say(
                "this machine became slower than it was measured, so the runs that are left get fewer steps: "
                + ", ".join(f"{n} {k}" for (n, _), k in still.steps.items())
            )

    def _forward(self, ground: Mapping[str, Any]) -> float:
        """Seconds a token of one forward, from measuring the base."""
        took, text_n = ground["took"], (ground.get("general") or {}).get("n", 0)
        if took["losses"]:
            return float(took["losses"] / max(1, ground["tokens"]["test"]))
        return float(took["general"] / text_n) if text_n else 1e-4

    def _testing(self, s: Standing) -> float:
        """Seconds that a row's runs take besides their steps, as far as the base tells."""
        g = self.grounds[s.ground]
        return float(g["loaded"] + UNLIKE * sum(g["took"].values()) + 6.0) * len(self.asked.seeds)

    def _row_seconds(self) -> float:
        return budget.usable(self.minutes) / max(1, len(self.asked.rows))

    def _task(self, s: Standing) -> dict[str, Any]:
        """What search and final share."""
        g = self.grounds[s.ground]
        mean = g["tokens"]["choose"] / max(1, g["chosen_on"])
        choose = int(LOOKING * self._row_seconds() / ((SEARCH_LOOKS + LOOKS + 2) * self._forward(g) * max(1.0, mean)))
        scored = MOST_SCORED
        if g["renders"] == "chat":
            one = g["took"]["answers"] / max(1, g["most"])
            scored = int(SCORING * self._row_seconds() / (LOOKS * one)) if one else 0
            scored = 0 if scored < LEAST_SCORED else min(scored, MOST_SCORED)
        choose = max(LEAST_ROWS, min(g["chosen_on"], choose))
        looked = self._looked(s, {"choose": choose, "curve_rows": scored})
        tested = {k: g[k] for k in ("most", "loss_rows", "max_new")}
        limits = {"positions": g["positions"], "max_tokens": g["max_tokens"]}
        return {"run": config.plain(s.row.run), "test": self.test, "seed": self.asked.seeds[0], "tested": tested} | limits | looked

    def _looked(self, s: Standing, now: dict[str, int] | None = None) -> dict[str, int]:
        """How many rows a row's runs are followed on; what was decided first stays."""
        return dict(self.state.decided.setdefault("looked", {}).setdefault(s.row.name, now or {"choose": 0, "curve_rows": 0}))

    def _follow_no_scores(self) -> None:
        """Where little time is left, runs are followed by their loss alone."""
        for looked in self.state.decided.get("looked", {}).values():
            looked["curve_rows"] = 0
        self.notes.append("curves and the target are of the held-out loss: there was no time to follow a score")

    def _final(self, s: Standing, i: int, steps: int) -> dict[str, Any]:
        task = self._task(s) | {"kind": "final", "steps": steps, "lr": s.search.get("lr"), "run_seed": self.asked.seeds[i]}
        if s.chooses:
            task |= {"choosing": CHOOSING * self._row_seconds(), "choose": self.grounds[s.ground]["chosen_on"]}
        return task | {"out": str(self.state.folder / "runs"), "name": f"{_slug(s)}-seed-{self.asked.seeds[i]}"}

    def _cost(self, s: Standing, probes: Mapping[str, Mapping[str, float]]) -> Cost:
        """What a run that counts takes, from the row's own probe and from measuring the base."""
        g = self.grounds[s.ground]
        if s.chooses:
            longer = (s.row.run.method.max_tokens + g["median"]) / g["median"]
            took = g["took"]
            testing = 2 * longer * took["losses"] + 5 * took["answers"] + 2 * took["general"] + 4 * took["latency"]  # with a long prompt before every row
            return Cost(g["loaded"] + UNLIKE * CHOOSING * self._row_seconds() + testing, 1e-9, 1.0, 0)
        p = budget.calm(s.row.name, probes)
        testing = UNLIKE * (g["took"]["losses"] or p["look"]) + g["took"]["general"] + UNLIKE * g["took"]["answers"]
        latency = 2 * UNLIKE * g["took"]["latency"] or 1.0
        fixed = p["start"] + p["other"] + (LOOKS + 2) * p["look"] + (LOOKS * p["score"] if self._looked(s)["curve_rows"] else 0.0) + testing + latency
        return Cost(fixed, p["step"], p["tokens"], s.told["steps"])


def in_four_bits(asked: Asked) -> list[Row]:
    """LoRA on a base in NF4 (QLoRA), where methods were left to us; compared where the base is large enough for its memory to matter."""
    if asked.chosen:
        return []
    found = next((r for r in asked.rows if kind_of(r.run.method) == "lora" and r.run.precision == "auto"), None)
    if found is None:
        return []
    tree = config.plain(replace(found.run, precision=config.load_run(None, [f"precision={text('nf4')}"]).precision))
    return [Row(f"{found.name}, nf4", config.load_run(tree), (*found.settings, "precision=nf4"))]


def _slug(s: Standing) -> str:
    from .state import slug

    return slug(s.row.name)


def _job(s: Standing, i: int) -> str:
    return f"run {s.row.name} {i}"


def _plan_said(planned: Mapping[tuple[str, int], int], costs: Mapping[str, Cost], rows: Mapping[str, Standing], seeds: int) -> str:
    steps = {n: k for (n, i), k in planned.items() if i == 0 and not rows[n].chooses}
    each = {round(k * costs[n].tokens) for n, k in steps.items()}
    alike = len({*steps.values()}) == 1 and bool(steps)
    what = (
        f"{next(iter(steps.values())):,} steps of about {next(iter(costs[n].tokens for n in steps)):,.0f} tokens each"
        if alike
        else ", ".join(f"{n} {k:,} steps" for n, k in steps.items())
    )
    return f"the runs that count: {what or 'none'}, {seeds} {'seed' if seeds == 1 else 'seeds'}" + (f" ({max(each):,} tokens a run)" if alike else "")
