"""Weights laid out for decoding, and blocks read in fewer calls: the same numbers, and nothing of it afterwards."""

import logging

import pytest
import torch

import tiny
from luthier.generating import graph, lean, prepacked
from luthier.methods.adapter import Method as Adapter
from luthier.methods.lora import Method as Lora
from luthier.modelling.packed import PackedLinear
from luthier.policy import Policy

PROMPTS = [[5, 9, 11], [7] * 9, [12, 30], [4, 8, 15, 16, 23, 42]]
LLAMAS = ["llama", "llama_tied", "mistral_window", "qwen2", "qwen3"]


def changed(model):
    return {n: m.__dict__["forward"] for n, m in model.named_modules() if "forward" in m.__dict__}


def both(policy, monkeypatch, **how):
    """The same answers with and without."""
    how = {"samples": 2, "max_new": 20, "temperature": 1.0, "stop": [7], "seed": 1} | how
    with monkeypatch.context() as m:
        m.setattr(prepacked, "STEPS", 10**9)
        plain = policy.generate(PROMPTS, **how)
        assert not changed(policy.lm)
    used = []
    with monkeypatch.context() as m:
        own = prepacked._product
        m.setattr(prepacked, "_product", lambda parts, dtype: used.append(len(parts)) or own(parts, dtype))
        laid_out = policy.generate(PROMPTS, **how)
    assert used and not changed(policy.lm)
    return plain, laid_out, used


@pytest.mark.parametrize("family", [*tiny.DECODERS, *tiny.SEQ2SEQ])
def test_weights_that_are_laid_out_give_the_same_answers_and_are_dropped(family, monkeypatch):
    policy = Policy(tiny.base(family)).eval()
    plain, laid_out, used = both(policy, monkeypatch)
    assert plain.ids == laid_out.ids
    for a, b in zip(plain.logps, laid_out.logps, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-5, rtol=1e-5)
    assert (3 in used) == (family in [*LLAMAS, "granite"])  # queries, keys and values in one product


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_delta_stays_where_it_is(family, monkeypatch):
    base = tiny.base(family)
    method = Lora(targets=("all",))
    delta = method.attach(base, "default")
    tiny.randomise(delta.params, std=0.3)
    policy = Policy(base, delta, method=method).eval()
    plain, laid_out, used = both(policy, monkeypatch)
    assert plain.ids == laid_out.ids and set(used) == {1}  # what is edited is not merged
    policy.use(None)
    assert policy.generate(PROMPTS, samples=2, max_new=20, temperature=1.0, stop=[7], seed=1).ids != plain.ids


def test_a_delta_that_changes_weights_is_not_passed_by(monkeypatch):
    from luthier.methods.partial import Method

    base = tiny.base("llama")
    method = Method(matching=(r".*(q_proj|down_proj)\.weight",))
    delta = method.attach(base, "default")
    for p in delta.params.values():
        p.data.mul_(3)
    policy = Policy(base, delta, method=method).eval()
    plain, laid_out, _ = both(policy, monkeypatch)
    assert plain.ids == laid_out.ids
    off, laid_out, _ = both(policy, monkeypatch, route=[None] * 4)  # while the delta is in use elsewhere
    assert off.ids == laid_out.ids != plain.ids


def test_weights_in_codes_are_not_decoded_for_every_token(monkeypatch):
    policy = Policy(tiny.in_codes("llama")).eval()
    decoded = []
    own = tiny.ByRow.values
    monkeypatch.setattr(tiny.ByRow, "values", lambda self, dtype: decoded.append(1) or own(self, dtype))
    plain, laid_out, _ = both(policy, monkeypatch)
    codes = sum(isinstance(m, PackedLinear) for m in policy.lm.modules())
    assert plain.ids == laid_out.ids and codes == 14
    decoded.clear()
    policy.generate(PROMPTS, max_new=20)
    assert len(decoded) <= 3 * codes  # once when they are laid out; those that are merged, when prompts and the first token are read


