"""Decay towards the start, against its plain formula."""

import pytest
import torch

import tiny
from luthier.core import Incompatible
from luthier.forgetting import l2sp
from luthier.methods.adapter import Method as Adapter
from luthier.methods.diff_pruning import Method as Pruning
from luthier.methods.dora import Method as Dora
from luthier.methods.full import Method as Full
from luthier.methods.ia3 import Method as Ia3
from luthier.methods.lora import Method as Lora
from luthier.methods.partial import Method as Partial
from luthier.methods.prefix import Method as Prefix
from luthier.modelling.site import sites
from luthier.policy import Policy


def policy_of(method, family="llama"):
    base = tiny.base(family)
    return Policy(base, method.attach(base, "default"), method=method)


def moved(policy):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in policy.delta.params.values():
            p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("method", [Full(), Partial(biases=False, norms=True, last_blocks=1)], ids=["full", "partial"])
def test_of_trained_weights_it_is_half_alpha_times_the_squared_distance(method):
    policy = policy_of(method)
    start = {k: p.detach().clone() for k, p in policy.delta.params.items()}
    l2sp.hold(policy, 0.3)
    assert float(policy.delta.penalty()) == 0.0
    moved(policy)
    slow = sum(0.5 * 0.3 * float((p - start[k]).double().pow(2).sum()) for k, p in policy.delta.params.items())
    penalty = policy.delta.penalty()
    assert float(penalty) == pytest.approx(slow, rel=1e-5)
    penalty.backward()
    for k, p in policy.delta.params.items():
        torch.testing.assert_close(p.grad, 0.3 * (p.detach() - start[k]), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("targets", [("all",), ("embedding", "query")], ids=str)
@pytest.mark.parametrize("init", ["zero", "pissa"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_of_low_rank_changes_it_is_that_of_the_weights_they_stand_for(targets, init, family):
    policy = policy_of(Lora(targets=targets, init=init, rank=4), family)
    with torch.no_grad():  # start from a change, as method.from does
        for p in policy.delta.params.values():
            p.mul_(0.5)
    weights = {n: s.base.weight for n, s in sites(policy.lm).items()}

    def changes():
        out = {}
        for n, s in sites(policy.lm).items():
            change = s.edits["default"].fold(
                torch.zeros(torch.Size([*reversed(weights[n].shape)]) if family == "gpt2" and weights[n].ndim == 2 and "c_" in n else weights[n].shape)
            )
            if float(change.abs().sum()):
                out[id(weights[n])] = change.detach().clone()
        return out

    before = changes()
    l2sp.hold(policy, 0.2)
    assert float(policy.delta.penalty()) == pytest.approx(0.0, abs=1e-6)
    moved(policy)
    after = changes()
    slow = sum(0.1 * float((after[k] - before.get(k, 0.0)).double().pow(2).sum()) for k in after)
    assert slow > 0
    assert float(policy.delta.penalty()) == pytest.approx(slow, rel=1e-4)


@pytest.mark.parametrize("method", [Dora(), Adapter(), Ia3()], ids=["dora", "adapter", "ia3"])
def test_of_other_methods_it_is_that_of_their_parameters_and_pulls_them_to_the_base(method):
    policy = policy_of(method)
    start = {k: p.detach().clone() for k, p in policy.delta.params.items()}
    assert "which is the base" in l2sp.hold(policy, 1.0)
    moved(policy)
    slow = sum(0.5 * float((p - start[k]).double().pow(2).sum()) for k, p in policy.delta.params.items())
    assert float(policy.delta.penalty()) == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize(
    "method,said", [(Prefix(length=2), "does not start as the base"), (Pruning(share=0.05), "a penalty of its own")], ids=["prefix", "diff_pruning"]
)
def test_where_the_start_is_not_the_base_it_is_refused(method, said):
    with pytest.raises(Incompatible, match=said):
        l2sp.hold(policy_of(method), 0.1)
