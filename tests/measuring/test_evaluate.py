"""Scores with intervals, held-out loss, and the baseline that copies."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from luthier.core import LuthierError
from luthier.measuring import evaluate
from luthier.measuring.evaluate import Losses, Score, loss_on, nearest_copy, rise, score
from luthier.tasks import bleu, exact_match


def test_a_score_is_the_mean_over_rows_with_its_interval_and_count():
    rows = [{"prompt": str(i), "refs": ["yes"]} for i in range(100)]
    found = score(lambda rs: ["yes" if int(r["prompt"]) < 80 else "no" for r in rs], exact_match.Task(), rows, seed=0)["exact_match"]
    assert (found.value, found.n) == (0.8, 100)
    # A binomial share of 0.8 in 100 has a standard error of 0.04.
    assert found.low == pytest.approx(0.72, abs=0.02) and found.high == pytest.approx(0.88, abs=0.02)


def test_corpus_bleu_is_that_of_the_sums_and_not_the_mean_of_sentences():
    sacrebleu = pytest.importorskip("sacrebleu")
    rows = [{"prompt": "", "refs": [t]} for t in ("the cat sat on the mat today", "a dog", "one two three four five six")]
    answers = ["the cat sat on the mat", "a dog", "one two four five six three"]
    found = score(lambda _: answers, bleu.Task(), rows, seed=0)["bleu"]
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(answers, [[r["refs"][0] for r in rows]]).score)
    assert found.low <= found.value <= found.high


def test_scores_are_seeded():
    rows = [{"prompt": "", "refs": [str(i % 3)]} for i in range(30)]
    run = lambda seed: score(lambda rs: ["1"] * len(rs), exact_match.Task(), rows, seed=seed)  # noqa: E731
    assert run(1) == run(1)


def test_no_rows_and_too_few_answers_are_refused():
    with pytest.raises(LuthierError, match="no rows"):
        score(lambda rs: [], exact_match.Task(), [])
    with pytest.raises(LuthierError, match="2 rows were asked and 1 answers"):
        score(lambda rs: ["x"], exact_match.Task(), [{"refs": ["x"]}] * 2)


def test_a_comparison_is_paired_and_sees_a_small_steady_gain():
    rows = [{"prompt": "", "refs": [f"the {w} sat on the mat by the door"]} for w in ("cat", "dog", "hen", "fox") * 25]
    before = ["the thing sat on the mat by the door"] * 100
    after = [r["refs"][0] if i % 5 else before[0] for i, r in enumerate(rows)]
    found = evaluate.compare(bleu.Task(), rows, before, after)["bleu"]
    assert found.low > 0 and found.value > 10
    same = evaluate.compare(exact_match.Task(), rows, before, before)["exact_match"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_score_prints_with_its_interval_and_count():
    assert str(Score(45.91, 44.8, 47.02, 630)) == "45.9 [44.8, 47.0] n=630"
    assert str(Score(0.9126, 0.9, 0.93, 200)) == "0.913 [0.900, 0.930] n=200"


class Constant(torch.nn.Module):
    """Remembers whether it was in training mode when it was asked."""

    def __init__(self):
        super().__init__()
        self.seen = []


def objective(terms):
    def loss(policy, batch):
        policy.seen.append((policy.training, torch.is_grad_enabled()))
        return SimpleNamespace(sums={k: torch.tensor(v) for k, v in batch.sums.items()})

    return SimpleNamespace(terms=terms, loss=loss)


def batch(sums, units):
    return SimpleNamespace(sums=sums, units=units)


def test_held_out_loss_is_the_sum_over_batches_divided_once():
    policy = Constant()
    policy.train()
    found = loss_on(
        policy,
        objective({"tokens": 1.0, "labels": 0.5}),
        [batch({"tokens": 30.0, "labels": 2.0}, {"tokens": 10, "labels": 1}), batch({"tokens": 10.0}, {"tokens": 10})],
    )
    assert found.terms == {"tokens": 2.0, "labels": 2.0}
    assert found.value == 3.0 and found.n == 21 and found.counts == {"tokens": 20, "labels": 1}
    assert found.bits_per_byte(80) == pytest.approx(40 / math.log(2) / 80)
    assert policy.seen == [(False, False)] * 2 and policy.training


def test_the_policy_returns_to_the_mode_it_was_in_even_after_an_error():
    policy = Constant()
    policy.eval()
    loss_on(policy, objective({"tokens": 1.0}), [batch({"tokens": 1.0}, {"tokens": 1})])
    assert not policy.training
    policy.train()
    with pytest.raises(KeyError):
        loss_on(policy, objective({"tokens": 1.0}), [batch({"other": 1.0}, {"tokens": 1})])
    assert policy.training


def test_held_out_data_with_nothing_to_score_is_refused():
    with pytest.raises(LuthierError, match="nothing to score"):
        loss_on(Constant(), objective({"tokens": 1.0}), [batch({"tokens": 0.0}, {"tokens": 0})])


def test_the_copying_baseline_finds_what_an_exhaustive_search_finds():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(60)]
    draw = lambda: " ".join(rng.choice(words, size=rng.integers(3, 9), p=np.arange(1, 61) / 1830))  # noqa: E731
    train = [(draw(), str(i)) for i in range(200)]
    prompts = [draw() for _ in range(30)]
    df = {w: sum(w in p.split() for p, _ in train) for w in words}
    vector = lambda p: np.array([p.split().count(w) * (math.log(201 / (1 + df[w])) + 1) for w in words])  # noqa: E731
    matrix = np.stack([vector(p) / np.linalg.norm(vector(p)) for p, _ in train])
    got = nearest_copy(train, prompts)
    for prompt, answer in zip(prompts, got, strict=True):
        similar = matrix @ vector(prompt)
        assert similar[int(answer)] == pytest.approx(similar.max())


def test_the_copying_baseline_prefers_the_rare_word_and_takes_messages():
    train = [("name: The Vaults; food: Italian", "A"), ("name: The Mill; food: Italian", "B"), ("name: Zizzi; food: French", "C")]
    assert nearest_copy(train, ["name: The Mill", [{"role": "user", "content": "Zizzi"}], "unheard of"]) == ["B", "C", "A"]


def losses_of(sums_NT, counts_NT, weights):
    terms = list(weights)
    parts = tuple((dict(zip(terms, map(float, a), strict=True)), dict(zip(terms, map(int, b), strict=True))) for a, b in zip(sums_NT, counts_NT, strict=True))
    total = lambda x_NT: dict(zip(terms, x_NT.sum(0).tolist(), strict=True))  # noqa: E731
    return Losses(total(sums_NT), total(counts_NT), weights, parts)


def test_the_error_of_a_rise_is_that_of_resampling_its_batches():
    """Two terms with weights, batches of unlike size: the linearised error against a slow bootstrap of whole batches, both measurements resampled alike."""
    rng = np.random.default_rng(0)
    weights = {"tokens": 1.0, "pairs": 0.5}
    counts = rng.integers(5, 60, (24, 2))
    before = counts * rng.normal(2.0, 0.3, (24, 2))
    now = before + counts * rng.normal(0.1, 0.2, (24, 2))
    up, error = rise(losses_of(before, counts, weights), losses_of(now, counts, weights))
    w = np.array(list(weights.values()))
    value = lambda rows: float((w * ((now - before)[rows].sum(0) / counts[rows].sum(0))).sum())  # noqa: E731
    assert up == pytest.approx(value(np.arange(24)))
    slow = np.std([value(rng.integers(0, 24, 24)) for _ in range(4000)]) * (24 / 23) ** 0.5
    assert error == pytest.approx(slow, rel=0.06)
    assert rise(losses_of(before[:1], counts[:1], weights), losses_of(now[:1], counts[:1], weights))[1] == np.inf