def test_without_memory_weights_stay_as_they_are(monkeypatch):
    policy = Policy(tiny.base("llama")).eval()
    monkeypatch.setattr(prepacked, "MEMORY_SHARE", 0.0)
    with prepacked.products(policy.lm, 100):
        assert all(isinstance(f, lean.Lean) and f.qkv is None for f in changed(policy.lm).values())
        assert len(changed(policy.lm)) == 2
    assert policy.generate(PROMPTS, max_new=20).ids == Policy(tiny.base("llama")).generate(PROMPTS, max_new=15 + 5).ids


def test_moved_weights_are_laid_out_anew():
    policy = Policy(tiny.base("llama")).eval()
    before = policy.generate(PROMPTS, max_new=20).ids
    with torch.no_grad():
        for p in policy.lm.parameters():
            p.mul_(1.5)
    after = policy.generate(PROMPTS, max_new=20).ids
    expected = policy.lm.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 3:].tolist()
    assert after != before and after[0] == expected


# --- blocks ---------------------------------------------------------------------------------------------------------


def verdicts(policy, prompts=PROMPTS):
    """Of every block that was tried: equal to its own forward or not."""
    with prepacked.products(policy.lm, 100):
        blocks = [f for f in changed(policy.lm).values() if isinstance(f, lean.Lean)]
        policy.generate(prompts, max_new=3)
        return [b.equal for b in blocks]


@pytest.mark.parametrize("family", LLAMAS)
def test_blocks_built_as_llamas_are_found_equal(family):
    assert verdicts(Policy(tiny.base(family))) == [True, True]


def test_a_block_with_one_query_head_to_a_key_head_and_one_prompt_is_found_equal():
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier import build

    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(**tiny._COMMON | {"num_key_value_heads": 4}))
    assert verdicts(Policy(build.adopt(lm, source="heads")), [[5, 6, 7]]) == [True, True]


def test_a_block_that_only_looks_the_same_is_found_out_and_left_alone():
    policy = Policy(tiny.base("granite"))  # it multiplies what a sublayer gives before the sum
    assert verdicts(policy) == [False, False]


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi", "phi3", "gpt_neox", "gpt2", "cohere", "qwen3_moe", "t5", "bart"])
def test_blocks_built_otherwise_are_not_tried(family):
    assert lean.usual(tiny.model(family)) == []


@pytest.mark.parametrize(
    "how", [{}, {"placement": "pfeiffer"}, {"placement": "block"}, {"placement": "parallel"}, {"placement": "parallel", "reads": "stream"}]
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_delta_around_a_sublayer_or_a_block_acts_as_before(family, how, monkeypatch):
    base, method = tiny.base(family), Adapter(**how)
    delta = method.attach(base, "default")
    tiny.randomise(delta.params, std=0.5)
    policy = Policy(base, delta, method=method).eval()
    plain, laid_out, _ = both(policy, monkeypatch)
    assert plain.ids == laid_out.ids
    assert policy.generate(PROMPTS, samples=2, max_new=20, temperature=1.0, stop=[7], seed=1, route=[None] * 4).ids != plain.ids


# --- steps of one shape ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_steps_of_one_shape_give_the_same_answers_and_say_why_they_are_not_recorded(family, caplog, monkeypatch):
    monkeypatch.setattr(graph, "_said", set())
    policy = Policy(tiny.base(family)).eval()
    how = {"samples": 6, "max_new": 30, "temperature": 1.0, "stop": [3, 7], "seed": 1}
    with caplog.at_level(logging.WARNING, "luthier"):
        recorded = policy.generate(PROMPTS, cuda_graph=True, **how)
        policy.generate(PROMPTS, cuda_graph=True, **how)
    assert recorded.ids == policy.generate(PROMPTS, **how).ids
    assert [r.getMessage() for r in caplog.records] == ["decoding steps are not recorded as a CUDA graph, and run one call at a time: the model is on cpu"]


def test_models_whose_steps_cannot_be_recorded_are_answered_all_the_same(caplog, monkeypatch):
    monkeypatch.setattr(graph, "_said", set())
    policy = Policy(tiny.base("t5")).eval()
    with caplog.at_level(logging.WARNING, "luthier"):
        assert policy.generate(PROMPTS, cuda_graph=True, max_new=5).ids == policy.generate(PROMPTS, max_new=5).ids
    assert "attention is its own" in caplog.text
