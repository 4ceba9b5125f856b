"""A run that learns from its own answers: its feed, what is measured on held-out prompts, and the watch for rewards that are gamed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import voices
from ..core import Answer, LuthierError, Row
from ..data.prepare import Prepared
from ..data.render import stop_ids
from ..data.rollout import Rollouts, Sampling, answered
from ..forgetting.replaying import steady
from ..generating.decoding import cache_tokens
from ..measuring.evaluate import Score
from ..nn import intervals
from ..nn.rewarded import divergence
from ..policy import Policy
from ..settings.run import Run
from .rewards import Judge, proven

Say = Callable[[str], None]


def feed_of(run: Run, policy: Policy, prepared: Prepared, *, packed: bool, say: Say, tick: Callable[[str, int, int], None]) -> Rollouts:
    """The feed: prompts, the sources of reward, and what is said of them. Raises LuthierError for a reward model that does not beat chance."""
    objective: Any = run.objective
    judge = Judge(objective.rewards, objective.watch, policy)
    for name in objective.rewards if objective.check_rewards else ():
        if line := proven(name, judge, run):
            say(line)
    base, added = voices.resident_bytes(policy)
    roles = 1 + len(policy.voices) + ("reference" in objective.reads)
    copies = f"; {roles} copies of the model would take {_megabytes(roles * base)}" if roles > 1 else ""
    say(f"one base of {_megabytes(base)} in memory for {_listed(['policy', *_roles(policy, objective)])}, which add {_megabytes(added)}{copies}")
    return Rollouts(
        prepared.train,
        policy,
        objective,
        judge,
        sampling(run, policy),
        pad=policy.pad,
        packed=packed,
        micro_tokens=run.optim.micro_tokens,
        epochs=run.optim.epochs,
        steps=run.optim.steps,
        seed=run.seed,
        beside=steady(run, policy, tuple(objective.ptx_data), objective.ptx_tokens, packed=packed, say=say) if getattr(objective, "ptx", 0) else None,
        tick=tick,
    )


def sampling(run: Run, policy: Policy) -> Sampling:
    """How this run samples."""
    objective: Any = run.objective
    tokenizer, anatomy = policy.base.tokenizer, policy.base.anatomy
    return Sampling(
        objective.max_new,
        objective.temperature,
        stop_ids(tokenizer, run.model.template, kind=anatomy.kind),
        run.seed,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        anatomy.decoder_start if anatomy.kind == "encoder_decoder" else None,
        cache_tokens(policy) if policy.device.type == "cpu" else None,  # the same bits again on the CPU, however much memory is free then
    )


def _roles(policy: Policy, objective: Any) -> list[str]:
    rewards = sum(name.startswith("reward") for name in policy.voices)
    return [
        *(["reference"] if "reference" in objective.reads else []),
        *(["value"] if "value" in policy.voices else []),
        *([f"{rewards} reward model{'s' if rewards > 1 else ''}"] if rewards else []),
    ]


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _megabytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


# --- held-out prompts ------------------------------------------------------------------------------------------------


def held_out(run: Run, policy: Policy, judge: Judge, prompts: Sequence[Row], *, packed: bool) -> tuple[dict[str, Score], list[Answer]]:
    """Scores of one sampled answer to each held-out prompt, at the temperature of training and always with the same random numbers; and the answers."""
    objective: Any = run.objective
    training = policy.training
    policy.eval()
    try:
        how = replace(sampling(run, policy), seed=run.seed + 7919)  # other random numbers than training's
        layout: dict[str, Any] = {"pad": policy.pad, "packed": packed, "tokens": run.optim.micro_tokens, "temperature": objective.temperature}
        wants = objective.reads & {"reference"}
        answers, _ = answered(policy, prompts, 1, how, judge, numbers=range(len(prompts)), wants=wants, layout=layout)
    finally:
        policy.train(training)
    columns: dict[str, list[float]] = {"reward": [a.score for a in answers]}
    names = list(answers[0].scores)
    columns |= {column(n): [a.scores[n] for a in answers] for n in (names if len(names) > 1 else [])}
    columns["answer_tokens"] = [float(len(a.ids)) for a in answers]
    if "reference" in answers[0].tokens:
        columns["kl"] = [float(_divergence(a)) for a in answers]
    return {name: _score(intervals.mean(np.array(v), seed=run.seed)) for name, v in columns.items()}, answers


def column(name: str) -> str:
    """What a source's scores are called in metrics."""
    return name if name.startswith("watch_") else f"reward_{name}"


def _divergence(a: Answer) -> float:
    import torch

    return float(divergence(torch.from_numpy(a.tokens["logp"]), torch.from_numpy(a.tokens["reference"]), "k3").sum())


def _score(found: intervals.Interval) -> Score:
    return Score(found.value, found.low, found.high, found.n)


