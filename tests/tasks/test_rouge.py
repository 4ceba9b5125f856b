"""ROUGE, against slow versions of Lin's definitions (2004, sections 2 and 3)."""

import random
from functools import cache

import pytest

from luthier.core import LuthierError
from luthier.tasks.rouge import Task

pytest.importorskip("rouge_score")

WORDS = "the cat sat on a mat by an open door and slept 7 hours".split()  # noqa: SIM905


def f(shared, said, wanted):
    return 2 * shared / (said + wanted) if shared else 0.0


def slow(answer, ref):
    out = {}
    for n, name in ((1, "rouge1"), (2, "rouge2")):
        a, r = ([tuple(t[i : i + n]) for i in range(len(t) - n + 1)] for t in (answer, ref))
        out[name] = f(sum(min(a.count(g), r.count(g)) for g in set(a)), len(a), len(r))

    @cache
    def longest(i, j):
        if i == len(answer) or j == len(ref):
            return 0
        return 1 + longest(i + 1, j + 1) if answer[i] == ref[j] else max(longest(i + 1, j), longest(i, j + 1))

    out["rougeL"] = f(longest(0, 0), len(answer), len(ref))
    return out


@pytest.mark.parametrize("seed", range(10))
def test_scores_are_lins_and_the_best_reference_counts(seed):
    rng = random.Random(seed)
    answer, *refs = (rng.choices(WORDS, k=rng.randint(1, 10)) for _ in range(3))
    got = Task().score({"refs": [" ".join(r) for r in refs]}, " ".join(answer).capitalize() + ".")
    each = [slow(tuple(answer), tuple(r)) for r in refs]
    assert got == {k: pytest.approx(max(e[k] for e in each)) for k in ("rouge1", "rouge2", "rougeL")}


def test_stems_count_as_one_word_where_that_is_asked_for():
    assert Task().score({"refs": ["repaired bridges"]}, "repairing bridge")["rouge1"] == 0.0
    assert Task(stem=True).score({"refs": ["repaired bridges"]}, "repairing bridge")["rouge1"] == 1.0


def test_a_script_that_the_usual_words_do_not_see_is_said_and_not_scored_zero():
    row = {"refs": ["кошка сидит"]}
    with pytest.raises(LuthierError, match="words=any"):
        Task().score(row, "кошка сидит")
    assert Task(words="any").score(row, "Кошка спит")["rouge1"] == pytest.approx(0.5)
    assert Task(words="any").score({"refs": ["猫が好き"]}, "犬が好き")["rouge1"] == pytest.approx(0.75)
    with pytest.raises(LuthierError, match="stem"):
        Task(words="any", stem=True).score(row, "x")
