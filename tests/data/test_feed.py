"""The order of training is a function of the data and the seed, and of nothing else."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from luthier.core import IGNORE, Batch, LuthierError, Row, next_token_batch
from luthier.data.feed import Batches


def rows_of(n: int, seed: int = 0, longest: int = 60) -> list[Row]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        length = int(rng.integers(3, longest))
        train = rng.random(length) < 0.5
        train[-1] = True
        made.append(Row(rng.integers(1, 100, length).astype(np.int32), train, str(i)))
    return made


ROWS = rows_of(57)


def feed(rows: list[Row] = ROWS, **how: Any) -> Batches:
    return Batches(rows, next_token_batch, **{"pad": 0, "batch_tokens": 300, "micro_tokens": 128, **how})


def names(step: list[Batch]) -> list[str]:
    return sorted(w for b in step for w in b.where)


def steps_of(f: Batches) -> list[list[str]]:
    return [names(step) for step in f]


PLANS = [
    {"epochs": 1.0},
    {"epochs": 3.0},
    {"epochs": 2.5},
    {"epochs": 0.4},
    {"steps": 40},
    {"epochs": 2.0, "batch_examples": 7},
    {"epochs": 2.0, "batch_examples": 100},
    {"epochs": 2.0, "batch_tokens": 2},  # every row is over it, the last of an epoch too
    {"epochs": 3.0, "batch_tokens": 100_000},
    {"steps": 3, "batch_tokens": 100_000},
    {"epochs": 2.0, "batch_tokens": 61},
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_number_of_steps_is_known_in_advance(plan: dict) -> None:
    f = feed(**plan)
    assert len(steps_of(f)) == f.steps


@pytest.mark.parametrize("plan", [p for p in PLANS if "steps" not in p], ids=str)
def test_epochs_hold_every_row_once_each(plan: dict) -> None:
    seen = [w for step in steps_of(feed(**plan)) for w in step]
    counts = np.bincount([int(w) for w in seen], minlength=len(ROWS))
    assert len(seen) == round(plan["epochs"] * len(ROWS))
    assert counts.min() >= int(plan["epochs"]) and counts.max() <= int(np.ceil(plan["epochs"]))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_step_is_full_and_never_over_its_tokens(plan: dict) -> None:
    f = feed(**plan)
    lengths = {r.where: len(r) for r in ROWS}
    sizes = [[lengths[w] for w in step] for step in steps_of(f)]
    assert all(sizes)
    if "batch_examples" in plan:
        assert all(len(s) == plan["batch_examples"] for s in sizes[:-1])
    else:
        budget = f.batch_tokens
        assert all(sum(s) <= budget or len(s) == 1 for s in sizes)
        assert all(sum(s) > budget - 60 for s in sizes[:-1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_micro_batch_changes_nothing_but_the_cut(plan: dict, packed: bool) -> None:
    expected = steps_of(feed(**plan, micro_tokens=1_000_000))
    for micro in (1, 64, 200):
        got = list(feed(**plan, micro_tokens=micro, packed=packed))
        assert [names(s) for s in got] == expected
        for batch in (b for s in got for b in s):
            lengths = batch.segments.length
            positions = int(lengths.sum() if packed else lengths.max() * len(lengths))  # the collator's rounding up of widths aside
            assert positions <= micro or len(lengths) == 1


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_feed_goes_on_from_any_step_as_if_nothing_had_happened(plan: dict) -> None:
    whole = list(feed(**plan))
    for stop in range(len(whole)):
        f = feed(**plan)
        for _ in range(stop):
            next(f)
        state = f.state_dict()
        again = feed(**plan)
        again.load_state_dict(state)
        rest = list(again)
        assert len(rest) == len(whole) - stop
        for a, b in zip(rest, whole[stop:], strict=True):
            assert all(torch.equal(x.ids, y.ids) and torch.equal(x.targets, y.targets) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]


def test_epochs_differ_from_one_another_and_seeds_too() -> None:
    def order(seed: int, epochs: float = 2.0) -> list[list[str]]:
        return steps_of(feed(seed=seed, epochs=epochs, batch_examples=5))

    one = feed(batch_examples=19, epochs=2.0)  # 3 steps an epoch
    steps = steps_of(one)
    assert steps[:3] != steps[3:]
    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_ranks_share_a_step_without_overlap_in_equally_many_micro_batches(plan: dict, size: int) -> None:
    alone = steps_of(feed(**plan))
    ranks = [list(feed(**plan, rank=r, size=size)) for r in range(size)]
    for step, expected in enumerate(alone):
        shares = [r[step] for r in ranks]
        assert len({len(s) for s in shares}) == 1 and len(shares[0]) > 0
        real = [w for s in shares for b in s for w in b.where if "fewer rows" not in w]
        assert sorted(real) == expected
        for share in shares:  # a rank runs an empty row only where it has fewer rows than micro-batches to run
            empty = sum("fewer rows" in w for b in share for w in b.where)
            assert not empty or all(len(b.where) == 1 for b in share)


def test_a_rank_without_rows_runs_one_that_counts_nothing() -> None:
    f = feed(batch_examples=1, rank=1, size=2)
    (batch,) = next(f)
    assert batch.units == {"tokens": 0} and bool((batch.targets == IGNORE).all())


def visits(f: Batches, steps: int) -> list[set[tuple[int, ...]]]:
    seen: list[set[tuple[int, ...]]] = []

    def collate(rows: list[Row], **how: Any) -> Batch:
        assert all(ROWS[r.visit[2]].where == r.where for r in rows if r.visit)
        seen[-1] |= {r.visit for r in rows if r.visit}  # none: a rank without rows
        return next_token_batch(rows, **how)

    f.collate = collate
    for _ in range(steps):
        seen.append(set())
        next(f)
    return seen


def test_a_row_knows_its_visit_whatever_the_machine() -> None:
    """What is hidden from a row is drawn by its visit: (seed, epoch, row)."""
    whole = visits(feed(epochs=3.0, seed=5), 15)
    assert set().union(*whole) >= {(5, 0, i) for i in range(57)} | {(5, 1, i) for i in range(57)}
    ranks = [visits(feed(epochs=3.0, seed=5, size=2, rank=r, micro_tokens=64), 15) for r in (0, 1)]
    assert [a | b for a, b in zip(*ranks, strict=True)] == whole
    later = feed(epochs=3.0, seed=5)
    state = feed(epochs=3.0, seed=5)
    for _ in range(9):
        next(state)
    later.load_state_dict(state.state_dict())
    assert visits(later, 6) == whole[9:]


def test_a_source_counts_as_much_as_an_answer() -> None:
    rng = np.random.default_rng(0)
    rows = [Row(np.ones(n, np.int32), np.ones(n, bool), str(i), {"source": np.ones(m, np.int32)}) for i, (n, m) in enumerate(rng.integers(2, 50, (40, 2)))]
    f = feed(rows, epochs=1.0, batch_tokens=400, micro_tokens=200)
    total = 0
    for step in f:
        tokens = sum(b.tokens for b in step)
        total += tokens
        assert tokens <= 400
        for b in step:
            assert b.source is not None
            assert len(b.where) * int(b.segments.length.max() + b.source.segments.length.max()) <= 200
    assert total == sum(len(r) + len(r.extras["source"]) for r in rows)


def test_packed_examples_keep_their_own_positions_and_targets() -> None:
    f = feed(packed=True, micro_tokens=300)
    for batch in next(f):
        assert batch.ids.shape[0] == 1
        positions, owner = batch.segments.positions(batch.shape)[0], batch.segments.example(batch.shape)[0]
        for s, where in enumerate(batch.where):
            row, here = ROWS[int(where)], owner == s
            assert batch.ids[0][here].tolist() == row.ids.tolist()
            assert positions[here].tolist() == list(range(len(row)))
            assert batch.targets is not None
            wanted = [int(i) if t else IGNORE for i, t in zip(row.ids[1:], row.train[1:], strict=True)] + [IGNORE]
            assert batch.targets[0][here].tolist() == wanted


def test_other_data_cannot_be_resumed() -> None:
    state = feed().state_dict()
    with pytest.raises(LuthierError, match="cannot resume: rows was 57 .* and is 50 now"):
        feed(ROWS[:50]).load_state_dict(state)
    with pytest.raises(LuthierError, match="batch_tokens"):
        feed(batch_tokens=301).load_state_dict(state)
    with pytest.raises(LuthierError, match="no row to train on"):
        feed([])


def test_a_million_rows_are_planned_in_seconds() -> None:
    ids, train = np.ones(400, dtype=np.int32), np.ones(400, dtype=bool)
    rows = [Row(ids[:n], train[:n]) for n in np.random.default_rng(0).integers(5, 400, 1_000_000).tolist()]
    start = time.perf_counter()
    f = feed(rows, batch_tokens=8192, micro_tokens=8192, epochs=2.0)
    for _ in range(20):
        next(f)
    assert time.perf_counter() - start < 10
    assert f.steps > 40_000


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_that_begin_alike_lie_side_by_side_and_every_row_is_dealt_once(size: int) -> None:
    begin = [np.arange(b, b + 20, dtype=np.int32) for b in (60, 5, 40)]
    rows = [Row(np.concatenate([begin[i % 3], np.array([i + 3] * (1 + i % 4), dtype=np.int32)]), np.arange(21 + i % 4) >= 20, str(i)) for i in range(24)]
    dealt = [next(feed(rows, packed=True, batch_examples=24, micro_tokens=96, epochs=1.0, rank=rank, size=size, together=True)) for rank in range(size)]
    assert sorted(w for step in dealt for b in step for w in b.where if w.isdigit()) == sorted(map(str, range(24)))
    prompts = [[int(w) % 3 for b in step for w in b.where if w.isdigit()] for step in dealt]
    for order in prompts:
        assert sum(a != b for a, b in pairwise(order)) == len(set(order)) - 1  # each prompt in one stretch
    assert all(len(b.ids[0]) <= 96 + 32 for step in dealt for b in step)
    assert max(b.segments.alike[0].tokens for step in dealt for b in step if b.segments.alike) == 20
