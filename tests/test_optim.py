"""The flat optimizer against torch's own AdamW, and its state."""

import importlib.util
import sys
from contextlib import nullcontext

import pytest
import torch

import tiny
from luthier.core import LuthierError
from luthier.methods.full import Method as Full
from luthier.methods.ia3 import Method as Ia3
from luthier.methods.lora import Method as Lora
from luthier.methods.partial import Method as Partial
from luthier.methods.prefix import Method as Prefix
from luthier.optim import Optimizer, default_lr, state_for


def params(dtype=torch.float32):
    torch.manual_seed(0)
    return {"a:w": torch.nn.Parameter(torch.randn(4, 3).to(dtype)), "b:w": torch.nn.Parameter(torch.randn(5).to(dtype))}


def step(values, optimizer, seed):
    g = torch.Generator().manual_seed(seed)
    loss = sum((p.float() * torch.randn(p.shape, generator=g)).sum() for p in values.values())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_it_is_adamw_with_decay_on_matrices_only():
    ours, theirs = params(), params()
    optimizer = Optimizer(ours, lr=1e-2, weight_decay=0.1)
    adam = torch.optim.AdamW([{"params": [theirs["a:w"]], "weight_decay": 0.1}, {"params": [theirs["b:w"]], "weight_decay": 0.0}], lr=1e-2)
    for s in range(5):
        step(ours, optimizer, s)
        step(theirs, adam, s)
    for k in ours:
        torch.testing.assert_close(ours[k], theirs[k], atol=1e-6, rtol=1e-6)


def test_a_pattern_scales_the_learning_rate_and_the_decay():
    ours, theirs = params(), params()
    optimizer = Optimizer(ours, lr=1e-2, weight_decay=0.1, patterns={"^a": {"lr": 4.0, "decay": 0.0}})
    adam = torch.optim.AdamW([{"params": [theirs["a:w"]], "lr": 4e-2}, {"params": [theirs["b:w"]], "lr": 1e-2}], weight_decay=0.0)
    optimizer.set_lr(1e-2)
    step(ours, optimizer, 0)
    step(theirs, adam, 0)
    for k in ours:
        torch.testing.assert_close(ours[k], theirs[k], atol=1e-6, rtol=1e-6)


def test_a_pattern_can_fix_a_rate_of_its_own_that_follows_the_schedule():
    ours, theirs = params(), params()
    optimizer = Optimizer(ours, lr=1e-2, patterns={"^a": {"rate": 0.3}})
    adam = torch.optim.AdamW([{"params": [theirs["a:w"]], "lr": 0.15}, {"params": [theirs["b:w"]], "lr": 5e-3}], weight_decay=0.0)
    optimizer.set_lr(5e-3)  # halfway down
    step(ours, optimizer, 0)
    step(theirs, adam, 0)
    for k in ours:
        torch.testing.assert_close(ours[k], theirs[k], atol=1e-6, rtol=1e-6)


def test_the_first_pattern_that_is_found_counts_and_a_vector_never_decays():
    values = {"x.gate": torch.nn.Parameter(torch.ones(3, 2)), "x.value": torch.nn.Parameter(torch.ones(3, 2)), "x.bias": torch.nn.Parameter(torch.ones(3))}
    optimizer = Optimizer(values, lr=1e-2, weight_decay=0.1, patterns={r"\.gate$": {"lr": 7.0}, "x": {"lr": 2.0, "decay": 0.5}})
    found = {n: (g.lr_factor, s["weight_decay"]) for g, s in zip(optimizer.groups, optimizer.adam.param_groups, strict=True) for n in g.names}
    assert found == {"x.gate": (7.0, 0.1), "x.value": (2.0, 0.05), "x.bias": (2.0, 0.0)}


