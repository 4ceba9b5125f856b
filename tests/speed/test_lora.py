"""LoRA in few operations: the same loss and gradients as the plain form, wherever it is used, and the plain form where it is not."""

import logging

import pytest
import torch

import tiny
from luthier import speed
from luthier.methods.dora import Method as Dora
from luthier.methods.lora import Method as Lora
from luthier.modelling.site import Frame, sites, using
from luthier.policy import Policy
from luthier.precision.nf4 import Precision as NF4
from luthier.settings.run import Speed
from luthier.speed import linears, lora
from speed_forms import OFF, apart, batch_for, distances, gradients, only, policy_on

ON = only(lora="auto")


def calls(monkeypatch):
    """How many linears each fused product had, in order."""
    seen, own = [], lora.products
    monkeypatch.setattr(lora, "products", lambda x, which, terms: (seen.append(len(which)), own(x, which, terms))[1])
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "phi3", "bert", "t5_gated", "bart", "qwen3_moe"])
def test_loss_and_gradients_equal_the_plain_form_on_every_kind_of_family(family, monkeypatch):
    seen = calls(monkeypatch)
    policy = policy_on(tiny.base(family), Lora(targets=("attention",) if family == "qwen3_moe" else ("all",), rank=3, ranks={"query": 5}))
    loss, plain, notes = gradients(policy, OFF)
    assert not notes and not seen
    other, fused, notes = gradients(policy, ON)
    assert notes and seen
    assert other == pytest.approx(loss, rel=1e-6)
    assert apart(plain, fused) < 1e-5


def test_three_attention_inputs_and_two_of_the_feed_forward_are_computed_together(monkeypatch):
    seen = calls(monkeypatch)
    policy = policy_on(tiny.base(), Lora(targets=("all",)))
    gradients(policy, ON)
    assert seen[-8:] == [3, 1, 2, 1] * 2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("how", [{"init": "pissa"}, {"rank_stabilised": True, "alpha": 7.0}, {"targets": ("value", "up")}])
def test_variants_of_lora_keep_their_gradients_over_micro_batches_and_under_recomputation(how, recompute):
    policy = policy_on(tiny.base("qwen2"), Lora(**{"targets": ("all",), "rank": 2} | how), recompute=recompute)
    batches = [batch_for(policy, seed=s) for s in (1, 2)]
    loss, plain, _ = gradients(policy, OFF, *batches)
    other, fused, _ = gradients(policy, ON, *batches)
    assert other == pytest.approx(loss, rel=1e-6)
    assert apart(plain, fused) < 1e-5


def test_a_base_in_codes_is_decoded_again_in_the_backward_with_the_same_gradients():
    policy = policy_on(tiny.in_codes(precision=NF4(compute="float32", resident="no")), Lora(targets=("all",)))
    loss, plain, _ = gradients(policy, OFF)
    other, fused, notes = gradients(policy, ON)
    assert notes and other == pytest.approx(loss, rel=1e-6)
    assert apart(plain, fused) < 1e-5


def test_in_16_bits_it_is_no_further_from_float32_than_the_plain_form():
    plain, fused = distances(Lora(targets=("all",)), OFF, ON)
    assert fused != plain and fused < 1.1 * plain < 0.1


def test_a_mixed_route_a_stack_and_no_route_take_the_plain_path_bit_for_bit(monkeypatch):
    seen = calls(monkeypatch)
    policy = policy_on(tiny.base(), Lora(targets=("all",)))
    other = Lora(targets=("query",)).attach(policy.base, "other")
    tiny.randomise(other.params, seed=1)
    policy.add("other", other)
    batch = batch_for(policy)
    for route in (("default", None, "other", "default", None), ("default+other",) * 5):
        loss, plain, _ = gradients(policy, OFF, batch, route=route)
        again, same, _ = gradients(policy, ON, batch, route=route)
        assert again == loss and all(torch.equal(plain[n], same[n]) for n in plain)
    policy.use("default+other")
    loss, plain, _ = gradients(policy, OFF, batch)
    again, same, _ = gradients(policy, ON, batch)
    assert again == loss and all(torch.equal(plain[n], same[n]) for n in plain)
    policy.use("default")
    del seen[:]
    bare = Policy(tiny.base()).eval()
    batch.route = None
    with policy.reference():
        assert torch.equal(policy.hidden(batch), bare.hidden(batch))
    assert not seen
    assert apart(*(gradients(policy, s, batch, route=("default",) * 5)[1] for s in (OFF, ON))) < 1e-5


