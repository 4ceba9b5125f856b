"""Which rows stay, how many of a category, and in which order."""

from collections import Counter

import numpy as np
import pytest

from luthier.core import LuthierError
from luthier.data.known import capped, caps_of, choose, named
from luthier.nn.slick import CATEGORIES

SET = ["Unknown", "HighlyKnown", "MaybeKnown", "Unknown", "WeaklyKnown", "Unknown", "HighlyKnown", "Unknown"]


def test_rows_are_kept_by_category_in_the_order_of_the_file():
    assert choose(SET, keep=("HighlyKnown", "MaybeKnown")) == [1, 2, 6]
    assert choose(SET) == list(range(8))


def test_known_rows_come_first_where_that_is_asked_for():
    assert choose(SET, order="known-first") == [1, 6, 2, 4, 0, 3, 5, 7]
    assert choose(SET, order="unknown-first") == [0, 3, 5, 7, 4, 2, 1, 6]


def test_a_capped_category_has_at_most_its_share_of_what_is_written_and_one_row_more_would_be_too_many():
    rng = np.random.default_rng(0)
    for _ in range(50):
        names = [CATEGORIES[i] for i in rng.integers(0, 4, 60)]
        caps = {"Unknown": float(rng.uniform(0, 0.6)), "WeaklyKnown": float(rng.uniform(0, 0.6))}
        stay = Counter(names[i] for i in choose(names, caps=caps))
        total = sum(stay.values())
        whole = Counter(names)
        for name, share in caps.items():
            assert stay[name] <= share * total + 1e-9
            assert stay[name] == whole[name] or (stay[name] + 1) > share * (total + 1) - 1e-9
        assert all(stay[c] == whole[c] for c in ("HighlyKnown", "MaybeKnown"))


def test_which_rows_of_a_capped_category_stay_is_drawn_by_the_seed():
    names = ["Unknown"] * 50 + ["HighlyKnown"] * 50
    first, again, other = (choose(names, caps={"Unknown": 0.2}, seed=s) for s in (1, 1, 2))
    assert first == again != other and len(first) == 62 and not set(range(12)) >= {i for i in first if i < 50}


def test_shares_of_one_and_nothing():
    assert capped({"Unknown": 5, "HighlyKnown": 5}, {"Unknown": 1.0}) == {"Unknown": 5, "HighlyKnown": 5}
    assert capped({"Unknown": 5, "HighlyKnown": 5}, {"Unknown": 0.0}) == {"Unknown": 0, "HighlyKnown": 5}


def test_what_cannot_be_read_or_leaves_nothing_is_one_sentence():
    assert named("unknown", "--keep") == "Unknown" and caps_of(["unknown=0.1"]) == {"Unknown": 0.1}
    for wrong in ("Unknown", "Unknown=2", "Unknown=x"):
        with pytest.raises(LuthierError, match=r"say CATEGORY=SHARE"):
            caps_of([wrong])
    with pytest.raises(LuthierError, match="'Unkown' is no category; there are HighlyKnown"):
        named("Unkown", "--keep")
    with pytest.raises(LuthierError, match="no row is left to write: the set has 4 Unknown"):
        choose(["Unknown"] * 4, keep=("HighlyKnown",))
