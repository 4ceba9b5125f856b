"""A reward model: one number for a prompt with an answer, learned from which answers people prefer.

Bradley & Terry, 1952: P(y1 > y2 | x) = sigmoid(r(x, y1) - r(x, y2)), maximised over the pairs (Stiennon et al., 2020, arXiv 2009.01325, section 3.4). Of
a ranking of K answers all K(K-1)/2 pairs are used, weighted 1 / C(K, 2), and each answer is scored once a step (Ouyang et al., 2022, arXiv 2203.02155,
equation 1). Margins: Touvron et al., 2023, arXiv 2307.09288, equation 2; ties: Christiano et al., 2017, arXiv 1706.03741, section 2.2.3; centring:
Eisenstein et al., 2023, arXiv 2312.09244.

The head is that of `classify` with one output: a decoder's score is read at the last token of the answer, an encoder's at its first token, an
encoder-decoder's at the first token it would answer with. So PEFT and transformers open it as a sequence classifier of one label, which is what the field
keeps reward models as.

How we differ:
1. The score is of the last token of the conversation as the template writes it, which is its end-of-turn token; what is cut for its length has another.
2. The centring term of a ranking of more than two is the mean over its pairs, as its loss is.
3. Rewards are not shifted after training to a mean of zero (Ouyang et al., appendix C.2); centring does that while training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import Base, Batch, Loss, LuthierError, Policy, Renders, Row, joined_batch
from ..nn import preferences
from ..settings.plugins import Range, within_ranges
from .classify import HEAD, new_head


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which of several answers is better, as a number for each."""

    needs: ClassVar[frozenset[str]] = frozenset()
    couples: ClassVar[bool] = False
    renders: ClassVar[Renders] = "ranked"

    centre: Annotated[float, Range(0)] = 0.0
    """Weight of the term that keeps the rewards around zero (Eisenstein et al. use 0.01); 0: no such term, and rewards have no zero."""
    dropout: Annotated[float, Range(0, 1)] = 0.0
    """Dropout before the layers of the head."""

    def __post_init__(self) -> None:
        within_ranges(self)

    @property
    def terms(self) -> Mapping[str, float]:
        """Both are per ranking; a pair is a ranking of two."""
        return {"rankings": 1.0} | ({"centre": self.centre} if self.centre else {})

    def serves(self, kind: str) -> None:
        """Every kind of model."""

    def heads(self, base: Base) -> dict[str, nn.Module]:
        """The head of one output, new and small-random, in fp32 on the base's device."""
        return new_head(base, 1, self.dropout, bias=False)  # pairs say nothing of where zero lies

    def collate(self, rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
        """Every answer once, and the pairs among them. A row without ranks is only scored; one with nothing marked stands for a rank without rows."""
        batch = joined_batch(rows, pad=pad, packed=packed)
        batch.targets = None
        counted = [bool(r.train.any()) and bool(r.extras["ranks"]) for r in rows]
        number = torch.bincount(batch.extras["row"], minlength=len(rows)).tolist()
        rankings = [r.extras["ranks"] or (0,) * n for r, n in zip(rows, number, strict=True)]
        pairs, n = preferences.all_pairs(rankings, counted, ties=True)
        margin = torch.tensor([float(r.extras.get("margin", 0.0)) for r in rows])
        batch.extras |= pairs | {"margin": margin.index_select(0, pairs["ranking"])}
        batch.units = dict.fromkeys(self.terms, n) | {"compared": int((~pairs["tied"]).sum())}
        return batch

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Sum over the rankings. Metrics: how many pairs are in order, how far apart they are, and the mean reward."""
        x = batch.extras
        reward_S = self.scores(policy, batch)
        gap_P = reward_S.index_select(0, x["better"]) - reward_S.index_select(0, x["worse"])
        loss_P = preferences.bradley_terry(gap_P, tied_P=x["tied"], margin_P=x["margin"])
        sums = {"rankings": (x["weight"] * loss_P).sum()}
        if self.centre:
            sums["centre"] = (x["weight"] * preferences.centring(reward_S, x["better"], x["worse"])).sum()
        metrics = {"reward": (reward_S.sum(), reward_S.new_tensor(float(len(reward_S))))}
        if batch.units.get("compared"):
            weight_P = x["weight"] * ~x["tied"]
            metrics |= {"accuracy": ((weight_P * preferences.right(gap_P)).sum(), weight_P.sum()), "margin": ((weight_P * gap_P).sum(), weight_P.sum())}
        return Loss(sums, metrics)

    def scores(self, policy: Policy, batch: Batch) -> Tensor:
        """(S,) fp32 reward of each answer. Raises LuthierError for a policy without this head."""
        if HEAD not in policy.heads:
            raise LuthierError("this model has no reward head: a base alone prefers nothing; open a run or an adapter that was trained with objective: reward")
        return policy.heads[HEAD](policy.base.anatomy.pool(policy.hidden(batch), batch.segments)).squeeze(-1)

    @torch.no_grad()
    def predict(self, policy: Policy, batch: Batch) -> list[dict[str, Any]]:
        """For each row {"scores": the reward of every answer, in the row's order}."""
        return by_row(self.scores(policy, batch), batch)


def by_row(score_S: Tensor, batch: Batch) -> list[dict[str, Any]]:
    """What predict gives: the scores of each row's answers."""
    row_S = batch.extras["row"].tolist()
    out: list[dict[str, Any]] = [{"scores": []} for _ in range(max(row_S, default=-1) + 1)]
    for row, score in zip(row_S, score_S.tolist(), strict=True):
        out[row]["scores"].append(score)
    return out
