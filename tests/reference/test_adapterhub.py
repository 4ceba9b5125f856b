"""AdapterHub's directories, both ways: names and flags here, and against the `adapters` library itself where LUTHIER_ADAPTERS_PYTHON names an
interpreter that has it (adapters 1.3.0 needs an older transformers, so it cannot live beside ours):

python3 -m venv /tmp/adapters-env && /tmp/adapters-env/bin/pip install torch==2.13.0 numpy adapters==1.3.0
LUTHIER_ADAPTERS_PYTHON=/tmp/adapters-env/bin/python python -m pytest tests/reference/test_adapterhub.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from luthier.core import Incompatible, LuthierError
from luthier.deltas import adapterhub
from luthier.methods.adapter import Method
from luthier.policy import Policy
from luthier.saving import adapter

PEER = os.environ.get("LUTHIER_ADAPTERS_PYTHON")
PLACEMENTS = ["houlsby", "pfeiffer", "block", "parallel"]


def policy_of(family, method, seed=1, base=None):
    base = base or tiny.base(family)
    delta = method.attach(base, "mine")
    tiny.randomise(delta.params, seed=seed, std=0.2)
    return Policy(base, delta, method=method, name="mine")


def read_back(policy, family):
    """The directory of a policy's delta as a policy on a fresh base."""
    config, tensors = policy.delta.export()
    config = json.loads(json.dumps(config))
    base = tiny.base(family)
    method, values = Method.from_layout(config, tensors, base)
    return loaded(base, method, values)


def loaded(base, method, values):
    delta = method.attach(base, "other")
    assert set(values) == set(delta.params)
    with torch.no_grad():
        for k, p in delta.params.items():
            assert p.shape == values[k].shape
            p.copy_(values[k])
    return Policy(base, delta, method=method, name="other")


def hidden(policy, ids):
    """Last hidden states as a plain call of the model gives them."""
    with torch.no_grad():
        lm = policy.lm
        return lm(**ids, output_hidden_states=True).decoder_hidden_states[-1] if lm.config.is_encoder_decoder else lm.base_model(**ids).last_hidden_state


def inputs(family):
    generator = torch.Generator().manual_seed(0)
    ids = {"input_ids": torch.randint(3, tiny.V, (2, 9), generator=generator)}
    return ids | ({"decoder_input_ids": torch.randint(3, tiny.V, (2, 5), generator=generator)} if family in tiny.SEQ2SEQ else {})


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert", "roberta", "t5", "bart", "qwen3_moe"])
def test_a_directory_read_back_is_the_same_function(family, placement, norms):
    policy = policy_of(family, Method(placement=placement, bottleneck=5, activation="gelu", norms=norms))
    again = read_back(policy, family)
    assert torch.equal(hidden(again, inputs(family)), hidden(policy, inputs(family)))
    assert again.method == policy.method


@pytest.mark.parametrize(
    ("family", "placement", "name"),
    [
        ("bert", "houlsby", "bert.encoder.layer.1.attention.output.adapters.mine.adapter_down.0.weight"),
        ("bert", "pfeiffer", "bert.encoder.layer.1.output.adapters.mine.adapter_up.bias"),
        ("llama", "houlsby", "model.layers.0.attention_adapters.adapters.mine.adapter_up.weight"),
        ("llama", "pfeiffer", "model.layers.0.output_adapters.adapters.mine.adapter_down.0.bias"),
        ("t5", "houlsby", "encoder.block.0.layer.0.adapters.mine.adapter_down.0.weight"),
        ("t5", "houlsby", "encoder.block.0.layer.1.adapters.mine.adapter_down.0.weight"),
        ("t5", "parallel", "decoder.block.2.layer.2.adapters.mine.adapter_down.0.weight"),
        ("bart", "houlsby", "model.decoder.layers.1.attention_adapters.adapters.mine.adapter_up.weight"),
        ("gpt2", "block", "transformer.h.1.output_adapters.adapters.mine.adapter_up.weight"),
    ],
)
def test_tensors_are_named_as_that_library_names_them(family, placement, name):
    config, tensors = policy_of(family, Method(placement=placement, bottleneck=5)).delta.export()
    assert name in tensors
    assert config["name"] == "mine" and config["model_type"] == family and config["hidden_size"] == 32 and config["version"] == "adapters.1.3.0"


def test_every_reduction_factor_gives_its_bottleneck_back():
    for width in (32, 256, 768, 1000, 1024, 4096):
        for bottleneck in {*range(1, 40), width // 16, width // 2, width, 2 * width}:
            assert int(width // adapterhub.reduction_factor(width, bottleneck)) == bottleneck


def test_what_the_layout_cannot_say_is_marked_so_that_the_other_library_refuses_it():
    def marks(family, **fields):
        return policy_of(family, Method(**fields)).delta.export()[0]["config"].get("architecture")

    assert marks("llama", placement="parallel") == "luthier"  # theirs reads in front of the normalisation
    assert marks("llama", placement="parallel", reads="stream") is None
    assert marks("bert", placement="parallel") is None  # nothing stands before its feed-forward
    assert marks("bert", norms=True) == "luthier"
    assert marks("bert") is None


def directory(**changes):
    config, tensors = policy_of("bert", Method(bottleneck=4)).delta.export()
    config["config"] |= changes
    return config, tensors


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "lora"}, "architecture is 'lora'"),
        ({"non_linearity": "leakyrelu"}, "non_linearity is 'leakyrelu'"),
        ({"scaling": "learned"}, "scaling is 'learned'"),
        ({"ln_before": True}, "ln_before is True"),
        ({"inv_adapter": "nice"}, "inv_adapter is 'nice'"),
        ({"leave_out": [3]}, r"leave_out is \[3\]"),
        ({"phm_layer": True}, "phm_layer is True"),
        ({"use_gating": True}, "use_gating is True"),
        ({"original_ln_before": True}, "no placement this program"),
        ({"mh_adapter": False}, "no placement this program"),
        ({"mh_adapter": False, "original_ln_before": True, "residual_before_ln": "post_add"}, "no placement this program"),
        ({"mh_adapter": False, "original_ln_before": True, "cross_adapter": True}, "cross_adapter is True"),
    ],
)
def test_what_adapter_cannot_express_is_refused_by_its_key(changes, said):
    with pytest.raises(Incompatible, match=said):
        Method.from_layout(*directory(**changes), tiny.base("bert"))


