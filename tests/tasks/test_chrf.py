"""chrF: equal to sacrebleu, over the corpus and by the row."""

import random

import numpy as np
import pytest

from luthier.measuring.evaluate import score
from luthier.tasks.chrf import Task

sacrebleu = pytest.importorskip("sacrebleu")

WORDS = "the a cheap pub near (river) city-centre is called Vaults, . serves food £20-25 Ítalian and 5 日本".split()  # noqa: SIM905


def corpus(seed, n=40, references=3):
    rng = random.Random(seed)
    rows = [{"refs": [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(rng.randint(1, references))]} for _ in range(n)]
    return rows, [" ".join(w for w in rng.choice(r["refs"]).split() if rng.random() > 0.3) for r in rows]


@pytest.mark.parametrize("words", [0, 2])
@pytest.mark.parametrize("lowercase", [False, True])
def test_corpus_and_row_are_sacrebleus(words, lowercase):
    peer = sacrebleu.CHRF(word_order=words, lowercase=lowercase)
    task = Task(words=words, lowercase=lowercase)
    for seed in range(4):
        rows, answers = corpus(seed)
        streams = [[r["refs"][i] if i < len(r["refs"]) else None for r in rows] for i in range(3)]
        assert score(lambda _: answers, task, rows)[task.name].value == pytest.approx(peer.corpus_score(answers, streams).score, abs=1e-9)  # noqa: B023
        for row, answer in zip(rows, answers, strict=True):
            assert task.score(row, answer)[task.name] == pytest.approx(peer.sentence_score(answer, row["refs"]).score, abs=1e-9)


def test_nothing_and_something_unlike_score_zero_and_the_same_scores_100():
    for answer, want in (("", 0.0), ("xyz", 0.0), ("a cheap pub", 100.0)):
        assert Task().score({"refs": ["a cheap pub"]}, answer)["chrf"] == pytest.approx(want)
        assert Task().corpus(Task().statistics({"refs": ["a cheap pub"]}, answer)[None])["chrf"] == pytest.approx([want])
    assert np.isfinite(Task().corpus(np.zeros((2, 18)))["chrf"]).all()
