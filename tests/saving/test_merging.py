"""Merging a delta that was trained on a base in codes: into the values it was trained on, or into the floats the codes were made from; never silently."""

import re

import pytest
import torch

import tiny
from luthier import build, opening
from luthier.cli import main
from luthier.modelling.packed import packed
from luthier.saving import adapter
from luthier.saving.merging import logits, merge, probe_ids
from luthier.settings.plugins import plugin
from luthier.settings.run import Model, Run


def trained(home, kind="nf4", method="lora", compute="bfloat16", **how):
    """An adapter folder whose base was opened in codes, and the policy that was saved."""
    if not (home / "base").exists():
        tiny.folder(home / "base")
    run = Run(
        model=str(home / "base"), method={"kind": method, **how}, precision={"kind": kind, "compute": compute, **({"group": 8} if kind == "gptq" else {})}
    )
    policy, objective = build.assemble(run)
    if method != "partial":
        tiny.randomise(policy.delta.params, std=0.05)
    else:
        with torch.no_grad():
            for p in policy.delta.params.values():
                p.add_(0.1)
    adapter.save(policy, home / "adapter", objective=objective)
    return policy


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(("method", "how"), [("lora", {"targets": ["all"]}), ("dora", {}), ("ia3", {}), ("partial", {"norms": True})])
def test_merged_into_its_own_codes_the_model_is_the_one_that_was_trained(tmp_path, kind, method, how):
    policy = trained(tmp_path, kind, method, **how)
    values = {p: m.values(torch.bfloat16) for p, m in packed(policy.lm)}
    before = logits(policy, probe_ids(policy))
    done = merge(policy, tmp_path / "merged", dtype=torch.float32)
    assert done.folded < 1e-5 and done.reopened < 1e-5 and done.codes < 3e-2 and done.dtype == "float32"
    again = opening.load(tmp_path / "merged", precision="float32")
    torch.testing.assert_close(logits(again, probe_ids(again)), before, atol=3e-2 * float(before.abs().max()), rtol=0)
    if method == "partial":  # the weights in codes were not touched: they are the decoded values, bit for bit
        own = dict(again.lm.named_modules())
        assert all(torch.equal(own[p].weight, v.float()) for p, v in values.items())


def test_an_adapter_is_served_on_the_codes_it_was_trained_on_unless_told_otherwise(tmp_path):
    policy = trained(tmp_path)
    served = opening.load(tmp_path / "adapter")
    assert len(list(packed(served.lm))) == 14 and served.base.precision.double
    assert torch.equal(logits(served, probe_ids(served)), logits(policy, probe_ids(policy)))
    assert not list(packed(opening.load(tmp_path / "adapter", precision="float32").lm))


def test_merging_on_the_command_line_says_what_was_written_out_and_what_changed(tmp_path, capsys):
    trained(tmp_path, targets=["all"])
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "the base's nf4 codes were written out as the values they stand for" in said and "the weights are equal" in said
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "b"), "--into", "float"]) == 0
    said = capsys.readouterr().out
    assert "which is not the model that was trained" in said
    found = re.search(r"logits differ by (\S+) of the largest", said)
    assert found and 1e-3 < float(found[1]) < 1
    losses = re.search(r"general text \(n=[\d,]+\): as trained ([\d.]+), into float ([\d.]+) \(([+-][\d.]+)\)", said)
    assert losses and float(losses[2]) - float(losses[1]) == pytest.approx(float(losses[3]), abs=2e-4)
    # each is what it says: the merged folders differ by the rounding of the codes, on the base's own weights
    a, b = (opening.load(tmp_path / f, precision="float32").lm.model.layers[0].mlp.up_proj.weight for f in "ab")
    own = build.load(Model(id=str(tmp_path / "base")), precision=plugin("precision", "float32")()).model.model.layers[0].mlp.up_proj.weight
    coded = build.load(Model(id=str(tmp_path / "base")), precision=plugin("precision", "nf4")()).model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(b - a, own - coded.values(torch.bfloat16).float(), atol=1e-6, rtol=0)


def test_into_float_needs_a_base_in_codes(tmp_path, capsys):
    trained(tmp_path, "nf4")
    tiny.folder(tmp_path / "plain")
    assert main(["merge", str(tmp_path / "plain"), "--output", str(tmp_path / "a"), "--into", "float"]) == 2
    assert "this adapter's base is in floats, so there is nothing to choose" in capsys.readouterr().err


def test_what_no_weight_holds_is_refused_before_anything_is_written(tmp_path, capsys):
    trained(tmp_path, method="prefix")
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "a")]) == 2
    assert "cannot be merged" in capsys.readouterr().err and not (tmp_path / "a").exists()
