"""How long a run takes: the arithmetic of steps and evaluations, and that a prediction is of the size of what is measured."""

import time

import pytest
import torch

from configured import SMALL, deep
from luthier import build
from luthier.core import LuthierError
from luthier.planning.forecast import Clock, Forecast, Pace
from luthier.planning.memory import Plan
from luthier.planning.microbatch import made_up, shape_of
from luthier.settings.run import Run

CPU = torch.device("cpu")


def test_a_pace_goes_through_a_small_and_a_large_micro_batch():
    pace = Pace.through([(1000, 3.0), (200, 1.0)])
    assert pace(1000) == pytest.approx(3.0) and pace(200) == pytest.approx(1.0) and pace(600) == pytest.approx(2.0)
    assert Pace.through([(500, 2.0)])(1000) == pytest.approx(4.0)  # one size: in proportion
    assert Pace.through([(500, 2.0), (550, 2.0)])(1100) == pytest.approx(4.0)  # too close to say what does not grow
    assert Pace.through([(100, 2.0), (200, 1.0)])(400) == pytest.approx(2.0)  # noise: a larger one is not faster


def test_the_whole_is_its_steps_and_its_evaluations():
    f = Forecast(step=2.0, tokens=100, steps=50, evaluations=12, evaluation=3.0)
    assert f.training == 100.0 and f.total == 136.0
    unknown = Forecast(step=2.0, tokens=100, steps=None, evaluations=0, evaluation=0.0)
    assert unknown.training is None and unknown.total is None


def run_of(folder, **more):
    more = {"objective": "text", "precision": "float32", "method": {"kind": "lora", "targets": ["all"]}} | SMALL | more
    return Run(model={"id": folder, "random": True}, **more)


def test_accumulation_multiplies_and_recomputation_adds(tmp_path):
    folder, clock = deep("llama", tmp_path), Clock(CPU)
    plain = run_of(folder)
    plan = Plan(plain)
    once = clock.forecast(plan, plan.run).step
    twice = run_of(folder, optim={"micro_tokens": 128, "batch_tokens": 1024})
    four = run_of(folder, optim={"micro_tokens": 128, "batch_tokens": 4096})
    assert clock.forecast(plan, four).step == pytest.approx(4 * clock.forecast(plan, twice).step, rel=0.1)
    again = run_of(folder, recompute="blocks")
    assert clock.forecast(Plan(again), again).step > 1.1 * once


def test_steps_that_are_known_are_timed_by_their_own_micro_batches(tmp_path):
    folder, clock = deep("llama", tmp_path), Clock(CPU)
    run = run_of(folder)
    plan = Plan(run)
    micro = lambda: made_up(shape_of(run, plan.policy.base), plan.policy.base, plan.objective)  # noqa: E731
    f = clock.forecast(plan, run, [[micro()], [micro(), micro(), micro()]], held_out=640, total_steps=20)
    one = clock.forecast(plan, run, [[micro()]], total_steps=20)
    assert f.step == pytest.approx(2 * one.step, rel=0.2) and f.tokens == 2 * micro().tokens
    assert f.evaluations == 12 and one.evaluation == 0 and f.evaluation > 0
    assert f.evaluation < f.step * 640 / f.tokens  # no backward


def test_a_step_takes_about_as_long_as_was_predicted(tmp_path):
    run = run_of(deep("llama", tmp_path), optim={"micro_tokens": 2048, "batch_tokens": 2048})
    plan = Plan(run)
    predicted = Clock(CPU).forecast(plan, plan.run).step
    policy, objective = build.assemble(plan.run)
    policy.train()
    batch = made_up(shape_of(run, policy.base), policy.base, objective)
    took = []
    for _ in range(4):
        began = time.perf_counter()
        loss = objective.loss(policy, batch)
        torch.stack([w * loss.sums[k] / batch.units[k] for k, w in objective.terms.items()]).sum().backward()
        took.append(time.perf_counter() - began)
    assert min(took) / 3 < predicted < 4 * min(took)  # benchmarks/planner.py measures it on models that are worth it, on an idle machine


def test_what_cannot_be_timed_is_said(tmp_path):
    run = run_of(deep("llama", tmp_path), objective={"kind": "grpo", "rewards": {"bleu": 1.0}})
    plan = Plan(run)
    with pytest.raises(LuthierError, match="learns from its own answers"):
        Clock(CPU).forecast(plan, plan.run)
