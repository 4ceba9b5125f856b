"""A policy with random factors, and its loss and gradients: in the plain form and in the faster ones."""

from __future__ import annotations

import torch

import tiny
from luthier import speed
from luthier.modelling.site import restoring
from luthier.objectives.sft import Objective
from luthier.policy import Policy, real
from luthier.settings.run import Speed

OFF = Speed.plain()


def only(**what) -> Speed:
    """These settings, and off for the rest."""
    return Speed.plain(**what)


def policy_on(base, method, *, dtype=torch.float32, name="default", recompute=False) -> Policy:
    """A method on a tiny base, its parameters random."""
    base.model.to(dtype)
    policy = Policy(base, method.attach(base, name), method=method, name=name)
    tiny.randomise(policy.delta.params)
    if recompute:
        base.model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    return policy


def batch_for(policy, n=5, seed=0):
    """Packed where the base packs."""
    rows = tiny.pairs("t5", n, seed) if policy.base.anatomy.kind == "encoder_decoder" else tiny.rows(n, seed=seed)
    return Objective().collate(rows, pad=0, packed=policy.base.packs)


def gradients(policy, settings, *batches, route=None):
    """(loss, gradients by name) over micro-batches under these settings."""
    notes = speed.install(policy, settings)
    policy.train()
    total = 0.0
    for batch in batches or [batch_for(policy)]:
        batch.route = route
        torch.manual_seed(0)
        hidden = policy.hidden(batch)[real(batch)]  # what stands at padding is nobody's
        weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        loss = (hidden.float() - weight).square().mean()
        loss.backward()
        total += float(loss.detach())
    found = {n: p.grad for n, p in policy.trained().items()}
    for p in policy.trained().values():
        p.grad = None
    return total, found, notes


def apart(a, b) -> float:
    """The distance of two sets of gradients, relative to the length of the first."""
    assert a.keys() == b.keys() and all(g is not None and bool(g.any()) for g in a.values())
    far = sum(float((b[n].double() - g.double()).norm() ** 2) for n, g in a.items())
    return (far / sum(float(g.double().norm() ** 2) for g in a.values())) ** 0.5


def distances(method, *settings, seeds=range(6)) -> list[float]:
    """How far the gradients of a bfloat16 model are from float32's under each of these settings, over several batches."""
    far = [0.0] * len(settings)
    for seed in seeds:
        exact = policy_on(tiny.base(), method)
        _, wanted, _ = gradients(exact, OFF, batch_for(exact, seed=seed))
        policy = policy_on(tiny.base(), method, dtype=torch.bfloat16)
        for i, s in enumerate(settings):
            far[i] += apart(wanted, gradients(policy, s, batch_for(policy, seed=seed))[1]) / len(seeds)
    return far
