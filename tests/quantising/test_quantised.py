"""Bases in codes: quantised while they are read, kept on disk, read back; and what is said where a folder does not fit."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from luthier import build, opening
from luthier.core import LuthierError
from luthier.modelling.packed import PackedLinear, packed
from luthier.quantising import codes
from luthier.settings.plugins import plugin
from luthier.settings.run import Model, Run

KINDS = ("nf4", "int8")
FAMILIES = ["llama_tied", "gpt2", "phi3", "qwen3_moe", "bert", "modernbert", "t5_gated", "bart"]


def precision(kind, **how):
    return plugin("precision", kind)(compute="float32", **how)


def open_(folder, stored, **how):
    return build.load(Model(id=str(folder), **how), precision=stored)


@torch.no_grad()
def logits(base):
    ids = torch.arange(5, 15)[None]
    return base.model(input_ids=ids, **({"decoder_input_ids": ids} if base.anatomy.kind == "encoder_decoder" else {})).logits


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_read_from_floats_written_as_codes_and_read_again_a_model_is_the_same(home, family, kind):
    own = tiny.model(family)
    own.save_pretrained(home / "floats")
    base = open_(home / "floats", precision(kind))
    linears = {p: m for p, m in own.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    inside = {p for p in linears if p.startswith(tuple(f"{s}." for s in base.anatomy.stacks.values()))}
    assert {p for p, _ in packed(base.model)} == inside and inside
    for path, made in packed(base.model):  # each holds what encoding its weight gives
        again = precision(kind).linear(made.in_features, made.out_features, None)
        weight = linears[path].weight.detach()
        again.write(weight.t() if made.transposed else weight)
        assert torch.equal(made.values(torch.float32), again.values(torch.float32)), path
    codes.write_folder(base, base.precision, home / "codes")
    back = open_(home / "codes", plugin("precision", kind)(compute="float32"))
    assert torch.equal(logits(back), logits(base))
    assert codes.original(home / "codes") == {"source": str(home / "floats"), "revision": None, "hash": base.hash}


def test_on_the_meta_device_the_codes_have_their_shapes_and_no_memory(home):
    tiny.model("llama").save_pretrained(home / "floats")
    here, there = (build.load(Model(id=str(home / "floats")), precision=precision("nf4"), weights=w) for w in (True, False))
    for (path, real), (same, planned) in zip(packed(here.model), packed(there.model), strict=True):
        assert path == same and {n: (t.shape, t.dtype) for n, t in real.stored().items()} == {n: (t.shape, t.dtype) for n, t in planned.stored().items()}
        assert all(t.is_meta for t in planned.stored().values())


def test_a_random_model_is_packed_too(home):
    tiny.model("llama").config.save_pretrained(home / "shape")
    base = open_(home / "shape", precision("nf4"), random=True)
    assert len(list(packed(base.model))) == 14 and "15,360 weights of 14 linears" in base.storage


def test_the_quantised_copy_is_kept_when_asked_and_opened_the_next_time(home):
    tiny.folder(home / "floats")
    first = open_(home / "floats", precision("nf4"), cache="yes")
    kept = codes.cached(first.hash, first.precision)
    assert kept.is_dir() and str(kept) in first.storage
    weights = kept / "model.safetensors"
    changed = load_file(weights)
    changed["model.norm.weight"] = changed["model.norm.weight"] * 2  # to see that it is this file that is read
    save_file(changed, weights, metadata={"format": "pt"})
    second, third = open_(home / "floats", precision("nf4")), open_(home / "floats", precision("nf4"), cache="no")
    assert second.hash == first.hash and not torch.equal(logits(second), logits(first)) and torch.equal(logits(third), logits(first))
    other = open_(home / "floats", precision("nf4", double=False))  # other codes are another copy
    assert torch.equal(logits(open_(home / "floats", precision("nf4", double=False), cache="no")), logits(other))


def test_small_models_are_not_kept_unasked(home):
    tiny.folder(home / "floats")
    open_(home / "floats", precision("nf4"))
    assert not (home / "cache").exists()


@pytest.mark.parametrize(("resident", "held"), [("auto", True), ("yes", True), ("no", False)])
def test_decoded_values_stay_in_memory_where_there_is_room_or_as_asked_with_the_same_numbers(home, resident, held):
    tiny.folder(home / "floats")
    base, other = open_(home / "floats", precision("nf4", resident=resident)), open_(home / "floats", precision("nf4", resident="no"))
    assert all((m.resident is not None) == held for _, m in packed(base.model))
    assert ("stay in memory" in base.storage) == held
    assert torch.equal(logits(base), logits(other))


def test_auto_does_not_hold_what_would_take_more_than_a_third_of_the_memory(home, monkeypatch):
    monkeypatch.setattr("luthier.quantising.quantised._free_memory", lambda device: 100_000)
    tiny.folder(home / "floats")
    base = open_(home / "floats", precision("nf4"))
    assert all(m.resident is None for _, m in packed(base.model)) and "decoded at every use" in base.storage


def test_a_precision_of_auto_is_that_of_the_codes_in_the_folder(home):
    tiny.folder(home / "floats")
    base = open_(home / "floats", precision("int8"))
    codes.write_folder(base, base.precision, home / "codes")
    run, notes = build.resolve(Run(model=str(home / "codes")))
    assert type(run.precision) is plugin("precision", "int8") and "so the model is stored" in notes[0]
    assert isinstance(opening.load(home / "codes").lm.model.layers[0].mlp.up_proj, PackedLinear)


# --- what does not fit ------------------------------------------------------------------------------------------------


def damaged(folder, change):
    """The folder with one change of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def stored(home):
    tiny.folder(home / "floats")
    base = open_(home / "floats", precision("nf4"))
    codes.write_folder(base, base.precision, home / "codes")
    return home / "codes"


