"""Our sampling loop against transformers' generate, and its promises."""

import json

import pytest
import torch

import tiny
from luthier import build
from luthier.core import LuthierError
from luthier.generation import choose
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
    logp = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def draws():
        return [torch.Generator().manual_seed(n) for n in range(200)]

    many = logp.expand(200, 4)
    assert set(choose(many, draws(), 1.0, 2, 1.0).tolist()) == {0, 1}
    assert set(choose(many, draws(), 1.0, 0, 0.6).tolist()) == {0, 1}
    assert set(choose(many, draws(), 1.0, 0, 0.4).tolist()) == {0}
    free = choose(logp.expand(4000, 4), [torch.Generator().manual_seed(n) for n in range(4000)], 1.0, 0, 1.0)
    torch.testing.assert_close(torch.bincount(free) / 4000, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)


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
