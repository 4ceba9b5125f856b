"""A linear in codes computes with the values they stand for, saves nothing of them between forward and backward, and evaluation leaves training as it was."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear

import tiny
from luthier.core import Incompatible
from luthier.methods.full import Method as Full
from luthier.methods.lora import Method as Lora
from luthier.modelling.packed import PackedLinear, dequantise, packed, unpacked
from luthier.modelling.site import restoring, site_at
from luthier.objectives.sft import Objective
from luthier.policy import Policy


def one(bias=True, n_in=12, n_out=7):
    g = torch.Generator().manual_seed(0)
    out = tiny.ByRow(n_in, n_out, torch.nn.Parameter(torch.randn(n_out, generator=g)) if bias else None)
    out.write(torch.randn(n_out, n_in, generator=g))
    return out


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_the_decoded_weight(bias, dtype):
    module = one(bias)
    x, plain = (random(2, 5, 12).to(dtype).requires_grad_() for _ in range(2))
    b = None if not bias else module.bias.detach().to(dtype).requires_grad_()
    y, want = module(x), linear(plain, module.values(dtype), b)
    assert torch.equal(y, want) and y.dtype == dtype
    g = random(2, 5, 7, seed=2).to(dtype)
    y.backward(g)
    want.backward(g)
    torch.testing.assert_close(x.grad, plain.grad)
    if bias:
        torch.testing.assert_close(module.bias.grad, b.grad.float(), atol=1e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)


def test_nothing_is_saved_for_the_backward():
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        one()(random(3, 12).requires_grad_())
    assert kept == []


def test_a_weight_held_in_memory_gives_the_same_bits():
    module = one()
    x = random(4, 12).requires_grad_()
    decoded = torch.autograd.grad(module(x).square().sum(), x)[0], module(x)
    module.keep(torch.float32)
    held = torch.autograd.grad(module(x).square().sum(), x)[0], module(x)
    assert all(torch.equal(a, b) for a, b in zip(decoded, held, strict=True))
    assert module(x.bfloat16()).dtype == torch.bfloat16  # another dtype than the one that is held is decoded
    module.keep(None)
    assert module.resident is None and "resident" not in module.stored()


def test_constants_beside_the_codes_keep_their_dtype_when_a_model_is_cast_and_are_no_parameters():
    module = one().to(torch.bfloat16)
    assert module.scales.dtype == torch.float32 and module.codes.dtype == torch.int8 and module.bias.dtype == torch.bfloat16
    assert [n for n, _ in module.named_parameters()] == ["bias"] and module.weight is None
    assert module.to("meta").codes.device.type == "meta"


def trained(evaluations, recompute=False):
    """LoRA parameters after some steps with an evaluation before every second step, or none; and the gradient norms on the way."""
    base = tiny.in_codes("llama")
    if recompute:
        base.model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    method = Lora(targets=("all",), rank=4)
    torch.manual_seed(0)
    policy = Policy(base, method.attach(base, "default"), method=method)
    optimizer = torch.optim.SGD(policy.delta.params.values(), lr=0.5)
    norms = []
    for step in range(6):
        batch = Objective().collate(tiny.rows(4, seed=step), pad=0, packed=True)
        if evaluations and step % 2:
            policy.eval()
            with torch.no_grad():
                Objective().loss(policy, batch)
            policy.train()
        optimizer.zero_grad()
        loss = Objective().loss(policy, batch).sums["tokens"] / batch.units["tokens"]
        loss.backward()
        assert all(p.grad is not None for p in policy.delta.params.values()), step
        norms.append(float(torch.stack([p.grad.norm() for p in policy.delta.params.values()]).norm()))
        optimizer.step()
    return {k: p.detach().clone() for k, p in policy.delta.params.items()}, norms


def test_an_evaluation_in_the_middle_of_training_leaves_the_gradients_as_they_were():
    """A common library packs its 4-bit weights anew for the first evaluation on CPU, and from then on uses a product that has no gradient: training
    goes on, nothing is said, and nothing below the top is learned. Here a run with evaluations equals one without, bit for bit."""
    (plain, norms), (evaluated, again) = trained(False), trained(True)
    assert norms == again and min(norms) > 0
    assert all(torch.equal(plain[k], evaluated[k]) for k in plain)


def test_recomputation_changes_nothing():
    (plain, norms), (recomputed, again) = trained(False), trained(True, recompute=True)
    assert norms == pytest.approx(again, rel=1e-5)
    assert all(torch.allclose(plain[k], recomputed[k], atol=1e-6) for k in plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "qwen3_moe"])
def test_written_out_in_floats_a_model_computes_the_same(family):
    base = tiny.in_codes(family)
    ids = torch.arange(5, 15)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if family in tiny.SEQ2SEQ else {})
    kinds = {p: (m.transposed, m.in_features, m.out_features) for p, m in packed(base.model)}
    with torch.no_grad():
        before = base.model(**inputs).logits
        dequantise(base.model, torch.float32)
        assert torch.equal(base.model(**inputs).logits, before)
    assert not list(packed(base.model)) and kinds
    own = dict(tiny.model(family).named_modules())
    assert all(type(base.model.get_submodule(p)) is type(own[p]) for p in kinds)


def test_a_linear_in_codes_inside_a_site_is_found_by_its_path_in_the_untouched_base():
    base = tiny.in_codes("llama")
    paths = [p for p, _ in packed(base.model)]
    site_at(base.model, paths[0])
    assert [p for p, _ in packed(base.model)] == paths
    dequantise(base.model, torch.float32)
    assert not isinstance(base.model.get_submodule(paths[0]).base, PackedLinear)


def test_an_unpacked_copy_is_not_the_weight_that_is_held():
    module = one()
    module.keep(torch.float32)
    free = unpacked(module, torch.float32)
    with torch.no_grad():
        free.weight.add_(1)
    assert not torch.equal(free.weight, module.resident)


def test_nothing_folds_into_codes_and_full_fine_tuning_of_them_trains_what_is_float():
    base = tiny.in_codes("llama")
    method = Lora()
    policy = Policy(base, method.attach(base, "default"), method=method)
    with pytest.raises(Incompatible, match="stored in codes.*luthier merge writes"):
        policy.fold()
    assert not any(".q_proj" in k for k in Full().attach(tiny.in_codes("llama"), "x").params)
