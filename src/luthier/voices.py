"""Several roles on one resident base: the policy that is trained, the reference it is held to, the value that is learned beside it, rewards that are only read.

A voice is a route (which delta serves) and heads of its own. All share the base's weights, so that learning from rewards needs one model in memory where
four copies are usual (policy, reference, value, reward: Ouyang et al., 2022, arXiv 2203.02155). The exception is a method that trains the base's own
weights: its reference is a copy, made before training, its value reads the policy's hidden states, and a reward model on that base is opened once more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .core import Base, Batch, Delta, LuthierError
from .modelling import vocabulary
from .modelling.anatomy import modules, trunk
from .policy import Policy
from .saving import adapter

REFERENCE, VALUE = "reference", "value"


class Voice:
    """One role: what an objective asks of a policy, answered by another route of the same base and by heads of its own."""

    def __init__(self, policy: Policy, route: str | None, heads: nn.ModuleDict, objective: Any = None):
        self.policy, self.route, self.heads, self.objective = policy, route, heads, objective
        self.base, self.name = policy.base, route or "base"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.policy.device

    @property
    def limit(self) -> int:
        """Positions that are left to the text."""
        return self.base.max_positions - self.policy.room(self.route)

    @property
    def pad(self) -> int:
        """A token id for places that hold no token."""
        return self.policy.pad

    @property
    def training(self) -> bool:
        """Whether the policy is in training mode."""
        return self.policy.training

    def train(self, mode: bool = True) -> None:
        """Set the policy's mode."""
        self.policy.train(mode)

    def eval(self) -> None:
        """Put the policy into evaluation mode."""
        self.policy.eval()

    def hidden(self, batch: Batch) -> Tensor:
        """(B, T, D) last hidden states of this voice, aligned with ``batch.ids``."""
        return self.policy.hidden(batch, route=self.route)


def add_value(policy: Policy, method: Any, *, shared: bool) -> None:
    """Give the policy a value voice: a number for each token's state, by a delta of its own or (``shared``) on the policy's hidden states.

    The head starts at zero, so that the first values are 0. A delta of its own starts as the policy's does, ``method.from`` included.
    """
    base = policy.base
    route = policy.name
    if not shared:
        delta = method.attach(base, VALUE)
        vocabulary.attach(base, delta, VALUE)
        _leave_out_head(base, delta)
        policy.add(VALUE, delta)
        if getattr(method, "from_", None) and base.model.device.type != "meta":
            _copy(policy.deltas[policy.name], delta)
        policy.use(policy.active)
        route = VALUE
    head = nn.Linear(base.width, 1, device=base.model.device)
    if head.weight.device.type != "meta":
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    heads = nn.ModuleDict({VALUE: head})
    policy.voice_heads[VALUE] = heads
    policy.voices[VALUE] = Voice(policy, route, heads)


def _leave_out_head(base: Base, delta: Delta) -> None:
    """A value reads hidden states only: what a delta adds to the language-model head would get no gradient, so it is not trained."""
    lm: Any = base.model
    parts = [lm.get_encoder(), lm.get_decoder()] if base.anatomy.kind == "encoder_decoder" else [trunk(lm)]
    unread = {id(p) for p in lm.parameters()} - {id(p) for part in parts for p in part.parameters()}
    for key, p in list(delta.params.items()):
        if id(p) in unread:
            p.requires_grad_(False)
            del delta.params[key]


def _copy(source: Delta, into: Delta) -> None:
    with torch.no_grad():
        for key, p in into.params.items():
            p.copy_(source.params[key])
        for key, b in into.buffers.items():
            b.copy_(source.buffers[key])


def moves_base(method: Any) -> bool:
    """Whether training by this method changes the base's own tensors, so that no other voice on it stays what it was."""
    return method.edits == "weights" and not getattr(method, "reversible", False)


def keep_reference(policy: Policy, method: Any) -> str:
    """Keep what the policy is before training, for as long as it trains; what was kept, in words.

    The base with the delta off costs nothing. A delta that training starts from is attached once more. Where the base's own weights are trained, a copy.
    """
    if moves_base(method):
        policy.keep_copy()
        return "a copy of the whole model, since the base's own weights are trained"
    started = getattr(method, "from_", None)
    if not started:
        return "the base, with the delta off"
    if policy.base.model.device.type == "meta":  # counted, not run: there is nothing to read
        return "a saved delta, attached once more"
    folder = adapter.artefact(Path(started).expanduser())
    if folder is None:
        raise LuthierError(f"method.from: there is no folder {started!r}; name an adapter's or a run's folder")
    adapter.add(policy, folder, REFERENCE)
    _freeze(policy.deltas[REFERENCE])
    policy.reference_route = REFERENCE
    return f"the delta of {folder}, attached once more"


def add_reader(policy: Policy, folder: Path, name: str) -> Voice:
    """A saved delta with its head (a reward model, a classifier) as a voice that is only read. Raises LuthierError where it does not fit this base."""
    tokens = tuple(adapter.describe(folder)[1].get("tokens") or ())
    if tokens and tokens != policy.base.tokens:
        raise LuthierError(f"{folder}: was trained with {', '.join(tokens)} added to the vocabulary; give this run the same ones: tokens=[{', '.join(tokens)}]")
    _, values, objective = adapter.read_delta(policy.base, folder)
    if objective is None or not any(k.startswith("heads.") for k in values):
        raise LuthierError(f"{folder}: this delta has no head, so it scores nothing; name one that was trained with objective: reward or classify")
    heads = adapter.restored_heads(policy.base, objective, values, folder)
    adapter.add(policy, folder, name, heads=True)
    _freeze(policy.deltas[name])
    own = nn.ModuleDict(heads).to(policy.device).requires_grad_(False)
    policy.voice_heads[name] = own
    voice = Voice(policy, name, own, objective)
    policy.voices[name] = voice
    return voice


def _freeze(delta: Delta) -> None:
    for p in delta.params.values():
        p.requires_grad_(False)


def resident_bytes(policy: Policy) -> tuple[int, int]:
    """(bytes of the base's weights, bytes of everything the voices add to them)."""
    base = {id(t): t.nbytes for _, m in modules(policy.lm) for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)]}
    more = [t for d in policy.deltas.values() for t in [*d.params.values(), *d.buffers.values()]]
    more += [t for m in [policy.voice_heads, *policy._copy] for t in [*m.parameters(), *m.buffers()]]
    added = {id(t): t.nbytes for t in more if id(t) not in base}
    return sum(base.values()), sum(added.values())