def test_saved_state_of_several_groups_continues_bit_for_bit():
    a, b = params(), params()
    patterns = {"^a": {"rate": 0.1, "decay": 0.0}}
    one, two = (Optimizer(p, lr=1e-2, weight_decay=0.1, patterns=patterns) for p in (a, b))
    for s in range(3):
        one.set_lr(1e-2)
        step(a, one, s)
    tensors, scalars = one.state_dict()
    two.load_state_dict({k: v.clone() for k, v in tensors.items()}, scalars)
    for s in range(3, 6):
        for values, optimizer in ((a, one), (b, two)):
            optimizer.set_lr(1e-2)
            step(values, optimizer, s)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_16_bit_parameters_accumulate_and_step_in_fp32():
    """A thousand updates that are each far below bf16's resolution still add up."""
    p = {"w:w": torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))}
    optimizer = Optimizer(p, lr=1e-4)
    for _ in range(1000):
        p["w:w"].float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(p["w:w"][0, 0]) == pytest.approx(0.9, abs=0.01)
    assert p["w:w"].grad is None and optimizer.seen == {"w:w"}


def test_saved_state_continues_bit_for_bit():
    a, b = params(), params()
    one, two = Optimizer(a, lr=1e-2, weight_decay=0.1), Optimizer(b, lr=1e-2, weight_decay=0.1)
    for s in range(3):
        step(a, one, s)
    tensors, scalars = one.state_dict()
    two.load_state_dict({k: v.clone() for k, v in tensors.items()}, scalars)
    for s in range(3, 6):
        step(a, one, s)
        step(b, two, s)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_state_of_other_parameters_is_refused():
    one = Optimizer(params(), lr=1e-2)
    tensors, scalars = one.state_dict()
    with pytest.raises(LuthierError, match="trains other parameters"):
        one.load_state_dict({k: v for k, v in tensors.items() if "b:w" not in k}, scalars)


def test_default_learning_rates_follow_width_and_method():
    assert default_lr(Full(), 768)[0] == pytest.approx(5e-5)
    assert default_lr(Full(), 4096)[0] == pytest.approx(1e-5)
    assert default_lr(Lora(), 4096)[0] == pytest.approx(1e-4)
    assert default_lr(Partial(biases=True, norms=True), 768)[0] == pytest.approx(5e-4)  # vectors alone
    assert default_lr(Partial(biases=True, last_blocks=1), 768)[0] == pytest.approx(5e-5)
    assert default_lr(Prefix(), 256)[0] == pytest.approx(40 * default_lr(Full(), 256)[0]) and default_lr(Prefix(hidden=8), 256) == default_lr(Lora(), 256)
    assert default_lr(Ia3(), 32) == (0.3, "0.3: 2.0e-03 for full fine-tuning at width 32, times 300 for this method, at most 0.3")
    lr, why = default_lr(Lora(), 256)
    assert lr == pytest.approx(10 * default_lr(Full(), 256)[0]) and "width 256" in why


def test_nothing_to_train_is_an_error():
    with pytest.raises(LuthierError, match="nothing to train"):
        Optimizer({}, lr=1e-3)


def test_the_optimizer_owns_the_parameters_memory():
    base = tiny.base("llama")
    delta = Lora().attach(base, "d")
    optimizer = Optimizer(delta.params, lr=1e-3)
    with torch.no_grad():
        optimizer.groups[0].master.fill_(2.0)
    assert all(bool((p == 2).all()) for p in delta.params.values())


# --- moments in 8 bits ----------------------------------------------------------------------------------------------

eight_bit = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra: quant)")


