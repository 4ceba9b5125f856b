"""How often each source of a mixture is drawn, and that its order is a function of the seed and the place alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from luthier.core import Batch, LuthierError, Row, next_token_batch
from luthier.data.feed import Batches
from luthier.data.mixing import CHUNK, Mixture, Rows, rates

SIZES = {"e2e": 42_061, "alpaca": 18_659, "gsm8k": 7_473, "dolly": 2_996, "task": 200}
WEIGHTS = [1.0, 2.0, 3.0, 3.5, 0.5]
RULES: list[tuple[str, dict[str, Any]]] = [
    ("proportional", {}),
    ("proportional", {"cap": 5_000}),
    ("temperature", {"temperature": 2.0}),
    ("temperature", {"temperature": 4.0, "cap": 5_000}),
    ("equal", {}),
    ("weights", {"weights": WEIGHTS}),
]


def by_hand(rule: str, *, temperature: float = 1.0, cap: float = float("inf"), weights: Any = None) -> list[float]:
    """The formulas of section 3.5.2, one source at a time."""
    sizes = list(SIZES.values())
    if rule == "equal":
        return [1 / len(sizes) for _ in sizes]
    if rule == "weights":
        return [w / sum(weights) for w in weights]
    r = [min(e, cap) / sum(min(n, cap) for n in sizes) for e in sizes]
    if rule == "temperature":
        r = [x ** (1 / temperature) for x in r]
    return [x / sum(r) for x in r]


class Counted:
    """A source of which only the size matters."""

    tokens = 1.0

    def __init__(self, name: str, size: int):
        self.name, self.size = name, size

    def epochs(self, n: int) -> float:
        return n / self.size


def mixture_of(rule: str, how: dict[str, Any], seed: int = 0) -> Mixture:
    return Mixture([Counted(n, s) for n, s in SIZES.items()], rates(list(SIZES.values()), rule, **how), seed)  # type: ignore[misc]


@pytest.mark.parametrize(("rule", "how"), RULES, ids=str)
def test_rates_are_those_of_the_formulas(rule: str, how: dict[str, Any]) -> None:
    np.testing.assert_allclose(rates(list(SIZES.values()), rule, **how), by_hand(rule, **how), rtol=1e-12)


def test_the_rules_differ_and_temperature_goes_from_proportional_to_equal() -> None:
    all_of_them = [by_hand(rule, **how) for rule, how in RULES]
    assert all(np.abs(np.subtract(a, b)).max() > 0.01 for i, a in enumerate(all_of_them) for b in all_of_them[:i])
    sizes = list(SIZES.values())
    np.testing.assert_allclose(rates(sizes, "temperature", temperature=1.0), rates(sizes, "proportional"))
    np.testing.assert_allclose(rates(sizes, "temperature", temperature=1e6), rates(sizes, "equal"), rtol=1e-4)


@pytest.mark.parametrize(("rule", "how"), RULES, ids=str)
def test_what_is_drawn_is_the_rate_within_sampling_error(rule: str, how: dict[str, Any]) -> None:
    """Draws repel one another, so the counts are much nearer than the standard deviation of independent draws: within a few rows."""
    rate = np.array(by_hand(rule, **how))
    for seed in range(3):
        for n in (500, 5_000, 70_000):
            counts = mixture_of(rule, how, seed).drawn(*divmod(n, CHUNK))
            assert counts.sum() == n
            assert (np.abs(counts - n * rate) < 3 * np.sqrt(n * rate * (1 - rate)) + 1).all()
            assert (np.abs(counts - n * rate) < 6).all()


def test_over_seeds_every_single_draw_has_the_rate() -> None:
    rate = np.array(by_hand("temperature", temperature=2.0))
    seeds = 4_000
    for place in (0, 1, 777):
        taken = Counter(int(mixture_of("temperature", {"temperature": 2.0}, s).sources_of(place, 1)[0]) for s in range(seeds))
        counts = np.array([taken[m] for m in range(len(rate))])
        assert (np.abs(counts - seeds * rate) < 4 * np.sqrt(seeds * rate * (1 - rate))).all(), place


# --- rows -----------------------------------------------------------------------------------------------------------


def rows_of(name: str, n: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        length = int(rng.integers(3, 40))
        out.append(Row(rng.integers(1, 90, length).astype(np.int32), np.arange(length) > 0, f"{name}:{i}"))
    return out


SOURCES = {"big": rows_of("big", 300, 0), "middle": rows_of("middle", 90, 1), "small": rows_of("small", 7, 2)}


def mixed(seed: int = 0, rate: Any = (0.6, 0.3, 0.1), epoch_rows: int | None = 397) -> Mixture:
    sources, first = [], 0
    for name, rows in SOURCES.items():
        sources.append(Rows(name, rows, seed, first=first))
        first += len(rows)
    return Mixture(sources, np.array(rate), seed, epoch_rows=epoch_rows)


def feed(seed: int = 0, **how: Any) -> Batches:
    order = how.pop("order", None) or mixed(seed)
    return Batches([], next_token_batch, **{"pad": 0, "order": order, "batch_tokens": 300, "micro_tokens": 128, "seed": seed, **how})


def names(step: list[Batch]) -> list[str]:
    return sorted(w for b in step for w in b.where)


def test_a_source_is_drawn_without_replacement_within_each_of_its_epochs() -> None:
    drawn: dict[str, list[tuple[int, str]]] = {name: [] for name in SOURCES}
    order = mixed()
    for number in range(3):
        chunk = order.chunk(number)
        for place in range(len(chunk)):
            row = chunk.row(place)
            drawn[row.where.split(":")[0]].append((int(chunk.visits_N2[place, 0]), row.where))
    for name, seen in drawn.items():
        size = len(SOURCES[name])
        assert [e for e, _ in seen] == [i // size for i in range(len(seen))]
        whole = [{w for e, w in seen if e == epoch} for epoch in range(len(seen) // size)]
        assert all(len(w) == size for w in whole)
        orders = [[w for e, w in seen if e == epoch] for epoch in range(len(whole))]
        assert len(orders) < 2 or orders[0] != orders[1]


def test_row_numbers_tell_the_rows_of_all_sources_apart() -> None:
    chunk, everything = mixed().chunk(0), [r for rows in SOURCES.values() for r in rows]
    assert all(everything[int(n)].where == chunk.row(i).where for i, n in enumerate(chunk.visits_N2[:, 1]))


def test_an_epoch_of_the_mixture_has_as_many_draws_as_was_said() -> None:
    f = feed(epochs=2.5)
    steps = [names(s) for s in f]
    assert len(steps) == f.steps and sum(map(len, steps)) == round(2.5 * 397)


@pytest.mark.parametrize("how", [{"epochs": 6.0}, {"steps": 120}, {"steps": 60, "batch_examples": 25}], ids=str)
def test_a_mixture_goes_on_from_any_step_as_if_nothing_had_happened(how: dict[str, Any]) -> None:
    """More than 1,024 draws, so that the places where one chunk ends are among the steps."""
    whole = list(feed(**how))
    assert sum(len(names(s)) for s in whole) > CHUNK
    for stop in (0, 1, 17, len(whole) // 2, len(whole) - 1):
        f = feed(**how)
        for _ in range(stop):
            next(f)
        state = f.state_dict()
        again = feed(**how)
        again.load_state_dict(state)
        rest = list(again)
        assert len(rest) == len(whole) - stop
        for a, b in zip(rest, whole[stop:], strict=True):
            assert all(torch.equal(x.ids, y.ids) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("size", [2, 3])
def test_neither_ranks_nor_micro_batches_change_the_order(size: int) -> None:
    expected = [names(s) for s in feed(steps=60)]
    assert [names(s) for s in feed(steps=60, micro_tokens=7)] == expected
    ranks = [list(feed(steps=60, rank=r, size=size)) for r in range(size)]
    together = [sorted(w for r in ranks for w in names(r[i]) if "fewer rows" not in w) for i in range(60)]
    assert together == expected


def test_seeds_give_other_orders_and_a_source_keeps_its_own_when_another_is_added() -> None:
    assert [names(s) for s in feed(0, steps=9)] != [names(s) for s in feed(1, steps=9)]
    alone = Rows("small", SOURCES["small"], 0).draw(0, 21)
    among = mixed().sources[2].draw(0, 21)
    assert [alone.row(i).where for i in range(21)] == [among.row(i).where for i in range(21)]


def test_other_rates_or_sources_are_not_resumed() -> None:
    state = feed(steps=9).state_dict()
    for other in (mixed(rate=(0.5, 0.4, 0.1)), Mixture(mixed().sources[:2], np.array([0.5, 0.5]), 0)):
        with pytest.raises(LuthierError, match="cannot resume: mixture"):
            feed(steps=9, order=other).load_state_dict(state)


def test_every_epoch_of_a_source_takes_the_next_template_of_each_example() -> None:
    rows = [Row(np.arange(4, dtype=np.int32), np.ones(4, bool), f"f:{i}", {"t": t}) for i in range(50) for t in range(3) if not (i == 4 and t == 1)]
    source = Rows("s", rows, 5, variants=True)
    assert source.size == 50
    drawn = source.draw(0, 150)
    seen: dict[str, list[int]] = {}
    for i in range(150):
        seen.setdefault(drawn.row(i).where, []).append(int(drawn.row(i).extras["t"]))
    assert all(sorted(ts) == [0, 1, 2] for where, ts in seen.items() if where != "f:4")
    assert sorted(set(seen["f:4"])) == [0, 2]  # one of its rows was dropped
    first = Counter(ts[0] for ts in seen.values())
    assert min(first.values()) > 5  # they do not all begin with the same


def test_shares_tell_rows_tokens_draws_and_epochs() -> None:
    told = mixed().shares(0, 500)
    assert sum(s.drawn for s in told.values()) == 500 and abs(sum(s.tokens for s in told.values()) - 1) < 1e-9
    assert told["small"].epochs == told["small"].drawn / 7 > 6


def test_rates_that_do_not_fit_the_sources_are_refused() -> None:
    for rate in ([1.0], [0.5, 0.4, 0.2]):
        with pytest.raises(LuthierError, match="one for each, 1 together"):
            Mixture(mixed().sources, np.array(rate), 0)