# --- is the reward being gamed? --------------------------------------------------------------------------------------


@dataclass
class Watch:
    """The rollouts of a run, and what they say when the reward rises and what it stands for does not.

    Goodhart's law in preference learning: Gao et al., 2022, arXiv 2210.10760; length as the usual way out: Singhal et al., 2023, arXiv 2310.03716.

    The last quarter of the rollouts is compared with the first, again after every rollout, so a difference has to be large beside its noise: at four standard
    errors a score that only fluctuates is reported in 2 of 100 runs of 100 rollouts, at two in 47 (simulated).
    """

    rollouts: list[dict[str, Any]] = field(default_factory=list)
    raised: set[str] = field(default_factory=set)

    FEWEST = 10  # rollouts before anything is said
    ERRORS = 4.0  # standard errors that a difference has to exceed

    @classmethod
    def before(cls, metrics: Path, step: int) -> Watch:
        """What had been seen up to a step, from what the run has logged (metrics.jsonl): where one that goes on begins."""
        out = cls()
        for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
            logged = json.loads(line) if line.endswith("}") else {"event": "cut off"}
            if logged["event"] == "rollout" and logged["step"] <= step:
                out.see(logged)
        return out

    def see(self, facts: dict[str, Any]) -> list[str]:
        """Take one rollout; what to warn of, each thing once."""
        self.rollouts.append(facts)
        if len(self.rollouts) < self.FEWEST or not self._rose("reward"):
            return []
        said = {}
        for name in (n for n in facts if n.startswith("watch_")):
            if self._fell(name):
                said[name] = f"the reward rose and {name.removeprefix('watch_')} fell, {self._moved(name)}: the policy is learning to please the reward only"
        first, last = self._ends("answer_tokens")
        if last.mean() > 1.5 * first.mean() and np.mean([r["reward_by_length"] for r in self.rollouts[-len(last) :]]) > 0.3:
            said["length"] = (
                f"the reward rose and so did length, {self._moved('answer_tokens')} tokens, and longer answers score higher: it may be length that pays"
            )
        first, last = self._ends("repetition")
        if last.mean() > first.mean() + 0.1:
            said["repetition"] = (
                f"the reward rose and answers repeat themselves, {self._moved('repetition')} of their runs of four tokens: look at samples.jsonl"
            )
        new = {k: v for k, v in said.items() if k not in self.raised}
        self.raised |= set(new)
        return [f"rollout {len(self.rollouts)}: {v}" for v in new.values()]

    def _ends(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        series = np.array([r[name] for r in self.rollouts])
        n = max(self.FEWEST // 2, len(series) // 4)
        return series[:n], series[-n:]

    def _gap(self, name: str) -> tuple[float, float]:
        """How far the last rollouts are from the first, and how far they could be by chance."""
        first, last = self._ends(name)
        return float(last.mean() - first.mean()), self.ERRORS * math.sqrt(first.var(ddof=1) / len(first) + last.var(ddof=1) / len(last))

    def _rose(self, name: str) -> bool:
        gap, noise = self._gap(name)
        return gap > noise

    def _fell(self, name: str) -> bool:
        gap, noise = self._gap(name)
        return gap < -noise

    def _moved(self, name: str) -> str:
        first, last = self._ends(name)
        return f"from {first.mean():.3g} to {last.mean():.3g}"


def draw(rollouts: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Reward and watched scores, divergence, length, repetition and entropy over the rollouts, as a picture; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # without pyplot, so no window is opened and no backend is chosen for others
    except ImportError:
        return False
    if not rollouts:
        raise LuthierError("there is no rollout to draw")
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    x = [r["rollout"] for r in rollouts]
    watched = [n for n in rollouts[0] if n.startswith("watch_")]
    panels = [("reward", ["reward"]), ("watched scores", watched), ("KL to the reference, nats an answer", ["kl"]), ("entropy, nats a token", ["entropy"]),
              ("tokens an answer", ["answer_tokens"]), ("repeated runs of 4 tokens, share", ["repetition"])]  # fmt: skip
    for ax, (title, names) in zip(axes, panels, strict=True):
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("rollout", fontsize=8)
        shown = [n for n in names if n in rollouts[0]]
        for name in shown:
            ax.plot(x, [r[name] for r in rollouts], label=name.removeprefix("watch_"), linewidth=1.2)
        if title == "reward":
            low, high = ([r["reward"] + s * r["reward_std"] for r in rollouts] for s in (-1, 1))
            ax.fill_between(x, low, high, alpha=0.15, linewidth=0)
        if len(shown) > 1:
            ax.legend(fontsize=7)
        if not shown:
            ax.text(0.5, 0.5, "nothing is watched" if title.startswith("watched") else "not read", ha="center", va="center", transform=ax.transAxes, fontsize=9)
        ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    return True
