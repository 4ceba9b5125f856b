"""LoRA's embedding, head and learning-rate ratio; its formulas are compared with PEFT's in reference/test_peft_lora.py."""

import pytest
import torch

import tiny
from luthier.core import Incompatible, LuthierError
from luthier.methods.lora import Method
from luthier.objectives.sft import Objective
from luthier.optim import Optimizer
from luthier.policy import Policy


def policy_of(family="llama", name="default", base=None, **how):
    base = base or tiny.base(family)
    method = Method(**how)
    return Policy(base, method.attach(base, name), method=method, name=name)


def test_lora_plus_moves_b_so_many_times_as_fast_and_the_embedding_as_before():
    """Adam's first step is the learning rate in every entry that has a gradient."""
    policy = policy_of(targets=("query", "embedding"), lr_ratio=16.0)
    tiny.randomise(policy.delta.params)
    before = {k: p.detach().clone() for k, p in policy.delta.params.items()}
    optimizer = Optimizer(policy.trained(), lr=1e-4, patterns=policy.delta.optim)
    optimizer.set_lr(1e-4)
    batch = Objective().collate(tiny.rows(4), pad=0, packed=True)
    Objective().loss(policy, batch).sums["tokens"].backward()
    optimizer.step()
    moved = {k: float((p.detach() - before[k]).abs().max()) for k, p in policy.delta.params.items()}
    for key, by in moved.items():
        assert by == pytest.approx(16e-4 if key.endswith(":lora_B") else 1e-4, rel=1e-2), key
    with pytest.raises(LuthierError, match="lr_ratio: must be above 0"):
        Method(lr_ratio=0.0)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "bart", "t5", "bert"])
def test_the_embedding_and_the_head_start_at_the_base(family):
    policy = policy_of(family, targets=("embedding", "head"))
    ids = torch.tensor([[5, 9, 11]])
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if policy.lm.config.is_encoder_decoder else {})
    with torch.no_grad():
        on = policy.lm(**given).logits
        policy.use(None)
        assert torch.equal(on, policy.lm(**given).logits)


@pytest.mark.parametrize("packed", [True, False])
def test_an_embedding_is_routed_like_any_module(packed):
    base = tiny.base("llama")
    policy = policy_of(base=base, name="one", targets=("embedding", "down"))
    other = Method(targets=("embedding",)).attach(base, "two")
    policy.add("two", other)
    tiny.randomise(policy.delta.params, seed=1)
    tiny.randomise(other.params, seed=2)
    rows, route = tiny.rows(4), ("one", None, "two", "one+two")
    together = Objective().collate(rows, pad=0, packed=packed)
    together.route = route
    with torch.no_grad():
        hidden, width = policy.hidden(together).flatten(0, 1), together.shape[1]
        alone = []
        for i, (row, name) in enumerate(zip(rows, route, strict=True)):
            policy.use(name)
            alone.append(policy.hidden(Objective().collate([row], pad=0, packed=False))[0, : len(row)])
            first = int(together.segments.first(width)[i])
            torch.testing.assert_close(hidden[first : first + len(row)], alone[-1], atol=1e-5, rtol=1e-5)
    assert float((alone[0][:3] - alone[3][:3]).abs().max()) > 1e-3


def test_no_batch_is_routed_to_a_delta_that_edits_the_head():
    """Scoring sees positions without their examples, so it would use another delta than the hidden states did."""
    policy = policy_of(targets=("head",))
    batch = Objective().collate(tiny.rows(2), pad=0, packed=False)
    batch.route = ("default", None)
    with pytest.raises(Incompatible, match="default edits the head"):
        policy.hidden(batch)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_scores_are_those_of_the_edited_head(family):
    policy = policy_of(family, targets=("head",)).eval()
    tiny.randomise(policy.delta.params)
    batch = Objective().collate(tiny.rows(2), pad=0, packed=False)
    with torch.no_grad():
        hidden = policy.hidden(batch).flatten(0, 1)[:5]
        token = torch.arange(5)
        logp = policy.score(hidden, token)["logp"]
        policy.fold()
        torch.testing.assert_close(policy.lm.get_output_embeddings()(hidden).log_softmax(-1)[token, token], logp, atol=1e-5, rtol=1e-5)
        weight = policy.lm.get_output_embeddings().weight
        assert (weight is policy.lm.get_input_embeddings().weight) == (family == "llama_tied")


def test_two_ways_to_name_the_head_are_one():
    for name in ("head", "lm_head", r"(?:lm_head)"):
        assert {k.partition(":")[0] for k in policy_of("llama", targets=(name,)).delta.params} == {"lm_head"}
    with pytest.raises(Incompatible, match="say embedding to edit both uses"):
        policy_of("llama_tied", targets=(r"lm_h\w+|.*q_proj",))


def test_an_edit_inside_an_edited_module_still_serves():
    """It was set on the site around the outer module, which the model never asks for it, so it did nothing."""
    from luthier.methods.ia3 import Rescale
    from luthier.modelling.site import Edit, site_at, sites, unwrap

    base = tiny.base("llama")
    outer = site_at(base.model, "model.layers.0.mlp")
    outer.edits["outer"] = Edit()
    inner = site_at(base.model, "model.layers.0.mlp.down_proj")
    inner.edits["inner"] = Rescale(inner.base, True)
    with torch.no_grad():
        inner.edits["inner"].vector.fill_(0.0)
    x = torch.randn(1, 2, 32)
    assert float(outer(x).abs().max()) > 0
    outer.active = inner.active = "inner"
    assert not bool(outer(x).any())
    del outer.edits["outer"], inner.edits["inner"]
    unwrap(base.model)
    assert not sites(base.model)
