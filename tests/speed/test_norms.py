"""RMSNorms by the row kernel: found by what they compute, equal, and left alone where they train."""

import pytest
import torch

import tiny
from luthier import speed
from luthier.methods.full import Method as Full
from luthier.methods.lora import Method as Lora
from luthier.speed import compiled, norms
from luthier.speed.norms import Normed
from speed_forms import OFF, apart, gradients, only, policy_on

pytestmark = pytest.mark.skipif(compiled.kernels() is None, reason="no row kernels on this machine (no C++ compiler)")
ON = only(kernels="auto")


def normed(policy):
    return [m for m in policy.lm.modules() if isinstance(m.__dict__.get("forward"), Normed)]


@pytest.mark.parametrize(
    ("family", "many", "plus_one"), [("llama", 5, False), ("qwen3", 9, False), ("gemma2", 9, True), ("gpt2", 0, False), ("t5_gated", 12, False)]
)
def test_norms_are_found_by_what_they_compute_and_change_no_gradient(family, many, plus_one):
    policy = policy_on(tiny.base(family), Lora(targets=("query", "down")))
    with torch.no_grad():
        for m in norms.found(policy.lm):
            m.weight.add_(torch.randn(m.weight.shape, generator=torch.Generator().manual_seed(len(m.weight))) * 0.2)
    loss, plain, _ = gradients(policy, OFF)
    other, found, _ = gradients(policy, ON)
    assert len(normed(policy)) == many
    assert {m.__dict__["forward"].plus_one for m in normed(policy)} == ({plus_one} if many else set())
    assert other == pytest.approx(loss, rel=1e-6)
    assert apart(plain, found) < 1e-5
    speed.remove(policy)
    assert not normed(policy)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_weight_of_a_norm_that_trains_gets_the_plain_forms_gradient(family, monkeypatch):
    calls, own = [], compiled.Kernels.__call__
    monkeypatch.setattr(compiled.Kernels, "__call__", lambda self, name, *a: (calls.append(name), own(self, name, *a))[1])
    policy = policy_on(tiny.base(family), Full())
    plain, found = (gradients(policy, s)[1] for s in (OFF, ON))
    assert len(normed(policy)) >= 5 and calls.count("rms_weight") > len(normed(policy))  # the comparison at load, too
    trained = [n for n in plain if "norm" in n]
    assert len(trained) == len(normed(policy)) and all(torch.allclose(found[n], plain[n], rtol=1e-4, atol=1e-6) and plain[n].any() for n in trained)


def test_only_x_and_a_number_a_row_are_kept():
    norm = tiny.base().model.to(torch.bfloat16).model.norm
    x = torch.randn(1, 64, 32, dtype=torch.bfloat16, requires_grad=True)
    sizes = []
    for form in (norm, Normed(norm, False, compiled.kernels())):
        kept = {}

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            form(x)
        sizes.append(sum(kept.values()))
    assert sizes[1] == x.nbytes + 4 * 64 + 2 * 32 < sizes[0]
