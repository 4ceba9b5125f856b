"""What every method owes on a base in codes: the same gradients under recomputation, the base bit for bit when switched off, codes that never move."""

import importlib

import pytest
import torch

import tiny
from luthier.core import Incompatible
from luthier.modelling.packed import packed
from luthier.modelling.site import restoring
from luthier.policy import Policy
from luthier.settings.plugins import kinds, plugin
from luthier.settings.run import Run
from tests.matrix import SETTINGS, rows_for

METHODS = [k for k in kinds("methods") if k != "crafted_prompt"]
PACKED = [k for k in kinds("precision") if plugin("precision", k).packed]
FAMILIES = ["llama", "gpt2", "bert", "t5"]


def edits(kind):
    return importlib.import_module(f"luthier.methods.{kind}").Method.edits


def on(precision, method, family, recompute=False):
    """(policy, objective, batch) with a delta that does something."""
    from luthier import build

    stored = plugin("precision", precision)(compute="float32", resident="no", **SETTINGS.get(precision, {}))
    base = tiny.in_codes(family, precision=stored)
    objective = "masked_text" if family == "bert" else "sft"
    policy, goal = build.assemble(Run(method=method, objective=objective, precision=stored, place={"kind": "one", "on": "cpu"}, recompute="none"), base)
    if recompute:
        base.model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        for p in policy.trained().values():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return policy, goal, goal.collate(rows_for(objective, family), pad=0, packed=base.packs)


def gradients(policy, goal, batch):
    policy.train()
    torch.manual_seed(0)
    (goal.loss(policy, batch).sums[next(iter(goal.terms))] / 40).backward()
    return {k: p.grad for k, p in policy.trained().items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("method", [m for m in METHODS if edits(m) != "weights"])
def test_every_method_beside_the_weights_trains_on_codes_and_recomputation_changes_no_gradient(method, precision, family):
    policy, goal, batch = on(precision, method, family)
    before = {p: {n: t.clone() for n, t in m.stored().items()} for p, m in packed(policy.lm)}
    plain = gradients(policy, goal, batch)
    again = gradients(*on(precision, method, family, recompute=True))
    assert plain.keys() == again.keys() and all(g is not None and bool(g.any()) for g in plain.values())
    for key, g in plain.items():
        torch.testing.assert_close(again[key], g, atol=1e-5, rtol=1e-4)
    bare = Policy(tiny.in_codes(family, precision=plugin("precision", precision)(compute="float32", resident="no", **SETTINGS.get(precision, {}))))
    with policy.reference(), torch.no_grad():
        assert torch.equal(policy.hidden(batch), bare.eval().hidden(batch))
    assert all(torch.equal(t, before[p][n]) for p, m in packed(policy.lm) for n, t in m.stored().items())


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("method", [m for m in METHODS if edits(m) == "weights"])
def test_what_changes_weights_is_refused_in_a_sentence_that_names_a_way(method, precision):
    with pytest.raises(Incompatible, match=r"(pack|codes).*(lora|float precision)") as e:
        on(precision, method, "llama")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("precision", PACKED)
def test_biases_and_norms_beside_codes_still_train(precision):
    policy, goal, batch = on(precision, {"kind": "partial", "biases": True, "norms": True}, "gpt2")
    found = gradients(policy, goal, batch)
    assert any(k.endswith("c_attn:bias") for k in found) and any("ln_1:weight" in k for k in found)
    assert all(g is not None and bool(g.any()) for g in found.values())
