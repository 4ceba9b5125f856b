"""Linears in GPTQ's codes: what they compute, what stands in their files, and what is said of files that do not fit."""

import json

import pytest
import torch
from torch.nn.functional import linear

from luthier.core import Incompatible, LuthierError
from luthier.nn import affine, gptq
from luthier.nn.gptq import Grid
from luthier.precision.gptq import LEAVES, Precision
from luthier.settings.plugins import plugin


def made(bits=4, n_in=64, n_out=96, group=16, seed=0, **how):
    """A written linear and the weight it was written from."""
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed))
    out = Precision(bits=bits, group=group, **how).linear(n_in, n_out, None)
    out.write(weight)
    return out, weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_writing_rounds_to_the_nearest_value_of_the_grid(bits, group, symmetric):
    module, weight = made(bits, group=group, symmetric=symmetric)
    rounded = gptq.nearest(weight, Grid(bits, symmetric, lowest=1), group).values()
    assert torch.equal(module.values(torch.float32), rounded)
    step = module.scales.float().repeat_interleave(64 // len(module.scales), 0).t()
    inside = (rounded - weight).abs() <= step / 2 + 1e-6
    assert float(inside.float().mean()) > 0.9  # symmetric codes lack the uppermost value
    assert torch.equal(module.values(torch.bfloat16), rounded.bfloat16())


def test_it_computes_with_the_stored_weight_and_so_does_its_gradient():
    module, _ = made()
    weight = module.values(torch.float32)
    x = torch.randn(3, 5, 64, requires_grad=True)
    g = torch.randn(3, 5, 96)
    out = module(x)
    out.backward(g)
    assert torch.equal(out, linear(x, weight)) and torch.allclose(x.grad, g @ weight, atol=1e-5)
    module.keep(torch.float32)
    assert torch.equal(module(x), out)
    module.to(torch.bfloat16)
    assert module.scales.dtype == torch.float16 and module.qweight.dtype == torch.int32  # a cast leaves codes alone


@pytest.mark.parametrize("how", [{}, {"bits": 3, "symmetric": False}, {"bits": 8, "group": -1}, {"bits": 2, "checkpoint_format": "gptq_v2"}])
def test_what_is_written_to_a_file_is_read_from_it(how):
    module, _ = made(**how)
    tensors = module.to_file()
    assert tuple(tensors) == LEAVES and tensors["g_idx"].dtype == torch.int32 and tensors["scales"].dtype == torch.float16
    stored = Precision(**{"group": 16} | how)
    back = Precision.from_file_config(json.loads(json.dumps(stored.file_config())))
    assert back == stored
    again = back.linear(64, 96)
    again.from_file(tensors)
    assert torch.equal(again.values(torch.float32), module.values(torch.float32))


def test_version_1_and_version_2_differ_by_one_in_their_zeros_only():
    one, two = (made(checkpoint_format=f)[0] for f in ("gptq", "gptq_v2"))
    assert torch.equal(one.qweight, two.qweight) and torch.equal(one.values(torch.float32), two.values(torch.float32))
    assert one.qzeros[0, 0] == 0x77777777 and two.qzeros[0, 0] & 0xFFFFFFFF == 0x88888888


def test_version_1_never_holds_the_zero_it_has_no_room_for():
    """0 - 1 would run into the next zero of the word where a reader adds 1 to the whole word."""
    module = Precision(group=16, symmetric=False).linear(64, 96, None)
    module.write(torch.rand(96, 64) + 1)
    assert int(affine.unpack_zeros(module.qzeros, 4, minus_one=True).min()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_in_any_order_of_groups_are_read(dtype):
    module, _ = made(symmetric=False)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    tensors = module.to_file()
    codes = affine.unpack(tensors["qweight"], 4)[order]
    turned = Precision(group=16).linear(64, 96)
    turned.from_file(tensors | {"qweight": affine.pack(codes, 4), "g_idx": tensors["g_idx"][order]})
    assert torch.equal(turned.values(dtype), module.values(dtype)[:, order])


def test_awq_folders_are_read_and_written_as_version_2():
    module, _ = made(symmetric=False, checkpoint_format="gptq_v2")
    place = torch.tensor(affine.AWQ_ORDER)
    interleave = lambda t: affine.pack(t.view(t.shape[0], -1, 8)[..., place].reshape(t.shape).t().contiguous(), 4).t().contiguous()  # noqa: E731
    codes, zeros = affine.unpack(module.qweight, 4), affine.unpack_zeros(module.qzeros, 4, minus_one=False)
    stored = Precision.from_file_config({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True})
    assert (stored.checkpoint_format, stored.symmetric) == ("gptq_v2", False)
    back = stored.linear(64, 96)
    back.from_file({"qweight": interleave(codes), "qzeros": interleave(zeros), "scales": module.scales})
    assert torch.equal(back.values(torch.float32), module.values(torch.float32)) and torch.equal(back.qweight, module.qweight)


def test_a_missing_g_idx_means_inputs_in_order():
    module, _ = made()
    back = Precision(group=16).linear(64, 96)
    back.from_file({k: v for k, v in module.to_file().items() if k != "g_idx"})
    assert torch.equal(back.g_idx, module.g_idx)


def test_on_the_meta_device_shapes_and_bytes_are_counted():
    with torch.device("meta"):
        weight = torch.empty(4096, 11008)
    module = Precision().linear(11008, 4096)
    module.write(weight)
    assert all(t.is_meta for t in module.stored().values())
    bits = 8 * sum(t.nbytes for t in module.stored().values()) / module.count
    assert bits == pytest.approx(4 + (16 + 4) / 128 + 32 / 4096)


CONFIGS = {
    "autogptq": {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True, "true_sequential": True,
                 "model_name_or_path": None, "model_file_base_name": "model", "quant_method": "gptq"},
    "gptqmodel": {"bits": 4, "group_size": 32, "desc_act": True, "sym": False, "lm_head": False, "quant_method": "gptq", "checkpoint_format": "gptq_v2",
                  "pack_dtype": "int32", "dynamic": {"-:.*gate.*": {}}, "meta": {"quantizer": ["gptqmodel:1.4.0"]}},
    "optimum": {"bits": 8, "batch_size": 1, "block_name_to_quantize": "model.layers", "damp_percent": 0.1, "dataset": "c4", "desc_act": False, "group_size": -1,
                "max_input_length": None, "model_seqlen": 2048, "quant_method": "gptq", "sym": True, "tokenizer": None, "true_sequential": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "said"),
    [("autogptq", (4, 128, True, False, "gptq")), ("gptqmodel", (4, 32, False, True, "gptq_v2")), ("optimum", (8, -1, True, False, "gptq"))],
)
def test_settings_of_other_programs_are_read(name, said):
    found = Precision.from_file_config(CONFIGS[name])
    assert (found.bits, found.group, found.symmetric, found.act_order, found.checkpoint_format) == said


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"bits": 5}, r"quantization_config\.bits: found 5, accepted are 2, 3, 4 and 8"),
        ({}, r"quantization_config\.bits: found None, accepted are"),
        ({"bits": 4, "checkpoint_format": "marlin"}, "laid out as 'marlin'; read here is gptq and gptq_v2"),
        ({"bits": 4, "is_marlin_format": True}, "laid out as 'marlin'"),
        ({"bits": 4, "format": "gptq_p"}, "laid out as 'gptq_p'"),
        ({"bits": 4, "pack_dtype": "int16"}, "pack_dtype: found 'int16', accepted is int32"),
        ({"bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}}, r"dynamic: '\+:\.\*down\.\*' has bits or groups of its own"),
        ({"bits": 3, "quant_method": "awq"}, r"bits: found 3, accepted are 4 \(awq\)"),
        ({"bits": 4, "quant_method": "awq", "version": "gemv"}, "laid out as 'gemv'; read here is gemm"),
    ],
)
def test_settings_that_are_not_read_are_one_sentence(config, sentence):
    with pytest.raises(Incompatible, match=sentence):
        Precision.from_file_config({"quant_method": "gptq"} | config)


