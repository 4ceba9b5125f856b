"""Memory that runs out in the middle of a run: half the micro-batch, the same results, once; and what is tried before the first step leaves nothing."""

import json

import pytest
import torch

from luthier.core import LuthierError
from luthier.data.replay import Beside
from luthier.devices.device import ran_out
from luthier.objectives.sft import Objective
from luthier.planning import headroom
from luthier.running.starting import execute
from tinyruns import QUIET, Said, home_in, settings


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return home_in(tmp_path_factory.mktemp("home"))


def losses(folder, name="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x[name] for x in lines if x["event"] == "train"]


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_a_want_of_memory(error, memory):
    assert ran_out(error) is memory


def fail_at(monkeypatch, steps, error):
    """The loss fails whenever it is about to be computed for one of the given times with more than so many tokens."""
    own, count = Objective.loss, [0]

    def loss(self, policy, batch):
        if policy.training:
            count[0] += 1
            if count[0] in steps:
                raise error
        return own(self, policy, batch)

    monkeypatch.setattr(Objective, "loss", loss)


def test_a_run_that_loses_its_memory_once_goes_on_to_the_same_results(home, tmp_path, monkeypatch):
    more = ("method.dropout=0", "optim.micro_tokens=300")
    whole = execute(settings(home, tmp_path / "a", *more), reporter=QUIET)
    told = Said()
    fail_at(monkeypatch, {4}, torch.OutOfMemoryError("CUDA out of memory"))
    halved = execute(settings(home, tmp_path / "b", *more), reporter=told)
    assert [w for w in told.warnings if "memory ran out: micro-batches are of 150 tokens from now on, no more of 300" in w]
    assert losses(halved.folder) == pytest.approx(losses(whole.folder), rel=1e-5) and len(losses(whole.folder)) == 8
    assert halved.after.loss.value == pytest.approx(whole.after.loss.value, rel=1e-5)
    assert losses(halved.folder, "tokens") == losses(whole.folder, "tokens")


def test_the_second_time_and_any_other_error_end_the_run(home, tmp_path, monkeypatch):
    fail_at(monkeypatch, {4, 9}, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        execute(settings(home, tmp_path / "a", "optim.micro_tokens=300"), reporter=QUIET)
    monkeypatch.undo()
    fail_at(monkeypatch, {2}, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        execute(settings(home, tmp_path / "b", "optim.micro_tokens=300"), reporter=QUIET)


def test_under_a_ceiling_the_longest_micro_batch_is_tried_first_and_leaves_nothing(home, tmp_path, monkeypatch):
    tried = []
    own = headroom.try_longest
    monkeypatch.setattr(headroom, "try_longest", lambda *how: (tried.append(1), own(*how)))
    free = execute(settings(home, tmp_path / "a"), reporter=QUIET)
    assert not tried
    held = execute(settings(home, tmp_path / "b", "place.memory=400GB"), reporter=QUIET)
    assert tried == [1] and losses(held.folder) == losses(free.folder)  # to the bit, dropout and all


def test_a_ceiling_that_is_passed_halves_the_micro_batches_and_says_by_how_much(home, tmp_path, monkeypatch):
    from luthier.planning import fitting

    monkeypatch.setattr(fitting, "fitted", lambda run, planner, **how: (run, []))  # a prediction that was too low
    told = Said()
    execute(settings(home, tmp_path / "a", "place.memory=100MB", "optim.micro_tokens=300"), reporter=told)
    assert [w for w in told.warnings if "were taken where place.memory is 100 MB: micro-batches are of 150 tokens" in w] and len(told.warnings) == 1


def test_both_parts_of_a_feed_are_halved_and_what_has_no_micro_batches_is_refused():
    class Part:
        def __init__(self, n):
            self.micro_tokens = n

    feed = Beside(Part(100), Part(100), share=0.1)
    headroom.halve(feed)
    assert (feed.main.micro_tokens, feed.replayed.micro_tokens) == (50, 50)
    with pytest.raises(LuthierError, match="cannot be smaller; set recompute=blocks"):
        headroom.halve(object())


def test_what_a_place_may_take_is_a_size(home, tmp_path):
    with pytest.raises(LuthierError, match="place.memory=much: 'much' is no size of memory; accepted are auto, off, or a size such as 24GB"):
        settings(home, tmp_path, "place.memory=much")
    assert settings(home, tmp_path, "place.memory=1.5GB").place.ceiling == 1_500_000_000
    assert settings(home, tmp_path, "place.memory=800 mb").place.ceiling == 800_000_000
    assert settings(home, tmp_path).place.ceiling is None
