"""What a run will take, said before it and held against what it took."""

import json

import pytest

from luthier import amounts
from luthier.planning.forecast import Forecast
from luthier.planning.foresight import Foresight, as_long, foresee, is_long
from luthier.planning.memory import Plan
from luthier.reading import batches_of, read_data
from luthier.running.starting import execute
from tinyruns import Said, home_in, settings


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return home_in(tmp_path_factory.mktemp("home"))


TIME = Forecast(step=2.0, tokens=1000, steps=90, evaluations=12, evaluation=2.5)


class Memory:
    total = 1_200_000_000


def test_what_is_predicted_is_one_line_and_what_was_measured_another():
    f = Foresight(Memory(), TIME, 173)
    assert f.said() == "predicted: 1.20 GB of memory at its peak, 2 s a step, 3:00 of training, 0:30 of held-out loss"
    assert f.against(peak=1_000_000_000, training=200.0, steps=80) == (
        "1.00 GB of memory where 1.20 GB were predicted (20% too high); 2.5 s a step where 2 s were predicted (20% too low)"
    )
    assert f.against(peak=1_200_000_000, training=0.0, steps=0) == "1.20 GB of memory where 1.20 GB were predicted (0% too low)"
    nothing = Foresight(None, None, None, ("time is not predicted: why",))
    assert nothing.said() == "time is not predicted: why" and nothing.against(peak=1, training=1.0, steps=1) == "" and nothing.facts() == {}


@pytest.mark.parametrize(("n", "said"), [(0.0123, "0.012 s"), (0.85, "0.85 s"), (12.4, "12 s"), (119.0, "119 s"), (125.0, "2:05"), (3725.0, "1:02:05")])
def test_seconds_are_said_as_people_read_them(n, said):
    assert amounts.seconds(n) == said


def test_a_feed_that_was_looked_at_stands_where_it_stood(home, tmp_path):
    run = settings(home, tmp_path)
    plan = Plan(run)
    base = plan.policy.base
    prepared = read_data(run, base.tokenizer, positions=64, say=lambda _: None)
    make = lambda: batches_of(run, prepared, plan.objective, pad=0, packed=True)  # noqa: E731
    feed, other = make(), make()
    f = foresee(run, prepared, feed, plan=plan, program=100_000_000)
    assert f.time is not None and f.time.steps == 8 and f.memory is not None and f.memory.standing["program"] < 400_000_000 and f.longest
    assert [b.ids.tolist() for b in next(feed)] == [b.ids.tolist() for b in next(other)]
    assert foresee(run, prepared, feed, plan=plan, memory=False).memory is None


def test_only_long_runs_are_predicted_unasked(home, tmp_path):
    run = settings(home, tmp_path)
    assert not is_long(run, 10_000, 300, 8) and is_long(run, 100_000_000, 8192, 10)
    assert as_long(run, 17).data.max_tokens == 17 and as_long(run, None) == run == as_long(run, 3)
    told = Said()
    execute(run, reporter=told)
    assert not [n for n in told.notes if "predicted" in n]


def test_a_run_says_what_it_will_take_and_how_far_that_was_off_and_keeps_both(home, tmp_path, monkeypatch):
    from luthier.report import page
    from luthier.report.facts import read
    from luthier.running import session

    monkeypatch.setattr(session, "is_long", lambda *how: True)
    told = Said()
    result = execute(settings(home, tmp_path), reporter=told)
    before, after = [n for n in told.notes if "predicted" in n]
    assert before.startswith("predicted: ") and "a step" in before and "of training" in before
    assert "were predicted (" in after and "a step where" in after
    facts = json.loads((result.folder / "facts.json").read_text())
    assert facts["memory"]["longest"] == json.loads((result.folder / "environment.json").read_text())["data"]["longest"]
    text, took = page.html(read(result.folder)), json.loads((result.folder / "result.json").read_text())["seconds"]
    if took:  # it is kept to a tenth of a second
        assert "A step was predicted to take" in text and f"the prediction is {amounts.off(facts['time']['step'], took / 8)}" in text
    assert f"Predicted {amounts.size(facts['memory']['total'])}" in text
