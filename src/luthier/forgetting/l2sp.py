"""Decay towards where training started, instead of towards zero: L2-SP.

Li, Grandvalet & Davoine, 2018, arXiv 1802.01483, equation 2: alpha / 2 ||W - W0||^2 is added to the loss. What it is taken of, by method:

1. Methods that train the base's own weights (full, partial): the sum over trained tensors, W0 a copy of each at the start.
2. Methods whose edits are low-rank pairs (lora): W - W0 is s (B A - B0 A0), whose squared norm s^2 tr(A A' B' B) needs no matrix of W's size; exact as well.
   PiSSA's frozen part is part of the pair.
3. Other methods that edit outputs and start as the base (dora, adapter, ia3): their parameters' distance from their start. No weight of the base moves in
   these, so this is decay of what the delta adds, and of what else it trains.
4. Refused where the start is not the base, or there is another penalty: methods that edit the sequence (prefix, p_tuning, prompt), and diff_pruning.

How we differ: heads that are new have no start worth keeping, and decay by optim.weight_decay alone (the paper's beta). The penalty is part of the loss, as in
the paper, so AdamW scales its gradient with the rest; optim.weight_decay, which pulls towards zero, stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import Delta, Incompatible
from ..deltas.lowrank import Pair
from ..modelling.shards import is_sharded
from ..modelling.site import sites
from ..policy import Policy
from ..settings.plugins import kind_of

Term = Callable[[], Tensor]


def hold(policy: Policy, alpha: float) -> str:
    """Add the penalty to what the policy's delta asks for once a step, from where it stands now; what is held, in words. Raises Incompatible, see above."""
    delta, method = policy.delta, policy.method
    assert delta is not None
    kind = kind_of(method)
    if any(map(is_sharded, delta.params.values())):
        raise Incompatible("data.replay.l2sp: the base is sharded over ranks, and this penalty reads whole weights; use place.shard=none, or replay")
    if delta.penalty is not None:
        raise Incompatible(f"data.replay.l2sp: method {kind} has a penalty of its own on how far weights move (method.penalty); use that, and leave l2sp out")
    if getattr(method, "edits", "") == "sequence" or hasattr(method, "candidates"):
        raise Incompatible(
            f"data.replay.l2sp: method {kind} does not start as the base, so decay towards its start keeps nothing of it; use replay or kl, or a method that "
            "edits outputs or weights (lora, full)"
        )
    terms, said = _terms(policy, delta)
    delta.penalty = lambda: 0.5 * alpha * torch.stack([term() for term in terms]).sum()
    return said


def _terms(policy: Policy, delta: Delta) -> tuple[list[Term], str]:
    """Squared distances from the start, and what they are of."""
    covered: set[int] = set()
    terms: list[Term] = []
    for site in sites(policy.lm).values():
        edit = dict(site.edits.items()).get(policy.name)
        own = {id(p) for p in edit.parameters()} - covered if edit is not None and _is_pair(edit) else set()
        if own:  # else it is one more use of a matrix that has been counted
            covered |= own
            terms.append(_moved_pair(edit))
    matrices = len(terms)
    rest = [p for p in delta.params.values() if id(p) not in covered]
    terms += [_moved(p) for p in rest]
    changes = f"the changes of {matrices} matrices, as weights"
    if matrices:
        return terms, changes + (f", and {len(rest)} other tensors, from their start" if rest else "")
    if getattr(policy.method, "edits", "") == "weights":
        return terms, f"{len(rest)} tensors of the base, from what they were"
    return terms, f"{len(rest)} tensors that the method adds, from their start, which is the base"


def _is_pair(edit: Any) -> bool:
    """Whether an edit is the addition of a low-rank product and nothing else."""
    return hasattr(edit, "pair") and edit.pair().magnitude is None


def _moved(p: Tensor) -> Term:
    start = p.detach().clone()
    return lambda: (p.float() - start.float()).square().sum()


def _moved_pair(edit: Any) -> Term:
    first: Pair = edit.pair()
    a0, b0 = first.a.detach().clone(), first.b.detach().clone()
    still = not bool(a0.any()) or not bool(b0.any())  # the change starts at zero, as LoRA's does

    def term() -> Tensor:
        pair: Pair = edit.pair()
        a, b = (pair.a, pair.b) if still else (torch.cat([pair.a, a0]), torch.cat([pair.b, -b0], 1))
        return product_norm(a, b, pair.scale)

    return term


def product_norm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||scale * b @ a||^2 (Frobenius) of a (rank, in) and b (out, rank), in rank x rank numbers."""
    return scale**2 * ((a.float() @ a.float().t()) * (b.float().t() @ b.float())).sum()
