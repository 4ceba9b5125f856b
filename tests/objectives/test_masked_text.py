"""What is hidden, how often, by what, and that it can be put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import small
import tiny
from luthier.core import IGNORE, Incompatible, Row
from luthier.nn.corruption import choose_spans, hide_spans
from luthier.objectives.masked_text import Objective
from luthier.policy import Policy
from small import BY_MASK, BY_SENTINEL, USUAL, hidden_rows


def masked(batch, some):
    """(ids given, ids true, where hidden) of every row of a padded batch."""
    for b, row in enumerate(some):
        yield batch.ids[b, : len(row)].numpy(), row.ids, (batch.targets[b, : len(row)] != IGNORE).numpy()


def test_fifteen_percent_are_hidden_and_eight_in_ten_of_these_are_masked():
    some = hidden_rows(BY_MASK, n=400, length=100)
    batch = Objective().collate(some, pad=0, packed=False)
    hidden = mask = random = kept = 0
    for given, true, where in masked(batch, some):
        assert where.sum() == 15 and not where[0] and not where[-1]
        assert (given[~where] == true[~where]).all()
        hidden += where.sum()
        mask += (given[where] == 4).sum()
        kept += (given[where] == true[where]).sum()
        other = given[where][(given[where] != 4) & (given[where] != true[where])]
        random += len(other)
        assert np.isin(other, USUAL).all()
    assert batch.units == {"tokens": hidden} and hidden == 6000
    # standard errors: 0.8 +- 0.005, 0.1 +- 0.004; a random token is the true one in one of 45
    assert mask / hidden == pytest.approx(0.8, abs=0.02)
    assert random / hidden == pytest.approx(0.1 * 44 / 45, abs=0.015)
    assert kept / hidden == pytest.approx(0.1 + 0.1 / 45, abs=0.015)
    assert (batch.targets[batch.targets != IGNORE].numpy() == np.concatenate([t[w] for _, t, w in masked(batch, some)])).all()


def test_every_position_is_hidden_equally_often():
    times = np.zeros(20)
    for visit in range(600):
        batch = Objective().collate(hidden_rows(BY_MASK, n=1, length=20, visit=(0, visit)), pad=0, packed=False)
        times += (batch.targets[0, 1:21] != IGNORE).numpy()
    assert times.sum() == 600 * 3 and times.min() > 55 and times.max() < 130  # 90 each, standard deviation 8.7


@pytest.mark.parametrize("hiding", [BY_MASK, BY_SENTINEL])
def test_what_is_hidden_is_a_function_of_seed_epoch_and_row_alone(hiding):
    goal = Objective()
    both = lambda visit, n=6: goal.collate(hidden_rows(hiding, n=n, visit=visit), pad=0, packed=False)  # noqa: E731
    seen = lambda b: b.ids if b.source is None else b.source.ids  # noqa: E731
    assert torch.equal(seen(both((7, 2))), seen(both((7, 2))))
    assert not torch.equal(seen(both((7, 2))), seen(both((7, 3)))) and not torch.equal(seen(both((7, 2))), seen(both((8, 2))))
    alone = goal.collate(hidden_rows(hiding, visit=(7, 2))[3:4], pad=0, packed=False)  # its batch-mates do not matter
    width = (alone.source or alone).segments.length[0]
    assert torch.equal(seen(alone)[0, :width], seen(both((7, 2)))[3, :width])
    assert torch.equal(seen(both(())), seen(both(())))  # in evaluation it is fixed


def restored(source, answer, sentinels):
    """The text that a source and its answer come from, found the slow way."""
    spans, inside = {}, None
    for token in answer:
        if token in sentinels:
            inside = spans.setdefault(token, [])
        else:
            inside.append(token)
    return [t for token in source for t in spans.get(token, [token])]


@pytest.mark.parametrize("n", [2, 3, 5, 17, 30, 200])
def test_spans_put_back_give_the_text(n):
    rng = np.random.default_rng(n)
    for _ in range(50):
        ids = rng.integers(5, 40, n)
        hidden = choose_spans(rng, n, 0.15, 3.0, most=9)
        source, answer = hide_spans(ids, hidden, BY_SENTINEL.sentinels)
        spans = int((np.diff(np.concatenate([[0], hidden])) == 1).sum())
        assert restored(source, answer, set(BY_SENTINEL.sentinels)) == ids.tolist()
        assert hidden.sum() == min(max(round(0.15 * n), 1), n - 1) and spans <= 9
        used = list(BY_SENTINEL.sentinels[: spans + 1])
        assert [t for t in answer if t > 39] == used and answer[-1] == used[-1] and answer[0] == used[0]
        assert [t for t in source if t > 39] == used[:-1]


def test_the_figure_of_the_paper():
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    ids = np.arange(len(words)) + 100
    hidden = np.array([w in ("for", "inviting", "last") for w in words])
    source, answer = hide_spans(ids, hidden, (9, 8, 7))
    assert source.tolist() == [100, 101, 9, 104, 105, 106, 107, 8, 109]
    assert answer.tolist() == [9, 102, 103, 8, 108, 7]


def test_spans_are_three_long_on_average_and_may_lie_anywhere():
    rng = np.random.default_rng(0)
    lengths, ends, times = [], 0, np.zeros(100)
    for _ in range(1000):
        hidden = choose_spans(rng, 100, 0.15, 3.0, most=99)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden, [0]])))
        lengths += (edges[1::2] - edges[::2]).tolist()
        ends += hidden[0] + hidden[-1]
        times += hidden
    assert np.mean(lengths) == 3.0 and max(lengths) > 6
    assert 40 < ends < 160  # each end is a gap of 86 shared by 6: 5.8 % of the time
    assert times[5:-5].min() > 100 and times[5:-5].max() < 210  # 150 each


def test_a_text_with_too_few_sentinels_has_longer_spans():
    hidden = choose_spans(np.random.default_rng(0), 400, 0.15, 3.0, most=4)
    assert hidden.sum() == 60 and (np.diff(np.concatenate([[0], hidden])) == 1).sum() == 4


def test_the_batch_of_an_encoder_decoder_is_source_and_answer():
    batch = Objective().collate(hidden_rows(BY_SENTINEL, n=3), pad=0, packed=False)
    for s in range(3):
        source = batch.source.ids[s, : batch.source.segments.length[s]].tolist()
        answer = batch.ids[s, : batch.segments.length[s]].tolist()
        assert source[-1] == 2 and answer[0] == 0 and answer[-1] == 2
        assert restored(source[:-1], answer[1:-1], set(BY_SENTINEL.sentinels)) == hidden_rows(BY_SENTINEL, n=3)[s].ids.tolist()
        assert batch.targets[s, : len(answer) - 1].tolist() == answer[1:]
    assert batch.units["tokens"] == int((batch.targets != IGNORE).sum()) and batch.tokens > 3 * 32


@pytest.mark.parametrize(("family", "hiding"), [("bert", BY_MASK), ("t5", BY_SENTINEL)])
def test_packed_or_in_parts_the_sum_is_the_same(family, hiding):
    base, goal = tiny.base(family), Objective()
    policy, some = Policy(base), hidden_rows(hiding, n=6, visit=(0, 1))
    with torch.no_grad():
        whole = goal.loss(policy, goal.collate(some, pad=0, packed=False)).sums["tokens"]
        parts = sum(goal.loss(policy, goal.collate(some[i : i + 2], pad=0, packed=base.packs)).sums["tokens"] for i in (0, 2, 4))
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-5)


def test_a_rank_without_rows_trains_nothing():
    for hiding in (BY_MASK, BY_SENTINEL):
        row = hidden_rows(hiding, n=1)[0]
        batch = Objective().collate([Row(row.ids, np.zeros(len(row), dtype=bool), "", row.extras)], pad=0, packed=False)
        assert batch.units == {"tokens": 0} and not bool((batch.targets != IGNORE).any())


def test_a_decoder_is_refused():
    with pytest.raises(Incompatible, match="use objective: text"):
        Objective().heads(tiny.base("llama"))


def test_the_tokenizers_sentinels_are_found_in_their_order():
    from luthier.data.codec import Codec
    from luthier.data.encode import hiding_of
    from luthier.data.rows import Form

    tokenizer = small.with_sentinels()
    hiding = hiding_of(Codec(tokenizer), Form(kind="encoder_decoder", start=0))
    assert tokenizer.convert_ids_to_tokens(list(hiding.sentinels)) == [f"<extra_id_{i}>" for i in range(small.SENTINELS)]
    assert hiding.mask is None and hiding.eos == 1 and not set(hiding.usual.tolist()) & {0, 1, *hiding.sentinels}
    hiding = hiding_of(Codec(small.wordpiece()), Form(kind="encoder"))
    assert hiding.mask == 4 and hiding.usual.min() == 5
