"""NF4 and int8 against bitsandbytes 0.50: codes, constants and values bit for bit, and folders that transformers writes and reads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from luthier.modelling.packed import PackedLinear
from luthier.nn import int8, nf4
from luthier.precision.int8 import Precision as Int8
from luthier.precision.nf4 import Precision as Nf4

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quant)")
from bitsandbytes import functional

SHAPES = [(64, 64), (33, 100), (5, 64), (300, 258), (2, 33), (7, 3), (1, 1), (1024, 1100)]
# bitsandbytes compiles a version of its own for rows of odd length, which takes a minute: codes only.


def weight(shape, dtype, scale=0.02):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale
    w.view(-1)[: w.numel() // 9] = 0  # whole blocks of zeros where there is room
    return w.to(dtype)


@pytest.mark.parametrize("dtype", nf4.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_bitsandbytes_bit_for_bit(shape, dtype):
    for scale in (1.0, 0.02, 1e-4):
        w = weight(shape, dtype, scale)
        for double in (False, True):
            codes, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
            ours = nf4.encode(w, double=double)
            assert torch.equal(ours.codes, codes.flatten()) and torch.equal(ours.absmax, state.absmax)
            if double:
                assert torch.equal(ours.nested_absmax, state.state2.absmax) and torch.equal(ours.nested_offset, state.offset)
                assert torch.equal(nf4.dynamic_map(), state.state2.code)
            if shape[1] % 2 == 0:
                for to in nf4.DTYPES:
                    state.dtype = to
                    assert torch.equal(nf4.decode(ours, w.numel(), to), functional.dequantize_4bit(codes, state).flatten())


@pytest.mark.parametrize("length", [64, 62])  # a whole block is multiplied by the reciprocal of its scale there, the rest at the end divided by it
def test_weights_within_a_rounding_of_a_midpoint_get_bitsandbytes_codes_too(length):
    levels, above = torch.tensor(nf4.LEVELS), torch.tensor(torch.inf)
    g = torch.Generator().manual_seed(0)
    for _ in range(150):
        scale = torch.rand((), generator=g) + 0.5
        near = (levels[1:] + levels[:-1]) / 2 * scale
        around = [near, torch.nextafter(near, above), torch.nextafter(near, -above), torch.nextafter(torch.nextafter(near, above), above)]
        w = torch.cat([*around, scale[None], torch.zeros(3)])[-length:]
        codes, _ = functional.quantize_4bit(w, quant_type="nf4")
        assert torch.equal(nf4.encode(w, double=False).codes, codes.flatten())


def test_a_part_of_a_block_that_is_zero_is_stored_as_there():
    w = weight((3, 34), torch.float32)
    w.view(-1)[64:] = 0
    _, state = functional.quantize_4bit(w, quant_type="nf4")
    assert torch.equal(nf4.encode(w, double=False).absmax, state.absmax)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_is_bitsandbytes_bit_for_bit(dtype):
    for shape in [(64, 64), (33, 100), (7, 3)]:
        w = weight(shape, dtype)
        w[0, 0] = 0.5  # a row of zeros would be 0 x infinity there
        w += 0.001
        codes, largest, _ = functional.int8_vectorwise_quant(w.half())
        ours = int8.encode(w)
        assert torch.equal(ours[0], codes) and torch.equal(ours[1], largest)
        for to in (torch.float32, torch.bfloat16):
            theirs = codes.to(to).mul_(largest.unsqueeze(1).mul(1.0 / 127.0))  # as its training on CPUs decodes
            assert torch.equal(int8.decode(*ours, to), theirs)


@pytest.mark.parametrize("double", [True, False])
def test_training_through_nf4_gives_the_numbers_of_bitsandbytes_own_linear(double):
    from bitsandbytes.nn import Linear4bit

    w = weight((128, 64), torch.bfloat16)
    theirs = Linear4bit(64, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=double)
    theirs.weight.data = w.clone()
    theirs.to("cpu")
    for kernels in ("torch", "bitsandbytes"):
        ours = Nf4(double=double, kernels=kernels).linear(64, 128)
        ours.write(w)
        x = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        one, two = ours(a), theirs(b)
        assert torch.equal(one, two)
        one.backward(torch.ones_like(one))
        two.backward(torch.ones_like(two))
        assert torch.equal(a.grad, b.grad)


# --- folders --------------------------------------------------------------------------------------------------------

CASES = {
    "nf4-double": (Nf4(), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}),
    "nf4": (Nf4(double=False), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}),
    "int8": (Int8(), {"load_in_8bit": True}),
}


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A small Llama in bfloat16, as a folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, attention_bias=True
    )
    folder = tmp_path_factory.mktemp("floats")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CASES)
def case(request, floats, tmp_path_factory):
    """(our precision, the folder that transformers with bitsandbytes wrote, the model it wrote it from)."""
    precision, settings = CASES[request.param]
    model = AutoModelForCausalLM.from_pretrained(floats, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return precision, folder, model


def linears(folder):
    """path -> tensors by the name inside the linear, of the stored linears."""
    out = {}
    for key, t in load_file(folder / "model.safetensors").items():
        path, dot, leaf = key.partition("_proj.")
        if dot and leaf != "bias":
            out.setdefault(f"{path}_proj", {})[leaf] = t
    assert len(out) == 14
    return out


def empty(precision, floats, path) -> tuple[PackedLinear, torch.Tensor]:
    w = load_file(floats / "model.safetensors")[f"{path}.weight"]
    return precision.linear(w.shape[1], w.shape[0]), w


def test_a_folder_of_transformers_is_read_and_holds_what_we_would_have_stored(case, floats):
    precision, folder, _ = case
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert type(precision).from_file_config(said) == precision
    for path, tensors in linears(folder).items():
        linear, w = empty(precision, floats, path)
        linear.from_file(tensors)
        written, _ = empty(precision, floats, path)
        written.write(w)
        assert linear.stored().keys() == written.stored().keys()
        assert all(torch.equal(t, written.stored()[k]) for k, t in linear.stored().items())


def test_what_we_write_is_what_transformers_writes(case, floats):
    precision, folder, _ = case
    for path, tensors in linears(folder).items():
        linear, w = empty(precision, floats, path)
        linear.write(w)
        ours = linear.to_file()
        assert ours.keys() == tensors.keys()
        for leaf, t in tensors.items():
            if "quant_state" in leaf:
                assert json.loads(bytes(ours[leaf].tolist())) == json.loads(bytes(t.tolist()))
            else:
                assert ours[leaf].shape == t.shape and ours[leaf].dtype == t.dtype and torch.equal(ours[leaf], t)


def test_transformers_opens_a_folder_of_ours_and_computes_the_same(case, floats, tmp_path):
    precision, folder, model = case
    tensors = {k: t for k, t in load_file(folder / "model.safetensors").items() if "_proj." not in k or k.endswith(".bias")}
    for path in linears(folder):
        linear, w = empty(precision, floats, path)
        linear.write(w)
        tensors |= {f"{path}.{leaf}": t for leaf, t in linear.to_file().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": precision.file_config(["lm_head"])}
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(opened.model.layers[0].mlp.up_proj).__name__ in ("Linear4bit", "Linear8bitLt")
    ids = torch.arange(20)[None]
    model.train(), opened.train()  # evaluating repacks its 4-bit weights
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, model(ids).logits)
