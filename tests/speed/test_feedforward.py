"""SwiGLU feed-forwards with LoRA in one step of autograd."""

import pytest
import torch

import tiny
from luthier.methods.dora import Method as Dora
from luthier.methods.full import Method as Full
from luthier.methods.lora import Method as Lora
from luthier.precision.nf4 import Precision as NF4
from luthier.speed import compiled, feedforward, rows
from luthier.speed.feedforward import Gated
from speed_forms import OFF, apart, batch_for, distances, gradients, only, policy_on

ON = only(mlp="auto")
needs = pytest.mark.skipif(compiled.kernels() is None, reason="no row kernels on this machine (no C++ compiler)")


def gated(policy):
    return [m for m in policy.lm.modules() if isinstance(m.__dict__.get("forward"), Gated)]


@pytest.mark.parametrize("settings", [ON, only(mlp="auto", kernels="auto")])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("targets", [("mlp",), ("down",), ("gate",), ("all",)])
def test_loss_and_gradients_equal_the_plain_form(targets, recompute, settings):
    policy = policy_on(tiny.base("qwen3"), Lora(targets=targets, rank=3, ranks={targets[0]: 5}), recompute=recompute)
    batches = [batch_for(policy, seed=s) for s in (1, 2)]
    loss, plain, _ = gradients(policy, OFF, *batches)
    other, fused, _ = gradients(policy, settings, *batches)
    assert len(gated(policy)) == 2
    assert other == pytest.approx(loss, rel=1e-6)
    assert apart(plain, fused) < 1e-5


def test_codes_and_16_bits():
    policy = policy_on(tiny.in_codes(precision=NF4(compute="float32", resident="no")), Lora(targets=("all",)))
    plain, fused = (gradients(policy, s)[1] for s in (OFF, ON))
    assert gated(policy) and apart(plain, fused) < 1e-5
    plain, fused = distances(Lora(targets=("mlp",)), OFF, only(mlp="auto", kernels="auto"))
    assert fused != plain and fused < 1.1 * plain < 0.1


def test_what_it_does_not_know_keeps_its_own_forward():
    assert not gated(policy_and_install("gemma2"))  # its activation is another
    assert not gated(policy_and_install("gpt2"))
    assert not gated(policy_and_install("llama", Dora(targets=("down",))))  # and there are no row kernels


@needs
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("method", [Lora(targets=("query",)), Dora(targets=("down",)), Full()])
def test_where_nothing_is_edited_or_weights_train_the_activation_alone_is_one_kernel(method, recompute, monkeypatch):
    policy = policy_on(tiny.base(), method, recompute=recompute)
    loss, plain, _ = gradients(policy, OFF)
    calls = []
    monkeypatch.setattr(rows, "swiglu_back", lambda *a: calls.append(1) or feedforward.swiglu_back(*a))
    other, faster, _ = gradients(policy, only(mlp="auto", kernels="auto"))
    assert len(gated(policy)) == 2 and other == pytest.approx(loss, rel=1e-6)
    plain, faster = ({n: g for n, g in found.items() if g is not None} for found in (plain, faster))  # the head has none: nothing is scored
    assert apart(plain, faster) < 1e-5
    assert bool(calls) == (type(method) is not Lora)  # fused with its frozen products under LoRA


def policy_and_install(family, method=None, targets=("all",)):
    policy = policy_on(tiny.base(family), method or Lora(targets=targets))
    gradients(policy, ON)
    return policy


def test_a_mixed_route_takes_the_plain_form_and_equals_itself_alone():
    policy = policy_on(tiny.base(), Lora(targets=("mlp",)))
    batch = batch_for(policy)
    loss, plain, _ = gradients(policy, OFF, batch, route=("default", None) * 2 + ("default",))
    other, fused, _ = gradients(policy, ON, batch, route=("default", None) * 2 + ("default",))
    assert gated(policy) and other == loss and all(torch.equal(plain[n], g) for n, g in fused.items())


def test_only_x_gate_up_and_narrow_products_are_kept():
    policy = policy_on(tiny.base(), Lora(targets=("mlp",)))
    gradients(policy, ON)
    module, x = policy.lm.model.layers[0].mlp, torch.randn(1, 64, 32, requires_grad=True)
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    from luthier.modelling.site import Frame, using

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), using(Frame("default")):
        module(x)
    wide = sorted(kept.values())[-3:]
    assert wide == [64 * 32, 64 * 48, 64 * 48]
    assert sum(kept.values()) == sum(wide) + 64 * 16 + 64 * 8 + (32 * 16 + 48 * 8 * 2) + (48 * 8 + 32 * 8)
