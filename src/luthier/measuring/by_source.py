"""A mixture's sources one by one: what each is measured with, what their numbers come to together, and how much of it each is or has been."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..data.feed import Batches
from ..data.mixing import CHUNK, Mixture, Share
from ..data.prepare import Prepared
from ..reading import part_of, sections
from ..settings.run import Run
from .evaluate import Losses, Score


def runs_of(run: Run, prepared: Prepared) -> Iterator[tuple[str, Any, Prepared, Run]]:
    """(source, objective, rows, the run with that source's tasks and its share of the samples) of a mixture; nothing where there is none."""
    for i, (name, objective, rows) in enumerate(sections(run, prepared) if prepared.sources else ()):
        assert run.data.mix is not None
        tasks, (each, rest) = run.data.mix.sources[name].tasks, divmod(run.evaluate.samples, len(prepared.sources))
        if tasks is None:
            tasks = run.evaluate.tasks if objective.renders in ("chat", "pairs") else ()
        yield name, objective, rows, replace(run, evaluate=replace(run.evaluate, forgetting=False, tasks=tasks, samples=each + (i < rest)))


def pooled(run: Run, losses: Mapping[str, Losses]) -> Losses:
    """The loss over the held-out rows of all sources, each term over all of its units."""
    terms: Mapping[str, float] = run.objective.terms
    sums, counts, parts = dict.fromkeys(terms, 0.0), dict.fromkeys(terms, 0), []
    for name, own in losses.items():
        within = f"{part_of(run, name)[0]}." if run.objective.renders == "mixed" else ""
        parts += [({within + k: v for k, v in a.items()}, {within + k: n for k, n in b.items()}) for a, b in own.parts]
        for k in own.sums:
            sums[within + k] += own.sums[k]
            counts[within + k] += own.counts[k]
    return Losses(sums, counts, dict(terms), tuple(parts))


def average(scores: Sequence[Score]) -> Score:
    """The mean of scores over sets of rows that have nothing in common; the half-widths of its interval are theirs in quadrature."""
    value = sum(s.value for s in scores) / len(scores)
    below, above = (sum(d * d for d in side) ** 0.5 / len(scores) for side in ([s.value - s.low for s in scores], [s.high - s.value for s in scores]))
    return Score(value, value - below, value + above, sum(s.n for s in scores))


class Told:
    """What is said of a mixture before, during and after a run."""

    def __init__(self, run: Run, mixture: Mixture, feed: Batches):
        self.run, self.mixture, self.feed = run, mixture, feed

    @property
    def draws(self) -> int:
        """Rows of the whole run, as far as that is known before."""
        return self.feed.total_rows or round(self.feed.steps * self.feed.rows_per_step)

    def planned(self) -> dict[str, Share]:
        """What each source will give to the whole run."""
        return self.mixture.shares(*divmod(self.draws, CHUNK))

    def so_far(self) -> dict[str, Share]:
        """What each source has given."""
        return self.mixture.shares(self.feed.number, self.feed.offset)

    def epochs(self) -> dict[str, float]:
        """The same as epochs of each source, for metrics.jsonl."""
        return {f"{name}/epochs": round(s.epochs, 4) for name, s in self.so_far().items()}

    def rule(self) -> str:
        """The rule, and what an epoch of the mixture is, in a sentence."""
        mix, o = self.run.data.mix, self.run.optim
        assert mix is not None
        rule = f"temperature {mix.temperature or 2:g}" if mix.rule == "temperature" else mix.rule
        cap = "" if mix.cap is None else f", sources capped at {mix.cap:,} rows"
        n = self.mixture.epoch_rows
        epoch = "" if n is None else f"; an epoch is {n:,} draws, as many as there are rows in all sources{', capped' if mix.cap else ''}"
        return f"mixture: {rule}{cap}{epoch}; {f'about {self.draws:,} draws' if o.steps is not None else f'{self.draws:,} draws'} in {self.feed.steps:,} steps:"
