"""An objective with what keeps a model from forgetting: the loss of replayed text, and the divergence from what the model was before training.

Each is a term of its own, divided by its own count: "replay" by the replayed tokens of the step, "kl" by the tokens at which the divergence is taken. So a
step's replay does not weaken the objective however many tokens it has; it counts by its weight. The default weight, share / (1 - share), gives a replayed
token what a token of the data has, as if both were one text (Ibrahim et al., 2024, arXiv 2403.08763).

The divergence is KL(before || now) over the whole vocabulary, taken at the positions of tokens that are there, not sampled. This direction, because
forgetting is what it measures: on text that the model itself would have written, the rise of the cross-entropy is exactly KL(before || now), and wherever the
old model gave probability the new one must. It is the distillation term of learning without forgetting (Li & Hoiem, 2016, arXiv 1606.09282, equation 2), which
takes it on the inputs of the new task (kl_on: trained). The other direction, KL(now || before), belongs where the model samples (PPO). How we differ:
temperature 1 instead of 2, and on replayed text where there is some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, is_grad_enabled, nn

from ..core import Batch, Coupled, Loss, Objective, Row, scored
from ..data.replay import KL, REPLAY
from ..nn.kl import Head, hidden_kl
from ..policy import Policy


class Kept:
    """An objective, and beside it the terms "replay" and "kl"; for the training loop only, which what is measured does not see."""

    def __init__(self, own: Objective, learner: Objective | None = None, *, weight: float = 0.0, kl: float = 0.0):
        """``learner``: the objective of replayed text, whose unit is the token; ``weight`` of it; ``kl``: of the divergence, 0 for none."""
        self.own, self.learner = own, learner
        self.terms: Mapping[str, float] = {**own.terms} | ({REPLAY: weight} if learner is not None else {}) | ({KL: kl} if kl else {})
        self.needs, self.couples, self.renders = own.needs, own.couples, own.renders

    def heads(self, base: Any) -> dict[str, nn.Module]:
        """The objective's own."""
        return self.own.heads(base)

    def collate(self, rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
        """The objective's own rows; replayed ones are batched by their feed."""
        return self.own.collate(rows, pad=pad, packed=packed)

    def couple(self, policy: Any, batches: Sequence[Batch], mean: Callable[[float], float] = float) -> None:
        """Show the objective its own batches of a step."""
        cast(Coupled, self.own).couple(policy, [b for b in batches if REPLAY not in b.units], mean)

    def loss(self, policy: Any, batch: Batch) -> Loss:
        """The objective's sums, or of replayed text its own; and of both the divergence, where it is counted."""
        seen = _Seen(policy, batch)
        if REPLAY in batch.units:
            assert self.learner is not None
            out = Loss({REPLAY: self.learner.loss(cast(Any, seen), batch).sums["tokens"]})
        else:
            out = self.own.loss(cast(Any, seen), batch)
        if KL in batch.units and KL in self.terms:
            assert seen.states is not None
            out.sums[KL] = from_before(policy, batch, seen.states).sum()
        return out

    def own_loss(self, terms: Mapping[str, float]) -> float:
        """The objective's part of a step's loss, from the means of all terms."""
        return sum(w * terms[k] for k, w in self.own.terms.items() if k in terms)


class _Seen:
    """A policy that remembers the hidden states an objective reads of a batch, so that the divergence needs no second forward of it."""

    def __init__(self, policy: Any, batch: Batch):
        self.policy, self.batch = policy, batch
        self.states: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def hidden(self, batch: Batch, **how: Any) -> Tensor:
        """As the policy's; a forward of the reference, which has no gradients, is not what is remembered."""
        states: Tensor = self.policy.hidden(batch, **how)
        if batch is self.batch and self.states is None and is_grad_enabled():
            self.states = states
        return states


def from_before(policy: Policy, batch: Batch, hidden_BTD: Tensor) -> Tensor:
    """(N,) fp32 KL(before || now), in nats, of the next token at every scored position of a batch; differentiable in the states of now."""
    lm, rule = policy.lm, policy.base.anatomy
    with policy.reference():
        before_ND, _, _ = scored(batch, policy.hidden(batch))
        before_ND = rule.before_head(policy.lm, before_ND)
        head: Any = policy.lm.get_output_embeddings()
        weight, bias = (head.weight.detach(), head.bias) if type(head).forward is nn.Linear.forward else (None, None)
    now_ND = rule.before_head(lm, scored(batch, hidden_BTD)[0])
    own: Any = lm.get_output_embeddings()
    return hidden_kl(
        now_ND,
        before_ND,
        own,
        _head(policy, weight, bias),
        vocabulary=lm.config.get_text_config().vocab_size,
        scale=rule.head_scale,
        cap=rule.head_cap,
        **_frozen(own, now_ND),
    )


def _frozen(head: Any, h_ND: Tensor) -> dict[str, Tensor | None]:
    """Weight and bias of a head that is one linear, in the states' dtype."""
    if type(head).forward is not nn.Linear.forward:
        return {}
    weight = head.weight
    return {"weight": weight if weight.dtype == h_ND.dtype else weight.to(h_ND.dtype), "bias": head.bias}


def _head(policy: Policy, weight: Tensor | None, bias: Tensor | None) -> Head:
    """The head before training: its own weight where it is one linear, else asked with the delta off."""
    if weight is not None:
        return lambda h: nn.functional.linear(h, weight.to(h.dtype), bias)

    def ask(h: Tensor) -> Tensor:
        with policy.reference():
            return policy.lm.get_output_embeddings()(h)

    return ask
