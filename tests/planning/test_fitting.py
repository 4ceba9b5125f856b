"""Runs that are made to fit: by changes that leave the results as they are, as few as are needed, or refused."""

from dataclasses import replace

import pytest

from configured import shape
from luthier.core import LuthierError
from luthier.planning import fitting
from luthier.planning.fitting import Planner, equal, fitted
from luthier.settings.run import Run

SIZES = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1408, "vocab_size": 32000}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = shape(tmp_path_factory.mktemp("fit") / "m", **SIZES)
    data, optim = {"max_tokens": 512}, {"micro_tokens": 4096, "batch_tokens": 4096}
    return Run(model={"id": folder}, method="lora", objective="text", precision="bfloat16", data=data, optim=optim, evaluate={"samples": 0})


@pytest.fixture(scope="module")
def planner():
    return Planner()


def total(planner, run):
    return planner.predict(run, "cpu", 0).total


def test_a_run_that_fits_is_left_alone(run, planner):
    assert fitted(run, planner, ceiling=total(planner, run), program=0) == (run, [])


def test_smaller_micro_batches_come_first_and_recomputation_where_they_are_not_enough(run, planner):
    half = replace(run, optim=replace(run.optim, micro_tokens=2048))
    found, said = fitted(run, planner, ceiling=total(planner, half), program=0)
    assert found == half and "optim.micro_tokens=2048 was set" in said[0] and "same results" in said[0]
    smallest = replace(run, optim=replace(run.optim, micro_tokens=512), recompute="blocks")
    found, said = fitted(run, planner, ceiling=total(planner, smallest), program=0)
    assert found.recompute == "blocks" and found.optim.micro_tokens == 512 and "recompute=blocks" in said[0]
    assert (found.method, found.precision, found.data, found.optim.batch_tokens) == (run.method, run.precision, run.data, run.optim.batch_tokens)


def test_a_ceiling_that_nothing_holds_is_refused_and_free_memory_that_is_too_little_is_said(run, planner, monkeypatch):
    with pytest.raises(
        LuthierError, match=r"place.memory: 50 MB were asked for, and the run needs \d+ MB with optim.micro_tokens=512 recompute=blocks; .*precision=nf4"
    ):
        fitted(run, planner, ceiling=50_000_000, program=0)
    monkeypatch.setattr(fitting, "machine", lambda device: (100_000_000, 60_000_000))
    found, said = fitted(run, planner, program=0)
    assert found.recompute == "blocks" and "may end for want of memory" in said[0]


def test_only_changes_without_a_price_in_results_are_made_unasked(run, planner):
    names = {c.setting.partition("=")[0] for c in equal(run, planner.predict(run, "cpu", 0))}
    assert names == {"optim.micro_tokens", "recompute"}
