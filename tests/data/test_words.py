"""Words as numbers, against slow versions."""

import numpy as np

from luthier.data.quality import Seen
from luthier.data.quality.repeats import BANDS, DEEP, KEPT, jaccard, same, shingles
from luthier.data.shapes import Document
from luthier.data.words import grams, number, numbers, sentences, short, words


def test_words_are_lower_case_and_characters_of_scripts_without_spaces_stand_alone():
    assert words("It's 5 o'clock: GO_now!") == ["it", "s", "5", "o", "clock", "go", "now"]
    assert words("Tokyo東京です") == ["tokyo", "東", "京", "で", "す"]


def test_runs_of_words_are_equal_exactly_where_the_words_are():
    text = ["a", "b", "c", "a", "b", "c", "a", "b", "d"]
    found = grams(numbers(text), 3)
    slow = [" ".join(text[i : i + 3]) for i in range(len(text) - 2)]
    assert len(found) == 7
    assert all((found[i] == found[j]) == (slow[i] == slow[j]) for i in range(7) for j in range(7))
    assert len(grams(numbers(["a", "b"]), 3)) == 1 and len(grams(numbers([]), 3)) == 0
    assert grams(numbers(["a", "b"]), 2)[0] != grams(numbers(["b", "a"]), 2)[0]


def test_the_same_words_have_the_same_numbers_in_every_process():
    assert numbers([""]).tolist() == [number("")] == [0x2D06800538D394C2]  # XXH3 of nothing, as its authors publish it


def test_similarity_is_that_of_the_sets_and_close_to_it_for_long_texts():
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 2**63, 6000, dtype=np.uint64)
    for n, shift in ((40, 10), (400, 30), (3000, 300)):
        a, b = np.unique(pool[:n]), np.unique(pool[shift : n + shift])
        true = len(set(a.tolist()) & set(b.tolist())) / len(set(a.tolist()) | set(b.tolist()))
        assert abs(jaccard(a[:KEPT], b[:KEPT]) - true) < (1e-9 if n <= KEPT else 0.05)


def test_banding_proposes_the_pairs_it_should():
    from luthier.data.quality.repeats import Repeats

    bands = object.__new__(Repeats)
    rng = np.random.default_rng(1)
    for alike, least, most in ((0.85, 0.97, 1.0), (0.3, 0.0, 0.08)):
        bands.bands, bands.waiting = [], []
        for _ in range(200):
            pool = rng.integers(0, 2**63, 200, dtype=np.uint64)
            common = round(2 * 80 * alike / (1 + alike))  # of 80 each, so that common / (160 - common) is what is asked
            bands.waiting += [np.unique(pool[:80]), np.unique(pool[80 - common : 160 - common])]
        bands._sketch()
        found = bands.bands[0].reshape(200, 2, BANDS)
        proposed = (found[:, 0] == found[:, 1]).any(axis=1).mean()
        assert least <= proposed <= most, (alike, proposed, 1 - (1 - alike**DEEP) ** BANDS)


def test_the_first_of_equal_keys_stays():
    later, firsts = same(np.array([7, 3, 7, 9, 3, 7], dtype=np.uint64))
    assert later == [(2, 0), (4, 1), (5, 0)] and firsts.tolist() == [0, 1, 3]


def test_shingles_are_a_set():
    row = Seen(0, "train", Document("x"), "", "", ("one two three one two three",))
    assert len(shingles(row)) == 3


def test_sentences_and_short_lines():
    assert sentences("One. Two! Three?\n- four\n\n五。六") == ["One.", "Two!", "Three?", "- four", "五。", "六"]
    assert short("a\n b\x07") == "a b\\u0007" and len(short("x" * 999, 100)) < 110
