"""Saved deltas: PEFT opens ours, we open PEFT's, and nothing damaged or foreign is taken."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from luthier.core import Incompatible, LuthierError, Row
from luthier.methods.full import Method as Full
from luthier.methods.lora import Method as Lora
from luthier.objectives.classify import Objective as Classify
from luthier.objectives.sft import Objective
from luthier.policy import Policy
from luthier.saving import adapter
from luthier.saving.merging import logits, merge
from luthier.settings.plugins import kinds, plugin

IDS = torch.tensor([[5, 9, 11, 20, 33, 7]])


def tuned(family="llama", **how):
    base = tiny.base(family)
    method = Lora(**({"targets": ("attention",), "rank": 4} | how))
    delta = method.attach(base, "default")
    if method.init == "zero":
        tiny.randomise(delta.params)
    else:
        with torch.no_grad():
            for p in delta.params.values():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return Policy(base, delta, method=method).eval()


def out(policy):
    with torch.no_grad():
        return policy.lm(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("how", [{}, {"rank_stabilised": True, "alpha": 7.0}, {"init": "pissa"}])
def test_an_adapter_of_ours_opens_in_peft_with_equal_logits(tmp_path, family, how):
    peft = pytest.importorskip("peft")
    policy = tuned(family, **how)
    adapter.save(policy, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny.model(family).eval(), tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, out(policy), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_opens_here_with_equal_logits(tmp_path, family, rslora):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "c_fc"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM", init_lora_weights=False
    )
    theirs = peft.get_peft_model(tiny.model(family).eval(), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    policy = adapter.load(tiny.base(family), tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(out(policy), theirs(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", [{}, {"init": "pissa"}])
def test_what_is_saved_restores_the_delta_bit_for_bit(tmp_path, how):
    policy = tuned(**how)
    adapter.save(policy, tmp_path / "a")
    again = adapter.load(tiny.base(), tmp_path / "a").eval()
    mine, back = adapter.tensors_of(policy), adapter.tensors_of(again)
    assert set(mine) == set(back) and all(torch.equal(mine[k], back[k]) for k in mine)
    assert torch.equal(out(policy), out(again)) and again.method == policy.method
    assert (tmp_path / "a" / "delta.safetensors").exists() == bool(how)


def test_pissa_starts_at_the_base_and_off_is_the_base():
    base = tiny.base()
    plain = out(Policy(tiny.base()).eval())
    method = Lora(init="pissa", rank=4)
    policy = Policy(base, method.attach(base, "default"), method=method).eval()
    torch.testing.assert_close(out(policy), plain, atol=2e-6, rtol=1e-5)
    policy.use(None)
    assert torch.equal(out(policy), plain)


def test_pissas_factors_are_the_best_low_rank_approximation():
    """Eckart and Young: the error is exactly the singular values that are left out."""
    from luthier.methods.lora import principal

    w = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    a, b = principal(w, 5, scale=2.0)
    left = torch.linalg.svdvals(w)[5:].square().sum().sqrt()
    assert float((w - 2.0 * b @ a).norm()) == pytest.approx(float(left), rel=1e-5)


def test_a_delta_that_is_not_finite_is_never_saved(tmp_path):
    policy = tuned()
    with torch.no_grad():
        next(iter(policy.delta.params.values()))[0, 0] = float("nan")
    with pytest.raises(LuthierError, match="not finite"):
        adapter.save(policy, tmp_path / "a")
    assert not (tmp_path / "a").exists() and not list(tmp_path.iterdir())


def test_an_adapter_for_another_base_is_refused(tmp_path):
    policy = tuned()
    policy.base.hash = "one"
    adapter.save(policy, tmp_path / "a")
    other = tiny.base()
    other.hash = "two"
    with pytest.raises(LuthierError, match="trained on 'tiny-llama'.*An adapter only fits its own base"):
        adapter.load(other, tmp_path / "a")


def test_a_foreign_adapter_of_another_shape_is_refused(tmp_path):
    adapter.save(tuned(), tmp_path / "a")
    (tmp_path / "a" / "luthier.json").unlink()
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file({k: v[:, :16].contiguous() if "lora_A" in k else v for k, v in tensors.items()}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(LuthierError, match="does not fit this base: .* in the file and"):
        adapter.load(tiny.base(), tmp_path / "a")


@pytest.mark.parametrize("what", ["truncated", "missing", "json"])
def test_a_damaged_adapter_is_one_sentence(tmp_path, what):
    adapter.save(tuned(), tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "missing":
        weights.unlink()
    else:
        (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(LuthierError, match="damaged|missing"):
        adapter.load(tiny.base(), tmp_path / "a")


def test_a_dora_directory_is_not_mistaken_for_lora(tmp_path):
    adapter.save(tuned(), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(Incompatible, match="use_dora"):
        adapter.load(tiny.base(), tmp_path / "a")


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gemma2", "gpt_neox", "phi3"])
def test_a_merged_folder_opens_in_plain_transformers_with_equal_logits(tmp_path, family):
    from transformers import AutoModelForCausalLM

    policy = tuned(family)
    before = out(policy)
    done = merge(policy, tmp_path / "m")
    assert done.folded < 1e-5 and done.reopened < 1e-5 and done.same_greedy
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=IDS).logits, before, atol=1e-5, rtol=1e-4)


def test_a_merge_that_changes_the_logits_is_refused(tmp_path, monkeypatch):
    policy = tuned()
    monkeypatch.setattr("luthier.methods.lora.LoraEdit.fold", lambda self, w: w + 0.1)
    with pytest.raises(LuthierError, match="folding changed the logits"):
        merge(policy, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_full_fine_tuning_saves_a_whole_model(tmp_path):
    from transformers import AutoModelForCausalLM

    base = tiny.base("llama_tied")
    policy = Policy(base, Full().attach(base, "default"), method=Full()).eval()
    tiny.randomise(policy.delta.params)
    adapter.save(policy, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=IDS).logits, logits(policy, IDS.tolist())[None], atol=1e-5, rtol=1e-5)


# --- every kind -----------------------------------------------------------------------------------------------------

SAVED = {  # kind -> settings, and whether another program's files are written
    "lora": ({}, True),
    "dora": ({}, True),
    "ia3": ({}, True),
    "prompt": ({"length": 4}, True),
    "p_tuning": ({"length": 4}, True),
    "prefix": ({"length": 4, "hidden": 8}, True),
    "p_tuning_v2": ({"length": 4}, True),
    "adapter": ({"norms": True}, True),
    "partial": ({"last_blocks": 1}, False),
    "diff_pruning": ({"share": 0.01}, False),
    "crafted_prompt": ({"ids": (5, 6, 7)}, False),
}


def of_kind(kind, family="llama", std=0.1, **how):
    base = tiny.base(family)
    method = plugin("methods", kind)(**(SAVED[kind][0] | how))
    policy = Policy(base, method.attach(base, "default"), method=method).eval()
    tiny.randomise(policy.delta.params, std=std)
    if policy.delta.on_step is not None:
        policy.delta.on_step(1, 2)  # prunes
    return policy


def hidden(policy):
    batch = Objective().collate(tiny.rows(2), pad=0, packed=False)
    with torch.no_grad():
        return policy.hidden(batch)


def test_every_method_is_saved_in_one_of_these_ways():
    assert set(kinds("methods")) == set(SAVED) | {"full"}


@pytest.mark.parametrize("kind", SAVED)
def test_every_kind_comes_back_from_its_folder(kind, tmp_path):
    policy = of_kind(kind)
    adapter.save(policy, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_config.json").exists() == SAVED[kind][1]
    assert (tmp_path / "a" / "luthier.json").exists()
    again = adapter.load(tiny.base(), tmp_path / "a").eval()
    mine, back = adapter.tensors_of(policy), adapter.tensors_of(again)
    assert set(mine) == set(back) and all(torch.equal(mine[k], back[k]) for k in mine)
    assert again.method == policy.method
    plain = hidden(Policy(tiny.base()).eval())
    assert torch.equal(hidden(policy), hidden(again)) and not torch.equal(hidden(policy), plain)


def test_deltas_of_different_kinds_stand_on_one_base_and_equal_each_alone(tmp_path):
    names = ["lora", "dora", "ia3", "prompt", "prefix", "adapter"]
    alone = {}
    for kind in names:
        policy = of_kind(kind)
        adapter.save(policy, tmp_path / kind)
        alone[kind] = hidden(policy)
    policy = Policy(tiny.base()).eval()
    plain = hidden(policy)
    for kind in names:
        adapter.add(policy, tmp_path / kind, kind)
    assert torch.equal(hidden(policy), plain)  # nothing is in use yet
    for kind in names:
        policy.use(kind)
        assert torch.equal(hidden(policy), alone[kind])
    policy.use("lora+ia3")
    assert not torch.equal(hidden(policy), alone["lora"])
    with pytest.raises(LuthierError, match="already a delta called 'lora'"):
        adapter.add(policy, tmp_path / "dora", "lora")
    policy.use("lora")
    assert torch.equal(hidden(policy), alone["lora"])  # and the one that was there still is


def test_a_delta_that_does_not_fit_leaves_the_base_as_it_was(tmp_path):
    adapter.save(of_kind("ia3", "llama", targets=("query",)), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: v[:-1].contiguous() if len(v) > 1 else v for k, v in load_file(path).items()}, path)
    policy = Policy(tiny.base()).eval()
    plain = hidden(policy)
    with pytest.raises(LuthierError, match="does not fit this base"):
        adapter.add(policy, tmp_path / "a", "one")
    assert not policy.deltas and torch.equal(hidden(policy), plain)
    with pytest.raises(LuthierError, match="no delta is called 'one'"):
        policy.use("one")


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "partial", "diff_pruning"])
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "bert", "t5"])
def test_every_kind_that_folds_is_merged_and_opened_by_plain_transformers(kind, family, tmp_path):
    policy = of_kind(kind, family, std=0.02 if kind == "partial" else 0.1)
    before = logits(policy, [[5, 9, 11, 20, 33, 7]])
    policy.use(None)
    assert not torch.equal(before, logits(policy, [[5, 9, 11, 20, 33, 7]]))
    policy.use("default")
    done = merge(policy, tmp_path / "m")
    assert done.folded < 1e-4 and done.reopened < 1e-4 and done.same_greedy, f"folding {done.folded:.1e}, reopened {done.reopened:.1e}"


@pytest.mark.parametrize("kind", ["prompt", "prefix", "adapter", "crafted_prompt"])
def test_a_kind_that_cannot_fold_says_so_before_anything_is_written(kind, tmp_path):
    with pytest.raises(Incompatible, match=f"a delta of {kind} cannot be merged"):
        merge(of_kind(kind), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_pickle_is_never_read(tmp_path):
    adapter.save(of_kind("lora"), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(LuthierError, match="a pickle can run any code"):
        adapter.load(tiny.base(), tmp_path / "a")


def test_an_unknown_peft_type_names_what_is_read(tmp_path):
    adapter.save(of_kind("lora"), tmp_path / "a")
    (tmp_path / "a" / "luthier.json").unlink()
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "LOHA"}))
    with pytest.raises(Incompatible, match="'LOHA' is not read; LORA, IA3,"):
        adapter.load(tiny.base(), tmp_path / "a")


# --- heads ----------------------------------------------------------------------------------------------------------

LABELS = Classify(problem="single", labels=("bad", "good", "odd"))


def classifier(family, kind="lora", **how):
    policy = of_kind(kind, family, **how)
    torch.manual_seed(5)
    policy.heads = torch.nn.ModuleDict(LABELS.heads(policy.base))
    policy.objective = LABELS
    for p in policy.heads.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return policy.eval()


def scores(policy):
    rows = [Row(r.ids, r.train, extras={"label": 0} | ({"source": r.ids} if policy.base.anatomy.kind == "encoder_decoder" else {})) for r in tiny.rows(3)]
    with torch.no_grad():
        return policy.objective.scores(policy, LABELS.collate(rows, pad=0, packed=False))


@pytest.mark.parametrize("family", ["llama", "bert", "roberta", "modernbert", "t5"])
@pytest.mark.parametrize("kind", ["lora", "prefix", "partial"])
def test_a_head_comes_back_with_its_delta_and_its_labels(family, kind, tmp_path):
    policy = classifier(family, kind)
    adapter.save(policy, tmp_path / "a")
    again = adapter.load(tiny.base(family), tmp_path / "a").eval()
    assert again.objective == LABELS
    assert torch.equal(scores(policy), scores(again))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_delta_without_its_head_is_refused(family, tmp_path):
    """A new head would answer at random, and look as if it worked."""
    adapter.save(classifier(family), tmp_path / "a")
    for file in ("adapter_model.safetensors", "delta.safetensors"):
        if (path := tmp_path / "a" / file).exists():
            save_file({k: v for k, v in load_file(path).items() if "score" not in k and not k.startswith("heads.")}, path)
    with pytest.raises(LuthierError, match="its head is missing .* would answer at random"):
        adapter.load(tiny.base(family), tmp_path / "a")


def test_heads_are_not_saved_without_what_they_are_for(tmp_path):
    policy = classifier("llama")
    policy.objective = None
    with pytest.raises(LuthierError, match="cannot be saved without the objective"):
        adapter.save(policy, tmp_path / "a")


def test_a_second_delta_brings_no_head(tmp_path):
    adapter.save(classifier("llama"), tmp_path / "a")
    with pytest.raises(LuthierError, match="has a head of its own"):
        adapter.add(Policy(tiny.base()), tmp_path / "a", "one")


@pytest.mark.parametrize("family", ["llama", "roberta"])
@pytest.mark.parametrize("how", ["merged", "full"])
def test_a_whole_model_keeps_its_head_beside_it(family, how, tmp_path):
    policy = classifier(family)
    before = scores(policy)
    merge(policy, tmp_path / "m")
    base = tiny.base(family)
    base.model = adopted(type(base.model).from_pretrained(tmp_path / "m"))
    if how == "full":
        policy = Policy(base, Full().attach(base, "default"), method=Full(), heads=adapter.heads_of(base, tmp_path / "m"))
        policy.objective = adapter.objective_of(tmp_path / "m")
        adapter.save(policy, tmp_path / "n")
        (tmp_path / "m").rename(tmp_path / "o")
        (tmp_path / "n").rename(tmp_path / "m")
    again = Policy(base, heads=adapter.heads_of(base, tmp_path / "m")).eval()
    again.objective = adapter.objective_of(tmp_path / "m")
    torch.testing.assert_close(scores(again), before, atol=1e-5, rtol=1e-4)
    (tmp_path / "m" / "heads.safetensors").unlink()
    with pytest.raises(LuthierError, match="its head is missing"):
        adapter.heads_of(base, tmp_path / "m")


def adopted(lm):
    from luthier.build import adopt

    return adopt(lm).model


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "bert"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_classifier_goes_both_ways_through_peft(family, kind, tmp_path):
    """transformers' sequence classifier with PEFT's delta gives our scores, and its folder opens here, labels unnamed."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    policy = classifier(family, kind)
    adapter.save(policy, tmp_path / "a")
    lm = tiny.model(family)
    lm.save_pretrained(tmp_path / "base")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=lm.config.pad_token_id or 0).eval()
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    with torch.no_grad():
        their_scores = torch.cat([theirs(input_ids=torch.from_numpy(r.ids).long()[None], attention_mask=torch.ones(1, len(r))).logits for r in tiny.rows(3)])
    torch.testing.assert_close(their_scores, scores(policy), atol=1e-5, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "b")
    again = adapter.load(tiny.base(family), tmp_path / "b").eval()
    assert again.objective.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    torch.testing.assert_close(scores(again), their_scores, atol=1e-5, rtol=1e-4)
