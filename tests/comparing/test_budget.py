"""The time of a comparison: halving, shares, and a whole comparison on simulated clocks that stays within its budget."""

from __future__ import annotations

import math
import random

import pytest

from luthier.comparing import budget
from luthier.comparing.budget import Cost
from luthier.errors import LuthierError
from simulated import World, comparison


def cost(step=1.0, fixed=10.0, tokens=1000.0, most=None):
    return Cost(fixed, step, tokens, most)


def test_rates_lie_around_the_default_and_none_is_above_what_the_setting_takes():
    assert budget.rates_around(3e-3, 3) == [1e-3, 3e-3, 9e-3]
    assert budget.rates_around(0.5, 4) == [0.17, 0.5, 1.0]  # 1.5 and 5 are both 1
    assert budget.rates_around(3e-3, 1) == [3e-3]


def test_the_better_half_of_the_rates_goes_on():
    assert budget.survivors({1e-3: 2.0, 3e-3: 1.0, 9e-3: 1.5}) == [3e-3, 9e-3]
    assert budget.survivors({1e-3: 2.0, 3e-3: 1.0, 9e-3: 1.5, 3e-2: math.inf}) == [3e-3, 9e-3]


def test_where_the_best_rate_is_at_an_end_the_next_beyond_takes_the_place_of_the_worst_that_goes_on():
    assert budget.survivors({1e-3: 2.0, 3e-3: 1.5, 9e-3: 1.0}) == [9e-3, 2.7e-2]
    assert budget.survivors({1e-3: 1.0, 3e-3: 1.5, 9e-3: 2.0}) == [3.3e-4, 1e-3]
    assert budget.survivors({0.5: 2.0, 1.0: 1.0}) == [1.0]  # no rate is above 1
    assert budget.survivors({1e-3: 1.0, 3e-3: math.nan, 9e-3: math.nan}) == [3.3e-4, 1e-3]


@pytest.mark.parametrize("seed", range(30))
def test_a_search_takes_the_seconds_it_is_given_and_no_more(seed):
    rng = random.Random(seed)
    seconds, step, run, n = rng.uniform(1, 300), rng.uniform(0.01, 2), rng.uniform(0.1, 5), rng.choice([2, 3, 4])
    steps = budget.rungs(seconds, n, step=step, run=run)
    spent = sum(runs * (run + k * step) for runs, k in zip((n, max(2, math.ceil(n / 2))), steps, strict=False))
    assert spent <= seconds or not steps
    if steps:
        assert steps[0] >= budget.RUNG
        more = sum(runs * (run + (k + 1) * step) for runs, k in zip((n, max(2, math.ceil(n / 2))), steps, strict=False))
        assert more + 2 * n * step > seconds or (len(steps) == 1 and more > seconds)  # nearly all of it
    else:
        assert n * (run + budget.RUNG * step) > seconds


def test_rows_get_the_same_tokens_and_together_the_time_there_is():
    costs = {"fast": cost(1.0), "slow": cost(2.0), "wide": cost(2.0, tokens=2000.0)}
    runs = dict.fromkeys(costs, 2)
    steps = budget.steps_of(costs, runs, 1004.0)
    assert steps["fast"] == steps["slow"] == 2 * steps["wide"]
    assert 0.97 * 1004 <= budget.seconds_of(costs, runs, steps) <= 1004


def test_rows_get_the_same_time_where_that_is_asked_for():
    costs = {"fast": cost(1.0), "slow": cost(2.0, fixed=20.0)}
    steps = budget.steps_of(costs, {"fast": 1, "slow": 1}, 1000.0, "time")
    assert steps == {"fast": 490, "slow": 240}


def test_no_row_trains_longer_than_its_settings_ask_for_and_the_others_then_get_no_more_tokens():
    costs = {"a": cost(), "short": cost(most=50)}
    assert budget.steps_of(costs, {"a": 1, "short": 1}, 1000.0) == {"a": 50, "short": 50}
    assert budget.steps_of(costs, {"a": 1, "short": 1}, 1000.0, "time") == {"a": 490, "short": 50}


def test_seeds_are_given_up_before_runs_become_too_short_to_teach_anything():
    costs = {"a": cost(), "b": cost()}
    assert budget.repetitions(costs, 3, 3 * 2 * (10 + budget.FEW)) == 3
    assert budget.repetitions(costs, 3, 3 * 2 * (10 + budget.FEW) - 1) == 2
    assert budget.repetitions(costs, 3, 5.0) == 1
    assert budget.repetitions({"a": cost(most=2)}, 3, 36.0) == 3  # two steps were asked for


def test_a_busy_moment_while_one_row_was_measured_does_not_make_it_a_slow_one():
    probe = {"start": 8.0, "look": 0.5, "score": 1.0, "other": 1.0, "run": 2.0, "step": 1.0, "tokens": 100.0}
    probes = {"a": probe, "b": {k: 1.1 * v for k, v in probe.items()}, "busy": {k: 9 * v for k, v in probe.items()}}
    found = budget.calm("busy", probes)
    assert found["start"] == pytest.approx(1.5 * 8.8) and found["score"] == pytest.approx(1.65)
    assert found["step"] == 9.0  # that methods do differ in
    assert budget.calm("a", probes) == probe


