"""Some blocks compute their activations again: the same gradients, as many calls as were asked for, and a prediction that follows."""

from dataclasses import replace

import pytest
import torch

import tiny
from luthier.core import Incompatible, LuthierError
from luthier.methods.lora import Method as Lora
from luthier.modelling import recompute
from luthier.modelling.recompute import blocks_of
from luthier.objectives.sft import Objective
from luthier.planning.memory import Plan
from luthier.policy import Policy
from luthier.settings.config import load_run as load
from luthier.settings.run import Run


def calls_and_gradients(family, which):
    base = tiny.base(family)
    method = Lora(targets=("attention",))
    policy = Policy(base, method.attach(base, "default"), method=method)
    tiny.randomise(policy.delta.params)
    recompute.enable(base.model, base.anatomy.stacks.values(), which)
    policy.train()
    counts = []
    for block in blocks_of(base.model, base.anatomy.stacks.values()):
        attention = next(m for n, m in block.named_modules() if hasattr(m, "is_causal"))
        counts.append([0])
        attention.register_forward_pre_hook(lambda *_, c=counts[-1]: c.__setitem__(0, c[0] + 1))
    rows = tiny.rows_for(family)
    loss = Objective().loss(policy, Objective().collate(rows, pad=0, packed=base.packs)).sums["tokens"]
    loss.backward()
    return [c[0] for c in counts], {n: p.grad for n, p in policy.trained().items()}


@pytest.mark.parametrize(("family", "blocks"), [("llama", 2), ("gpt2", 2), ("t5", 5)])
def test_the_first_blocks_are_computed_twice_and_no_gradient_changes(family, blocks):
    calls, plain = calls_and_gradients(family, "none")
    assert calls == [1] * blocks
    for which in (1, blocks, "blocks"):
        calls, again = calls_and_gradients(family, which)
        n = blocks if which == "blocks" else which
        assert calls == [2] * n + [1] * (blocks - n)
        for name, g in plain.items():  # what the decoder's blocks give the encoder's states is summed in another order
            assert torch.equal(g, again[name]) if family != "t5" else torch.allclose(g, again[name], rtol=1e-4, atol=1e-6)


def test_more_blocks_than_there_are_is_refused_and_numbers_and_words_are_read(tmp_path):
    base = tiny.base()
    with pytest.raises(Incompatible, match="recompute: found 3, and this model has 2 blocks; accepted are none, blocks, or 1 to 2"):
        recompute.enable(base.model, base.anatomy.stacks.values(), 3)
    path = tmp_path / "run.yaml"
    path.write_text("recompute: 4\n")
    assert load(path).recompute == 4 and load(path, ["recompute=blocks"]).recompute == "blocks"
    for wrong, said in (("block", "accepted are none, blocks, a whole number; did you mean blocks"), ("0", "at least 1"), ("2.5", "a whole number")):
        with pytest.raises(LuthierError, match=said):
            load(path, [f"recompute={wrong}"])


def test_the_prediction_of_memory_falls_with_every_block(tmp_path):
    config = tiny.model("llama").config
    config.num_hidden_layers = 6
    config.save_pretrained(tmp_path)
    run = Run(model={"id": str(tmp_path)}, precision="bfloat16", place={"kind": "one", "on": "cpu"}, data={"max_tokens": 64})
    plan = Plan(run)
    assert plan.blocks == 6
    kept = [plan.predict(replace(run, recompute=w), "cpu", program=0).moments["training"].kept for w in ("none", 1, 2, 4, 5, "blocks")]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 6
    assert plan.predict(replace(run, recompute=6), "cpu", program=0).moments == plan.predict(replace(run, recompute="blocks"), "cpu", program=0).moments
    each = (kept[1] - kept[2]), (kept[2] - kept[3]) / 2
    assert each[0] == pytest.approx(each[1], rel=0.1)
