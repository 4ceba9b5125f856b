"""Folding a delta into its base and proving it: logits before and after on a probe set, then the saved folder as transformers opens it.

A base in codes is written out in floats first: the values of its codes, which are what the delta was trained on, so that the merged model is the trained one.
Merging into the floats that the codes were made from gives another model; `compare` says by how much.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import Incompatible, LuthierError
from ..modelling.anatomy import cast
from ..modelling.packed import dequantise, packed
from ..modelling.site import unwrap
from ..policy import Policy
from ..settings.plugins import kind_of
from .adapter import save_model

PROBES = ("The instrument on the bench", "Once upon a time there was", "1, 2, 3,")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative to the largest logit


@dataclass
class Merged:
    """What was compared."""

    folder: Path
    dtype: str
    folded: float  # largest logit difference, attached against folded, relative to the largest logit
    reopened: float  # attached against the saved folder in plain transformers
    same_greedy: bool  # the likeliest next token is the same at every probe position
    positions: int
    codes: float | None = None  # of a base in codes: as it was served against written out in floats, before anything was folded


def merge(policy: Policy, folder: Path, *, dtype: torch.dtype | None = None, extra: dict[str, Any] | None = None) -> Merged:
    """Fold the policy's delta into its base, save the whole model, and its heads, and reopen it with plain transformers.

    Sums are made in fp32 and rounded once to ``dtype``, by default the base's. Raises Incompatible where the delta cannot fold, LuthierError where the
    largest logit difference exceeds what rounding to that dtype explains.
    """
    foldable(policy)
    ids = probe_ids(policy)
    codes = write_out(policy, ids, dtype) if any(True for _ in packed(policy.lm)) else None
    dtype = next(policy.lm.parameters()).dtype
    before = logits(policy, ids)
    if policy.delta is not None:
        policy.fold()
        unwrap(policy.lm)
    folded = difference(logits(policy, ids), before)
    _refuse(folded, dtype, "folding changed the logits")
    save_model(policy, folder, extra=extra)
    kind: Any = type(policy.lm)
    plain = kind.from_pretrained(folder, dtype=dtype).to(policy.device).eval()
    with torch.no_grad():
        again = torch.cat([plain(**_inputs(policy, i)).logits[0].float() for i in ids])
    reopened = difference(again, before)
    _refuse(reopened, dtype, f"{folder} opened by transformers gives other logits")
    same = bool((again.argmax(-1) == before.argmax(-1)).all())
    return Merged(folder, str(dtype).removeprefix("torch."), folded, reopened, same, len(before), codes)


def foldable(policy: Policy) -> None:
    """Raise Incompatible for a delta that no weight can take."""
    if policy.delta is not None and policy.delta.fold is None:
        raise Incompatible(
            f"a delta of {kind_of(policy.method)} cannot be merged: it changes what no weight of the model holds; serve it beside its base "
            "(luthier generate FOLDER), or train a method that merges: lora, dora, ia3, partial, diff_pruning, full"
        )


def write_out(policy: Policy, ids: list[list[int]], dtype: torch.dtype | None) -> float:
    """Replace the codes of a policy's base by the values they were computed with. Returns the largest relative difference of its logits, which is that
    of computing in ``dtype`` instead: the weights are equal."""
    before = logits(policy, ids)
    computed = next(policy.lm.parameters()).dtype
    if policy.delta is not None and policy.method is not None and policy.method.edits == "weights":
        policy.fold()  # what stands in for a bias stands in the packed linear
    dequantise(policy.lm, computed)
    cast(policy.lm, dtype or computed)
    policy.base.precision, policy.base.storage = None, ""
    apart = difference(logits(policy, ids), before)
    _refuse(apart, computed, "writing the codes out in floats changed the logits")
    return apart


def compare(trained: Policy, other: Policy) -> tuple[float, bool]:
    """(largest relative difference of the logits, whether the likeliest next token is the same everywhere) between two policies on the probe set."""
    ids = probe_ids(trained)
    one, two = logits(trained, ids), logits(other, ids)
    return difference(two, one), bool((one.argmax(-1) == two.argmax(-1)).all())


def probe_ids(policy: Policy) -> list[list[int]]:
    """Token ids of a few texts, or made-up ones where there is no tokenizer."""
    if policy.base.tokenizer is None:
        vocabulary: Any = policy.lm.config.get_text_config().vocab_size
        return [[i % vocabulary for i in range(k, k + 9)] for k in (1, 20, 40)]
    return [policy.base.tokenizer(t)["input_ids"] for t in PROBES]


@torch.no_grad()
def logits(policy: Policy, ids: list[list[int]]) -> Tensor:
    """(positions, V) fp32 logits of the policy, delta included. An encoder-decoder answers a text with itself."""
    policy.eval()
    return torch.cat([policy.lm(**_inputs(policy, i)).logits[0].float() for i in ids])


def _inputs(policy: Policy, ids: list[int]) -> dict[str, Tensor]:
    given = torch.tensor([ids], device=policy.device)
    return {"input_ids": given} | ({"decoder_input_ids": given} if policy.base.anatomy.kind == "encoder_decoder" else {})


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def _refuse(found: float, dtype: torch.dtype, what: str) -> None:
    if not found <= TOLERANCE.get(dtype, 5e-2):  # nan too
        raise LuthierError(f"{what}: largest relative difference {found:.2g}, accepted {TOLERANCE.get(dtype, 5e-2):g} in {dtype}; try --dtype float32")
