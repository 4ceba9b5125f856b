"""Odds-ratio preference optimisation: learn the better answer and, in the same step, widen its odds over the worse, with no reference.

Hong et al., 2024, arXiv 2403.07691, equations 3 to 7: the cross-entropy of the better answer, and lambda times -log sigmoid(log odds(better) - log
odds(worse)), where odds = p / (1 - p) and log p is the mean log-probability of an answer's tokens.

How we differ:
1. The cross-entropy is of the better answer's tokens, each token counting once, and not of its prompt, which the authors' program also learns.
2. The two parts are terms with units of their own, tokens and rankings, so a step does not depend on how it is cut into micro-batches.
3. A ranking of more than two learns its best answer (all of those that are tied for it), and all its pairs, weighted 1 / C(K, 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import IGNORE, Base, Batch, Loss, Policy, Renders, Row, example_logps
from ..nn import preferences
from ..settings.plugins import Range, within_ranges
from .dpo import cannot_write, pair_metrics, pairs_batch
from .reward import by_row


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Supervised fine-tuning and preferences at once, with no reference."""

    needs: ClassVar[frozenset[str]] = frozenset()
    couples: ClassVar[bool] = False
    renders: ClassVar[Renders] = "pairs"

    weight: Annotated[float, Range(0, low_open=True)] = 0.1
    """Lambda: the weight of the odds ratio beside the cross-entropy of the better answer."""

    def __post_init__(self) -> None:
        within_ranges(self)

    @property
    def terms(self) -> Mapping[str, float]:
        """The odds ratio per ranking, the cross-entropy per token of the better answers."""
        return {"rankings": self.weight, "tokens": 1.0}

    def serves(self, kind: str) -> None:
        """Raise Incompatible for a kind of model that cannot write."""
        cannot_write(kind, "orpo")

    def heads(self, base: Base) -> dict[str, nn.Module]:
        """No head of its own: the model's. Raises Incompatible for an encoder."""
        self.serves(base.anatomy.kind)
        return {}

    def collate(self, rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
        """Every answer once, the pairs among them without ties, and which answers are learned: those of rank 0."""
        batch = pairs_batch(rows, pad=pad, packed=packed)
        batch.extras["best"] = torch.tensor([rank == 0 for r in rows for rank in r.extras["ranks"]])
        assert batch.targets is not None
        example_BT = batch.segments.example(batch.shape)
        trained = (batch.targets != IGNORE) & batch.extras["best"][example_BT.clamp(min=0)] & (example_BT >= 0)
        batch.units["tokens"] = int(trained.sum())
        return batch

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Sum over the rankings, and over the tokens of the best answers. Metrics are of the mean log-probabilities."""
        x = batch.extras
        mean_S, total_S = self._means(policy, batch)
        odds_S = preferences.log_odds(mean_S)
        gap_P = odds_S.index_select(0, x["better"]) - odds_S.index_select(0, x["worse"])
        sums = {"rankings": (x["weight"] * preferences.bradley_terry(gap_P)).sum(), "tokens": -(total_S * x["best"]).sum()}
        return Loss(sums, pair_metrics(odds_S, total_S, batch))

    @torch.no_grad()
    def predict(self, policy: Policy, batch: Batch) -> list[dict[str, Any]]:
        """For each row {"scores": the log odds of every answer}."""
        return by_row(preferences.log_odds(self._means(policy, batch)[0]), batch)

    def _means(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
        """(S,) mean log-probability of each answer's tokens, and (S,) their sum."""
        total_S, tokens_S = example_logps(policy, batch)
        return total_S / tokens_S.clamp(min=1), total_S
