"""LoRA and DoRA against PEFT: the same tensors give the same logits and gradients, and folders go both ways."""

import pytest
import torch

import tiny
from luthier.core import Incompatible, LuthierError
from luthier.deltas.lowrank import from_peft
from luthier.saving import adapter

pytest.importorskip("peft")
from reference import peft_peer as peer

FAMILIES = ["llama", "gpt2", "gpt_neox", "phi3", "bert", "t5", "bart"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_folders_go_both_ways(kind, family, tmp_path):
    policy = peer.tuned(family, kind, targets=("all",), rank=4, alpha=6.0)
    peer.both_ways(family, tmp_path, policy)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("stabilised", [False, True])
def test_ranks_and_alphas_of_single_targets_go_both_ways(kind, stabilised, tmp_path):
    how = {"targets": ("all",), "rank": 4, "ranks": {"mlp": 2, "down": 6}, "alphas": {"key": 3.0, r"model\.layers\.1\..*q_proj": 9.0}}
    policy = peer.tuned("llama", kind, rank_stabilised=stabilised, **how)
    _, back = peer.both_ways("llama", tmp_path, policy)
    assert policy.delta.params["model.layers.0.mlp.down_proj:lora_A"].shape[0] == 6
    assert policy.delta.params["model.layers.0.mlp.up_proj:lora_A"].shape[0] == 2
    said = {"layers.0.self_attn.k_proj": (3, 4), "layers.1.self_attn.q_proj": (9, 4), "layers.0.self_attn.q_proj": (16, 4), "layers.1.mlp.down_proj": (16, 6)}
    for path, (alpha, rank) in said.items():
        assert policy.method.scales(policy.base)[f"model.{path}"] == pytest.approx(alpha / (rank**0.5 if stabilised else rank))
    assert back.method.scales(back.base) == pytest.approx(policy.method.scales(policy.base))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3", "gpt2", "bart", "t5", "bert"])
@pytest.mark.parametrize("target", ["embedding", "head"])
def test_embedding_and_head_go_both_ways(family, target, tmp_path):
    policy = peer.tuned(family, "lora", targets=("query", target), rank=4)
    peer.both_ways(family, tmp_path, policy)


def test_a_tied_matrix_is_edited_at_both_uses_and_folds_to_the_same():
    policy = peer.tuned("llama_tied", "lora", targets=("embedding",), rank=4)
    assert sorted(policy.delta.params) == ["model.embed_tokens:lora_embedding_A", "model.embed_tokens:lora_embedding_B"]
    a, b = policy.delta.params.values()
    weight = policy.lm.get_input_embeddings().weight
    changed = weight + 16.0 / 4 * (b @ a).t()
    before = peer.ours(policy)
    policy.fold()
    assert policy.lm.get_output_embeddings().weight is policy.lm.get_input_embeddings().weight
    peer.same(policy.lm.get_input_embeddings().weight, changed)
    peer.same(peer.ours(policy), before)


def test_a_folder_that_edits_one_use_of_a_tied_matrix_is_refused(tmp_path):
    import peft

    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny.model("llama_tied"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(Incompatible, match="are one matrix in this model, and only one of them is edited"):
        adapter.load(tiny.base("llama_tied"), tmp_path / "a")


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_pefts(kind, family, tmp_path):
    policy = peer.tuned(family, kind, targets=("all",), rank=4)
    adapter.save(policy, tmp_path / "a")
    model = peer.theirs(family, tmp_path / "a")
    found = {n: p.requires_grad_() for n, p in model.named_parameters() if ".lora_" in n}
    weight = torch.randn(1, peer.IDS.shape[1], tiny.V, generator=torch.Generator().manual_seed(2))
    (model(**peer.inputs(model)).logits * weight).sum().backward()
    (policy.lm(**peer.inputs(policy.lm)).logits * weight).sum().backward()
    names = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight", "magnitude": "lora_magnitude_vector.default.weight"}
    compared = 0
    for key, p in policy.delta.params.items():
        path, _, leaf = key.partition(":")
        peer.same(p.grad, found[f"base_model.model.{path}.{names[leaf]}"].grad)
        compared += 1
    assert compared == len(found)


def test_dropout_is_on_the_same_input_as_pefts(tmp_path):
    """In training DoRA's part of W sees the dropped input too. One linear: the random numbers of both are then drawn alike."""
    how = {"targets": (r"model\.layers\.0\.mlp\.up_proj",), "rank": 4, "dropout": 0.5}
    for kind in ("lora", "dora"):
        policy = peer.tuned("llama", kind, **how)
        adapter.save(policy, tmp_path / kind)
        model = peer.theirs("llama", tmp_path / kind).train()
        policy.train()
        torch.manual_seed(3)
        mine = peer.ours(policy)
        torch.manual_seed(3)
        peer.same(peer.logits(model), mine)
        policy.eval()
        assert float((peer.ours(policy) - mine).abs().max()) > 1e-3  # it did drop something


def test_patterns_are_read_as_peft_reads_them(tmp_path):
    """Its keys are regular expressions over the end of a path; ours name whole paths."""
    import peft

    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 3},
        alpha_pattern={"k_proj": 5, "^model.layers.0.mlp.down_proj": 7},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(tiny.model("llama").eval(), config).eval()
    model.save_pretrained(tmp_path / "a")
    policy = adapter.load(tiny.base("llama"), tmp_path / "a").eval()
    peer.same(peer.ours(policy), peer.logits(model))


def test_what_is_not_low_rank_alone_is_refused_by_name():
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    for key, value in {"trainable_token_indices": [1], "lora_bias": True, "target_parameters": ["x"], "bias": "all"}.items():
        with pytest.raises(Incompatible, match=key):
            from_peft(plain | {key: value}, {})


def test_a_rank_for_what_is_no_target_is_refused():
    with pytest.raises(LuthierError, match=r"method.ranks: 'down' is none of the modules"):
        peer.tuned("llama", "lora", ranks={"down": 2})
    with pytest.raises(LuthierError, match=r"ranks.down: must be at least 1"):
        peer.tuned("llama", "lora", targets=("down",), ranks={"down": 0})
