"""luthier quantize: what it prints and writes, and what it refuses."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import small
import tiny
from luthier import build, opening
from luthier.cli import main
from luthier.cli.quantize import again, settings
from luthier.data.labels import Labelled
from luthier.measuring.measure import predict_texts
from luthier.modelling.packed import packed
from luthier.quantising.calibrating import How
from luthier.settings.plugins import plugin
from luthier.settings.run import Run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    tiny.folder(folder / "base")
    (folder / "text.txt").write_text("".join(f"Line {i} says that the {w} is {w}er than before.\n\n" for i in range(30) for w in ("big", "small", "old")))
    return folder


def said(capsys, *arguments):
    code = main(["quantize", *(str(a) for a in arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


def reopened(folder, kind):
    return build.load(str(folder), precision=plugin("precision", kind)(compute="float32"))


def test_a_model_is_fitted_to_a_text_and_the_folder_is_what_was_measured(home, tmp_path, capsys):
    ask = ("--group", 16, "--calibrate", home / "text.txt", "--rows", 20, "--tokens", 64, "--dtype", "float32")
    code, out, err = said(capsys, home / "base", *ask, "--output", tmp_path / "q")
    assert code == 0, err
    assert re.search(rf"fitted to 20 rows, [\d,]+ tokens, of {home / 'text.txt'}\n", out) and "tokens are few" not in out
    assert re.search(r"block 1/2 +model\.layers\.0 +[\d.]+% \([\d.]+%\)", out) and "block 2/2" in out and "left 0:00" in out
    before, after, change = re.search(r"loss per token: ([\d.]+) in float32, ([\d.]+) in gptq \(([+-][\d.]+)\), n=[\d,]+", out).groups()
    assert float(after) - float(before) == pytest.approx(float(change), abs=2e-4) and abs(float(change)) < 0.1
    assert "14 linears at 6.25 bits" in out  # 4, a scale of 16 and a zero of 4 for each 16 inputs, and 32 an input that name its group, by the outputs
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"], config["checkpoint_format"]) == (4, 16, True, False, "gptq")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    assert {k.rpartition(".")[2] for k in tensors if "q_proj" in k} == {"qweight", "qzeros", "scales", "g_idx"}
    base = reopened(tmp_path / "q", "gptq")
    assert len(list(packed(base.model))) == 14
    assert opening.load(tmp_path / "q").base.precision.bits == 4  # and by every other verb, which ask for "auto"
    origin = json.loads((tmp_path / "q" / "luthier.json").read_text())["quantised_from"]
    assert origin["to"] == "gptq" and origin["rows"] == 20 and origin["source"] == str(home / "base")


def test_settings_reach_the_codes(home, tmp_path, capsys):
    ask = (home / "base", "--calibrate", home / "text.txt", "--rows", 4, "--data", home / "text.txt", "--dtype", "float32")
    made = {}
    for name, options in {
        "usual": ("--group", 16),
        "other": ("--group", -1, "--bits", 2, "--asymmetric", "--no-act-order", "--no-search", "--damp", 0.5, "--seed", 1),
    }.items():
        code, _, err = said(capsys, *ask, *options, "--output", tmp_path / name)
        assert code == 0, err
        made[name] = dict(packed(reopened(tmp_path / name, "gptq").model))["model.layers.1.mlp.down_proj"]
    assert made["usual"].scales.shape == (3, 32) and made["usual"].qweight.shape == (48 * 4 // 32, 32)
    assert made["other"].scales.shape == (1, 32) and made["other"].qweight.shape == (48 * 2 // 32, 32)
    assert len(made["usual"].qzeros.unique()) == 1 < len(made["other"].qzeros.unique())


def test_settings_are_those_that_were_asked_for():
    stored, how = settings("gptq", {}, "bfloat16")
    assert (stored.bits, stored.group, stored.symmetric, stored.compute, how) == (4, 128, True, "bfloat16", How())
    given = {"bits": 3, "group": 32, "symmetric": False, "act_order": False, "search": False, "damp": 0.1}
    stored, how = settings("gptq", given, "float32")
    assert (stored.bits, stored.group, stored.symmetric, stored.compute) == (3, 32, False, "float32")
    assert how == How(damp=0.1, by_importance=False, search=False)
    stored, how = settings("nf4", {}, "float32")
    assert how is None and stored.dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_kinds_that_need_no_data_are_rounded_and_measured(home, tmp_path, capsys, kind):
    code, out, err = said(capsys, home / "base", "--to", kind, "--data", home / "text.txt", "--output", tmp_path / "q", "--dtype", "float32")
    assert code == 0, err
    assert "in float32, " in out and f" in {kind} (" in out and "block" not in out
    assert len(list(packed(reopened(tmp_path / "q", kind).model))) == 14


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_encoders_and_encoder_decoders_are_fitted_to_text_with_hidden_parts(tmp_path, capsys, family):
    base = getattr(small, family)(tmp_path / "base")
    code, out, err = said(capsys, base, "--group", 16, "--dtype", "float32", "--output", tmp_path / "q")
    assert code == 0, err
    assert "held-out loss per hidden token" in out and out.count("block ") == (2 if family == "bert" else 4)
    assert all(not n.startswith("encoder.pooler") for n, _ in packed(reopened(tmp_path / "q", "gptq").model))


def test_a_trained_head_comes_along(tmp_path, capsys):
    tiny.folder(tmp_path / "base")
    rows = [{"text": f"{w} {i}", "label": w} for i in range(20) for w in ("good", "bad")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    ask = ["objective=classify", "optim.steps=2", "precision=float32", f"out={tmp_path}", "name=r", "evaluate.samples=0", "evaluate.forgetting=no"]
    assert main(["train", str(tmp_path / "d.jsonl"), "--model", str(tmp_path / "base"), "--quiet", *ask]) == 0
    assert main(["merge", str(tmp_path / "r"), "--output", str(tmp_path / "m")]) == 0
    code, _, err = said(capsys, tmp_path / "m", "--group", 16, "--output", tmp_path / "q", "--dtype", "float32")
    assert code == 0, err
    before, after = (predict_texts(opening.load(tmp_path / f), [Labelled(("good 3",), None)])[0] for f in ("m", "q"))
    assert after["label"] == before["label"] and after["probability"] == pytest.approx(before["probability"], abs=0.02)


def test_a_merged_model_is_quantised_again_with_its_losses(home, tmp_path, capsys):
    again(home / "base", tmp_path / "q", "nf4", Run())
    out = capsys.readouterr().out
    assert "loss on general text" in out and "merged" in out and "in nf4" in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--bits", 5), "--bits: found 5, accepted are 2, 3, 4 and 8"),
        (("--group", 0), "--group: found 0, accepted are numbers of inputs, and -1"),
        (("--damp", 0), "--damp: found 0, accepted is a share above 0"),
        (("--to", "nf4", "--bits", 4), "--bits: says something to codes that are fitted to data, and nf4 is not"),
        (("--to", "int8", "--act-order"), "--act-order: says something to codes"),
        (("--grup", 4), "no option --grup; did you mean --group?"),
        (("--to", "awq"), "awq"),
        (("--calibrate", "nowhere.txt", "--group", 16), "nowhere.txt: no such file"),
        (("--group", 128), "model.layers.0.self_attn.q_proj: group: 128 does not divide the 32 inputs"),
    ],
)
def test_slips_are_one_sentence_and_leave_nothing(home, tmp_path, capsys, options, sentence):
    code, _, err = said(capsys, home / "base", *options, "--output", tmp_path / "q")
    assert code == 2 and sentence in err and err.count("\n") == 1 and not (tmp_path / "q").exists()


def test_a_folder_in_use_and_a_model_in_codes_are_refused(home, tmp_path, capsys):
    code, _, err = said(capsys, home / "base", "--output", home)
    assert code == 2 and "exists and is not empty; choose another --output" in err
    assert said(capsys, home / "base", "--to", "nf4", "--output", tmp_path / "q")[0] == 0
    code, _, err = said(capsys, tmp_path / "q", "--output", tmp_path / "again")
    assert code == 2 and "stored in nf4 already; name the model in floats that it was made from" in err
