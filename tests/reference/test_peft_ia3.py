"""(IA)3 against PEFT: the same vectors give the same logits and gradients, and folders go both ways."""

import pytest
import torch

import tiny
from luthier.core import Incompatible
from luthier.methods.ia3 import Method
from luthier.saving import adapter

pytest.importorskip("peft")
from reference import peft_peer as peer


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "qwen2", "bert", "t5_gated", "bart"])
def test_folders_go_both_ways(family, tmp_path):
    peer.both_ways(family, tmp_path, peer.tuned(family, "ia3"))


def test_what_peft_chooses_for_gpt2_is_what_we_choose():
    import peft

    model = peft.get_peft_model(tiny.model("gpt2"), peft.IA3Config(task_type="CAUSAL_LM"))
    chosen = {n.removeprefix("base_model.model.").rpartition(".ia3_l")[0] for n, _ in model.named_parameters() if ".ia3_l" in n}
    assert chosen == {k.partition(":")[0] for k in peer.tuned("gpt2", "ia3").delta.params}


def test_gradients_are_pefts(tmp_path):
    policy = peer.tuned("gpt2", "ia3")
    adapter.save(policy, tmp_path / "a")
    model = peer.theirs("gpt2", tmp_path / "a")
    found = {n: p.requires_grad_() for n, p in model.named_parameters() if ".ia3_l" in n}
    weight = torch.randn(1, peer.IDS.shape[1], tiny.V, generator=torch.Generator().manual_seed(2))
    (model(**peer.inputs(model)).logits * weight).sum().backward()
    (policy.lm(**peer.inputs(policy.lm)).logits * weight).sum().backward()
    for key, p in policy.delta.params.items():
        peer.same(p.grad, found[f"base_model.model.{key.partition(':')[0]}.ia3_l.default"].grad.flatten())
    assert len(found) == len(policy.delta.params)


def test_the_formula_is_the_papers():
    """l_k * K and l_v * V behind their linears, and W2 (l_ff * h); bias included, as K and V are what the linears give."""
    policy = peer.tuned("qwen2", "ia3")
    layer, params = policy.lm.model.layers[0], policy.delta.params
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    h = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(1))
    key, down = layer.self_attn.k_proj, layer.mlp.down_proj
    with torch.no_grad():
        key.base.bias.add_(1.0)
        policy.use("default")
        scaled = torch.stack([params["model.layers.0.self_attn.k_proj:vector"] * (key.base.weight @ t + key.base.bias) for t in x[0]])
        peer.same(key(x)[0], scaled)
        peer.same(down(h)[0], torch.stack([down.base.weight @ (params["model.layers.0.mlp.down_proj:vector"] * t) for t in h[0]]))
        before = peer.ours(policy)
        policy.fold()
        peer.same(peer.ours(policy), before)


def test_one_linear_cannot_be_rescaled_on_both_sides():
    with pytest.raises(Incompatible, match=r"down_proj is also one of method.targets"):
        Method(targets=("down",)).attach(tiny.base("llama"), "default")


def test_a_mixture_keeps_its_experts_and_says_so_where_they_are_asked_for():
    params = Method().attach(tiny.base("qwen3_moe"), "default").params
    assert {k.rpartition(".")[2].partition(":")[0] for k in params} == {"k_proj", "v_proj"}
    with pytest.raises(Incompatible, match="experts"):
        Method(feedforward=("up",)).attach(tiny.base("qwen3_moe"), "default")
