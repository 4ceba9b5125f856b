"""BLEU: equal to sacrebleu, over the corpus and by the row."""

import random

import numpy as np
import pytest

from luthier.core import LuthierError
from luthier.tasks.bleu import Task

sacrebleu = pytest.importorskip("sacrebleu")

WORDS = "the a cheap pub near river city centre is called Vaults , . serves food £20-25 Italian and 5".split()  # noqa: SIM905


def corpus(seed: int, n: int, references: int, noise: float) -> tuple[list[dict], list[str]]:
    """Random references, and answers that are noisy copies of one."""
    rng = random.Random(seed)
    rows, answers = [], []
    for _ in range(n):
        refs = [" ".join(rng.choices(WORDS, k=rng.randint(1, 25))) for _ in range(rng.randint(1, references))]
        rows.append({"prompt": "", "refs": refs})
        answers.append(" ".join(w for w in rng.choice(refs).split() if rng.random() > noise) + rng.choice(["", "!", " pub"]))
    return rows, answers


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("n,references,noise", [(200, 8, 0.2), (50, 1, 0.5), (3, 2, 0.9), (1, 1, 0.0)])
def test_summed_statistics_give_sacrebleus_corpus_score(n, references, noise, lowercase):
    for seed in range(5):
        rows, answers = corpus(seed, n, references, noise)
        task = Task(lowercase=lowercase)
        sums = sum(task.statistics(r, a) for r, a in zip(rows, answers, strict=True))
        streams = [[r["refs"][i] if i < len(r["refs"]) else None for r in rows] for i in range(max(len(r["refs"]) for r in rows))]
        expected = sacrebleu.corpus_bleu(answers, streams, lowercase=lowercase).score
        assert task.corpus(np.stack([sums]))["bleu"][0] == pytest.approx(expected, abs=1e-9)


def test_answers_without_any_match_or_any_word_score_zero_as_sacrebleu_says():
    for answer in ("", "nothing of it", "."):
        sums = Task().statistics({"refs": ["the cheap pub"]}, answer)[None]
        assert Task().corpus(sums)["bleu"][0] == pytest.approx(sacrebleu.corpus_bleu([answer], [["the cheap pub"]]).score, abs=1e-9)


def test_a_completion_is_the_reference_where_there_are_no_refs():
    assert Task().score({"prompt": "x", "completion": "a cheap pub near it"}, "a cheap pub near it")["bleu"] == pytest.approx(100)


def test_a_row_without_references_is_refused_by_what_it_lacks():
    with pytest.raises(LuthierError, match="refs"):
        Task().score({"prompt": "x"}, "y")
