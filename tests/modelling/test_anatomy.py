"""Families: what targets mean, and heads as the models themselves make them."""

import pytest
import torch

import tiny
from luthier import counts
from luthier.core import Incompatible
from luthier.methods.lora import Method as Lora
from luthier.modelling.anatomy import Anatomy, trunk
from luthier.policy import Policy


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_the_head_rule_reproduces_the_models_own_logits(family):
    model = tiny.model(family).eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        hidden = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(Anatomy.of(model).head(model, hidden), model(input_ids=ids).logits.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "names", "leaves"),
    [
        ("llama", ["query", "v"], {"q_proj", "v_proj"}),
        ("llama", ["all"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("llama", ["up_proj"], {"up_proj"}),
        ("llama", [r".*layers\.1\.mlp\..*"], {"gate_proj", "up_proj", "down_proj"}),
        ("gpt2", ["query", "value"], {"c_attn"}),
        ("gpt2", ["output"], {"c_proj"}),
        ("gpt_neox", ["attention"], {"query_key_value", "dense"}),
        ("phi", ["mlp"], {"fc1", "fc2"}),
        ("phi3", ["q", "gate"], {"qkv_proj", "gate_up_proj"}),
        ("qwen3_moe", ["all"], {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("bert", ["attention"], {"query", "key", "value", "dense"}),
        ("roberta", ["q", "v"], {"query", "value"}),
        ("modernbert", ["query", "gate"], {"Wqkv", "Wi"}),
        ("t5", ["mlp"], {"wi", "wo"}),
        ("t5_gated", ["gate", "up"], {"wi_0", "wi_1"}),
        ("bart", ["output", "down"], {"out_proj", "fc2"}),
    ],
)
def test_names_mean_the_same_role_in_every_family(family, names, leaves):
    model = tiny.model(family)
    found = Anatomy.of(model).targets(model, names)
    assert {p.rsplit(".", 1)[-1] for p in found} == leaves and len(found) == len(set(found))


def test_gpt2s_output_is_the_attentions_and_not_the_mlps():
    model = tiny.model("gpt2")
    assert all(".attn." in p for p in Anatomy.of(model).targets(model, ["output"]))


def test_berts_output_and_down_are_two_although_both_end_in_output_dense():
    model = tiny.model("bert")
    output, down = (Anatomy.of(model).targets(model, [role]) for role in ("output", "down"))
    assert all(p.endswith(".attention.output.dense") for p in output) and not set(output) & set(down)
    assert [p for p in down if ".attention." in p] == [] and len(output) == len(down) == 2


def test_a_regular_expression_reaches_one_stack_of_an_encoder_decoder():
    model = tiny.model("t5")
    assert {p.split(".")[0] for p in Anatomy.of(model).targets(model, ["query"])} == {"encoder", "decoder"}
    found = Anatomy.of(model).targets(model, [r"decoder\..*EncDecAttention\.[qv]"])
    assert len(found) == 6 and all(".EncDecAttention." in p for p in found)


def test_a_family_that_is_in_no_table_is_read_from_its_structure(monkeypatch):
    from luthier.modelling import anatomy

    for family in ("llama", "bart"):
        model = tiny.model(family)
        known = Anatomy.of(model)
        monkeypatch.setitem(anatomy.FAMILIES, family, {})
        guessed = Anatomy.of(model)
        assert guessed.linears and set(guessed.linears) == set(known.linears)
        assert guessed.linears["down"] == known.linears["down"]


def test_a_name_that_matches_nothing_is_answered_with_what_there_is():
    model = tiny.model("llama")
    with pytest.raises(Incompatible, match=r"'qkv'; there are .*query.*attention, mlp, all; .*q_proj"):
        Anatomy.of(model).targets(model, ["qkv"])
    with pytest.raises(Incompatible, match="no valid regular expression"):
        Anatomy.of(model).targets(model, ["*proj"])


def test_experts_are_refused_and_attention_is_named_instead():
    model = tiny.model("qwen3_moe")
    with pytest.raises(Incompatible, match="experts of this mixture.*attention"):
        Anatomy.of(model).targets(model, ["mlp"])


def test_lora_on_a_4096_matrix_trains_65536_against_16_8_million():
    """Hu et al. 2021: d = k = 4096, r = 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.build import adopt

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, vocab_size=100))
    base = adopt(model)
    method = Lora(rank=8, targets=("query",))
    [count] = counts.table(Policy(base, method.attach(base, "default"), method=method))
    assert (count.shape, count.modules, count.trained, count.whole) == ((4096, 4096), 2, 65_536, 16_777_216)
    assert counts.sentence(count) == "65,536 against 16,777,216, 256 times fewer"
