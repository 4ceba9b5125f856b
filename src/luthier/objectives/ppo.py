"""Proximal policy optimisation: learn from rewards of the model's own answers, held to what the model was by a penalty on their divergence.

Schulman et al., 2017, arXiv 1707.06347 (the clipped objective); Ziegler et al., 2019, arXiv 1909.08593 (language models, the KL penalty inside the reward);
Stiennon et al., 2020, arXiv 2009.01325; Ouyang et al., 2022, arXiv 2203.02155 (the reward, equation 2, with pretraining gradients mixed in: PPO-ptx).

The reward of an answer's last token is its score, and of every token -kl times its log-ratio to the reference (k1); advantages by GAE, whitened over the
rollout.
Scores come from reward models, classifiers, tasks or Python functions, weighted and added. The reference is what the policy is before training: the base, or,
where ``method.from`` names one, the delta that training starts from.

How we differ:
1. Policy, reference, value and reward models are voices of one base (voices.py), and the losses of policy and value each take a forward and a backward of
   their own, so that their activations are never in memory together. Where the value shares the policy's hidden states it is one forward.
2. Scores are divided by their running standard deviation over all rollouts so far, without moving their mean (``scale_rewards``).
3. The log-probabilities that ratios start from are read again in training's own forward after sampling, and sampling is refused where it disagrees.
4. While only the value learns it is not clipped: there is nothing yet that it could mislead.

What is logged and what kl_target holds is k3's estimate of the divergence, which is never negative. As a reward k3 is no penalty: where k1's gradient is that
of KL(policy || reference), k3's is that of KL(policy || reference) - KL(reference || policy), which vanishes near the reference and then points away from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..core import Answer, Base, Batch, Incompatible, Loss, LuthierError, Policy, Renders, Row, answered_batch, next_token_loss, scored, token_values
from ..nn import rewarded
from ..settings.plugins import Range, within_ranges

WARMING = "warming"  # a unit of batches from which only the value learns


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Learn from rewards of the model's own answers, with a value function and a KL penalty."""

    needs: ClassVar[frozenset[str]] = frozenset({"rollouts"})
    couples: ClassVar[bool] = False
    renders: ClassVar[Renders] = "prompts"
    reads: ClassVar[frozenset[str]] = frozenset({"reference", "value"})

    rewards: dict[str, float] = field(default_factory=dict)
    """What is rewarded, source: weight. A source is a run or adapter trained with objective reward (runs/reward) or classify (runs/stars:good), a task (bleu),
    or your own Python function (./mine.py or ./mine.py:name)."""
    watch: tuple[str, ...] = ()
    """Scores that are only watched, sources as in rewards: an independent judge tells when the reward is being gamed."""
    pairs: tuple[str, ...] = ()
    """Held-out pairs on which reward models must beat chance. Default: what their own training found."""
    check_rewards: bool = True
    """Refuse to start with a reward model that does not beat chance on held-out pairs."""
    prompts: Annotated[int, Range(1)] = 64
    """Prompts of a rollout."""
    samples: Annotated[int, Range(1)] = 1
    """Answers to each prompt."""
    max_new: Annotated[int, Range(1)] = 64
    """Longest answer, in tokens."""
    temperature: Annotated[float, Range(0, low_open=True)] = 1.0
    """Of sampling; what is learned is the policy at this temperature."""
    beginning: Annotated[int, Range(1)] = 16
    """Of raw text, so many first tokens are the prompt."""
    epochs: Annotated[int, Range(1)] = 4
    """Passes over each rollout."""
    minibatches: Annotated[int, Range(1)] = 4
    """Optimizer steps in each pass."""
    kl: Annotated[float, Range(0)] = 0.05
    """Coefficient of the KL penalty; where kl_target is given, the first one."""
    kl_target: Annotated[float | None, Range(0, low_open=True)] = None
    """Nats an answer at which the coefficient is held by adapting it. Default: it is fixed."""
    kl_horizon: Annotated[int, Range(1)] = 2000
    """Answers over which the coefficient adapts: the fewer, the faster."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """What the penalty counts. k1: the log-ratio itself, as the papers have it; k3: never negative, and as a reward hardly a penalty, for comparison only."""
    clip: Annotated[float, Range(0, 1, low_open=True)] = 0.2
    """How far the probability ratio may move before it no longer pays."""
    value: Literal["auto", "own", "shared"] = "auto"
    """Where values come from. own: a second delta of the same method; shared: a linear head that reads the policy's hidden states and does not move them.
    auto: own, unless the method trains weights of the base."""
    value_weight: Annotated[float, Range(0, low_open=True)] = 0.5
    """Weight of the value loss."""
    value_clip: Annotated[float, Range(0)] = 0.2
    """How far a value may move from what it was before it no longer pays; 0: no such limit. While only the value learns there is none."""
    value_warmup: Annotated[int, Range(0)] = 1
    """Rollouts in which only the value learns."""
    discount: Annotated[float, Range(0, 1)] = 1.0
    """Of a reward one token later (gamma)."""
    trace: Annotated[float, Range(0, 1)] = 0.95
    """How far advantages look ahead (lambda of GAE): 0 trusts the value, 1 the rewards."""
    whiten: bool = True
    """Give the advantages of a rollout mean 0 and variance 1."""
    scale_rewards: bool = True
    """Divide scores by their running standard deviation."""
    missing_eos_penalty: Annotated[float, Range(0)] = 0.0
    """Taken from the score of an answer that did not stop by itself."""
    entropy: Annotated[float, Range(0)] = 0.0
    """Weight of an entropy bonus."""
    ptx: Annotated[float, Range(0)] = 0.0
    """Weight of next-token learning on the text of ptx_data, mixed into every step; 0: none."""
    ptx_data: tuple[str, ...] = ()
    """Raw text or conversations for ptx."""
    ptx_tokens: Annotated[int, Range(1)] = 2048
    """Tokens of it in each step."""
    stop_kl: Annotated[float, Range(0)] = 100.0
    """Stop where the divergence of a rollout exceeds so many nats an answer; 0: never."""
    stop_entropy: Annotated[float, Range(0, 1)] = 0.03
    """Stop where the entropy of a rollout falls below this share of the first one's; 0: never."""
    stop_length: Annotated[float, Range(0, 1)] = 0.1
    """Stop where the mean length of answers falls below this share of the first rollout's; 0: never."""

    def __post_init__(self) -> None:
        within_ranges(self)
        enough_answers(self.prompts, self.samples, self.minibatches)
        if self.ptx and not self.ptx_data:
            raise LuthierError("ptx_data: must name text for ptx to learn; or set ptx to 0")
        if self.ptx_data and not self.ptx:
            raise LuthierError("ptx_data: is named, and ptx, its weight, is 0; set ptx, for example 0.5")

    @property
    def terms(self) -> Mapping[str, float]:
        """Per answer token, but for the text of PPO-ptx, which is per its own."""
        return {"tokens": 1.0, "values": self.value_weight} | ({"text": self.ptx} if self.ptx else {})

    def serves(self, kind: str) -> None:
        """Raise Incompatible for a kind of model that cannot write, LuthierError where nothing is rewarded."""
        cannot_answer(kind, "ppo")
        something_rewarded(self.rewards)

    def heads(self, base: Base) -> dict[str, nn.Module]:
        """None that is saved: the value's belongs to its voice. Raises Incompatible for an encoder."""
        cannot_answer(base.anatomy.kind, "ppo")
        return {}

    def collate(self, rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
        """Prompts with their answers; what is known of each answer token beside them."""
        return answered_batch(rows, pad=pad, packed=packed)

    def parts(self, batch: Batch, rollout: int, *, shared: bool) -> list[Batch]:
        """What is learned of a micro-batch: the policy's part and the value's, each with units of its own; only the value's while it warms up.

        ``shared``: the value reads the policy's hidden states, so both are one part.
        """
        n = batch.units["tokens"]
        if rollout < self.value_warmup:
            return [replace(batch, units={"values": n, WARMING: n})]
        value = replace(batch, units={"values": n})
        return [replace(batch, units={"tokens": n, "values": n})] if shared else [replace(batch, units={"tokens": n}), value]

    # --- from answers to rows ---------------------------------------------------------------------------------------

    def rows(self, answers: Sequence[Answer], state: dict[str, Any], *, start: int | None) -> tuple[list[Row], dict[str, float]]:
        """One row an answer, with "old" log-probability, "advantage", "return" and "value" of each token; and facts for the log.

        ``state`` keeps the KL coefficient and the scale of scores from rollout to rollout.
        """
        coefficient = state.setdefault("kl", self.kl)
        score_S = np.array([a.score - self.missing_eos_penalty * (a.stopped != "stop") for a in answers])
        scale = running_scale(state, score_S) if self.scale_rewards else 1.0
        padded = {
            k: torch.nn.utils.rnn.pad_sequence([torch.from_numpy(a.tokens[k]) for a in answers], batch_first=True) for k in ("logp", "reference", "value")
        }
        length_S = torch.tensor([len(a.ids) for a in answers])
        mask_ST = torch.arange(padded["logp"].shape[1]) < length_S[:, None]
        kl_ST = rewarded.divergence(padded["logp"], padded["reference"], self.kl_estimator) * mask_ST
        reward_ST = -coefficient * kl_ST
        reward_ST[torch.arange(len(answers)), length_S - 1] += torch.from_numpy(score_S / scale).float()
        advantage_ST, return_ST = rewarded.gae(reward_ST, padded["value"], mask_ST, discount=self.discount, trace=self.trace)
        explained = rewarded.explained(padded["value"][mask_ST], return_ST[mask_ST])
        if self.whiten:
            advantage_ST = rewarded.whiten(advantage_ST, mask_ST)
        rows = []
        for a, advantage_T, return_T in zip(answers, advantage_ST.numpy(), return_ST.numpy(), strict=True):
            n = len(a.ids)
            rows.append(a.row(start, old=a.tokens["logp"], advantage=advantage_T[:n], returns=return_T[:n], value=a.tokens["value"]))
        facts = {"kl_coefficient": coefficient, "penalty": float((coefficient * kl_ST).sum()) / len(answers), "scale": scale, "value_explains": explained}
        if self.kl_target is not None:
            kl = float((rewarded.divergence(padded["logp"], padded["reference"], "k3") * mask_ST).sum()) / len(answers)
            state["kl"] = rewarded.next_coefficient(coefficient, kl, target=self.kl_target, answers=len(answers), horizon=self.kl_horizon)
        return rows, facts

    def collapsed(self, facts: Mapping[str, float], first: Mapping[str, float]) -> str:
        """Why learning should stop, "" where it need not."""
        return collapse(facts, first, kl=self.stop_kl, entropy=self.stop_entropy, length=self.stop_length)

    # --- the loss ---------------------------------------------------------------------------------------------------

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Sums over answer tokens of what the batch's units name: the policy's clipped loss, the value's, or both; or of PPO-ptx's text."""
        if "text" in batch.units:
            return Loss({"text": next_token_loss(policy, batch).sums["tokens"]})
        x, hidden_BTD = batch.extras, None
        out = Loss({})
        if "tokens" in batch.units:
            hidden_BTD = policy.hidden(batch)
            how = {"temperature": self.temperature, "low": self.clip, "high": self.clip, "entropy": self.entropy}
            policy_N, metrics, _ = policy_loss(policy, batch, hidden_BTD, **how)
            out = Loss({"tokens": policy_N.sum()}, metrics)
        if "values" in batch.units:
            if policy.voices["value"].route != "value" and hidden_BTD is None:
                with torch.no_grad():
                    hidden_BTD = policy.hidden(batch)
            value_N = token_values(policy, batch, hidden_BTD)
            clip = 0.0 if WARMING in batch.units else self.value_clip
            out.sums["values"] = rewarded.clipped_value(value_N, x["value"], x["returns"], clip=clip).sum()
            count = value_N.new_tensor(float(len(value_N)))
            out.metrics |= {"value": (value_N.sum(), count), "returns": (x["returns"].sum(), count)}
        return out


# --- what GRPO shares ------------------------------------------------------------------------------------------------


def policy_loss(
    policy: Policy, batch: Batch, hidden_BTD: Tensor, *, temperature: float, low: float, high: float, entropy: float
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], Tensor]:
    """(N,) clipped loss of each answer token, less its entropy bonus; what is seen of them; (N,) their log-probabilities."""
    hidden_ND, target_N, _ = scored(batch, hidden_BTD)
    got = policy.score(hidden_ND, target_N, temperature=temperature, want=("logp", "entropy") if entropy else ("logp",))
    old_N = batch.extras["old"]
    loss_N, held_N = rewarded.clipped_policy(got["logp"], old_N, batch.extras["advantage"], low=low, high=high)
    count = old_N.new_tensor(float(len(old_N)))
    moved_N = rewarded.divergence(old_N, got["logp"].detach(), "k3")
    metrics = {"clipped": (held_N.float().sum(), count), "moved": (moved_N.sum(), count)}
    if entropy:
        metrics["entropy"] = (got["entropy"].sum(), count)
        loss_N = loss_N - entropy * got["entropy"]
    return loss_N, metrics, got["logp"]


def enough_answers(prompts: int, samples: int, minibatches: int) -> None:
    """Raise LuthierError where a pass has more optimizer steps than answers."""
    if minibatches > prompts * samples:
        raise LuthierError(
            f"minibatches: {minibatches} steps a pass need at least as many answers, and a rollout has {prompts * samples} (prompts={prompts} times "
            f"samples={samples}); set minibatches to at most that"
        )


def cannot_answer(kind: str, objective: str) -> None:
    """Raise Incompatible for an encoder."""
    if kind == "encoder":
        raise Incompatible(f"objective {objective}: an encoder reads text and writes none, so it has no answers to learn from; use classify or reward")


def something_rewarded(rewards: Mapping[str, float]) -> None:
    """Raise LuthierError where there is no source of reward."""
    if not rewards:
        raise LuthierError(
            "objective.rewards: names nothing; say what is rewarded, source: weight, for example objective.rewards={runs/reward: 1.0} (a reward model), "
            "{bleu: 1.0} (a task) or {./mine.py: 1.0} (your function reward(prompt, answer, row))"
        )


def running_scale(state: dict[str, Any], score_S: np.ndarray) -> float:
    """The standard deviation of all scores so far, these included (Welford, 1962); 1 where they do not vary."""
    n, mean, square = state.get("scores", (0, 0.0, 0.0))
    for x in score_S.tolist():
        n += 1
        gap = x - mean
        mean += gap / n
        square += gap * (x - mean)
    state["scores"] = (n, mean, square)
    return math.sqrt(square / n) if n and square / n > 1e-12 else 1.0


def collapse(facts: Mapping[str, float], first: Mapping[str, float], *, kl: float, entropy: float, length: float) -> str:
    """Why learning should stop, "" where it need not."""
    if kl and facts.get("kl", 0.0) > kl:
        return f"the policy is {facts['kl']:.1f} nats an answer away from its reference, more than stop_kl={kl:g}; raise objective.kl or lower optim.lr"
    if entropy and facts["entropy"] < entropy * first["entropy"]:
        return (
            f"the entropy fell to {facts['entropy']:.3f} nats a token from {first['entropy']:.3f}: the policy says one thing only; raise objective.kl or "
            "objective.entropy, or lower optim.lr"
        )
    if length and facts["answer_tokens"] < length * first["answer_tokens"]:
        return (
            f"answers shrank to {facts['answer_tokens']:.1f} tokens from {first['answer_tokens']:.1f}; is brevity what is rewarded? Raise objective.kl, or set "
            "objective.stop_length=0 where short answers are meant"
        )
    return ""
