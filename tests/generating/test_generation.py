"""Our sampling loop against transformers' generate, and its promises."""

import importlib
import json

import pytest
import torch

import tiny
from luthier import build
from luthier.core import LuthierError, next_token_batch
from luthier.generating import cache
from luthier.generating.decoding import DecoderSteps, OwnCacheSteps, steps_for
from luthier.generating.generation import batches
from luthier.generating.sampling import choose
from luthier.policy import Policy

PROMPTS = [[5, 9, 11], [7] * 9, [12, 30], [4, 8, 15, 16, 23, 42]]


class Tokenizer:
    pad_token_id = 0


def policy(family="llama", **how):
    model = tiny.model(family, **how)
    base = build.adopt(model, Tokenizer())
    return Policy(base).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3", "gpt_neox", "phi", "qwen3", "mistral_window"])
def test_greedy_ids_are_those_of_transformers_generate(family):
    p = policy(family)
    out = p.generate(PROMPTS, max_new=12)
    for prompt, new in zip(PROMPTS, out.ids, strict=True):
        expected = p.lm.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)[0, len(prompt) :]
        assert new == expected.tolist()


def test_kept_log_probs_are_those_of_a_plain_forward():
    p = policy()
    out = p.generate(PROMPTS, max_new=8, temperature=0.8, seed=3)
    for prompt, new, logps in zip(PROMPTS, out.ids, out.logps, strict=True):
        with torch.no_grad():
            logits = p.lm(input_ids=torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(logps), expected, atol=1e-4, rtol=1e-4)


def test_an_answer_does_not_depend_on_its_batch():
    p = policy()
    together = p.generate(PROMPTS, max_new=10, temperature=1.0, seed=1).ids
    alone = [p.generate([x], max_new=10, temperature=1.0, seed=1, numbers=[i]).ids[0] for i, x in enumerate(PROMPTS)]
    assert together == alone


def test_a_stop_token_ends_its_row_and_the_others_go_on():
    p = policy()
    free = p.generate(PROMPTS, max_new=12).ids
    stop = free[1][3]
    out = p.generate(PROMPTS, max_new=12, stop=[stop])
    for new, unstopped, how in zip(out.ids, free, out.stopped, strict=True):
        end = unstopped.index(stop) + 1 if stop in unstopped else 12
        assert new == unstopped[:end] and how == ("stop" if stop in unstopped else "length")


def test_top_k_and_top_p_leave_only_the_likeliest():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])

    def uniform(n):
        return torch.cat([torch.rand(1, generator=torch.Generator().manual_seed(i)) for i in range(n)])

    many = p.expand(200, 4)
    assert set(choose(many, uniform(200), top_k=2).tolist()) == {0, 1}
    assert set(choose(many, uniform(200), top_p=0.6).tolist()) == {0, 1}
    assert set(choose(many, uniform(200), top_p=0.4).tolist()) == {0}
    free = choose(p.expand(4000, 4), uniform(4000))
    torch.testing.assert_close(torch.bincount(free) / 4000, p[0], atol=0.03, rtol=0)


def test_an_over_long_prompt_is_refused_in_a_sentence():
    with pytest.raises(LuthierError, match="prompt 1 has 70 tokens; this model takes 1 to 63"):
        policy().generate([[3] * 70])


def test_stories260k_reproduces_its_greedy_ids(shared):
    """A real trained Llama: exact ids from the beginning-of-sequence token."""
    folder = shared / "weights" / "stories260k"
    from luthier.precision.float32 import Precision

    base = build.load(str(folder), precision=Precision())
    base.tokenizer = Tokenizer()
    expected = json.loads((folder / "expected_greedy.json").read_text())["bos_only_greedy_ids"]
    out = Policy(base).generate([expected[:1]], max_new=len(expected) - 1)
    assert expected[:1] + out.ids[0] == expected


# --- several answers to a prompt ------------------------------------------------------------------------------------


