"""Saved deltas: PEFT opens ours, we open PEFT's, and nothing damaged or foreign is taken."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from luthier import adapter
from luthier.core import Incompatible, LuthierError
from luthier.merging import logits, merge
from luthier.methods.full import Method as Full
from luthier.methods.lora import Method as Lora
from luthier.policy import Policy

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