class Both:
    """Two optimizers as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def step(self):
        for o in self.optimizers:
            o.step()

    def zero_grad(self):
        for o in self.optimizers:
            o.zero_grad()


def larger(dtype=torch.float32):
    """Two matrices and a long vector (moments in 8 bits) and a short vector (too small for that)."""
    torch.manual_seed(0)
    shapes = {"a:w": (70, 80), "b:w": (300, 31), "c:w": (5000,), "d:w": (7,)}
    return {k: torch.nn.Parameter(torch.randn(s).to(dtype)) for k, s in shapes.items()}


@eight_bit
@pytest.mark.parametrize("state", ["8bit", "paged-8bit"])
def test_8_bit_moments_over_flat_masters_are_bitsandbytes_own_on_separate_tensors(state):
    from bitsandbytes.optim import AdamW8bit

    ours, theirs = larger(), larger()
    with pytest.warns(UserWarning, match="not supported on CPU") if state == "paged-8bit" else nullcontext():
        optimizer = Optimizer(ours, lr=1e-2, weight_decay=0.1, state=state)
        settings = [{"params": [theirs[k] for k in ["a:w", "b:w"]], "weight_decay": 0.1}, {"params": [theirs["c:w"]], "weight_decay": 0.0}]
        adam = AdamW8bit(settings, lr=1e-2)
        small = torch.optim.AdamW([theirs["d:w"]], lr=1e-2, weight_decay=0.0, fused=True)
        for s in range(5):
            step(ours, optimizer, s)
            step(theirs, Both(adam, small), s)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert optimizer.adam8.state[optimizer.groups[0].pieces[0]]["state1"].dtype == torch.uint8


@eight_bit
def test_8_bit_moments_train_as_float32_ones_do_and_take_a_quarter():
    ours, exact = larger(), larger()
    coded, plain = Optimizer(ours, lr=1e-2, state="8bit"), Optimizer(exact, lr=1e-2)
    start = larger()
    for s in range(20):
        step(ours, coded, s)
        step(exact, plain, s)
    for k in ours:
        moved = (exact[k] - start[k]).norm()
        assert float((ours[k] - exact[k]).norm() / moved) < 0.1, k
    saved = sum(t.nbytes for t in coded.state_dict()[0].values())
    assert coded.state_bytes == saved and coded.master_bytes == plain.master_bytes
    assert (saved - coded.master_bytes) < 0.27 * (plain.state_bytes - plain.master_bytes)


@eight_bit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_8_bit_state_continues_bit_for_bit(dtype):
    a, b = larger(dtype), larger(dtype)
    how = {"lr": 1e-2, "weight_decay": 0.1, "state": "8bit", "patterns": {"^b": {"lr": 3.0}}, "precise": {"c:w"}}
    one, two = Optimizer(a, **how), Optimizer(b, **how)
    for s in range(3):
        one.set_lr(1e-2)
        step(a, one, s)
    tensors, scalars = one.state_dict()
    two.load_state_dict({k: v.clone() for k, v in tensors.items()}, scalars)
    for s in range(3, 6):
        for values, optimizer in ((a, one), (b, two)):
            optimizer.set_lr(1e-2)
            step(values, optimizer, s)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(x, y) for x, y in zip(one.state_dict()[0].values(), two.state_dict()[0].values(), strict=True))


@eight_bit
def test_a_state_before_the_first_step_is_restored_over_a_later_one():
    a, b = larger(), larger()
    one, two = Optimizer(a, lr=1e-2, state="8bit"), Optimizer(b, lr=1e-2, state="8bit")
    tensors, scalars = one.state_dict()
    tensors = {k: v.clone() for k, v in tensors.items()}
    step(b, two, 9)
    two.load_state_dict(tensors, scalars)
    for s in range(2):
        step(a, one, s)
        step(b, two, s)
    assert all(torch.equal(a[k], b[k]) for k in a)


@eight_bit
def test_named_and_small_tensors_keep_exact_moments():
    optimizer = Optimizer(larger(), lr=1e-2, state="8bit", precise={"a:w"})
    assert {n: g.pieces is not None for g in optimizer.groups for n in g.names} == {"a:w": False, "b:w": True, "c:w": True, "d:w": False}


@eight_bit
def test_moments_of_another_kind_are_refused_in_a_sentence():
    values = larger()
    coded = Optimizer(values, lr=1e-2, state="8bit")
    step(values, coded, 0)
    with pytest.raises(LuthierError, match="moments of 'a:w' in 8 bits, and this run keeps them in float32"):
        Optimizer(larger(), lr=1e-2).load_state_dict(*coded.state_dict())
    values = larger()
    plain = Optimizer(values, lr=1e-2)
    step(values, plain, 0)
    with pytest.raises(LuthierError, match="moments of 'a:w' in float32, and this run keeps them in 8 bits"):
        Optimizer(larger(), lr=1e-2, state="8bit").load_state_dict(*plain.state_dict())


def test_a_machine_that_cannot_keep_8_bit_moments_keeps_exact_ones_and_says_so(monkeypatch):
    assert state_for("float32", torch.device("cuda")) == ("float32", None)
    kept, note = state_for("8bit", torch.device("cpu"))
    assert kept == "float32" and note is not None and "8bit was asked for" in note and "on cpu" in note
    monkeypatch.setattr("luthier.optim.find_spec", lambda name: None)
    kept, note = state_for("paged-8bit", torch.device("cuda"))
    assert kept == "float32" and note is not None and "luthier[quant]" in note
    monkeypatch.setattr("luthier.optim.find_spec", lambda name: object())
    assert state_for("paged-8bit", torch.device("cuda")) == ("paged-8bit", None)


def test_8_bit_moments_without_bitsandbytes_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(LuthierError, match="luthier\\[quant\\]"):
        Optimizer(larger(), lr=1e-2, state="8bit")
    Optimizer(params(), lr=1e-2, state="8bit")  # all of it is small: nothing to keep in 8 bits


def test_what_got_no_gradient_is_neither_decayed_nor_carried_on_by_its_momentum():
    """As torch leaves a parameter whose gradient is None. Weight decay once moved the policy while only its value learned."""
    ours, theirs = params(), params()
    optimizer = Optimizer(ours, lr=1e-2, weight_decay=0.1)
    adam = torch.optim.AdamW([{"params": [theirs["a:w"]], "weight_decay": 0.1}, {"params": [theirs["b:w"]], "weight_decay": 0.0}], lr=1e-2)
    first = ours["a:w"].detach().clone()
    for s, names in enumerate([("b:w",), ("a:w", "b:w"), ("b:w",), ("b:w",)]):
        for values, o in ((ours, optimizer), (theirs, adam)):
            g = torch.Generator().manual_seed(s)
            sum((values[n] * torch.randn(values[n].shape, generator=g)).sum() for n in names).backward()
            o.step()
            o.zero_grad()
        if s == 0:
            assert torch.equal(ours["a:w"], first)
        if s == 1:
            moved = ours["a:w"].detach().clone()
            moments = {k: v.clone() for k, v in optimizer.state_dict()[0].items() if k.endswith("a:w")}
    assert torch.equal(ours["a:w"], moved) and not torch.equal(moved, first)
    assert all(torch.equal(v, moments[k]) for k, v in optimizer.state_dict()[0].items() if k in moments)
    torch.testing.assert_close(ours["b:w"], theirs["b:w"], atol=1e-6, rtol=1e-6)


def test_a_gradient_in_16_bits_takes_the_place_of_the_last_steps_and_one_that_does_not_come_is_zero():
    """No buffer is cleared for it: what stands there from the last step must count nowhere."""
    torch.manual_seed(0)
    params = {n: torch.nn.Parameter(torch.randn(3, 4).to(dtype)) for n, dtype in (("a", torch.bfloat16), ("b", torch.bfloat16), ("c", torch.float32))}
    optimizer = Optimizer(params, lr=0.1)
    grads = {n: torch.randn(3, 4).to(p.dtype) for n, p in params.items()}
    for names in (("a", "b", "c"), ("a", "c"), ("b",), ()):
        for _ in range(2):  # micro-batches
            for n in names:
                (params[n] * grads[n]).sum().backward()
        wanted = torch.stack([(2 * grads[n].float()).norm() for n in names]).norm() if names else torch.tensor(0.0)
        torch.testing.assert_close(optimizer.grad_norm(), wanted)
        assert float(sum(g.abs().sum() for g in optimizer.grads)) == pytest.approx(sum(float((2 * grads[n].float()).abs().sum()) for n in names), rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()


def test_a_gradient_that_is_longer_than_a_part_is_added_whole(monkeypatch):
    monkeypatch.setattr("luthier.optim.PART", 5)
    p = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16))
    optimizer, up = Optimizer({"p": p}, lr=0.1), torch.randn(3, 4).to(torch.bfloat16)
    for _ in range(3):
        (p * up).sum().backward()
    torch.testing.assert_close(optimizer.grads[0][:12].view(3, 4), 3 * up.float())


@pytest.mark.parametrize("state", ["float32", "8bit"])
def test_scaled_gradients_move_as_gradients_that_were_smaller_to_begin_with(state):
    moved = []
    for by in (1.0, 0.25):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(80, 80))
        optimizer, up = Optimizer({"p": p}, lr=0.1, state=state), torch.randn(80, 80)
        for step in range(3):
            (p * up * (0.25 / by if step == 1 else 1.0)).sum().backward()
            if step == 1:
                optimizer.scale_grads(by)
            optimizer.step()
            optimizer.zero_grad()
        moved.append(p.detach().clone())
    torch.testing.assert_close(*moved, rtol=1e-5, atol=1e-6)