def test_dropout_and_dora_keep_the_plain_form_and_dropout_off_in_evaluation_does_not(monkeypatch):
    seen = calls(monkeypatch)
    for method in (Dora(targets=("query", "value")), Lora(targets=("query", "value"), dropout=0.5)):
        policy = policy_on(tiny.base(), method)
        loss, plain, _ = gradients(policy, OFF)
        again, same, _ = gradients(policy, ON)
        assert again == loss and all(torch.equal(plain[n], same[n]) for n in plain)
    del seen[:]  # those of the comparison at load
    policy.hidden(batch_for(policy))
    assert not seen
    policy.eval()
    policy.hidden(batch_for(policy))
    assert set(seen) == {2}


@pytest.mark.parametrize("settings", [ON, Speed()])
def test_the_start_is_the_reference_bit_for_bit(settings):
    base = tiny.base()
    method = Lora(targets=("all",))
    policy = Policy(base, method.attach(base, "default"), method=method)
    assert speed.install(policy, settings)
    batch = batch_for(policy)
    with torch.no_grad():
        now = policy.eval().hidden(batch)
    with policy.reference():
        assert torch.equal(now, policy.hidden(batch))


def test_installing_leaves_parameters_and_random_numbers_as_they_were():
    policy = policy_on(tiny.base(), Lora(targets=("all",)))
    before = {n: p.detach().clone() for n, p in policy.trained().items()}
    torch.manual_seed(3)
    speed.install(policy, ON)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in policy.trained().items())


def test_a_form_that_differs_is_left_out_and_said(monkeypatch, caplog):
    own = linears.Group.backward

    def wrong(*args):
        dx, given = own(*args)
        return dx, [None if g is None else 1.2 * g for g in given]

    monkeypatch.setattr(linears.Group, "backward", wrong)
    policy = policy_on(tiny.base(), Lora(targets=("query", "key")))
    with caplog.at_level(logging.WARNING, logger="luthier.speed"):
        assert not speed.install(policy, ON)
    assert "4 linears keep the plain form" in caplog.text
    assert all(s.faster is None for s in sites(policy.lm).values())


def test_linears_that_turn_out_to_read_different_inputs_are_computed_alone(monkeypatch):
    policy = policy_on(tiny.base(), Lora(targets=("query", "key", "value")))
    speed.install(policy, ON)
    q, k, v = list(sites(policy.lm).values())[:3]
    x, z = torch.randn(1, 4, 32), torch.randn(1, 4, 32)
    seen = calls(monkeypatch)
    with using(Frame("default")):
        got = [q(x), k(z), v(x)]
    speed.remove(policy)
    with using(Frame("default")):
        for y, (site, at) in zip(got, ((q, x), (k, z), (v, x)), strict=True):
            torch.testing.assert_close(y, site(at))
    assert seen == [3, 1, 1]


def test_what_waits_for_its_siblings_ends_with_the_frame_even_after_an_exception():
    policy = policy_on(tiny.base(), Lora(targets=("query", "key", "value")))
    speed.install(policy, ON)
    q, k, _ = list(sites(policy.lm).values())[:3]
    frame, x = Frame("default"), torch.randn(1, 4, 32)
    with pytest.raises(KeyError), using(frame):
        q(x)
        raise KeyError
    with using(Frame("default")):
        k(x)  # another forward: nothing of the first is handed out
    assert len(frame.plans) == 1
    assert not q.faster.group.apart


def test_x_is_kept_once_for_linears_that_share_it():
    policy = policy_on(tiny.base(), Lora(targets=("query", "key", "value", "gate", "up")))
    batch, sizes = batch_for(policy), []
    for settings in (OFF, ON):
        speed.install(policy, settings)
        kept = {}

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            policy.hidden(batch)
        sizes.append(sum(t.numel() for t in kept.values()))
    assert sizes[1] < sizes[0]
