"""Tokens from logits and random numbers: against probabilities, sorted vocabularies and one generator a token."""

import pytest
import torch

from luthier.generating import sampling
from luthier.generating.sampling import Draws, choose, pick, seed_of

CPU = torch.device("cpu")


def test_random_numbers_drawn_in_blocks_are_those_drawn_one_by_one():
    draws = Draws([5, None, 9], CPU)
    got = torch.stack([draws.next() for _ in range(130)], 1)
    for row, seed in ((0, 5), (2, 9)):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(got[row], torch.cat([torch.rand(1, generator=generator) for _ in range(130)]))
    assert not got[1].any()


def test_rows_that_are_kept_keep_their_random_numbers_and_fillers_take_none():
    plain, kept = Draws([1, 2, 3], CPU), Draws([1, 2, 3], CPU)
    for _ in range(10):
        plain.next(), kept.next()
    kept.keep([2, 0, 2], living=2)
    for _ in range(150):
        a, b = plain.next(), kept.next()
        assert b[0] == a[2] and b[1] == a[0]


def test_samples_of_all_prompts_and_seeds_start_differently():
    seeds = {seed_of(seed, number, sample) for seed in range(3) for number in range(500) for sample in range(16)}
    assert len(seeds) == 3 * 500 * 16 and all(0 <= s < 2**63 for s in seeds)
    assert seed_of(4, 7, 0) == 4 * 1_000_003 + 7


@pytest.mark.parametrize("likeliest", [4, 1024])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (0, 0.95), (5, 0.6), (50, 0.3), (1, 1.0)])
def test_choices_are_as_frequent_as_a_sorted_vocabulary_says(top_k, top_p, likeliest, monkeypatch):
    monkeypatch.setattr(sampling, "LIKELIEST", likeliest)
    made = torch.Generator().manual_seed(0)
    p = torch.randn(11, generator=made).mul(1.5).softmax(-1)
    order = sorted(range(11), key=lambda t: -float(p[t]))
    left, mass = [], 0.0
    for rank, t in enumerate(order):
        if (top_k and rank >= top_k) or (rank and mass >= top_p):
            break
        left.append(t)
        mass += float(p[t])
    expected = torch.zeros(11)
    expected[left] = p[left] / p[left].sum()
    n = 40_000
    got = torch.bincount(choose(p.expand(n, -1).clone(), torch.rand(n, generator=made), top_k, top_p), minlength=11) / n
    assert set(got.nonzero().flatten().tolist()) == set(left)
    torch.testing.assert_close(got, expected, atol=0.012, rtol=0)


def test_a_token_without_probability_is_never_chosen():
    p = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0, 0.0]])
    for u in (0.0, 0.2999, 0.3001, 1 - 2**-24, 1.0):  # the last two round to all of it
        assert int(choose(p, torch.tensor([u]))) in (1, 3)


def test_picked_tokens_come_with_both_log_probs():
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 30, generator=made) * 3
    for temperature in (1.0, 0.7, 2.0):
        token, logp, tempered = pick(logits, torch.rand(64, generator=made), temperature, 0, 1.0)
        torch.testing.assert_close(logp, logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1))
        torch.testing.assert_close(tempered, (logits / temperature).log_softmax(-1).gather(1, token[:, None]).squeeze(1))
    token, logp, tempered = pick(logits, None, 0.0, 0, 1.0)
    assert torch.equal(token, logits.argmax(-1)) and not tempered.any()
    torch.testing.assert_close(logp, logits.log_softmax(-1).amax(-1))
