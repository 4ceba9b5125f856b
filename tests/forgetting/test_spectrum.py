"""Spectra of real folders: a model whose change was planted, a LoRA whose pairs were; the command, its table, its file and its refusals."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from luthier.build import load
from luthier.cli import main
from luthier.core import LuthierError
from luthier.forgetting.spectrum import common_rank, learned, table
from luthier.hub import fingerprint
from luthier.methods.dora import Method as Dora
from luthier.methods.full import Method as Full
from luthier.methods.lora import Method as Lora
from luthier.methods.prompt import Method as Prompt
from luthier.policy import Policy
from luthier.saving import adapter
from luthier.settings.plugins import plugin
from luthier.settings.run import Model


@pytest.fixture
def base(tmp_path):
    return tiny.folder(tmp_path / "base")


def policy_on(folder, method):
    made = load(Model(id=str(folder)), precision=plugin("precision", "float32")())
    return Policy(made, method.attach(made, "default"), method=method)


def planted(policy, ranks):
    """Change matrices of the blocks by so many equal singular values."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for (_, p), rank in zip([(n, p) for n, p in policy.lm.named_parameters() if ".layers." in n and p.ndim == 2], ranks, strict=False):
            u, v = (torch.linalg.qr(torch.randn(k, rank, generator=g))[0] for k in p.shape)
            p += 0.1 * u @ v.t()


def test_a_planted_change_of_a_whole_model_is_found(base, tmp_path):
    policy = policy_on(base, Full())
    planted(policy, [1, 2, 5])
    adapter.save(policy, tmp_path / "model")
    found = sorted(learned(tmp_path / "model"), key=lambda x: x.spectrum.total)
    assert len(found) == 3 and [x.spectrum.rank(0.9) for x in found] == [1, 2, 5]  # of five equal values four hold 0.8
    old = load_file(base / "model.safetensors")
    new = load_file(tmp_path / "model" / "model.safetensors")
    for x in found:
        change = (new[f"{x.name}.weight"].double() - old[f"{x.name}.weight"].double()).numpy()
        assert np.sqrt(x.spectrum.energies.numpy()) == pytest.approx(np.linalg.svd(change, compute_uv=False), abs=1e-6)
        assert x.size == pytest.approx(np.linalg.norm(change) / float(old[f"{x.name}.weight"].norm()), rel=1e-4) and x.rounding == 0.0
    # energies of 1, 2 and 5 values of 0.01 each: rank 4 everywhere holds 1 + 2 + 4 of 8, rank 5 all
    assert common_rank(found) == 5 and common_rank(found, 0.8) == 4


@pytest.mark.parametrize("method", [Lora(rank=6), Dora(rank=6)])
def test_of_a_lora_it_says_how_much_of_the_rank_is_used(base, tmp_path, method):
    policy = policy_on(base, method)
    tiny.randomise(policy.delta.params, std=0.1)
    with torch.no_grad():
        for key, p in policy.delta.params.items():
            if key.endswith(":lora_A"):
                p[2:] *= 1e-3
    adapter.save(policy, tmp_path / "a")
    found = learned(tmp_path / "a")
    assert len(found) == 4 and {x.given for x in found} == {6} and {x.spectrum.rank(0.9) for x in found} <= {1, 2}
    (row,) = [r for r in table(found) if r.kind.endswith("q_proj")]
    assert row.matrices == 2 and row.given == 6 and row.size is None


def test_rounding_to_bfloat16_is_told(base, tmp_path, capsys):
    policy = policy_on(base, Full())
    planted(policy, [1])
    adapter.save(policy, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    assert main(["runs", "spectrum", str(tmp_path / "model")]) == 0
    assert "the weights were saved rounded" in capsys.readouterr().out


def test_the_command_tells_and_writes(base, tmp_path, capsys):
    policy = policy_on(base, Full())
    planted(policy, [1, 2, 5])
    adapter.save(policy, tmp_path / "model")
    assert main(["runs", "spectrum", str(tmp_path / "model"), "--output", str(tmp_path / "s.json")]) == 0
    said = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj" in said and "would have needed rank 5 to hold 90 %" in " ".join(said.split())
    told = json.loads((tmp_path / "s.json").read_text())
    assert sorted(x["rank_90"] for x in told) == [1, 2, 5] and told[0]["singular_values"][0] == pytest.approx(0.1, rel=1e-3)


def test_what_has_no_spectrum_is_refused_in_a_sentence(base, tmp_path, capsys):
    adapter.save(policy_on(base, Prompt()), tmp_path / "prompt")
    with pytest.raises(LuthierError, match="spectra are of LoRA, DoRA and full fine-tuning; this is prompt"):
        learned(tmp_path / "prompt")
    adapter.save(policy_on(base, Full()), tmp_path / "same")
    with pytest.raises(LuthierError, match="no matrix of it was changed"):
        learned(tmp_path / "same")
    with pytest.raises(LuthierError, match=r"no luthier\.json here"):
        learned(base)
    other = tiny.folder(tmp_path / "other", seed=1)
    with pytest.raises(LuthierError, match=f"this base is {fingerprint(other)}"):
        learned(tmp_path / "same", base=str(other))
    assert main(["runs", "spectrum", "nosuch"]) == 2
    error = capsys.readouterr().err
    assert "no run of this name" in error and error.strip().count("\n") == 0