def test_a_plan_that_fits_stays_as_it_is():
    planned = {("a", 0): 20, ("b", 0): 20, ("a", 1): 20}
    assert budget.again({"a": cost(), "b": cost()}, planned, 90.0) == budget.Still(planned)


def test_a_slower_machine_costs_repetitions_first_then_steps_and_last_whole_runs():
    costs, planned = {"a": cost(), "b": cost()}, {("a", 0): 20, ("b", 0): 20, ("a", 1): 20, ("b", 1): 20}
    some = budget.again(costs, planned, 100.0)
    assert some.steps == {("a", 0): 20, ("b", 0): 20, ("a", 1): 20}
    assert some.given_up == (("b", 1),)
    shorter = budget.again(costs, planned, 40.0)
    assert shorter.steps == {("a", 0): 10, ("b", 0): 10}
    assert shorter.shortened
    last = budget.again(costs, planned, 35.0, slower=2.0)  # two runs alone take 40 without a step
    assert list(last.steps) == [("a", 0)]
    assert 0 < last.steps["a", 0] <= 20  # and never more than was planned
    assert budget.again(costs, planned, 5.0) == budget.Still({}, (("b", 1), ("a", 1), ("b", 0), ("a", 0)))


def test_a_run_that_is_left_after_others_were_given_up_keeps_its_steps():
    assert budget.again({"a": cost(), "b": cost(fixed=500.0)}, {("a", 0): 1, ("b", 0): 1}, 60.0) == budget.Still({("a", 0): 1}, (("b", 0),))


METHODS = "methods=[crafted_prompt,lora,adapter,prefix,full]"


@pytest.mark.parametrize("equal", ["tokens", "time"])
@pytest.mark.parametrize(("minutes", "seeds"), [(12, "seed=0"), (30, "seed=0"), (45, "seed=[0,1,2]"), (240, "seed=[0,1,2]")])
def test_a_comparison_ends_within_a_tenth_of_its_minutes_and_uses_most_of_them(tmp_path, minutes, seeds, equal):
    world = World(noise=0.05)
    found = comparison(tmp_path / "c", world, METHODS, seeds, minutes=minutes, equal=equal).go()
    assert all(s.runs for s in found.rows)
    assert 0.8 * minutes * 60 <= world.time <= 1.1 * minutes * 60
    tokens = {s.row.name: s.runs[0]["tokens"] for s in found.rows if not s.chooses}
    assert (len({*tokens.values()}) == 1) is (equal == "tokens")
    if equal == "time":
        assert tokens["full"] < tokens["adapter"]


@pytest.mark.parametrize("slow", [1.3, 2.0, 4.0])
@pytest.mark.parametrize("after", [400.0, 900.0, 1500.0])
def test_a_machine_that_becomes_slower_on_the_way_does_not_make_the_comparison_later(tmp_path, slow, after):
    world = World(noise=0.1, slow=slow, slow_after=after)
    said: list[str] = []
    found = comparison(tmp_path / "c", world, METHODS, "seed=[0,1]", minutes=40, said=said.append).go()
    assert world.time <= 1.1 * 40 * 60
    assert sum(bool(s.runs) for s in found.rows) >= (3 if slow < 4 else 1)  # the run in which it happens cannot be shortened any more
    if any(len(s.runs) < 2 for s in found.rows if not s.chooses):
        assert any("not run" in line or "fewer steps" in line or "seeds" in line for line in [*said, *found.notes])


@pytest.mark.parametrize("sticks", ["run lora 0", "run crafted_prompt 0", "run full 0"])
def test_a_run_that_takes_much_longer_than_foretold_is_stopped_and_the_others_get_their_time(tmp_path, sticks):
    # the story: choosing a prompt was foretold to take a minute, took twelve, and nothing else was run
    world = World(sticks=sticks, stuck=5000.0)
    found = comparison(tmp_path / "c", world, METHODS, minutes=30).go()
    assert world.time <= 1.1 * 30 * 60
    problems = {s.row.name: s.problem for s in found.rows if not s.runs}
    assert problems[sticks.split()[1]] == f"{sticks} was stopped"
    assert len(problems) <= 2
    assert world.jobs[-1] == "run crafted_prompt 0" or "crafted_prompt" in problems  # what trains comes first


def test_too_little_time_is_refused_before_anything_is_trained(tmp_path):
    world = World()
    with pytest.raises(LuthierError, match=r"--minutes 1 is too little for 5 rows.*give at least \d+"):
        comparison(tmp_path / "c", world, METHODS, minutes=1).go()
    assert world.jobs == ["base"]


def test_seeds_that_there_is_no_time_for_are_said(tmp_path):
    found = comparison(tmp_path / "c", World(step=2.0), METHODS, "seed=[0,1,2]", minutes=9).go()
    assert found.seeds < 3
    assert any("of the 3 seeds" in note for note in found.notes)
