"""NF4 as a precision: the linear and its gradient, who decodes, files that are damaged, settings."""

import importlib.util
import json
import sys
import types

import pytest
import torch
from safetensors.torch import save
from torch.nn.functional import linear

import tiny
from luthier.errors import ConfigError, LuthierError
from luthier.methods.lora import Method as Lora
from luthier.modelling.packed import packed, unpacked
from luthier.nn import nf4
from luthier.objectives.sft import Objective
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.precision import nf4 as precision
from luthier.precision.nf4 import Linear, Precision
from luthier.settings.config import load_run
from luthier.train import train

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
KERNELS = ["torch", pytest.param("bitsandbytes", marks=pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed (extra: quant)"))]


def made(n_in=70, n_out=33, *, bias=False, seed=0, dtype=torch.float32, **how):
    g = torch.Generator().manual_seed(seed)
    out = Precision(**how).linear(n_in, n_out, torch.nn.Parameter(torch.randn(n_out, generator=g)) if bias else None)
    out.write((torch.randn(n_out, n_in, generator=g) * 0.1).to(dtype))
    return out


# --- the linear -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (70, 33), (33, 7)])  # rows of 96 straddle blocks; 33 x 7 is odd
def test_outputs_and_gradients_are_those_of_the_decoded_weight(kernels, shape):
    for dtype in (torch.float32, torch.bfloat16):
        module = made(*shape, bias=True, kernels=kernels)
        weight = nf4.decode(module.packed, module.count, dtype).view(module.shape)
        x = torch.randn(2, 5, shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours, theirs = module(one), linear(two, weight, module.bias.to(dtype))
        assert torch.equal(ours, theirs)
        ours.float().square().sum().backward()
        theirs.float().square().sum().backward()
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
        dense = unpacked(module, dtype)
        assert torch.equal(dense.weight, weight)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_evaluating_in_the_middle_of_training_changes_nothing_of_it(kernels, compute):
    """bitsandbytes' own linears repack their weight in place when a CPU evaluates them, and pass no gradient from then on, without an error: training
    went on with whatever lay above the last such linear. Ours are the same module before and after, so every step is the same to the last digit.
    """

    def run(evaluates):
        base = tiny.in_codes("llama", precision=Precision(kernels=kernels, compute=compute))
        base.model.to(Precision(compute=compute).dtype)
        method = Lora(targets=("all",))
        policy = Policy(base, method.attach(base, "default"), method=method)
        tiny.randomise(policy.trained(), std=0.05)

        class Rows:
            def __init__(self):
                self.at = 0

            def __next__(self):
                self.at += 1
                return [Objective().collate(tiny.rows(4, seed=self.at), pad=0, packed=base.packs)]

        held_out = Objective().collate(tiny.rows(4, seed=99), pad=0, packed=base.packs)
        optimizer = Optimizer(policy.trained(), lr=1e-2)
        steps, losses = [], []
        for step in train(policy, Objective(), Rows(), optimizer, lr=lambda _: 1e-2, steps=4, place=Place(on="cpu")):
            steps.append((step.loss, step.grad_norm))
            assert optimizer.seen == set(policy.trained()), "a trained tensor got no gradient"
            optimizer.seen.clear()
            if evaluates:
                policy.eval()
                with torch.no_grad():
                    losses.append(float(Objective().loss(policy, held_out).sums["tokens"]))
        return steps, losses, optimizer.masters()

    (plain, _, ends), (between, losses, same) = run(False), run(True)
    assert plain == between and all(norm > 0 for _, norm in plain) and len(set(losses)) == 4
    assert all(torch.equal(ends[k], same[k]) for k in ends)


def test_constants_keep_their_dtype_when_the_model_is_cast_and_values_do_not_change():
    module = made()
    before = module.values(torch.float32)
    module.to(torch.float16)
    assert module.nested_absmax.dtype == module.nested_offset.dtype == torch.float32
    assert torch.equal(module.values(torch.float32), before)
    assert module.double() is module  # nn.Module's own: no attribute of ours hides it


def test_held_values_are_the_decoded_ones():
    module, x = made(), torch.randn(3, 70)
    out = module(x)
    module.keep(torch.float32)
    assert torch.equal(module(x), out) and set(module.stored()) == {"codes", "absmax", "nested_absmax", "nested_offset"}


def test_a_weight_on_meta_has_the_bytes_of_a_real_one():
    real, meta = made(), Precision().linear(70, 33)
    meta.write(torch.empty(33, 70, device="meta"))
    assert {k: (t.shape, t.dtype) for k, t in meta.stored().items()} == {k: (t.shape, t.dtype) for k, t in real.stored().items()}
    assert meta(torch.empty(2, 70, device="meta")).shape == (2, 33)


def test_a_whole_model_takes_the_bits_that_are_promised():
    base = tiny.in_codes("llama", precision=Precision())
    for _, module in packed(base.model):
        assert 8 * sum(t.nbytes for t in module.stored().values()) / module.count == nf4.bits_per_weight(module.count, double=True)


@pytest.mark.parametrize("weight", [torch.zeros(33, 70, dtype=torch.int8), torch.zeros(33, 70, dtype=torch.float64), torch.zeros(70, 33)])
def test_a_weight_that_does_not_fit_is_refused(weight):
    with pytest.raises(LuthierError, match=r"a weight \(33, 70\) in float32, bfloat16, float16 is wanted, found"):
        Precision().linear(70, 33).write(weight)


def test_values_that_are_not_finite_and_unknown_dtypes_are_refused():
    with pytest.raises(LuthierError, match="not finite"):
        Precision().linear(70, 33).write(torch.full((33, 70), float("nan")))
    with pytest.raises(LuthierError, match="float64 was asked for"):
        made()(torch.zeros(2, 70, dtype=torch.float64))


# --- who decodes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    """Each test finds out for itself what decodes."""
    precision._bitsandbytes.cache_clear()
    yield
    precision._bitsandbytes.cache_clear()


def test_without_bitsandbytes_pytorch_decodes_and_says_so(monkeypatch, fresh):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert precision.decoder("auto", "cpu") is nf4.decode
    assert Precision().notes(torch.device("cpu")) == ["nf4: decoded in PyTorch: bitsandbytes is not installed"]
    with pytest.raises(LuthierError, match=r"bitsandbytes cannot decode here: bitsandbytes is not installed.*luthier\[quant\]"):
        made(kernels="bitsandbytes").values(torch.float32)
    assert Precision(kernels="torch").notes(torch.device("cpu")) == ["nf4: decoded in PyTorch, as asked"]


@pytest.mark.parametrize("kernel", [lambda p, n, d: nf4.decode(p, n, d) * 1.01, lambda p, n, d: 1 / 0])
def test_a_kernel_that_gives_other_numbers_or_fails_is_not_used(monkeypatch, fresh, kernel, caplog):
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(__version__="9.9"))
    monkeypatch.setattr(precision, "_by_kernel", kernel)
    assert precision.decoder("auto", "cpu") is nf4.decode
    assert torch.equal(made().values(torch.float32), made(kernels="torch").values(torch.float32))
    assert "decoded in PyTorch" in Precision().notes(torch.device("cpu"))[0] and "bitsandbytes 9.9" in caplog.text
    with pytest.raises(LuthierError, match="bitsandbytes cannot decode here"):
        precision.decoder("bitsandbytes", "cpu")


@pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed (extra: quant)")
def test_the_kernel_decodes_where_it_gives_the_same_numbers(fresh):
    assert precision.decoder("auto", "cpu") is precision._by_kernel
    assert "decoded by bitsandbytes" in Precision().notes(torch.device("cpu"))[0]


@pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed (extra: quant)")
def test_an_odd_count_is_left_to_pytorch(monkeypatch, fresh):
    """For rows of odd length bitsandbytes compiles code anew for each shape, which takes seconds."""
    module = made(33, 7, kernels="bitsandbytes")
    precision.decoder("bitsandbytes", "cpu")
    seen = []
    monkeypatch.setattr(nf4, "decode", lambda packed, count, dtype: seen.append(count) or torch.zeros(count, dtype=dtype))
    module.values(torch.float32)
    made(32, 7, kernels="bitsandbytes").values(torch.float32)
    assert seen == [33 * 7]


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", nf4.DTYPES)
def test_tensors_of_a_file_restore_the_linear(double, dtype):
    module = made(double=double, dtype=dtype)
    back = Precision(double=not double).linear(70, 33)  # the file decides
    back.from_file(module.to_file())
    state = json.loads(bytes(module.to_file()["weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert state["dtype"] == str(dtype).removeprefix("torch.") and state["shape"] == [33, 70]
    assert all(torch.equal(a, b) for a, b in zip(module.stored().values(), back.stored().values(), strict=True))
    assert torch.equal(back.values(torch.float32), module.values(torch.float32))
    again = back.to_file()
    assert set(again) == set(module.to_file()) and all(torch.equal(t, again[k]) for k, t in module.to_file().items())
    save({f"{name}.{k}": t for name, m in (("a", module), ("b", made(seed=1))) for k, t in m.to_file().items()})  # takes no memory twice


def test_levels_of_the_scales_that_are_not_todays_are_kept():
    """Releases have differed in the last digits of these levels, and some held -1 as the first."""
    file = made().to_file()
    file["weight.nested_quant_map"] = file["weight.nested_quant_map"] * 1.5
    module = Precision().linear(70, 33)
    module.from_file(file)
    scales = nf4.scales(made().packed) - made().nested_offset
    torch.testing.assert_close(nf4.scales(module.packed) - module.nested_offset, scales * 1.5)
    assert torch.equal(module.to_file()["weight.nested_quant_map"], file["weight.nested_quant_map"])


def test_codes_that_were_written_as_floats_are_read():
    """What bnb_4bit_quant_storage does, for sharding."""
    file = made(64, 32).to_file()
    file["weight"] = file["weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    module = Precision().linear(64, 32)
    module.from_file(file)
    assert torch.equal(module.codes, made(64, 32).codes)


def _state(**changed):
    def damage(file):
        key = "weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(file[key].tolist())) | changed
        return file | {key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}

    return damage


def _without(*names):
    return lambda file: {k: t for k, t in file.items() if k not in names}


def _renamed(file):
    return {k.replace("__nf4", "__fp4"): t for k, t in file.items()}


DAMAGE = {
    "weight.absmax is missing": _without("weight.absmax"),
    "weight.quant_map is missing": _without("weight.quant_map"),
    "weight.nested_absmax is missing": _without("weight.nested_absmax"),
    "bitsandbytes__nf4 is missing": _without("weight.quant_state.bitsandbytes__nf4"),
    r"codes \(weight\) are missing": _without("weight"),
    r"codes \(weight\) are 1,000 bytes long where 1,155 are wanted": lambda f: f | {"weight": f["weight"][:1000]},
    r"weight.absmax is \(36,\) uint8 where \(37,\) uint8 is wanted": lambda f: f | {"weight.absmax": f["weight.absmax"][:-1]},
    r"weight.absmax is \(37,\) float32 where \(37,\) uint8": lambda f: f | {"weight.absmax": f["weight.absmax"].float()},
    "weight.nested_absmax is damaged: it holds values that are not finite": lambda f: f | {"weight.nested_absmax": f["weight.nested_absmax"] / 0},
    "holds other levels than NF4's": lambda f: f | {"weight.quant_map": f["weight.quant_map"].flip(0)},
    "is damaged: it holds no JSON object with a finite nested_offset": _state(nested_offset=float("nan")),
    "bitsandbytes__nf4 is damaged": lambda f: f | {"weight.quant_state.bitsandbytes__nf4": torch.tensor([123, 34], dtype=torch.uint8)},
    "codes are fp4, and of bitsandbytes' 4-bit kinds only nf4": _renamed,
    "have blocksize 128, and 64 is read": _state(blocksize=128),
    "have nested_blocksize 512, and 256 is read": _state(nested_blocksize=512),
    r"have shape \[70, 33\], and \[33, 70\] is read": _state(shape=[70, 33]),
    "were made from int8": _state(dtype="int8"),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_damage_and_other_codes_are_refused_in_one_sentence(said):
    with pytest.raises(LuthierError, match=said) as e:
        Precision().linear(70, 33).from_file(DAMAGE[said](made().to_file()))
    assert "\n" not in str(e.value)


def test_what_config_json_says_is_read_back_and_other_kinds_are_refused():
    assert Precision.from_file_config(Precision(double=False).file_config()) == Precision(double=False)
    assert Precision.from_file_config(Precision().file_config(["lm_head"])) == Precision()
    assert Precision(compute="float32").file_config(["lm_head"])["llm_int8_skip_modules"] == ["lm_head"]
    said = Precision().file_config()
    for changed, match in [
        ({"bnb_4bit_quant_type": "fp4"}, "stored in fp4"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "speaks of 8 bits"),
        ({"quant_method": "gptq"}, "speaks of gptq"),
    ]:
        with pytest.raises(LuthierError, match=match):
            Precision.from_file_config(said | changed)
    with pytest.raises(LuthierError, match="stored in fp4"):
        Precision.from_file_config({"load_in_4bit": True})  # what bitsandbytes takes for granted


# --- settings -------------------------------------------------------------------------------------------------------


def test_settings_are_read_and_wrong_ones_refused():
    run = load_run(None, ["precision=nf4", "precision.double=no", "precision.compute=float32", "precision.resident=yes", "precision.kernels=torch"])
    assert run.precision == Precision(double=False, compute="float32", resident="yes", kernels="torch")
    assert run.precision.dtype == torch.float32 and Precision().dtype == torch.bfloat16 and Precision.packed
    module = run.precision.linear(70, 33)
    assert isinstance(module, Linear) and not module.nested and module.kernels == "torch"
    with pytest.raises(ConfigError, match="bfloat16, float32"):
        load_run(None, ["precision=nf4", "precision.compute=float16"])