def test_a_directory_of_before_the_first_version_says_gelu_and_means_another_function():
    config, tensors = directory(non_linearity="gelu")
    assert Method.from_layout(config, tensors, tiny.base("bert"))[0].activation == "gelu"
    del config["version"]
    with pytest.raises(Incompatible, match="non_linearity"):
        Method.from_layout(config, tensors, tiny.base("bert"))


def test_tensors_that_do_not_fit_the_base_are_refused_by_name():
    config, tensors = directory()
    with pytest.raises(Incompatible, match=r"'bert.encoder.layer.0.*adapter_down.0.weight' is missing"):
        Method.from_layout(config, {k: v for k, v in tensors.items() if "layer.0.output.adapters.mine.adapter_down.0.weight" not in k}, tiny.base("bert"))
    with pytest.raises(Incompatible, match=r"'invertible' has no place"):
        Method.from_layout(config, tensors | {"invertible": torch.zeros(1)}, tiny.base("bert"))
    with pytest.raises(Incompatible, match="another model"):
        Method.from_layout(config, tensors, tiny.base("llama"))


def test_only_one_width_in_all_layers_is_read():
    config, tensors = directory()
    odd = "bert.encoder.layer.0.output.adapters.mine.adapter_down.0.bias"
    with pytest.raises(Incompatible, match=r"widths \[4, 6\]"):
        Method.from_layout(config, tensors | {odd: torch.zeros(6)}, tiny.base("bert"))


def test_the_directory_of_a_model_without_a_head_is_read_too():
    config, tensors = directory()
    bare = {k.removeprefix("bert."): v for k, v in tensors.items()}
    assert all(
        torch.equal(v, Method.from_layout(config, tensors, tiny.base("bert"))[1][k]) for k, v in Method.from_layout(config, bare, tiny.base("bert"))[1].items()
    )


def test_a_folder_is_opened_without_our_own_file_beside_it_and_a_pickle_is_never_read(tmp_path):
    policy = policy_of("bert", Method(placement="pfeiffer", bottleneck=5))
    config, tensors = policy.delta.export()
    adapter.write(tmp_path, config, tensors, weights_file=adapterhub.WEIGHTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    assert torch.equal(hidden(adapter.load(tiny.base("bert"), tmp_path), inputs("bert")), hidden(policy, inputs("bert")))
    (tmp_path / adapterhub.WEIGHTS).rename(tmp_path / "pytorch_adapter.bin")
    with pytest.raises(LuthierError, match=r"pytorch_adapter.bin: a pickle.*as safetensors"):
        adapter.load(tiny.base("bert"), tmp_path)


@pytest.mark.skipif(PEER is None, reason="LUTHIER_ADAPTERS_PYTHON names no interpreter that has the adapters library")
@pytest.mark.parametrize("placement", [*PLACEMENTS, "cross"])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "mistral_window", "gpt2", "t5", "t5_gated", "bart"])
def test_directories_exchanged_with_the_adapters_library_compute_the_same(family, placement, tmp_path):
    if placement == "cross" and family not in tiny.SEQ2SEQ:
        pytest.skip("no cross-attention")
    cross = placement == "cross"
    method = Method(placement="houlsby" if cross else placement, cross=cross, bottleneck=7, activation="silu")
    if placement == "parallel" and family not in ("bert", "roberta", "bart"):
        method = Method(placement=placement, bottleneck=7, activation="silu", reads="stream")
    ids = inputs(family)
    save_file(ids, tmp_path / "ids.safetensors")
    plain = tiny.model(family)
    plain.save_pretrained(tmp_path / "base")
    policy = policy_of(family, method)
    config, tensors = policy.delta.export()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / adapterhub.CONFIG).write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "ours" / adapterhub.WEIGHTS)
    done = subprocess.run([PEER, str(Path(__file__).with_name("adapterhub_peer.py")), str(tmp_path), placement], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = load_file(tmp_path / "hidden.safetensors")
    with torch.no_grad():
        policy.use(None)
        torch.testing.assert_close(hidden(policy, ids), said["base"], atol=1e-5, rtol=1e-5)
        policy.use("mine")
        torch.testing.assert_close(hidden(policy, ids), said["ours"], atol=1e-5, rtol=1e-5)
    assert (said["ours"] - said["base"]).abs().max() > 0.05
    base = tiny.base(family)
    theirs, values = Method.from_layout(
        json.loads((tmp_path / "theirs" / adapterhub.CONFIG).read_text()), load_file(tmp_path / "theirs" / adapterhub.WEIGHTS), base
    )
    back = loaded(base, theirs, values)
    torch.testing.assert_close(hidden(back, ids), said["theirs"], atol=1e-5, rtol=1e-5)
    assert (said["theirs"] - said["base"]).abs().max() > 0.05
    print(f"{family} {placement}: {(hidden(policy, ids) - said['ours']).abs().max():.1e} {(hidden(back, ids) - said['theirs']).abs().max():.1e}")
