"""A comparison that is killed goes on: what is finished is not run again, and what was decided stays."""

from __future__ import annotations

import json
import os
import signal

import pytest

from luthier.comparing.state import State
from luthier.errors import LuthierError
from simulated import World, comparison

SETTINGS = ("methods=[lora,adapter,full]", "seed=[0,1]")


def killed_at(folder, number):
    """Run a comparison in a process of its own that is killed in the middle of a job; how many jobs it had begun."""
    log = folder.with_suffix(".log")
    if (child := os.fork()) == 0:
        try:
            world = World()

            def launch(name, task, limit):
                with log.open("a") as f:
                    f.write(name + "\n")
                if len(log.read_text().splitlines()) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return world.launch(name, task, limit)

            comparison(folder, world, *SETTINGS, launch=launch).go()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return log.read_text().splitlines(), os.WIFSIGNALED(status)


@pytest.mark.parametrize("number", range(1, 11))
def test_after_a_kill_at_any_job_only_that_one_and_those_after_it_run(tmp_path, number):
    whole = comparison(tmp_path / "whole", World(), *SETTINGS).go()
    begun, killed = killed_at(tmp_path / "c", number)
    assert killed and len(begun) == number
    world = World()
    found = comparison(tmp_path / "c", world, *SETTINGS).go()
    assert [*begun[:-1], *world.jobs] == [
        "base",
        *(f"search {m}" for m in ("lora", "adapter", "full")),
        *(f"run {m} {s}" for s in (0, 1) for m in ("lora", "adapter", "full")),
    ]
    if number > 4:  # steps were decided before the kill
        assert [s.runs for s in found.rows] == [s.runs for s in whole.rows]


def test_a_finished_comparison_runs_nothing_again_and_spends_nothing(tmp_path):
    comparison(tmp_path / "c", World(), *SETTINGS).go()
    world = World()
    found = comparison(tmp_path / "c", world, *SETTINGS).go()
    assert world.jobs == [] and world.time == 0
    assert all(len(s.runs) == 2 for s in found.rows)


def test_time_spent_before_counts_and_more_minutes_run_what_was_given_up(tmp_path):
    slow = World(slow=4.0, slow_after=600.0)
    first = comparison(tmp_path / "c", slow, *SETTINGS, minutes=20).go()
    assert any(len(s.runs) < 2 for s in first.rows)
    assert json.loads((tmp_path / "c" / "progress.json").read_text())["spent"] == pytest.approx(slow.time, abs=1)
    none = World()
    comparison(tmp_path / "c", none, *SETTINGS, minutes=20).go()
    assert none.jobs == []  # the time is up
    more = World()
    found = comparison(tmp_path / "c", more, *SETTINGS, minutes=60).go()
    assert all(len(s.runs) == 2 for s in found.rows)
    assert not set(more.jobs) & {"base", "search lora"}


def test_a_folder_of_another_comparison_is_not_written_into(tmp_path):
    comparison(tmp_path / "c", World(), *SETTINGS).go()
    with pytest.raises(LuthierError, match="another comparison is there .*settings.*--out"):
        comparison(tmp_path / "c", World(), "methods=[lora]")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(LuthierError, match="no comparison; choose another folder"):
        State(tmp_path / "other", {})


def test_objectives_that_are_scored_differently_are_not_put_into_one_table(tmp_path):
    with pytest.raises(LuthierError, match="scored by bleu and the loss, which do not compare"):
        comparison(tmp_path / "c", World(), "method=lora", "objective=[sft,text]").go()


def test_a_row_that_fails_is_told_and_the_others_go_on(tmp_path):
    world = World()

    def launch(name, task, limit):
        if name == "search adapter" or name == "run full 0":
            raise LuthierError(f"{name} is broken")
        return world.launch(name, task, limit)

    found = comparison(tmp_path / "c", world, *SETTINGS, launch=launch).go()
    by = {s.row.name: s for s in found.rows}
    assert by["adapter"].problem == "search adapter is broken" and not by["adapter"].runs
    assert len(by["lora"].runs) == 2
    assert by["full"].problem == "run full 0 is broken"