def test_samples_stand_prompt_by_prompt_and_are_functions_of_seed_number_and_sample():
    p = policy()
    three = p.generate(PROMPTS, samples=3, max_new=10, temperature=1.0, seed=5)
    assert len(three.ids) == len(three.logps) == len(three.stopped) == len(three.tempered) == 12
    assert three.ids[::3] == p.generate(PROMPTS, max_new=10, temperature=1.0, seed=5).ids  # the first sample is the only one of samples=1
    for i, prompt in enumerate(PROMPTS):
        assert three.ids[3 * i : 3 * i + 3] == p.generate([prompt], samples=3, max_new=10, temperature=1.0, seed=5, numbers=[i]).ids
    assert len({tuple(x) for x in three.ids}) == 12
    assert three.ids != p.generate(PROMPTS, samples=3, max_new=10, temperature=1.0, seed=6).ids


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma2", "gpt2"])
def test_an_answer_does_not_depend_on_order_or_on_how_many_fit_into_a_batch(family):
    p = policy(family)
    made = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, tiny.V, (n,), generator=made).tolist() for n in torch.randint(1, 40, (23,), generator=made).tolist()]
    numbers = list(range(100, 123))
    how = {"samples": 3, "max_new": 9, "temperature": 1.0, "stop": [7], "seed": 2}
    whole = p.generate(prompts, numbers=numbers, **how)
    assert len({len(x) for x in whole.ids}) > 2  # some stop early, so rows are dropped
    for limits in ({"batch_tokens": 200}, {"batch_rows": 4}, {"batch_tokens": 1}):
        assert p.generate(prompts, numbers=numbers, **how, **limits).ids == whole.ids
    back = p.generate(prompts[::-1], numbers=numbers[::-1], **how)
    assert [back.ids[3 * i : 3 * i + 3] for i in range(23)][::-1] == [whole.ids[3 * i : 3 * i + 3] for i in range(23)]


def embedded(p):
    """Collects the shapes of what is embedded."""
    seen, model = [], p.lm
    p.generate([[3]], max_new=2)  # the first time a few tokens are tried
    model.get_input_embeddings().register_forward_hook(lambda _, x, y: seen.append(tuple(x[0].shape)))
    return seen


def test_a_prompt_is_read_once_for_all_its_samples():
    p = policy()
    seen = embedded(p)
    p.generate([[3] * 16, [4] * 16], samples=5, max_new=4, temperature=1.0)
    assert seen == [(2, 16), (10, 1), (10, 1), (10, 1)]
    seen.clear()
    p.generate([[3] * 16], samples=5, max_new=4, temperature=1.0, batch_rows=2)  # also where they are written in turns
    assert seen == [(1, 16)] + 3 * [(2, 1)] + 3 * [(2, 1)] + 3 * [(1, 1)]


def test_finished_rows_are_dropped():
    p = policy()
    seen = embedded(p)
    out = p.generate(PROMPTS, samples=16, max_new=30, temperature=1.0, stop=range(3, 13), seed=1)
    rows = [shape[0] for shape in seen[1:]]
    assert rows == sorted(rows, reverse=True) and len(set(rows)) >= 5 and set(rows) <= {64, 56, 48, 40, 32, 24, 16, 8, 4, 2, 1}
    needed = sum(len(x) - 1 for x in out.ids)
    assert needed <= sum(rows) < 1.3 * needed


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # positions computed, and positions learned
@pytest.mark.parametrize("implementation", ["luthier", "sdpa"])
def test_every_answer_has_the_room_its_own_prompt_leaves(family, implementation):
    p = policy(family)
    p.lm.config._attn_implementation = implementation
    out = p.generate([[3] * 60, *[[3] * 8] * 6, [3] * 63], max_new=10)  # few enough end early to stay among the others
    assert [len(x) for x in out.ids] == [4, *[10] * 6, 1]
    assert out.ids[1] == p.generate([[3] * 8], max_new=10).ids[0]


