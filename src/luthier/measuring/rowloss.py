"""The held-out loss row by row, so that it has an interval, can be sliced, and can be paired with another model's on the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from ..core import Batch, Coupled, LuthierError, Objective, Row, Separable
from ..nn import intervals
from ..policy import Policy
from . import marks
from .evaluate import NOTHING
from .marks import Mark
from .measure import group, to_device


@torch.no_grad()
def by_row(policy: Policy, objective: Objective, rows: Sequence[Row], *, tokens: int = 8192) -> np.ndarray:
    """(N, 2 * terms) each row's loss, then its units, term by term. The policy is put into evaluation mode and back.

    ``tokens``: positions in a forward. An objective that cannot say it by row is shown the rows one by one.
    """
    pad, packed = policy.pad, policy.base.packs
    place = {id(row): i for i, row in enumerate(rows)}
    terms = list(objective.terms)
    out = np.zeros((len(rows), 2 * len(terms)))
    together = hasattr(objective, "losses")
    groups = group(rows, tokens, packed) if together else [[row] for row in rows]
    batches: Iterable[Batch] = (to_device(objective.collate(some, pad=pad, packed=packed), policy) for some in groups)
    training = policy.training
    policy.eval()
    try:
        if objective.couples:
            batches = list(batches)
            cast(Coupled, objective).couple(policy, batches)
        for some, batch in zip(groups, batches, strict=True):
            if not any(batch.units.values()):
                continue
            where = [place[id(row)] for row in some]
            if together:
                found = {k: (a.double().cpu().numpy(), b.double().cpu().numpy()) for k, (a, b) in cast(Separable, objective).losses(policy, batch).items()}
            else:
                found = {k: (np.array(float(v)), np.array(batch.units.get(k, 0))) for k, v in objective.loss(policy, batch).sums.items()}
            for name, (sum_S, count_S) in found.items():
                out[where, 2 * terms.index(name)], out[where, 2 * terms.index(name) + 1] = sum_S, count_S
    finally:
        policy.train(training)
    return out


def losses(policy: Policy, objective: Any, rows: Sequence[Row], record_of: Sequence[int]) -> dict[str, Mark]:
    """The held-out loss, and of text its perplexity and, where all of it is read, its bits per byte. Raises LuthierError where nothing is to be scored.

    ``record_of``: rows of one record (several answers to one prompt) hang together, so they are one row of a mark.
    """
    unit = unit_of(objective)
    stats_NK = by_row(policy, objective, rows)
    if not stats_NK[:, 1::2].any():
        raise LuthierError(NOTHING)
    together = np.array(record_of)
    loss = weighted(objective.terms)
    out = {f"loss per {unit}": marks.pooled(f"loss per {unit}", _summed(stats_NK, together), loss, lower_is_better=True)}
    if objective.renders in ("chat", "text"):
        out["perplexity"] = marks.pooled("perplexity", _summed(stats_NK, together), lambda sums_RK: np.exp(loss(sums_RK)), lower_is_better=True)
    if objective.renders == "text":
        read = policy.base.tokenizer.decode
        size_N = np.array([len(read(r.ids[1:], skip_special_tokens=True).encode()) for r in rows], dtype=np.float64)
        bits_N2 = _summed(np.stack([stats_NK[:, 0] / np.log(2), size_N], 1), together)
        out["bits per byte"] = marks.pooled("bits per byte", bits_N2, intervals.ratio_of_sums, lower_is_better=True)
    return out


def _summed(stats_NK: np.ndarray, record_N: np.ndarray) -> np.ndarray:
    out = np.zeros((int(record_N.max()) + 1, stats_NK.shape[1]))
    np.add.at(out, record_N, stats_NK)
    return out


def unit_of(objective: Any) -> str:
    """What the loss is per: token, hidden token, example, ranking."""
    return "hidden token" if objective.renders == "masked" else next(iter(objective.terms)).removesuffix("s")


def weighted(terms: Mapping[str, float]) -> intervals.Statistic:
    """The objective's loss from summed losses and units: the weighted sum of its terms' means, of those that have units."""
    weight_K = np.array(list(terms.values()))

    def loss(sums_RK: np.ndarray) -> np.ndarray:
        sum_RK, count_RK = sums_RK[:, ::2], sums_RK[:, 1::2]
        mean_RK = np.divide(sum_RK, count_RK, out=np.zeros_like(sum_RK), where=count_RK > 0)
        return np.where((count_RK > 0).any(1), mean_RK @ weight_K, np.nan)

    return loss
