"""LoRA of the linears of a block in few operations: Sites that read the same input (query, key and value; gate and up) are computed together at the first
call, the others are handed their outputs when they are called with that input; a Site that stands alone is computed by the same products (linears.py).

A family needs no surgery for it: what shares an input is read from the roles of its linears, and checked at every call by identity. Outputs wait in the plans
of the running Frame, which ends with its forward, so nothing outlives an exception; recomputation under gradient checkpointing runs under the same frame and
computes the group again. A mixed route, a stack of deltas, an edit that is more than a low-rank term (DoRA, dropout while training), weights that train or
stand in another dtype: the Site's plain path.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import Incompatible
from ..modelling.anatomy import blocks, features
from ..modelling.site import Frame, Site, current, sites, using
from .linears import Frozen, Term, products
from .selftest import at_hand, differs, evaluating

log = logging.getLogger("luthier.speed")

SHARING = (("query", "key", "value"), ("gate", "up"))  # roles whose linears read the same input, where they are of the same module
PLAIN = object()  # an edit that is more than a low-rank term


@dataclass
class _Waiting:
    """Outputs that were computed with the first of a group."""

    x: Tensor
    version: int
    outs: dict[int, Tensor]


class Together:
    """Sites that read the same input."""

    def __init__(self, members: list[Site]):
        self.members = members
        self.linears = [Frozen(s.base) for s in members]
        self.apart = len(members) == 1  # each is computed alone

    def call(self, i: int, x: Tensor, route: str) -> Tensor | None:
        """The output of member ``i``, or None where it is the plain path's."""
        frame = current()
        if not torch.is_grad_enabled() or frame is None or "+" in route:
            return None
        waiting: _Waiting | None = frame.plans.pop(self, None)
        if waiting is not None:
            if waiting.x is x and waiting.version == x._version and i in waiting.outs:
                y = waiting.outs.pop(i)
                if waiting.outs:
                    frame.plans[self] = waiting
                return y
            self.apart = True  # they do not share their input after all
            log.info("linears that were taken for sharing an input do not: each is computed alone")
        which = [i] if self.apart else [i, *(j for j in range(len(self.members)) if j != i)]
        linears = [self.linears[j] for j in which]
        terms = [term_of(self.members[j], route) for j in which]
        if any(t is PLAIN for t in terms) or not all(f.usable(x.dtype) for f in linears):
            return None
        y, *others = products(x, linears, terms)  # type: ignore[arg-type]
        if others:
            frame.plans[self] = _Waiting(x, x._version, dict(zip(which[1:], others, strict=True)))
        return y


def term_of(site: Site, route: str) -> Term | object | None:
    """The low-rank term of a site under a route, None where it has no edit there, PLAIN where its edit is something else."""
    if route not in site.edits:
        return None
    term = site.edits[route].term()  # type: ignore[operator]
    return PLAIN if term is None else term  # type: ignore[no-any-return]


class Member:
    """What a Site asks."""

    def __init__(self, group: Together, i: int):
        self.group, self.i = group, i

    def __call__(self, x: Tensor, route: str) -> Tensor | None:
        return self.group.call(self.i, x, route)


def groups(policy: Any) -> Iterator[list[Site]]:
    """Edited linears of the blocks, those that share an input together."""
    anatomy, found = policy.base.anatomy, sites(policy.lm)
    role_of = {suffix: role for role, suffixes in anatomy.linears.items() for suffix in suffixes}
    across = _cross(policy.lm)
    together: dict[Any, list[Site]] = {}
    for path, site in found.items():
        stack = next((s for s in anatomy.stacks.values() if path.startswith(s + ".")), None)
        if stack is None or not Frozen.reads(site.base):
            continue
        clean = path.replace(".base.", ".")
        inside = clean[len(stack) + 1 :].partition(".")[2]
        parent, role = clean.rpartition(".")[0], role_of.get(inside)
        sharing = next((i for i, roles in enumerate(SHARING) if role in roles), None)
        alone = sharing is None or (role == "query" and parent in across)
        key = clean if alone else (parent, sharing, features(site.base)[0])
        together.setdefault(key, []).append(site)
    yield from together.values()


def _cross(lm: Any) -> set[str | None]:
    """Paths of the cross-attentions, whose query reads the decoder's states, and key and value the encoder's."""
    try:
        return {b.cross for b in blocks(lm)}
    except Incompatible:
        return set()


def install(policy: Any) -> int:
    """Give every group of edited linears its faster form, where it is found equal to the plain one. Returns how many linears."""
    name, put, left = policy.name, 0, 0
    tested: dict[Any, bool] = {}
    for members in groups(policy):
        group = Together(members)
        if not _is_low_rank(members, name):
            continue
        kind = tuple((type(s.base), type(s.edits[name]) if name in s.edits else None, s.base.bias is None) for s in members)
        if kind not in tested:
            tested[kind] = _equals(policy, group)
        if not tested[kind]:
            left += len(members)
            continue
        for i, site in enumerate(members):
            site.faster = Member(group, i)
        put += len(members)
    if left:
        log.warning("speed.lora: %d linears keep the plain form of LoRA: the faster one was found to differ from it", left)
    return put


def remove(policy: Any) -> None:
    """Give every Site its plain path back."""
    for site in sites(policy.lm).values():
        site.faster = None


def _is_low_rank(members: list[Site], name: str) -> bool:
    """Whether an edit here is a low-rank term and no more, at least in evaluation (dropout)."""
    with evaluating([s.edits[name] for s in members if name in s.edits]) as edits:
        return any(e.term() is not None for e in edits)


def _equals(policy: Any, group: Together) -> bool:
    """Whether a group gives what its Sites give, outputs and gradients."""
    lm, name = policy.lm, policy.name
    if policy.device.type == "meta":
        return True

    def together(x: Tensor) -> list[Tensor]:
        with using(Frame(name)):
            found = [group.call(i, x, name) for i in range(len(group.members))]
        if any(y is None for y in found):
            raise RuntimeError("the faster form declines")
        return found  # type: ignore[return-value]

    def apart(x: Tensor) -> list[Tensor]:
        with using(Frame(name)):
            return [site(x) for site in group.members]

    with at_hand(s.base for s in group.members), evaluating([s.edits[name] for s in group.members if name in s.edits]) as edits:
        return not differs(apart, together, edits, features(group.members[0].base)[0], lm.dtype, policy.device)
