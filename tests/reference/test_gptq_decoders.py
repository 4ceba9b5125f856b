"""Folders of ours in other decoders: one written bit by bit from the description of the layout, and GPTQModel's own where it is installed.

LUTHIER_GPTQ_PYTHON names a Python that can import gptqmodel: PyTorch beside it is enough.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import tiny
from luthier import build
from luthier.modelling.packed import packed
from luthier.objectives import text
from luthier.quantising import calibrating
from luthier.quantising.calibrating import calibrate
from luthier.quantising.codes import write_folder
from luthier.settings.plugins import plugin

STORED = [(4, True, "gptq"), (4, False, "gptq"), (4, False, "gptq_v2"), (8, True, "gptq"), (3, False, "gptq"), (3, True, "gptq_v2"), (2, False, "gptq")]
HOW = [{"bits": b, "symmetric": s, "checkpoint_format": f} for b, s, f in STORED]
THEIRS = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

out = {}
for folder in sys.argv[2:]:
    said = json.load(open(folder + "/config.json"))["quantization_config"]
    held = load_file(folder + "/model.safetensors")
    for path in [k.removesuffix(".qweight") for k in held if k.endswith(".qweight")]:
        rows, n_out = held[path + ".qweight"].shape
        module = TorchLinear(bits=said["bits"], group_size=said["group_size"], sym=said["sym"], desc_act=said["desc_act"],
                             in_features=rows * 32 // said["bits"], out_features=n_out, bias=False, register_buffers=True)
        for leaf in ("qweight", "qzeros", "scales", "g_idx"):
            assert getattr(module, leaf).shape == held[f"{path}.{leaf}"].shape, (path, leaf)
            setattr(module, leaf, held[f"{path}.{leaf}"].clone())
        if said["checkpoint_format"] == "gptq":
            convert_gptq_v1_to_v2_format_module(module, bits=said["bits"], pack_dtype=torch.int32)
        module.scales = module.scales.float()
        out[folder + ":" + path] = module.dequantize_weight().float().t().contiguous()
save_file(out, sys.argv[1])
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A fitted tiny model for each way of storing it: folder -> the weights that this program reads from it."""
    out = {}
    for i, how in enumerate(HOW):
        folder = tmp_path_factory.mktemp("codes") / str(i)
        base = build.adopt(Qwen2ForCausalLM(Qwen2Config(**tiny._COMMON | {"hidden_size": 64, "intermediate_size": 96})))  # 3 bits need multiples of 32
        stored = plugin("precision", "gptq")(group=16, compute="float32", **how)
        list(calibrate(base, stored, calibrating.Rows(tiny.rows(6), [], text.Objective(), "made")))
        write_folder(base, stored, folder)
        back = build.load(str(folder), precision=plugin("precision", "gptq")(compute="float32"))
        out[str(folder)] = {path: module.values(torch.float32) for path, module in packed(back.model)}
        assert out[str(folder)].keys() == {path for path, _ in packed(base.model)}
    return out


def bit_by_bit(held, path, said):
    """The weight (out, in) in float32, each number of it taken from the file one bit at a time."""
    bits = said["bits"]
    words, zeros, scales, group = (held[f"{path}.{leaf}"].numpy() for leaf in ("qweight", "qzeros", "scales", "g_idx"))
    stream = lambda column: "".join(format(int(w) & 0xFFFFFFFF, "032b")[::-1] for w in column)  # noqa: E731
    number = lambda s, i: int(s[i * bits : (i + 1) * bits][::-1], 2)  # noqa: E731
    zero_of = [[(number(stream(row), o) + (said["checkpoint_format"] == "gptq")) % 2**bits for o in range(words.shape[1])] for row in zeros]
    out = np.zeros((words.shape[1], len(group)), dtype=np.float32)
    for o in range(out.shape[0]):
        column = stream(words[:, o])
        for i, g in enumerate(group):
            out[o, i] = np.float32(scales[g, o]) * np.float32(number(column, i) - zero_of[g][o])
    return torch.from_numpy(out)


def test_a_decoder_that_reads_bit_by_bit_reads_the_same_weights(folders):
    compared = 0
    for folder, ours in folders.items():
        said = json.loads(Path(folder, "config.json").read_text())["quantization_config"]
        held = load_file(f"{folder}/model.safetensors")
        for path in list(ours)[:2] + list(ours)[-1:]:
            assert torch.equal(bit_by_bit(held, path, said), ours[path]), (said, path)
            compared += 1
    assert compared == 3 * len(HOW)


def test_gptqmodel_reads_the_same_weights(folders, tmp_path):
    python = os.environ.get("LUTHIER_GPTQ_PYTHON")
    if not python:
        pytest.skip("LUTHIER_GPTQ_PYTHON names no Python with gptqmodel")
    done = subprocess.run([python, "-c", THEIRS, str(tmp_path / "theirs.safetensors"), *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert len(theirs) == sum(map(len, folders.values()))
    for folder, ours in folders.items():
        for path, weight in ours.items():
            assert torch.equal(theirs[f"{folder}:{path}"], weight), (folder, path)
