"""Text learned beside the data: its share by tokens, its order, and that it goes on where it stopped."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from luthier.core import LuthierError, Row, next_token_batch
from luthier.data.feed import Batches
from luthier.data.replay import Beside, Replayed


def rows_of(n, seed, longest, name):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest, n)
    return [Row(rng.integers(1, 100, k).astype(np.int32), np.arange(k) > 0, f"{name}{i}") for i, k in enumerate(lengths)]


DATA, TEXT = rows_of(70, 0, 60, "d"), rows_of(31, 1, 90, "t")
LONGEST = max(map(len, TEXT))


def feed(share=0.2, rank=0, size=1, micro=128, batch_tokens=300, steps=40, kl_on=None, text=TEXT):
    how = {"pad": 0, "micro_tokens": micro, "rank": rank, "size": size}
    main = Batches(DATA, next_token_batch, batch_tokens=batch_tokens, steps=steps, seed=3, **how)
    return Beside(main, Replayed(text, next_token_batch, batch_tokens=1, steps=steps, seed=5, **how), share=share, kl_on=kl_on)


def replayed(step):
    return [w for b in step if "replay" in b.units for w in b.where]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8])
def test_the_share_is_by_tokens_and_never_off_by_more_than_half_the_longest_row(share):
    f = feed(share)
    data = again = 0
    for step in f:
        data += sum(b.tokens for b in step if "replay" not in b.units)
        again += sum(b.tokens for b in step if "replay" in b.units)
        assert abs(again - share / (1 - share) * data) <= LONGEST / 2
    assert (f.read, f.tokens) == (data, again)
    assert again / (data + again) == pytest.approx(share, abs=0.01)


def test_the_data_is_that_of_the_run_without_replay_in_the_same_steps():
    alone = Batches(DATA, next_token_batch, pad=0, batch_tokens=300, micro_tokens=128, steps=40, seed=3)
    assert [[w for b in s for w in b.where] for s in alone] == [[w for b in s if "replay" not in b.units for w in b.where] for s in feed()]


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_replayed_depends_neither_on_the_ranks_nor_on_the_size_of_a_micro_batch(size):
    one = [sorted(replayed(step)) for step in feed()]
    assert [sorted(replayed(step)) for step in feed(micro=64)] == one
    ranks = [list(feed(rank=r, size=size)) for r in range(size)]
    for step, *shares in zip(one, *ranks, strict=True):
        assert sorted(w for s in shares for w in replayed(s) if not w.startswith("(nothing")) == step
        assert len({len(s) for s in shares}) == 1, "ranks must call the model equally often"


def test_every_pass_over_the_text_has_an_order_of_its_own_and_all_of_its_rows():
    f = feed(0.5)
    times = Counter(w for step in f for w in replayed(step))
    assert f.passes > 3 and set(times) == {r.where for r in TEXT}
    assert max(times.values()) - min(times.values()) <= 1
    even = [Row(np.arange(20, dtype=np.int32), np.arange(20) > 0, f"e{i}") for i in range(11)]
    order = [w for step in feed(0.2, batch_tokens=60, steps=60, text=even) for w in replayed(step)]  # one row a step at most
    first, second = order[:11], order[11:22]
    assert sorted(first) == sorted(second) == sorted(r.where for r in even) and first != second
    main = Batches(even, next_token_batch, pad=0, steps=1, batch_examples=11, seed=3)
    assert [main.order.chunk(0).row(i).where for i in range(11)] != first, "not the order of data of as many rows"


@pytest.mark.parametrize("at", [1, 7, 23])
def test_it_goes_on_from_any_step_as_if_nothing_had_happened(at):
    whole = [[(b.units, b.where) for b in step] for step in feed()]
    first = feed()
    for _ in range(at):
        next(first)
    later = feed()
    later.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [[(b.units, b.where) for b in step] for step in later] == whole[at:]


def test_other_text_another_share_or_none_at_all_is_not_the_run_that_was_interrupted():
    state = feed().state_dict()
    with pytest.raises(LuthierError, match=r"data\.replay\.share was 0\.2 .* and is 0\.3"):
        feed(0.3).load_state_dict(state)
    with pytest.raises(LuthierError, match=r"data\.replay: cannot resume: rows was 31"):
        feed(text=TEXT[:-1]).load_state_dict(state)
    with pytest.raises(LuthierError, match="something was replayed"):
        Beside(feed().main, None).load_state_dict(state)


def test_tokens_whose_divergence_is_taken_are_counted_where_it_is_taken():
    for step in feed(kl_on="replay", steps=5):
        assert all(("kl" in b.units) == ("replay" in b.units) and b.units.get("kl") == b.units.get("replay") for b in step)
    for step in feed(kl_on="trained", steps=5):
        assert all(("kl" in b.units) != ("replay" in b.units) and b.units.get("kl") == b.units.get("tokens") for b in step)


def test_a_small_step_gets_a_long_row_when_its_turn_has_come():
    f = feed(0.05, batch_tokens=60, steps=60)
    drawn = [len(replayed(step)) for step in f]
    assert set(drawn) == {0, 1} and f.tokens / (f.tokens + f.read) == pytest.approx(0.05, abs=0.02)
