"""What every method owes, over whatever files stand in methods/."""

import copy
import importlib

import pytest
import torch

import tiny
from luthier.core import Incompatible
from luthier.objectives.sft import Objective
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.settings.plugins import kinds
from luthier.train import train

METHODS = [k for k in kinds("methods") if k != "crafted_prompt"]  # which trains nothing: tests/methods/test_crafted_prompt.py
FAMILIES = ["llama_tied", "gpt2", "gemma2", "gpt_neox", "qwen3_moe"]


def edits(kind):
    return importlib.import_module(f"luthier.methods.{kind}").Method.edits


def attached(kind, family):
    base = tiny.base(family)
    method = importlib.import_module(f"luthier.methods.{kind}").Method()
    return Policy(base, method.attach(base, "default"), method=method)


def batch(policy, n=4, seed=0):
    return Objective().collate(tiny.rows(n, seed=seed), pad=0, packed=policy.base.packs)


def fit(policy, steps=12, lr=3e-3):
    """Losses over steps on one fixed batch."""

    class Same:
        def __next__(self):
            return [batch(policy)]

    optimizer = Optimizer(policy.trained(), lr=lr)
    return [s.loss for s in train(policy, Objective(), Same(), optimizer, lr=lambda _: lr, steps=steps, place=Place(on="cpu"))]


def test_the_methods_of_this_version_are_all_here():
    assert {"full", "lora", "prefix", "prompt", "p_tuning", "p_tuning_v2"} <= set(METHODS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [k for k in METHODS if edits(k) != "sequence"])  # vectors put before the text are seen from the first step on
def test_at_the_start_the_function_is_the_bases_bit_for_bit(kind, family):
    plain = Policy(tiny.base(family))
    policy = attached(kind, family)
    with torch.no_grad():
        assert torch.equal(policy.hidden(batch(policy)), plain.hidden(batch(plain)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", METHODS)
def test_the_loss_falls_and_nothing_outside_the_delta_moves(kind, family):
    policy = attached(kind, family)
    trained = {id(p) for p in policy.trained().values()}
    frozen = {n: p.detach().clone() for n, p in policy.lm.named_parameters() if id(p) not in trained}
    assert all(p.requires_grad == (id(p) in trained) for p in policy.lm.parameters())
    losses = fit(
        policy, lr={"ia3": 0.1, "diff_pruning": 3e-2}.get(kind, 3e-2 if policy.method.edits == "sequence" else 3e-3)
    )  # a few vectors or places learn slowly
    assert losses[-1] < losses[0] - 0.01
    after = dict(policy.lm.named_parameters())
    assert all(torch.equal(v, after[n]) for n, v in frozen.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", METHODS)
def test_switched_off_it_is_the_base_bit_for_bit_or_says_why_not(kind, family):
    plain, policy = Policy(tiny.base(family)), attached(kind, family)
    fit(policy, 3)
    if policy.method.edits == "weights" and not getattr(policy.method, "reversible", False):
        with pytest.raises(Incompatible, match="no base left"), policy.reference():
            pass
        return
    with policy.reference():
        off = policy.hidden(batch(policy))
    with torch.no_grad():
        assert torch.equal(off, plain.hidden(batch(plain)))
        assert not torch.equal(policy.hidden(batch(policy)), off)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", METHODS)
def test_folded_equals_attached(kind, family):
    policy = attached(kind, family)
    if policy.delta.fold is None:
        with pytest.raises(Incompatible, match="cannot be folded"):
            policy.fold()
        return
    tiny.randomise({k: p for k, p in policy.delta.params.items() if policy.method.edits == "outputs"})
    with torch.no_grad():
        before = policy.hidden(batch(policy))
        policy.fold()
        torch.testing.assert_close(policy.hidden(batch(policy)), before, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", [k for k in METHODS if k != "full"])
def test_routed_examples_equal_each_alone(kind):
    """One batch: this delta, the bare base, and a LoRA under another name."""
    base = tiny.base("llama")
    policies = {}
    for name, method in (
        ("one", importlib.import_module(f"luthier.methods.{kind}").Method()),
        ("two", importlib.import_module("luthier.methods.lora").Method(targets=("mlp",))),
    ):
        delta = method.attach(base, name)
        if method.edits == "outputs":
            tiny.randomise(delta.params, seed=len(name))
        policies[name] = Policy(base, delta, method=method, name=name)
    policies["one"].add("two", policies["two"].delta)
    rows, route = tiny.rows(5), ("one", None, "two", "one", "two")
    policy = policies["one"]
    for packed in (True, False):
        together = Objective().collate(rows, pad=0, packed=packed)
        together.route = route
        if edits(kind) == "weights":  # one tensor cannot be two
            with pytest.raises(Incompatible, match="serves a whole batch or none of it"):
                policy.hidden(together)
            continue
        with torch.no_grad():
            hidden = policy.hidden(together).flatten(0, 1)
            width = together.shape[1]
            for i, (row, name) in enumerate(zip(rows, route, strict=True)):
                policy.use(name)
                alone = policy.hidden(Objective().collate([row], pad=0, packed=False))[0, : len(row)]
                first = int(together.segments.first(width)[i])
                torch.testing.assert_close(hidden[first : first + len(row)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [k for k in METHODS if k != "full"])
def test_a_delta_in_a_bf16_base_trains_in_fp32(kind):
    base = tiny.base("llama")
    base.model.to(torch.bfloat16)
    method = importlib.import_module(f"luthier.methods.{kind}").Method()
    policy = Policy(base, method.attach(base, "default"), method=method)
    assert {p.dtype for p in policy.delta.params.values()} == {torch.float32}
    assert policy.hidden(batch(policy)).dtype == torch.bfloat16
    losses = fit(policy)
    assert losses[-1] < losses[0]


def test_a_base_is_not_changed_by_attaching_and_detaching():
    base = tiny.base("llama")
    before = copy.deepcopy(base.model.state_dict())
    from luthier.methods.lora import Method
    from luthier.modelling.site import clean_name, sites, unwrap

    Method(targets=("all",)).attach(base, "default")
    renamed = {clean_name(k) for k in base.model.state_dict() if ".edits." not in k}
    assert renamed == set(before)
    for site in sites(base.model).values():
        del site.edits["default"]
    unwrap(base.model)
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items()) and len(base.model.state_dict()) == len(before)
