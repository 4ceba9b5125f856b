"""Group-relative policy optimisation: several answers to each prompt, each judged against the others; no value function.

Shao et al., 2024, arXiv 2402.03300, equations 3 and 4: the clipped objective of PPO with the advantage (score - mean of the group) / its standard deviation
for all tokens of an answer, and a KL term to the reference in the loss, estimated by k3. ``baseline: leave_one_out`` is RLOO (Ahmadian et al., 2024, arXiv
2402.14740, equation 8). ``scale: no`` and ``average: tokens``: what Liu et al., 2025, arXiv 2503.20783 (Dr. GRPO) and Yu et al., 2025, arXiv 2503.14476 (DAPO)
found to be less biased by length and difficulty; ``clip_high`` is DAPO's.

How we differ:
1. ``average: tokens`` divides by the number of answer tokens of the step, as DAPO does; Dr. GRPO divides by a constant.
2. The reference's log-probabilities are read once a rollout, not in every step.
3. The log-probabilities that ratios start from are read again in training's own forward after sampling, and sampling is refused where it disagrees.
4. The standard deviation is the group's own, where TRL estimates it from n - 1 answers. An entropy bonus is averaged as the loss is.
5. With ``baseline: leave_one_out`` ratios are of tokens and the KL term stays in the loss; RLOO's are of whole answers, and its penalty is inside the reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from ..core import Answer, Base, Batch, Loss, LuthierError, Policy, Renders, Row, answered_batch
from ..nn import rewarded
from ..settings.plugins import Range, within_ranges
from .ppo import cannot_answer, collapse, enough_answers, policy_loss, something_rewarded


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Learn from rewards of several answers to each prompt, each judged against the others."""

    needs: ClassVar[frozenset[str]] = frozenset({"rollouts"})
    couples: ClassVar[bool] = False
    renders: ClassVar[Renders] = "prompts"

    rewards: dict[str, float] = field(default_factory=dict)
    """What is rewarded, source: weight. A source is a run or adapter trained with objective reward (runs/reward) or classify (runs/stars:good), a task (bleu),
    or your own Python function (./mine.py or ./mine.py:name)."""
    watch: tuple[str, ...] = ()
    """Scores that are only watched, sources as in rewards: an independent judge tells when the reward is being gamed."""
    pairs: tuple[str, ...] = ()
    """Held-out pairs on which reward models must beat chance. Default: what their own training found."""
    check_rewards: bool = True
    """Refuse to start with a reward model that does not beat chance on held-out pairs."""
    prompts: Annotated[int, Range(1)] = 16
    """Prompts of a rollout."""
    samples: Annotated[int, Range(2)] = 8
    """Answers to each prompt: the group."""
    max_new: Annotated[int, Range(1)] = 64
    """Longest answer, in tokens."""
    temperature: Annotated[float, Range(0, low_open=True)] = 1.0
    """Of sampling; what is learned is the policy at this temperature."""
    beginning: Annotated[int, Range(1)] = 16
    """Of raw text, so many first tokens are the prompt."""
    epochs: Annotated[int, Range(1)] = 1
    """Passes over each rollout."""
    minibatches: Annotated[int, Range(1)] = 1
    """Optimizer steps in each pass."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What an answer's score is compared with: the mean of its group, or of the others in it (RLOO)."""
    scale: bool = True
    """Divide by the group's standard deviation. It weighs prompts that are nearly always or never answered well more."""
    average: Literal["answers", "tokens"] = "answers"
    """answers: each answer counts once, however long; tokens: each token counts once."""
    kl: Annotated[float, Range(0)] = 0.04
    """Weight of the KL term (the paper's beta); 0: no reference is read."""
    clip: Annotated[float, Range(0, 1, low_open=True)] = 0.2
    """How far the probability ratio may move before it no longer pays."""
    clip_high: Annotated[float | None, Range(0, low_open=True)] = None
    """The same upwards, where it is to be wider. Default: as clip."""
    missing_eos_penalty: Annotated[float, Range(0)] = 0.0
    """Taken from the score of an answer that did not stop by itself."""
    entropy: Annotated[float, Range(0)] = 0.0
    """Weight of an entropy bonus."""
    stop_kl: Annotated[float, Range(0)] = 100.0
    """Stop where the divergence of a rollout exceeds so many nats an answer; 0: never."""
    stop_entropy: Annotated[float, Range(0, 1)] = 0.0
    """Stop where the entropy of a rollout falls below this share of the first one's; 0: never, since one right answer leaves nothing to choose."""
    stop_length: Annotated[float, Range(0, 1)] = 0.1
    """Stop where the mean length of answers falls below this share of the first rollout's; 0: never."""

    def __post_init__(self) -> None:
        within_ranges(self)
        enough_answers(self.prompts, self.samples, self.minibatches)
        if self.baseline == "leave_one_out" and self.scale:
            raise LuthierError("scale: the leave-one-out baseline is not divided by a deviation; set scale=no with baseline=leave_one_out")

    @property
    def terms(self) -> Mapping[str, float]:
        """One term, per answer or per token."""
        return {self.average: 1.0}

    @property
    def reads(self) -> frozenset[str]:
        """The reference, where it has a weight."""
        return frozenset({"reference"} if self.kl else ())

    def serves(self, kind: str) -> None:
        """Raise Incompatible for a kind of model that cannot write, LuthierError where nothing is rewarded."""
        cannot_answer(kind, "grpo")
        something_rewarded(self.rewards)

    def heads(self, base: Base) -> dict[str, nn.Module]:
        """None. Raises Incompatible for an encoder."""
        cannot_answer(base.anatomy.kind, "grpo")
        return {}

    def collate(self, rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
        """Prompts with their answers; what is known of each answer token beside them."""
        return answered_batch(rows, pad=pad, packed=packed)

    def parts(self, batch: Batch, rollout: int, *, shared: bool) -> list[Batch]:
        """The whole micro-batch at once."""
        return [batch]

    def rows(self, answers: Sequence[Answer], state: dict[str, Any], *, start: int | None) -> tuple[list[Row], dict[str, float]]:
        """One row an answer, with "old" log-probability, "advantage", "share" (1 / tokens of the answer) and "reference" of each token; facts for the log."""
        score_GK = torch.tensor([a.score - self.missing_eos_penalty * (a.stopped != "stop") for a in answers], dtype=torch.float64).view(-1, self.samples)
        advantage_S = rewarded.grouped(score_GK, baseline=self.baseline, scale=self.scale).flatten().tolist()
        rows = []
        for a, advantage in zip(answers, advantage_S, strict=True):
            n = len(a.ids)
            tokens = {"old": a.tokens["logp"], "advantage": np.full(n, advantage), "share": np.full(n, 1 / n if self.average == "answers" else 1.0)}
            rows.append(a.row(start, **tokens, **({"reference": a.tokens["reference"]} if self.kl else {})))
        alike = float((score_GK.std(1, correction=0) < 1e-9).double().mean())
        return rows, {"groups_alike": alike}

    def collapsed(self, facts: Mapping[str, float], first: Mapping[str, float]) -> str:
        """Why learning should stop, "" where it need not."""
        return collapse(facts, first, kl=self.stop_kl, entropy=self.stop_entropy, length=self.stop_length)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Sum over answers of their tokens' mean, or over all tokens."""
        x = batch.extras
        high = self.clip if self.clip_high is None else self.clip_high
        loss_N, metrics, logp_N = policy_loss(policy, batch, policy.hidden(batch), temperature=self.temperature, low=self.clip, high=high, entropy=self.entropy)
        if self.kl:
            loss_N = loss_N + self.kl * rewarded.divergence(logp_N, x["reference"], "k3")
        return Loss({self.average: (x["share"] * loss_N).sum()}, metrics)
