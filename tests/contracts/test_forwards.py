"""Every method under every way of running a forward: packed, accumulated, recomputed, routed, stacked, generated with a cache."""

import importlib

import pytest
import torch

import tiny
from luthier.core import next_token_batch
from luthier.modelling.site import restoring
from luthier.objectives.sft import Objective
from luthier.policy import Policy
from luthier.settings.plugins import kinds

METHODS = kinds("methods")
FAMILIES = ["llama", "gpt2", "gemma3", "mistral_window"]


def method_of(kind):
    chosen = {"ids": (5, 6, 7)} if kind == "crafted_prompt" else {}  # as it is after a run
    return importlib.import_module(f"luthier.methods.{kind}").Method(**chosen)


def moved(kind, base, name="default", seed=1):
    """A policy whose delta does something: its values are off their start."""
    method = method_of(kind)
    delta = method.attach(base, name)
    if method.edits != "weights":
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in delta.params.values():
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return Policy(base, delta, method=method, name=name)


def grads(policy, batches, total):
    for p in policy.trained().values():
        p.grad = None
    policy.train()
    loss = 0.0
    for b in batches:
        part = Objective().loss(policy, b).sums["tokens"] / total
        part.backward()
        loss += float(part.detach())
    return loss, {k: p.grad.clone() for k, p in policy.trained().items() if p.grad is not None}


def same(a, b, tolerance=2e-5):
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert set(a[1]) == set(b[1]) and a[1]
    largest = max(float(g.abs().max()) for g in a[1].values())
    for k, g in a[1].items():
        torch.testing.assert_close(b[1][k], g, atol=tolerance * max(largest, 1e-3), rtol=1e-3)


TRAINED = [k for k in METHODS if k != "crafted_prompt"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", TRAINED)
def test_packed_and_accumulated_equal_one_padded_batch(kind, family):
    policy, rows = moved(kind, tiny.base(family)), tiny.rows(4)
    padded = next_token_batch(rows, pad=0, packed=False)
    total = padded.units["tokens"]
    whole = grads(policy, [padded], total)
    same(whole, grads(policy, [next_token_batch(rows, pad=0, packed=True)], total))
    same(whole, grads(policy, [next_token_batch([r], pad=0, packed=False) for r in rows], total))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", TRAINED)
def test_recomputing_blocks_changes_nothing(kind, family):
    policy = moved(kind, tiny.base(family))
    batch = next_token_batch(tiny.rows(4), pad=0, packed=True)
    kept = grads(policy, [batch], batch.units["tokens"])
    policy.lm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    same(kept, grads(policy, [batch], batch.units["tokens"]), tolerance=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", METHODS)
def test_generation_with_a_cache_equals_going_over_the_text_again(kind, family):
    policy = moved(kind, tiny.base(family)).eval()
    prompts = [[5, 9, 11], [7] * 9, [12, 30]]
    out = policy.generate(prompts, max_new=6)
    from tiny import row

    for prompt, new in zip(prompts, out.ids, strict=True):
        ids = list(prompt)
        for token in new:
            with torch.no_grad():
                h = policy.hidden(next_token_batch([row(ids)], pad=0, packed=False))[0, len(ids) - 1]
            assert token == int(policy.base.anatomy.head(policy.lm, h).argmax())
            ids.append(token)


OUTPUTS_AND_SEQUENCES = [k for k in METHODS if importlib.import_module(f"luthier.methods.{k}").Method.edits != "weights"]


def company(family, kinds_here):
    """One base with a delta of every kind."""
    base = tiny.base(family)
    policies = {k: moved(k, base, name=k, seed=i) for i, k in enumerate(kinds_here)}
    policy = policies[kinds_here[0]]
    for k in kinds_here[1:]:
        policy.add(k, policies[k].delta)
    return policy


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_batch_of_all_kinds_and_the_base_equals_each_alone(family, recompute):
    policy = company(family, OUTPUTS_AND_SEQUENCES)
    if recompute:
        policy.lm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
        policy.train()
    before = {k: v.clone() for k, v in policy.lm.state_dict().items() if ".edits." not in k}
    route = (*OUTPUTS_AND_SEQUENCES, None, f"{OUTPUTS_AND_SEQUENCES[0]}+prefix")
    rows = tiny.rows(len(route))
    everything = [p for d in policy.deltas.values() for p in d.params.values()]

    def gradient(batch):
        for p in everything:
            p.grad = None
        hidden = policy.hidden(batch)
        real = (batch.segments.example(batch.shape) >= 0)[..., None]
        if hidden.requires_grad:  # a crafted prompt alone has nothing that learns
            (hidden * real).square().sum().backward()
        return hidden.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in everything]

    for packed in (True, False):
        batch = next_token_batch(rows, pad=0, packed=packed)
        batch.route = route
        together, gradients = gradient(batch)
        flat, total = together.flatten(0, 1), [torch.zeros_like(p) for p in everything]
        for i, (row, name) in enumerate(zip(rows, route, strict=True)):
            policy.use(name)
            alone, own = gradient(next_token_batch([row], pad=0, packed=False)) if name is not None else (None, [torch.zeros_like(p) for p in everything])
            if name is None:
                with torch.no_grad():
                    alone = policy.hidden(next_token_batch([row], pad=0, packed=False))
            total = [t + g for t, g in zip(total, own, strict=True)]
            first = int(batch.segments.first(batch.shape[1])[i])
            torch.testing.assert_close(flat[first : first + len(row)], alone[0, : len(row)], atol=1e-5, rtol=1e-5)
        for t, g in zip(total, gradients, strict=True):
            torch.testing.assert_close(g, t, atol=2e-4 * max(1.0, float(t.abs().max())), rtol=1e-3)
    after = {k: v for k, v in policy.lm.state_dict().items() if ".edits." not in k}
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompts_answered_by_different_kinds_at_once_equal_each_alone(family):
    policy = company(family, OUTPUTS_AND_SEQUENCES).eval()
    route = [*OUTPUTS_AND_SEQUENCES, None, f"{OUTPUTS_AND_SEQUENCES[0]}+prefix"]
    prompts = [[5 + i, 9, 11, *range(3, 3 + i)] for i in range(len(route))]
    together = policy.generate(prompts, route=route, max_new=6)
    for prompt, name, new in zip(prompts, route, together.ids, strict=True):
        policy.use(name)
        assert policy.generate([prompt], max_new=6).ids[0] == new


def test_a_name_that_is_not_there_is_refused():
    from luthier.core import LuthierError

    policy = moved("lora", tiny.base("llama"))
    for call in (lambda: policy.use("other"), lambda: policy.generate([[3]], route=["other"]), lambda: policy.add("default", policy.delta)):
        with pytest.raises(LuthierError, match="default"):
            call()
    with pytest.raises(LuthierError, match="letters"):
        policy.add("a+b", policy.delta)
