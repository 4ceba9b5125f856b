"""What stands in for a base's own parameter: seen where its delta serves, nowhere else."""

import copy

import pytest
import torch

import tiny
from luthier.core import Delta, Incompatible, next_token_batch
from luthier.deltas import standin
from luthier.methods.lora import Method as Lora
from luthier.modelling.site import Frame, using
from luthier.policy import Policy


def put(base, name="a", by=1.0, leaf="mlp.down_proj.weight"):
    """A delta that adds ``by`` to one weight of every block."""
    for w in standin.weights(base.model):
        if w.names[0].endswith(leaf):
            w.put(name, lambda own, training: own + by)
    return Delta({})


def batch(n=4):
    return next_token_batch(tiny.rows(n), pad=0, packed=False)


@pytest.mark.parametrize("family", list(tiny.MODELS))
def test_every_parameter_of_the_base_is_found_once(family):
    model = tiny.model(family)
    found = list(standin.weights(model))
    assert [w.tensor for w in found] == list(model.parameters()) or {id(w.tensor) for w in found} == {id(p) for p in model.parameters()}
    assert {n for w in found for n in w.names} == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    for w in found:
        assert w.key.replace(":", ".") == w.names[0] and all(m._parameters[leaf] is w.tensor for m, leaf in w.holders)


def test_a_tied_tensor_is_one_weight_with_two_holders():
    tied = [w for w in standin.weights(tiny.model("llama_tied")) if len(w.holders) > 1]
    assert [w.names for w in tied] == [("model.embed_tokens.weight", "lm_head.weight")]


def test_sites_of_other_deltas_are_seen_through():
    base = tiny.base("llama")
    before = [w.names for w in standin.weights(base.model)]
    Lora(targets=("all",)).attach(base, "l")
    assert [w.names for w in standin.weights(base.model)] == before


def test_the_base_is_untouched_by_name_value_and_class_and_gets_its_class_back():
    base = tiny.base("gpt2")
    before, names = copy.deepcopy(base.model.state_dict()), [n for n, _ in base.model.named_parameters()]
    classes = {n: type(m) for n, m in base.model.named_modules()}
    policy = Policy(base, put(base, leaf="attn.c_attn.weight"), name="a")
    module = base.model.transformer.h[0].attn.c_attn
    assert type(module) is not classes["transformer.h.0.attn.c_attn"] and type(module).__name__ == "Conv1D"
    assert torch.equal(module.weight, before["transformer.h.0.attn.c_attn.weight"] + 1)
    assert [n for n, _ in base.model.named_parameters()] == names
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())
    policy.use(None)
    assert module.weight is module._parameters["weight"]
    for w in standin.weights(base.model):
        if w.names[0].endswith("attn.c_attn.weight"):
            w.leave("a")
    assert {n: type(m) for n, m in base.model.named_modules()} == classes


def test_a_frame_decides_before_what_is_in_use():
    base = tiny.base("llama")
    policy = Policy(base, put(base), name="a")
    module = base.model.model.layers[0].mlp.down_proj
    own = module._parameters["weight"]
    with using(Frame(None)):
        assert module.weight is own
    with using(Frame("b")):
        assert module.weight is own
    policy.use(None)
    with using(Frame("a")):
        assert torch.equal(module.weight, own + 1)
    with using(Frame(("a", "a"))):
        assert torch.equal(module.weight, own + 1)


def test_a_stack_applies_in_its_order():
    base = tiny.base("llama")
    policy = Policy(base, put(base, "a", 1.0), name="a")
    for w in standin.weights(base.model):
        if w.names[0].endswith("mlp.down_proj.weight"):
            w.put("b", lambda own, training: own * 2)
    policy.add("b", Delta({}))
    module = base.model.model.layers[0].mlp.down_proj
    own = module._parameters["weight"]
    policy.use("a+b")
    assert torch.equal(module.weight, (own + 1) * 2)
    policy.use("b+a")
    assert torch.equal(module.weight, own * 2 + 1)


def test_a_batch_that_mixes_it_with_the_base_is_refused_and_one_of_its_own_is_served():
    base = tiny.base("llama")
    policy = Policy(base, put(base), name="a")
    b = batch(3)
    b.route = ("a", None, "a")
    with pytest.raises(Incompatible, match="the delta a changes the base's own weights.*serves a whole batch or none of it"):
        policy.hidden(b)
    with torch.no_grad():
        expected = policy.hidden(batch(3))
        b.route = ("a",) * 3
        torch.testing.assert_close(policy.hidden(b), expected)
        policy.use(None)
        off = policy.hidden(batch(3))
        b.route = (None,) * 3
        torch.testing.assert_close(policy.hidden(b), off)
    assert not torch.allclose(off, expected)


def test_folding_another_delta_writes_into_the_bases_own_weight():
    """A stand-in that serves while LoRA folds would take the sum and throw it away."""
    base = tiny.base("llama")
    delta = Lora(targets=("down",)).attach(base, "l")
    tiny.randomise(delta.params)
    policy = Policy(base, delta, name="l")
    policy.add("a", put(base))
    policy.use("l+a")
    with torch.no_grad():
        both = policy.hidden(batch())
    policy.fold()
    policy.use("a")
    with torch.no_grad():
        torch.testing.assert_close(policy.hidden(batch()), both, atol=1e-4, rtol=1e-4)
