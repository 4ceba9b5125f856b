"""Direct preference optimisation: the better of two answers made likelier than the worse, against a reference, with no reward model and no sampling.

Rafailov et al., 2023, arXiv 2305.18290, equation 7: -log sigmoid(beta (log-ratio of the better - log-ratio of the worse)), a log-ratio being
log p(answer | prompt) less that of the reference. ``loss_kind: ipo``: Azar et al., 2023, arXiv 2310.12036, equation 17. ``label_smoothing``: Mitchell, 2023,
"conservative DPO". A ranking of K answers gives all its pairs, weighted 1 / C(K, 2), as a reward model reads it: beta times the log-ratio is a reward.

The reference is what the policy is before training: the base, or, where ``method.from`` names one, the delta that training starts from.

How we differ:
1. The end-of-turn token belongs to the answer, and what the template writes behind it does not.
2. ``loss_kind: ipo`` compares log-probabilities of whole answers, as the paper writes them; other programs divide by their lengths, which
   ``length_normalised`` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core import Base, Batch, Incompatible, Loss, LuthierError, Policy, Renders, Row, example_logps, joined_batch, reference_logps
from ..nn import preferences
from ..settings.plugins import Range, within_ranges
from .reward import by_row


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Learn from pairs directly, against a reference."""

    terms: ClassVar[Mapping[str, float]] = {"rankings": 1.0}
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    couples: ClassVar[bool] = False
    renders: ClassVar[Renders] = "pairs"

    beta: Annotated[float, Range(0, low_open=True)] = 0.1
    """How closely the policy is held to the reference: the larger, the closer."""
    loss_kind: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO's. ipo: a squared distance to 1 / (2 beta), which does not grow without bound where all pairs agree."""
    label_smoothing: Annotated[float, Range(0, 0.5)] = 0.0
    """Share of the pairs that are taken to be labelled the wrong way round (sigmoid only)."""
    length_normalised: bool = False
    """Divide each answer's log-ratio by its number of tokens, so that long answers do not weigh more; beta is then larger, 1 to 10."""
    reference: Literal["cached", "live"] = "cached"
    """cached: the reference's log-probabilities are computed once, before training, and kept on disk; live: at each step, with the delta off."""

    def __post_init__(self) -> None:
        within_ranges(self)
        if self.label_smoothing and self.loss_kind != "sigmoid":
            raise LuthierError(f"label_smoothing: belongs to loss_kind=sigmoid, and loss_kind is {self.loss_kind}; leave one of the two out")

    def serves(self, kind: str) -> None:
        """Raise Incompatible for a kind of model that cannot write."""
        cannot_write(kind, "dpo")

    def heads(self, base: Base) -> dict[str, nn.Module]:
        """No head of its own: the model's. Raises Incompatible for an encoder."""
        self.serves(base.anatomy.kind)
        return {}

    def collate(self, rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
        """Every answer once, and the pairs among them; tied ones are left out."""
        return pairs_batch(rows, pad=pad, packed=packed)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Sum over the rankings. Metrics are of the implicit rewards, beta times the log-ratio."""
        x = batch.extras
        ratio_S, logp_S = self.ratios(policy, batch)
        gap_P = ratio_S.index_select(0, x["better"]) - ratio_S.index_select(0, x["worse"])
        if self.loss_kind == "sigmoid":
            loss_P = preferences.bradley_terry(self.beta * gap_P, smoothing=self.label_smoothing)
        else:
            loss_P = preferences.ipo(gap_P, self.beta)
        return Loss({"rankings": (x["weight"] * loss_P).sum()}, pair_metrics(self.beta * ratio_S, logp_S, batch))

    def ratios(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
        """(S,) log-ratio of each answer to the reference, per token where that is asked for, and (S,) its log-probability."""
        reference_S = reference_logps(policy, batch)
        logp_S, tokens_S = example_logps(policy, batch)
        ratio_S = logp_S - reference_S
        return ratio_S / tokens_S.clamp(min=1) if self.length_normalised else ratio_S, logp_S

    @torch.no_grad()
    def predict(self, policy: Policy, batch: Batch) -> list[dict[str, Any]]:
        """For each row {"scores": the implicit reward of every answer}."""
        return by_row(self.beta * self.ratios(policy, batch)[0], batch)


def cannot_write(kind: str, objective: str) -> None:
    """Raise Incompatible for an encoder."""
    if kind == "encoder":
        raise Incompatible(
            f"objective {objective}: an encoder reads text and writes none, so it has no answers to make likelier; use objective: reward, which scores answers"
        )


def pairs_batch(rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
    """Every answer once, the pairs among them without ties, and how many rankings have any ("rankings")."""
    batch = joined_batch(rows, pad=pad, packed=packed)
    pairs, n = preferences.all_pairs([r.extras["ranks"] for r in rows], [bool(r.train.any()) for r in rows], ties=False)
    batch.extras |= pairs
    batch.units = {"rankings": n}
    return batch


def pair_metrics(reward_S: Tensor, logp_S: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """How many pairs are in order and how far apart, the mean reward and log-probability of the better and of the worse answers; none without pairs."""
    x = batch.extras
    if not batch.units["rankings"]:
        return {}
    weight_P = x["weight"]
    side = lambda values_S, which: (weight_P * values_S.index_select(0, x[which])).sum()  # noqa: E731
    gap_P = reward_S.index_select(0, x["better"]) - reward_S.index_select(0, x["worse"])
    sums = {
        "accuracy": (weight_P * preferences.right(gap_P)).sum(),
        "margin": (weight_P * gap_P).sum(),
        "better_reward": side(reward_S, "better"),
        "worse_reward": side(reward_S, "worse"),
        "better_logp": side(logp_S, "better"),
        "worse_logp": side(logp_S, "worse"),
    }
    return {k: (v, weight_P.sum()) for k, v in sums.items()}
