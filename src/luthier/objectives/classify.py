"""Labels for texts: one of several, any of several, or a number, read by a small head from one vector of each example.

An encoder's vector is its first token's, and the head is a dense layer with tanh and a linear one, as BERT (Devlin et al., 2018, arXiv 1810.04805,
sections 3.2 and 4.1) and RoBERTa have it. A decoder's is its last token's, and the head is one linear layer without bias (Radford et al., 2018,
section 3.2, and the sequence classifiers of transformers). An encoder-decoder's is that of the first token its decoder would answer with (as in Ni et al.,
2021, arXiv 2108.08877, section 3, "encoder-decoder first").
Losses, summed over examples: cross-entropy (single), the mean over labels of the binary cross-entropies (multiple), squared error (regression).

How we differ:
1. Heads are computed in float32 whatever the base is stored in, and all their layers are new: BERT's pretrained pooler is not used.
2. An encoder-decoder's decoder sees only its start token; transformers' BART and T5 classifiers feed it the whole text again and read its last token.
3. No dropout before the head unless ``dropout`` asks for it (BERT: 0.1), so that a step does not depend on how it is cut into micro-batches.
4. Class weights are scaled to a mean of 1 over the training rows, and a step's sum is divided by its examples. torch's weighted mean divides by the weights of
   the batch's own labels, so that there a rare label weighs less in the batch that has it. "balanced" is N / (K n) of a label of n among N rows, K labels
   (King & Zeng, 2001). Held-out losses are weighted as well, accuracies are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ..core import IGNORE, Base, Batch, Loss, LuthierError, Policy, Renders, Row, inputs_of, lay_out, source_of
from ..settings.plugins import Range, within_ranges

HEAD = "label"  # the head's name in a policy
Problem = Literal["auto", "single", "multiple", "regression"]


class Head(nn.Module):
    """(S, D) vectors to (S, K) fp32 scores."""

    def __init__(self, width: int, outputs: int, *, deep: bool, dropout: float, std: float, bias: bool = True):
        super().__init__()
        self.dense = nn.Linear(width, width) if deep else None
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, outputs, bias=deep and bias)
        for linear in (self.dense, self.out):
            if linear is not None:
                nn.init.normal_(linear.weight, std=std)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def forward(self, pooled_SD: Tensor) -> Tensor:
        """Scores; logits, or the number itself."""
        x_SD = pooled_SD.float()
        if self.dense is not None:
            x_SD = torch.tanh(self.dense(self.dropout(x_SD)))
        return self.out(self.dropout(x_SD))


def new_head(base: Base, outputs: int, dropout: float, *, bias: bool = True) -> dict[str, nn.Module]:
    """A head of so many outputs, new and small-random, in fp32 on the base's device, by its name. ``bias``: of the outputs; decoders' heads have none."""
    std = getattr(base.model.config.get_text_config(), "initializer_range", None) or 0.02  # type: ignore[operator, union-attr]
    with torch.device(next(base.model.parameters()).device):
        deep = base.anatomy.kind != "decoder"
        return {HEAD: Head(base.width, outputs, deep=deep, dropout=dropout, std=std, bias=bias)}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Classification and regression of one text or two."""

    terms: ClassVar[Mapping[str, float]] = {"examples": 1.0}
    needs: ClassVar[frozenset[str]] = frozenset()
    couples: ClassVar[bool] = False
    renders: ClassVar[Renders] = "label"

    problem: Problem = "auto"
    """single: exactly one label; multiple: any number of labels; regression: a number. auto: told from the data, and printed."""
    labels: tuple[str, ...] = ()
    """Names of the labels, in the order of the head's outputs. Default: those of the training data, sorted; a run writes them down."""
    dropout: Annotated[float, Range(0, 1)] = 0.0
    """Dropout before the layers of the head."""
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """How much each label's loss counts (problem single): balanced, so that all labels count alike, or {label: weight}. A run writes down what it found."""

    def __post_init__(self) -> None:
        within_ranges(self)
        if len(set(self.labels)) < len(self.labels):
            twice = next(name for name in self.labels if self.labels.count(name) > 1)
            raise LuthierError(f"labels: {twice!r} is there twice; each label has one name")
        if len(self.labels) == 1 and self.problem != "multiple":
            raise LuthierError(f"labels: there is only {self.labels[0]!r}; at least two are needed to tell apart")
        if self.class_weights is not None and self.problem in ("multiple", "regression"):
            raise LuthierError(f"class_weights: weigh the labels of problem single, and the problem is {self.problem}; leave them out")
        for name, w in self.class_weights.items() if isinstance(self.class_weights, dict) else ():
            if not 0 < w < float("inf"):
                raise LuthierError(f"class_weights: the weight of {name!r} must be above 0, found {w}")

    def serves(self, kind: str) -> None:
        """Every kind of model."""

    def fitted(self, facts: Mapping[str, Any]) -> Objective:
        """With the problem and the labels that reading the data found (``Prepared.facts``)."""
        known = replace(self, problem=facts["problem"], labels=tuple(facts["labels"]))
        return known if self.class_weights is None else replace(known, class_weights=weighed(self.class_weights, facts["label_counts"]))

    @property
    def outputs(self) -> int:
        """How many numbers the head gives. Raises LuthierError while the labels are not known."""
        if self.problem == "auto" or (self.problem != "regression" and not self.labels):
            raise LuthierError("objective classify: its labels are not known yet; read the data first, or set objective.problem and objective.labels")
        return 1 if self.problem == "regression" else len(self.labels)

    def heads(self, base: Base) -> dict[str, nn.Module]:
        """The head, new and small-random, in fp32 on the base's device. Raises LuthierError while the labels are not known."""
        return new_head(base, self.outputs, self.dropout)

    def collate(self, rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
        """Texts and their labels. ``extras``: "label" is a number of a class (-1: none), a 0/1 list, or a float; a row without a label is only predicted."""
        ids_BT, _, segments = lay_out(rows, pad, packed)
        inputs = inputs_of(rows, ids_BT, segments)
        counted = [r.extras.get("label") is not None and bool(r.train.any()) for r in rows]  # an untrained row stands for a rank without rows
        extras = {"counted": torch.tensor(counted)}
        if any(counted):
            like = next(r.extras["label"] for r, c in zip(rows, counted, strict=True) if c)
            empty = IGNORE if isinstance(like, int) else [0.0] * len(like) if isinstance(like, list | tuple) else 0.0
            extras["label"] = torch.tensor([r.extras["label"] if c else empty for r, c in zip(rows, counted, strict=True)])
        where = tuple(r.where for r in rows)
        units = {"examples": sum(counted)}
        return Batch(ids=ids_BT, segments=segments, inputs=inputs, source=source_of(rows, pad), extras=extras, units=units, where=where)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Sum over the labelled examples; how many were right."""
        scores_SK = self.scores(policy, batch)
        counted_S = batch.extras["counted"]
        if "label" not in batch.extras:
            return Loss({"examples": scores_SK.sum() * 0.0})
        label, n = batch.extras["label"], counted_S.sum()
        if self.problem == "single":
            right_S = (scores_SK.argmax(-1) == label) & counted_S
            weight_K = self.weights(scores_SK)
            loss = cross_entropy(scores_SK, label, weight_K, ignore_index=IGNORE, reduction="sum")
            return Loss({"examples": loss}, {"accuracy": (right_S.sum(), n)})
        if self.problem == "multiple":
            label_SK = label.float()
            loss_S = binary_cross_entropy_with_logits(scores_SK, label_SK, reduction="none").mean(-1)
            right_S = ((scores_SK > 0) == (label_SK > 0.5)).all(-1) & counted_S
            return Loss({"examples": (loss_S * counted_S).sum()}, {"accuracy": (right_S.sum(), n)})
        error_S = (scores_SK.squeeze(-1) - label.float()) * counted_S
        return Loss({"examples": error_S.square().sum()}, {"absolute_error": (error_S.abs().sum(), n)})

    def losses(self, policy: Policy, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """The same of each row; 0 of one without a label."""
        scores_SK, counted_S = self.scores(policy, batch), batch.extras["counted"].float()
        if "label" not in batch.extras:
            return {"examples": (torch.zeros_like(counted_S), counted_S)}
        label = batch.extras["label"]
        if self.problem == "single":
            loss_S = cross_entropy(scores_SK, label, self.weights(scores_SK), ignore_index=IGNORE, reduction="none")
        elif self.problem == "multiple":
            loss_S = binary_cross_entropy_with_logits(scores_SK, label.float(), reduction="none").mean(-1)
        else:
            loss_S = (scores_SK.squeeze(-1) - label.float()).square()
        return {"examples": (loss_S * counted_S, counted_S)}

    def weights(self, like: Tensor) -> Tensor | None:
        """(K,) class weights in the order of the labels, as a tensor like this one; None where all count alike."""
        if not isinstance(self.class_weights, dict):
            return None
        return like.new_tensor([self.class_weights.get(name, 1.0) for name in self.labels])

    def scores(self, policy: Policy, batch: Batch) -> Tensor:
        """(S, K) fp32: what the head says of each example. Raises LuthierError for a policy without this head."""
        if HEAD not in policy.heads:
            raise LuthierError("this model has no classification head: a base alone cannot classify; open a run or an adapter that was trained with classify")
        return policy.heads[HEAD](policy.base.anatomy.pool(policy.hidden(batch), batch.segments))

    @torch.no_grad()
    def predict(self, policy: Policy, batch: Batch) -> list[dict[str, Any]]:
        """For each example its label and how likely it is.

        single: {"label", "probability", "probabilities": {name: p}}; multiple: "label" is the list of names above one half and "probability" that of
        this very set; regression: {"label": number}.
        """
        scores_SK = self.scores(policy, batch)
        if self.problem == "regression":
            return [{"label": x} for x in scores_SK.squeeze(-1).tolist()]
        out: list[dict[str, Any]] = []
        if self.problem == "single":
            for p_K in scores_SK.softmax(-1).tolist():
                best = int(np.argmax(p_K))
                out.append({"label": self.labels[best], "probability": p_K[best], "probabilities": dict(zip(self.labels, p_K, strict=True))})
            return out
        for p_K in scores_SK.sigmoid().tolist():
            chosen = [name for name, p in zip(self.labels, p_K, strict=True) if p > 0.5]
            sure = float(np.prod([max(p, 1 - p) for p in p_K]))
            out.append({"label": chosen, "probability": sure, "probabilities": dict(zip(self.labels, p_K, strict=True))})
        return out


def weighed(asked: str | Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
    """Weights of all labels with a mean of 1 over rows that have each label so often. Raises LuthierError where ``asked`` names other labels."""
    if isinstance(asked, Mapping) and (odd := [n for n in asked if n not in counts] + [n for n in counts if n not in asked]):
        has, names = ("is no label of the data", ", ".join(counts)) if odd[0] in asked else ("is a label of the data and has no weight", ", ".join(asked))
        raise LuthierError(f"objective.class_weights: {odd[0]!r} {has}; found {names}. Give every label a weight")
    raw = {n: asked[n] if isinstance(asked, Mapping) else 1.0 / c for n, c in counts.items() if c or isinstance(asked, Mapping)}
    mean = sum(w * counts[n] for n, w in raw.items()) / sum(counts.values())
    if abs(mean - 1) < 1e-4:  # scaled before, and written down
        return {n: raw.get(n, 1.0) for n in counts}
    return {n: float(f"{raw[n] / mean:.6g}") if n in raw else 1.0 for n in counts}
