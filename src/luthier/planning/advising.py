"""Which method to use: rules with their sources, added up for a task, a base, a machine and what is needed; then what the planner says that it takes.

The rules are data (assets/advice.yaml): each says when it counts, how many points it gives to which methods, why, and where that is known from. Only methods
that this program has can be advised, and only those that it can assemble for this base and objective within this memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..amounts import size
from ..core import LuthierError
from ..settings.plugins import kinds, plugin
from ..settings.run import Run
from .fitting import Change, Planner, changes, together
from .memory import Prediction

RULES = Path(__file__).parents[1] / "assets" / "advice.yaml"
NEEDS = {
    "many-tasks": "many tasks on one base",
    "no-latency": "nothing added to the time of an answer",
    "tiny-files": "files as small as may be",
    "frequent-updates": "trained again and exchanged often",
    "new-facts": "the model shall know what it does not know yet",
    "new-behaviour": "the model shall answer in another manner",
    "keep-abilities": "what the base can do must not suffer",
}
CONDITIONS = ("need", "objective", "kind", "examples_below", "examples_above", "parameters_below", "parameters_above", "packed")


@dataclass(frozen=True)
class Rule:
    """Something that speaks for or against methods."""

    because: str
    source: str
    when: Mapping[str, Any]
    points: Mapping[str, int]
    set: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Situation:
    """What a method is wanted for."""

    objective: str
    kind: str  # of the base: decoder, encoder, encoder_decoder
    parameters: int
    examples: int | None  # None: nobody knows without the data
    needs: tuple[str, ...] = ()
    packed: bool = False

    def meets(self, when: Mapping[str, Any]) -> bool:
        """Whether every condition holds; what is not known holds nothing."""
        n = self.examples
        return all(
            {
                "need": lambda v: bool(set(v) & set(self.needs)),
                "objective": lambda v: self.objective in v,
                "kind": lambda v: self.kind in v,
                "examples_below": lambda v: n is not None and n < v,
                "examples_above": lambda v: n is not None and n > v,
                "parameters_below": lambda v: self.parameters < v,
                "parameters_above": lambda v: self.parameters > v,
                "packed": lambda v: self.packed is v,
            }[name](value)
            for name, value in when.items()
        )


@dataclass
class Candidate:
    """A method with what speaks for it and what it would take."""

    method: str
    points: int
    reasons: list[tuple[int, Rule]]  # its points and the rule, the weightiest first
    settings: dict[str, Any] = field(default_factory=dict)
    run: Run | None = None
    made: list[str] = field(default_factory=list)  # settings that were needed so that it fits
    prediction: Prediction | None = None
    refused: str = ""  # why it cannot be used


def rules(path: Path = RULES) -> list[Rule]:
    """All rules. Raises LuthierError for a condition or a method that there is none of, and for a rule without a source."""
    out = []
    there = set(kinds("methods"))
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        rule = Rule(**{"source": "", "when": {}, "points": {}} | entry)
        odd = [*(set(rule.when) - set(CONDITIONS)), *((set(rule.points) | set(rule.set)) - there), *(set(rule.when.get("need", ())) - set(NEEDS))]
        if odd or not rule.source:
            raise LuthierError(f"{path}: the rule {rule.because!r} {'names ' + odd[0] + ', which there is none of' if odd else 'has no source'}")
        out.append(rule)
    return out


def ranked(situation: Situation, found: Sequence[Rule] | None = None) -> list[Candidate]:
    """All methods, by their points; equals in the order of their names."""
    counted = [r for r in (rules() if found is None else found) if situation.meets(r.when)]
    out = []
    for method in kinds("methods"):
        reasons = sorted(((r.points[method], r) for r in counted if r.points.get(method)), key=lambda p: -abs(p[0]))
        settings: dict[str, Any] = {}
        for rule in sorted(counted, key=lambda r: "need" in r.when):  # what is asked for outweighs what is usual
            settings |= rule.set.get(method, {})
        out.append(Candidate(method, sum(p for p, _ in reasons), reasons, settings))
    return sorted(out, key=lambda c: -c.points)


def extras(situation: Situation, found: Sequence[Rule] | None = None) -> dict[str, tuple[Any, Rule]]:
    """Settings of the run that are advised whatever the method is, each with the rule that says so."""
    return {key: (value, r) for r in (rules() if found is None else found) if situation.meets(r.when) for key, value in r.also.items()}


def sparing(run: Run, p: Prediction) -> Iterator[Change]:
    """The changes that leave the method and the data as they are: results stay, or change a little."""
    for change in changes(run, p):
        if change.setting.partition("=")[0] in ("optim.micro_tokens", "recompute", "optim.state", "precision", "method.rank"):
            yield change


def fit(candidate: Candidate, run: Run, planner: Planner, *, device: str, room: int) -> None:
    """Fill in whether this method can be assembled for the run and fits in ``room`` bytes, with smaller micro-batches, recomputation, a base in codes and a
    lower rank where it must, in this order."""
    predict = lambda r: planner.predict(r, device)  # noqa: E731
    try:
        own = plugin("methods", candidate.method)(**candidate.settings)
        candidate.run, candidate.made, total = together(replace(run, method=own), predict, room, sparing)
        candidate.prediction = predict(candidate.run)
        if total > room:
            candidate.refused = f"needs {size(total)} at least"
    except (LuthierError, TypeError) as e:
        candidate.refused = str(e)


def choose(candidates: Sequence[Candidate], run: Run, planner: Planner, *, device: str, room: int, most: int = 3) -> list[Candidate]:
    """The first ``most`` candidates with points that fit, in their order; those before them that do not are marked. What trains nothing is left to be the
    baseline."""
    out: list[Candidate] = []
    for c in candidates:
        if c.method == "crafted_prompt" or c.points <= 0:
            continue
        fit(c, run, planner, device=device, room=room)
        if not c.refused:
            out.append(c)
        if len(out) == most:
            break
    return out