def test_both_log_probs_of_a_tempered_answer_are_those_of_a_plain_forward():
    p = policy()
    out = p.generate(PROMPTS, samples=2, max_new=6, temperature=0.5, seed=3, top_k=5)
    for prompt, new, logps, tempered in zip([x for x in PROMPTS for _ in range(2)], out.ids, out.logps, out.tempered, strict=True):
        with torch.no_grad():
            logits = p.lm(input_ids=torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        for got, temperature in ((logps, 1.0), (tempered, 0.5)):
            expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(new)[:, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(got), expected, atol=1e-4, rtol=1e-4)
    assert p.generate([[3]], max_new=2).tempered == [[0.0, 0.0]]


@pytest.mark.parametrize("family", tiny.SEQ2SEQ)
def test_an_encoder_decoder_encodes_a_prompt_once_for_all_its_samples(family):
    p = Policy(tiny.base(family)).eval()
    seen = []
    p.lm.get_encoder().register_forward_hook(lambda _m, _a, kwargs, _y: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    out = p.generate(PROMPTS, samples=3, max_new=8, temperature=1.0, stop=(2, 5), seed=1)
    assert seen == [(4, 9)]
    for i, prompt in enumerate(PROMPTS):
        assert out.ids[3 * i : 3 * i + 3] == p.generate([prompt], samples=3, max_new=8, temperature=1.0, stop=(2, 5), seed=1, numbers=[i]).ids
    assert p.generate(PROMPTS, samples=3, max_new=8, temperature=1.0, stop=(2, 5), seed=1, batch_rows=2).ids == out.ids


def test_a_family_that_keeps_its_own_attention_gives_the_same_answers():
    ours, own = policy(), policy()
    own.lm.config._attn_implementation = "sdpa"
    assert isinstance(steps_for(own, [None]), OwnCacheSteps) and isinstance(steps_for(ours, [None]), DecoderSteps)
    how = {"samples": 4, "max_new": 40, "temperature": 1.0, "stop": [7, 9], "seed": 4}
    expected = ours.generate(PROMPTS, **how)
    for limits in ({}, {"batch_rows": 3}):
        got = own.generate(PROMPTS, **how, **limits)
        assert got.ids == expected.ids and got.stopped == expected.stopped


def test_a_hybrid_whose_states_no_grid_holds_is_answered_with_its_own_cache():
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    p = Policy(build.adopt(Lfm2ForCausalLM(Lfm2Config(**tiny._COMMON, layer_types=["conv", "full_attention"])), Tokenizer())).eval()
    assert p.lm.config._attn_implementation == "luthier" and isinstance(steps_for(p, [None]), OwnCacheSteps)
    out = p.generate(PROMPTS, max_new=12)
    for prompt, new in zip(PROMPTS, out.ids, strict=True):
        expected = p.lm.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)[0, len(prompt) :]
        assert new == expected.tolist()
    how = {"samples": 4, "max_new": 20, "temperature": 1.0, "stop": range(3, 9), "seed": 4}
    together = p.generate(PROMPTS, **how)
    for i, prompt in enumerate(PROMPTS):
        assert together.ids[4 * i : 4 * i + 4] == p.generate([prompt], numbers=[i], **how).ids


def test_progress_is_told_and_giving_up_leaves_the_model_as_it_was():
    p, told = policy().train(), []
    p.generate(PROMPTS, samples=2, max_new=3, batch_rows=4, on_answers=told.append)
    assert told == [4, 8]
    before = p.lm.config._attn_implementation

    def give_up(token):
        if len(tokens) == 20:
            raise KeyboardInterrupt
        tokens.append(token)

    tokens = []
    with pytest.raises(KeyboardInterrupt):
        p.generate(PROMPTS, samples=2, max_new=30, temperature=1.0, on_token=give_up)
    assert p.training and p.lm.config._attn_implementation == before
    assert not [n for n, m in p.lm.named_modules() if "forward" in m.__dict__]


def test_settings_out_of_range_are_refused_by_name():
    wrong = (("samples", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("max_new", -1), ("batch_tokens", 0), ("batch_rows", 0))
    for name, value in wrong:
        with pytest.raises(LuthierError, match=f"{name} is {value}; it takes"):
            policy().generate(PROMPTS, **{name: value})
    for name in ("numbers", "route"):
        with pytest.raises(LuthierError, match="3 (numbers|routes) for 4 prompts"):
            policy().generate(PROMPTS, **{name: [None] * 3})
    assert policy().generate([]).ids == [] and policy().generate(PROMPTS, max_new=0).ids == [[]] * 4


def test_batches_hold_no_more_than_they_may():
    lengths = [5, 900, 30, 31, 7, 600]
    got = list(batches(lengths, 4, 25, 1000, 8))
    assert got == [([0, 4], 4), ([2, 3], 4), ([5], 4), ([1], 4)]
    assert list(batches([500], 100, 20, 1000, 64)) == [([0], 25)]
    assert list(batches([5000], 8, 20, 1000, 64)) == [([0], 1)]  # more than there is room for: one at a time


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral_window"])
@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt", "p_tuning_v2", "adapter"])
def test_samples_of_a_delta_have_the_log_probs_of_training(kind, family):
    base = tiny.base(family)
    method = importlib.import_module(f"luthier.methods.{kind}").Method()
    delta = method.attach(base, "default")
    tiny.randomise(delta.params, seed=1, std=0.3)
    p = Policy(base, delta, method=method).eval()
    out = p.generate(PROMPTS, samples=3, max_new=20, temperature=1.0, stop=[7])
    rows = [tiny.row([*prompt, *new]) for prompt, new in zip([x for x in PROMPTS for _ in range(3)], out.ids, strict=True)]
    batch = next_token_batch(rows, pad=0, packed=False)
    with torch.no_grad():
        hidden = p.hidden(batch)
    for i, (row, new, logps) in enumerate(zip(rows, out.ids, out.logps, strict=True)):
        expected = p.score(hidden[i, len(row) - len(new) - 1 : len(row) - 1], torch.tensor(new))["logp"]
        torch.testing.assert_close(torch.tensor(logps), expected.detach(), atol=2e-4, rtol=2e-4)


def test_prompts_of_several_routes_have_samples_too():
    base = tiny.base()
    policies = {}
    for i, kind in enumerate(("lora", "prefix", "prompt")):
        method = importlib.import_module(f"luthier.methods.{kind}").Method()
        policies[kind] = method.attach(base, kind)
        tiny.randomise(policies[kind].params, seed=i, std=0.3)
    p = Policy(base, policies["lora"], name="lora")
    p.add("prefix", policies["prefix"])
    p.add("prompt", policies["prompt"])
    routes = ["lora", "prefix", None, "prompt+prefix"]
    how = {"samples": 2, "max_new": 8, "temperature": 1.0, "stop": [7], "seed": 3}
    together = p.generate(PROMPTS, route=routes, **how)
    for i, (prompt, route) in enumerate(zip(PROMPTS, routes, strict=True)):
        assert together.ids[2 * i : 2 * i + 2] == p.generate([prompt], route=[route], numbers=[i], **how).ids


def test_answers_in_half_precision_are_those_of_a_forward_in_half_precision():
    p = Policy(build.adopt(tiny.model("llama").to(torch.bfloat16), Tokenizer())).eval()
    for small in (cache.SMALL, 0):  # attention in float32, and in the model's own dtype
        with pytest.MonkeyPatch.context() as m:
            m.setattr(cache, "SMALL", small)
            out = p.generate(PROMPTS, samples=3, max_new=40, temperature=1.0, stop=[7])
        for prompt, new, logps in zip([x for x in PROMPTS for _ in range(3)], out.ids, out.logps, strict=True):
            with torch.no_grad():
                logits = p.lm(input_ids=torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].float()
            expected = logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(logps), expected, atol=3e-2, rtol=3e-2)
