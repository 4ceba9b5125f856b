"""KL from before, against whole distributions computed the slow way: exact where before can be asked, and never more than that where a part of it is kept."""

from itertools import pairwise

import pytest
import torch

import small
import tiny
from luthier.forgetting.divergence import Moved
from luthier.nn.kl import coarse, coarse_divergence
from luthier.objectives import masked_text, text
from luthier.policy import Policy
from luthier.settings.plugins import plugin


def policy_of(family="llama", kind="lora"):
    base, method = tiny.base(family), plugin("methods", kind)()
    policy = Policy(base, method.attach(base, "default"), method=method)
    policy.lm.requires_grad_(kind == "full")
    return policy


def batches(family):
    if family in ("bert", "t5"):
        rows = small.hidden_rows(small.BY_MASK if family == "bert" else small.BY_SENTINEL)
        return lambda: (masked_text.Objective().collate(some, pad=0, packed=False) for some in (rows[:4], rows[4:]))
    return lambda: (text.Objective().collate(tiny.rows(3, seed=s, prompt=1), pad=0, packed=True) for s in range(2))


def distributions(policy, made):
    """Log-probabilities over the vocabulary at every scored position, by the model's own logits."""
    out = []
    for batch in made():
        with torch.no_grad():
            logits = policy.base.anatomy.head(policy.lm, policy.eval().hidden(batch))
        out.append(logits[batch.targets != -100].log_softmax(-1))
    return torch.cat(out)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "bert", "t5"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_it_is_the_mean_divergence_of_whole_distributions(family, kind):
    policy, made = policy_of(family, kind), batches(family)
    before = distributions(policy, made)
    moved = Moved(policy, made, started=False)
    assert (moved.known is None) == (kind == "lora") and moved.measure()[0] < 1e-6
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.delta.params.values():
            p.add_(torch.randn(p.shape, generator=g) * 0.2)
    policy.train()
    now = distributions(policy, made)
    policy.train()
    value, n = moved.measure()
    expected = (before.exp() * (before - now)).sum(-1)
    assert n == len(expected) and value == pytest.approx(float(expected.mean()), rel=1e-4) and value > 1e-5
    assert policy.training and policy.active == "default"


def test_a_run_that_starts_from_a_delta_is_measured_from_that():
    policy, made = policy_of(), batches("llama")
    tiny.randomise(policy.delta.params, std=0.3)
    assert Moved(policy, made, started=False).measure()[0] > 1e-3, "the base is something else"
    moved = Moved(policy, made, started=True)
    assert moved.measure()[0] < 1e-6
    tiny.randomise(policy.delta.params, seed=1, std=0.3)
    assert moved.measure()[0] > 1e-3


def test_what_is_kept_in_part_is_a_lower_bound_that_rises_to_the_whole():
    g = torch.Generator().manual_seed(0)
    q, p = (torch.randn(64, 50, generator=g).mul(2).log_softmax(-1) for _ in range(2))
    whole = (q.exp() * (q - p)).sum(-1)
    found = [coarse_divergence(p, *coarse(q, k)) for k in (1, 4, 16, 49, 50, 99)]
    for a, b in pairwise(found):
        assert (a <= b + 1e-6).all()
    assert (found[0] >= 0).all() and found[-1].allclose(whole, atol=1e-5) and found[-1].equal(found[-2])
    # the slow way: two events, the likeliest token and all others
    q1, p1 = q.exp().max(-1).values, p.exp().gather(1, q.argmax(-1, keepdim=True)).squeeze(1)
    slow = q1 * (q1 / p1).log() + (1 - q1) * ((1 - q1) / (1 - p1)).log()
    assert found[0].allclose(slow, atol=1e-5)


def test_a_budget_of_memory_keeps_the_likeliest_tokens_only():
    policy, made = policy_of(kind="full"), batches("llama")
    n = sum(b.units["tokens"] for b in made())
    some, whole = (Moved(policy, made, started=False, budget=8 * n * k) for k in (5, 500))
    assert some.known == 5 and whole.known == tiny.V
    tiny.randomise(policy.delta.params, std=0.2)
    assert 0 < some.measure()[0] < whole.measure()[0]
