"""Epochs whose parts have counts of their own."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from luthier.core import Row, next_token_batch
from luthier.data.balance import Parts, by_label, difficulty, shares
from luthier.data.feed import Batches
from luthier.data.order import Epochs

LABELS = [0] * 60 + [1] * 25 + [2] * 7


def drawn(parts, epoch=0):
    return parts.order(np.random.default_rng([0, epoch]))


@pytest.mark.parametrize("balance,wanted", [(1.0, [31, 31, 30]), (0.5, shares([60**0.5, 5.0, 7**0.5], 92))])
def test_labels_are_drawn_by_the_power_of_their_counts(balance, wanted):
    found = Counter(LABELS[i] for i in drawn(by_label(LABELS, balance)))
    assert [found[k] for k in range(3)] == wanted and sum(wanted) == len(LABELS)


def test_rows_of_a_part_are_drawn_equally_often_but_for_one():
    times = Counter(drawn(by_label(LABELS, 1.0)).tolist())
    assert {times[i] for i in range(85, 92)} == {4, 5}  # 30 draws of 7 rows
    assert {times[i] for i in range(60)} == {0, 1}  # 31 draws of 60


def test_every_epoch_chooses_anew_and_the_same_seed_chooses_the_same():
    parts = by_label(LABELS, 1.0)
    assert np.array_equal(drawn(parts), drawn(parts)) and not np.array_equal(np.sort(drawn(parts)), np.sort(drawn(parts, 1)))
    seen = set().union(*(drawn(parts, e).tolist() for e in range(12)))
    assert seen == set(range(92)), "rows that one epoch leaves out come in another"


def test_shares_add_up():
    assert shares([1, 1, 1], 10) == [4, 3, 3] and shares([3, 1], 8) == [6, 2] and sum(shares([0.1, 0.25, 0.7], 997)) == 997


def test_a_feed_draws_its_epochs_so_and_goes_on_from_the_middle():
    rows = [Row(np.arange(3 + i % 5, dtype=np.int32), np.arange(3 + i % 5) > 0, str(i)) for i in range(92)]

    def feed(**more):
        return Batches(rows, next_token_batch, pad=0, batch_tokens=50, epochs=2, seed=1, order=Epochs(rows, 1, by_label(LABELS, 1.0).order), **more)

    whole = [[b.where for b in step] for step in feed()]
    assert Counter(LABELS[int(w)] for step in whole for b in step for w in b) == {0: 62, 1: 62, 2: 60}
    later, first = feed(), feed()
    for _ in range(7):
        next(first)
    later.load_state_dict(first.state_dict())
    assert [[b.where for b in step] for step in later] == whole[7:]
    ranks = [[w for step in feed(rank=r, size=2) for b in step for w in b.where] for r in range(2)]
    assert sorted(ranks[0] + ranks[1]) == sorted(w for step in whole for b in step for w in b)


def test_rows_are_told_apart_by_their_loss():
    loss = np.array([0.01, 0.05, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7, 2.8, 3.0, 9.0])
    found = difficulty(loss, 50_000, hardest=0.2, trivial=0.1, broken=3.0)
    q1, q3 = np.quantile(loss, [0.25, 0.75])
    assert found.bounds["broken"] == pytest.approx(q3 + 3 * (q3 - q1))
    assert np.flatnonzero(found.trivial_N).tolist() == [0, 1] and np.flatnonzero(found.broken_N).tolist() == [12]
    assert np.flatnonzero(found.hard_N).tolist() == [10, 11] and found.bounds["hard"] == 2.8  # a fifth of ten
    assert np.flatnonzero(difficulty(loss, 17, hardest=0.2, trivial=0.1, broken=100.0).broken_N).tolist() == [11, 12], (
        "worse than chance over 17 tokens: log 17 = 2.83"
    )


def test_an_epoch_has_the_asked_share_of_hard_rows():
    loss = np.linspace(1.0, 3.0, 100)
    found = difficulty(loss, 50_000, hardest=0.2, trivial=0.1, broken=3.0)
    times = Counter(drawn(found.parts(0.5)).tolist())
    assert sum(times.values()) == 100 and sum(times[i] for i in range(80, 100)) == 50
    assert {times[i] for i in range(80, 100)} == {2, 3} and max(times[i] for i in range(80)) == 1
    assert isinstance(found.parts(1.0), Parts) and set(drawn(found.parts(1.0)).tolist()) == set(range(80, 100))