def test_linears_left_in_floats_are_said_so_that_other_programs_leave_them():
    said = Precision().file_config(skip=["lm_head", "model.layers.0.mlp.gate"])
    assert said["dynamic"] == {r"-:^model\.layers\.0\.mlp\.gate$": {}} and "dynamic" not in Precision().file_config(skip=["lm_head"])
    assert Precision.from_file_config(said) == Precision()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scales": None}, r"the file has no scales for this linear \(it has g_idx, qweight, qzeros\); a linear in gptq has qweight, qzeros, scales, g_idx"),
        ({"qweight": torch.zeros(4, 96, dtype=torch.int32)}, r"qweight has the shape \(4, 96\), and 4 bits in groups of 16 need \(8, 96\)"),
        ({"scales": torch.zeros(2, 96)}, r"scales has the shape \(2, 96\)"),
        ({"qweight": torch.zeros(8, 96)}, r"codes are torch\.float32"),
        ({"g_idx": torch.full((64,), 4, dtype=torch.int32)}, "g_idx names groups 4 to 4, and there are 4, counted from 0"),
    ],
)
def test_damaged_files_are_one_sentence(change, sentence):
    tensors = {k: v for k, v in (made()[0].to_file() | change).items() if v is not None}
    with pytest.raises(Incompatible, match=sentence):
        Precision(group=16).linear(64, 96).from_file(tensors)


def test_shapes_that_the_layout_has_no_room_for_are_one_sentence():
    with pytest.raises(Incompatible, match=r"group: 128 does not divide the 96 inputs of a linear; 32 does, and -1 is one group for all of them"):
        Precision().linear(96, 64)
    with pytest.raises(Incompatible, match=r"a linear of 50 outputs: codes of 4 bits are stored 8 at a time"):
        Precision(group=-1).linear(64, 50)
    with pytest.raises(Incompatible, match=r"a linear of 80 inputs: codes of 3 bits are stored 32 at a time"):
        Precision(bits=3, group=-1).linear(80, 64)
    with pytest.raises(Incompatible, match="group: must be at least 1, or -1"):
        Precision(group=0)


def test_a_weight_that_is_not_finite_is_one_sentence():
    with pytest.raises(LuthierError, match=r"a weight is not finite.*; is the file damaged\?"):
        Precision(group=16).linear(64, 96).write(torch.full((96, 64), float("nan")))


def test_it_is_a_precision_that_runs_can_name():
    stored = plugin("precision", "gptq")(compute="float32")
    assert stored.packed and stored.calibrated and stored.dtype == torch.float32 and Precision().dtype == torch.bfloat16
