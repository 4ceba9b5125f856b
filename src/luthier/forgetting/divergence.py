"""How far a model has moved: the mean KL(before || now) of the next token on fixed text, in nats.

Before is what the policy was before training. Where the delta can be switched off it is asked again, and the divergence is exact: over the whole
vocabulary. Where the base's own weights are trained, or training starts from a saved delta, it is gone after the first step; then its log-probabilities are
kept at the scored tokens, in float32 and BYTES of memory at most: all of the vocabulary where that fits, else of the likeliest tokens, the others as one
event, which makes the number a lower bound (nn/kl.py). How low is measured in docs/forgetting.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..core import Batch, Row, scored
from ..nn.kl import coarse, coarse_divergence, divergence
from ..nn.logprob import chunks, shape_logits
from ..policy import Policy
from ..references import as_it_was, trains_base

BYTES = 64 << 20
PER_TOKEN = 8  # bytes of a kept log-probability and its token
Batches = Callable[[Sequence[Row]], Iterator[Batch]]


class Moved:
    """The divergence of a policy from what it is now, while it trains. Made before the first step."""

    def __init__(self, policy: Policy, batches: Callable[[], Iterator[Batch]], *, started: bool, budget: int = BYTES):
        """``batches``: the fixed text, anew at every call; ``started``: training starts from a saved delta; ``budget``: bytes to keep."""
        self.policy, self.batches, self.started = policy, batches, started
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = None  # by batch: this rank's
        if started or trains_base(policy):
            self.kept = self._keep(budget)

    @property
    def known(self) -> int | None:
        """Of how many tokens the probability before is known at each position; None: of all, because before can be asked."""
        return None if self.kept is None else self.most

    @torch.no_grad()
    def _keep(self, budget: int) -> dict[int, tuple[Tensor, Tensor]]:
        n = sum(sum(b.units.values()) for b in self.batches())
        k = max(1, budget // (PER_TOKEN * max(1, n)))
        out = {}
        self.most = min(k, vocabulary(self.policy))
        with as_it_was(self.policy, self.started):
            for i, batch in self._own():
                parts = [coarse(logq_nV, k) for logq_nV in said(self.policy, states(self.policy, batch))]
                out[i] = (torch.cat([p.cpu() for p, _ in parts]), torch.cat([t.cpu() for _, t in parts]))
        return out

    def _own(self) -> Iterator[tuple[int, Batch]]:
        """This rank's share of the batches, with their numbers."""
        place = self.policy.place
        return ((i, batch) for i, batch in enumerate(self.batches()) if i % place.size == place.rank)

    @torch.no_grad()
    def measure(self) -> tuple[float, int]:
        """(mean KL in nats, over how many tokens). The policy is put into evaluation mode and back."""
        policy, own = self.policy, []
        training = policy.training
        policy.eval()
        try:
            for i, batch in self._own():
                now_ND = states(policy, batch)
                kl = self._asked(batch, now_ND) if self.kept is None else self._known(now_ND, *self.kept[i])
                own.append((i, sum(float(x.double().sum()) for x in kl), len(now_ND)))
        finally:
            policy.train(training)
        told = sorted(part for some in policy.place.gather(own, "divergence") for part in some)
        n = sum(count for _, _, count in told)
        return max(0.0, sum(kl for _, kl, _ in told)) / n, n

    def _asked(self, batch: Batch, now_ND: Tensor) -> Iterator[Tensor]:
        policy = self.policy
        with policy.reference():
            was_ND = states(policy, batch)
        for c in chunks(len(now_ND), vocabulary(policy)):
            logp_nV = next(said(policy, now_ND[c]))
            with policy.reference():
                yield divergence(logp_nV, next(said(policy, was_ND[c])))

    def _known(self, now_ND: Tensor, logq_Nk: Tensor, token_Nk: Tensor) -> Iterator[Tensor]:
        first = 0
        for logp_nV in said(self.policy, now_ND):
            here = slice(first, first + len(logp_nV))
            first = here.stop
            yield coarse_divergence(logp_nV, logq_Nk[here].to(logp_nV.device), token_Nk[here].to(logp_nV.device))


def vocabulary(policy: Policy) -> int:
    """How many tokens the head scores."""
    return int(policy.lm.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]


def states(policy: Policy, batch: Batch) -> Tensor:
    """(N, D) what the head reads at the scored positions of a batch."""
    return policy.base.anatomy.before_head(policy.lm, scored(batch, policy.hidden(batch))[0])


def said(policy: Policy, states_ND: Tensor) -> Iterator[Tensor]:
    """(n, V) fp32 log-probabilities of the next token, a chunk of positions at a time."""
    head, rule = policy.lm.get_output_embeddings(), policy.base.anatomy
    for c in chunks(len(states_ND), vocabulary(policy)):
        yield shape_logits(head(states_ND[c]), rule.head_scale, rule.head_cap).log_softmax(-1)