def test_codes_asked_for_in_another_kind_or_in_floats_are_refused_with_what_to_say(stored):
    with pytest.raises(LuthierError, match=r"stored in nf4, and precision is int8; say precision=nf4, or write it out in floats first: luthier export"):
        open_(stored, precision("int8"))
    with pytest.raises(LuthierError, match=r"stored in nf4, and precision is float32; say precision=nf4"):
        open_(stored, plugin("precision", "float32")())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight.absmax"), r"model.layers.1.mlp.up_proj: weight.absmax is missing beside its codes"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"][:-4].clone()}), r"up_proj: its codes \(weight\) are"),
        (lambda t: t.pop("model.norm.weight"), r"1 weights are missing from the files.*model.norm.weight"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("model.layers.1.mlp.up_proj")], r"1 weights are missing.*layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_damaged_folder_of_codes_is_one_sentence_that_names_the_tensor(stored, change, said):
    damaged(stored, change)
    with pytest.raises(LuthierError, match=said) as e:
        open_(stored, precision("nf4"))
    assert "\n" not in str(e.value)


def test_a_file_that_is_cut_off_is_said(stored):
    file = stored / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(LuthierError, match="damaged|cannot be opened"):
        open_(stored, precision("nf4"))


def test_codes_that_nothing_here_reads_are_named(stored):
    config = json.loads((stored / "config.json").read_text())
    for method, said in (("aqlm", "stored in aqlm, which is not read here"), ("hqq", "stored in hqq")):
        (stored / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
        with pytest.raises(LuthierError, match=said):
            open_(stored, precision("nf4"))


def test_weights_and_config_that_disagree_are_said_while_quantising(home):
    tiny.folder(home / "floats")
    damaged(home / "floats", lambda t: t.update({"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"][:-8].clone()}))
    with pytest.raises(LuthierError, match=re.compile(r"up_proj.weight.*shape", re.S)) as e:
        open_(home / "floats", precision("nf4"))
    assert "\n" not in str(e.value)


# --- memory -----------------------------------------------------------------------------------------------------------

PEAK = """
import sys, threading, time
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
from luthier.quantising import quantised
from luthier.settings.plugins import plugin

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

import transformers.models.llama.modeling_llama
before, peak, going = anonymous(), [0], [True]
def watch():
    while going[0]:
        peak[0] = max(peak[0], anonymous()); time.sleep(0.001)
t = threading.Thread(target=watch); t.start()
config = AutoConfig.from_pretrained(sys.argv[1])
lm, _ = quantised.open_model(AutoModelForCausalLM, Path(sys.argv[1]), config, plugin("precision", "nf4")(kernels="torch"))
going[0] = False; t.join()
print(peak[0] - before, anonymous() - before)
"""


def test_loading_never_holds_more_than_the_codes_and_two_tensors(tmp_path):
    """59 M weights in bf16 would be 117 MB; their codes are 30 MB, and the largest tensor is 17 MB in bf16.

    It did hold more, once in some runs: glibc kept what was freed, up to 45 MB of it after the last weight.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(hidden_size=1024, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, vocab_size=64)
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weights = 2 * (4 * 1024 * 1024 + 3 * 1024 * 8192)
    codes_, largest, rest = weights * 0.516, 1024 * 8192 * 2, 8e6  # rest: what is no linear, and what transformers leave behind
    peak, after = map(int, done.stdout.split())
    assert after < codes_ + rest
    assert peak < codes_ + 2 * largest + rest
