"""int8 as a precision: the linear and its gradient, files that are damaged, settings."""

import pytest
import torch
from torch.nn.functional import linear

import tiny
from luthier.errors import LuthierError
from luthier.modelling.packed import packed
from luthier.nn import int8
from luthier.precision.int8 import Precision
from luthier.settings.config import load_run


def made(n_in=70, n_out=33, *, bias=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = Precision().linear(n_in, n_out, torch.nn.Parameter(torch.randn(n_out, generator=g)) if bias else None)
    out.write(torch.randn(n_out, n_in, generator=g) * 0.1)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_decoded_weight_before_and_after_an_evaluation(dtype):
    module = made(bias=True)
    weight = int8.decode(module.codes, module.largest, dtype)
    x = torch.randn(2, 5, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    for _ in range(2):
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours, theirs = module(one), linear(two, weight, module.bias.to(dtype))
        assert torch.equal(ours, theirs)
        ours.float().square().sum().backward()
        theirs.float().square().sum().backward()
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
        module.eval()
        with torch.no_grad():
            assert torch.equal(module(x), ours)
        module.train()


def test_scales_keep_their_dtype_when_the_model_is_cast():
    module = made().to(torch.bfloat16)
    assert module.largest.dtype == torch.float32 and module.codes.dtype == torch.int8


def test_a_weight_on_meta_has_the_bytes_of_a_real_one():
    real, meta = made(), Precision().linear(70, 33)
    meta.write(torch.empty(33, 70, device="meta"))
    assert {k: (t.shape, t.dtype) for k, t in meta.stored().items()} == {k: (t.shape, t.dtype) for k, t in real.stored().items()}
    assert meta(torch.empty(2, 70, device="meta")).shape == (2, 33)


def test_a_whole_model_takes_the_bits_that_are_promised():
    base = tiny.in_codes("llama", precision=Precision())
    for _, module in packed(base.model):
        assert 8 * sum(t.nbytes for t in module.stored().values()) / module.count == int8.bits_per_weight(module.out_features, module.in_features)


def test_what_cannot_be_stored_or_decoded_is_refused():
    for weight in (torch.zeros(33, 70, dtype=torch.float64), torch.zeros(70, 33)):
        with pytest.raises(LuthierError, match=r"a weight \(33, 70\) in float32, bfloat16, float16 is wanted, found"):
            Precision().linear(70, 33).write(weight)
    with pytest.raises(LuthierError, match="not finite"):
        Precision().linear(70, 33).write(torch.full((33, 70), float("inf")))
    with pytest.raises(LuthierError, match="float64 was asked for"):
        made()(torch.zeros(2, 70, dtype=torch.float64))


def test_tensors_of_a_file_restore_the_linear():
    module, back = made(), Precision().linear(70, 33)
    back.from_file(module.to_file())
    assert torch.equal(back.values(torch.float32), module.values(torch.float32))
    back.from_file({k: t for k, t in module.to_file().items() if k != "weight_format"})  # early files have none


DAMAGE = {
    "SCB is missing": lambda f: {k: t for k, t in f.items() if k != "SCB"},
    r"weight is \(33, 70\) uint8 where \(33, 70\) int8": lambda f: f | {"weight": f["weight"].to(torch.uint8)},
    r"SCB is \(32,\) float32 where \(33,\)": lambda f: f | {"SCB": f["SCB"][1:]},
    "SCB is damaged": lambda f: f | {"SCB": f["SCB"] / 0},
    "have weight_format 2, and only 0": lambda f: f | {"weight_format": torch.tensor(2, dtype=torch.uint8)},
}


@pytest.mark.parametrize("said", DAMAGE)
def test_damage_and_other_orders_are_refused_in_one_sentence(said):
    with pytest.raises(LuthierError, match=said) as e:
        Precision().linear(70, 33).from_file(DAMAGE[said](made().to_file()))
    assert "\n" not in str(e.value)


def test_settings_and_what_config_json_says():
    run = load_run(None, ["precision=int8", "precision.compute=float32", "precision.resident=no"])
    assert run.precision == Precision(compute="float32", resident="no") and run.precision.dtype == torch.float32
    assert Precision.from_file_config(Precision().file_config()) == Precision()
    with pytest.raises(LuthierError, match="speaks of 4 bits"):
        Precision.from_file_config({"load_in_4bit": True})
