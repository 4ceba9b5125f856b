"""Kahneman-Tversky optimisation: answers that are judged one by one, good or bad, with no pairs.

Ethayarajh et al., 2024, arXiv 2402.01306, section 4.1: of a good answer lambda_D (1 - sigmoid(beta (r - z))), of a bad one lambda_U (1 - sigmoid(beta
(z - r))), r being its log-ratio to the reference and z, the reference point, the divergence of policy and reference, at least 0, estimated on prompts
with answers to other prompts and not learned. Where good and bad answers are unequal in number, lambda_D n_D should be near lambda_U n_U.

The reference is what the policy is before training: the base, or, where ``method.from`` names one, the delta that training starts from.

How we differ:
1. The other answer of a prompt is chosen once, from the whole data, by the seed; the authors shift the answers of each micro-batch by one.
2. z is the mean over the optimizer step and all ranks, not over a micro-batch, so a step does not depend on how it is cut.
3. z is measured without dropout.
4. A pair is read as a good and a bad answer, as the authors do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core import Base, Batch, Loss, Policy, Renders, Row, example_logps, examples_of, join, joined_batch, reference_logps
from ..nn import preferences
from ..settings.plugins import Range, within_ranges
from .dpo import cannot_write


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Learn from answers that are each judged good or bad, against a reference."""

    terms: ClassVar[Mapping[str, float]] = {"examples": 1.0}
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    couples: ClassVar[bool] = True
    renders: ClassVar[Renders] = "judged"

    beta: Annotated[float, Range(0, low_open=True)] = 0.1
    """How closely the policy is held to the reference: the larger, the closer."""
    desirable: Annotated[float, Range(0)] = 1.0
    """Lambda_D: the weight of good answers."""
    undesirable: Annotated[float, Range(0)] = 1.0
    """Lambda_U: the weight of bad answers."""
    reference: Literal["cached", "live"] = "cached"
    """cached: the reference's log-probabilities are computed once, before training, and kept on disk; live: at each step, with the delta off."""

    def __post_init__(self) -> None:
        within_ranges(self)

    def serves(self, kind: str) -> None:
        """Raise Incompatible for a kind of model that cannot write."""
        cannot_write(kind, "kto")

    def heads(self, base: Base) -> dict[str, nn.Module]:
        """No head of its own: the model's. Raises Incompatible for an encoder."""
        self.serves(base.anatomy.kind)
        return {}

    def collate(self, rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
        """The judged answers; ``beside`` them the same prompts with answers to others."""
        parts = [examples_of(r) for r in rows]
        batch = joined_batch([_only(r, p, 0) for r, p in zip(rows, parts, strict=True)], pad=pad, packed=packed)
        counted = [bool(r.train.any()) for r in rows]
        good = [bool(r.extras["good"]) for r in rows]
        batch.extras |= {"good": torch.tensor(good), "counted": torch.tensor(counted)}
        n, n_good = sum(counted), sum(g and c for g, c in zip(good, counted, strict=True))
        batch.units = {"examples": n, "good": n_good, "bad": n - n_good}
        others = [_only(r, p, 1) for r, p, c in zip(rows, parts, counted, strict=True) if len(p) > 1 and c]
        if others:
            batch.beside = joined_batch(others, pad=pad, packed=packed)
        return batch

    @torch.no_grad()
    def couple(self, policy: Policy, batches: Sequence[Batch], mean: Callable[[float], float] = float) -> None:
        """Measure z, the mean over all batches of a step and, by ``mean``, over ranks, and give it to each of them."""
        training = policy.training  # type: ignore[attr-defined]
        policy.eval()  # type: ignore[attr-defined]
        try:
            ratios = [example_logps(policy, b.beside)[0] - reference_logps(policy, b.beside) for b in batches if b.beside is not None]
        finally:
            policy.train(training)  # type: ignore[attr-defined]
        count = mean(float(sum(len(r) for r in ratios)))
        total = mean(float(torch.cat(ratios).sum()) if ratios else 0.0)
        for b in batches:
            b.extras["kl"] = torch.tensor(max(0.0, total / count) if count else 0.0, device=b.ids.device)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Sum over the judged answers. A batch that `couple` has not seen is a step of its own."""
        if "kl" not in batch.extras:
            self.couple(policy, [batch])
        x = batch.extras
        reference_S = reference_logps(policy, batch)
        ratio_S = example_logps(policy, batch)[0] - reference_S
        loss_S = preferences.kto(ratio_S, x["good"], x["kl"], beta=self.beta, desirable=self.desirable, undesirable=self.undesirable)
        metrics: dict[str, tuple[Tensor, Tensor]] = {"kl": (x["kl"], torch.ones_like(x["kl"]))}
        for name, is_it in (("good", x["good"] & x["counted"]), ("bad", ~x["good"] & x["counted"])):
            if batch.units[name]:
                metrics[f"{name}_reward"] = (self.beta * (ratio_S * is_it).sum(), is_it.sum())
        return Loss({"examples": (loss_S * x["counted"]).sum()}, metrics)


def _only(row: Row, parts: Sequence[Row], i: int) -> Row:
    """One of a row's examples as a row, with its part of what the row brought."""
    extras = {"reference": row.extras["reference"][i : i + 1]} if "reference" in row.extras else {}
    return join([replace(parts[i], where=row.where)], **extras)
