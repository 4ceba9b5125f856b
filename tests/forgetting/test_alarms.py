"""Alarms: of a run made to overfit, of one made to forget, of none that is healthy; and each condition by itself."""

import json
import random
import shutil

import pytest

import tiny
from luthier.cli import main
from luthier.core import LuthierError
from luthier.forgetting.alarms import FORGETTING, OVERFITTING, Alarms
from luthier.measuring.evaluate import Losses, Score
from luthier.measuring.measure import GENERAL, Mean, Measures
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.settings.config import load_run
from luthier.settings.run import Run
from luthier.tasks.instruments import Task

QUIET = Reporter(quiet=True)
RUN = Run()


def measures(loss=2.0, general=4.0, facts=1.0, unit="tokens", task=None):
    retained = {} if task is None else {"mine/score": Score(*task, 50)}
    return Measures(Mean(loss, 100, unit), Mean(general, 1000), suite={"facts": Mean(facts, 60, "facts")}, retained=retained)


def seen(*visits, run=RUN, before=None, last=True):
    """The kinds raised at each of some visits."""
    alarms = Alarms(run, before or measures())
    return [[a.kind for a in alarms.see(i + 1, now, None, last=last and i + 1 == len(visits))] for i, now in enumerate(visits)]


FORGOTTEN = [
    ({"general": 4.41, "loss": 0.5}, True),  # a tenth, whatever was gained
    ({"general": 4.39, "loss": 0.5}, False),
    ({"general": 4.2, "loss": 1.9}, True),  # more than was gained
    ({"general": 4.2, "loss": 1.7}, False),
    ({"general": 4.09, "loss": 2.5}, False),  # hardly anything
    ({"facts": 40 / 60}, True),
    ({"facts": 41 / 60}, False),
    ({"task": (0.3, 0.2, 0.39)}, True),
    ({"task": (0.3, 0.2, 0.41)}, False),  # the intervals meet
]


@pytest.mark.parametrize("now,forgotten", FORGOTTEN, ids=str)
def test_each_condition_of_forgetting_has_its_threshold(now, forgotten):
    before = measures(task=(0.5, 0.4, 0.6)) if "task" in now else measures()
    assert bool(Alarms(RUN, before).forgotten(measures(**now))) == forgotten


def test_what_is_lost_is_not_set_against_a_gain_of_another_kind():
    """A loss an example is no nats a token."""
    assert not Alarms(RUN, measures(unit="examples")).forgotten(measures(general=4.2, loss=1.9, unit="examples"))


def test_few_facts_say_nothing():
    before = measures()
    before.suite["facts"] = Mean(1.0, 9, "facts")
    now = measures()
    now.suite["facts"] = Mean(0.0, 9, "facts")
    assert not Alarms(RUN, before).forgotten(now)


def test_forgetting_takes_two_evaluations_running_or_the_last_and_is_said_once():
    bad, good = measures(general=5.0), measures()
    assert seen(bad, good, bad, good) == [[], [], [], []]
    assert seen(bad, bad, bad) == [[], [FORGETTING], []]
    assert seen(good, bad) == [[], [FORGETTING]]
    assert seen(bad, bad, run=Run(evaluate={"alarm": "off"})) == [[], []]


def test_a_model_that_writes_no_text_any_more_has_no_text_to_forget():
    assert not Alarms(Run(objective="classify"), measures()).forgotten(measures(general=9.0, facts=0.0))
    assert Alarms(Run(objective="dpo"), measures()).forgotten(measures(general=9.0))


# --- overfitting, by made-up losses -----------------------------------------------------------------------------------------


def held_out(mean, spread=0.0, batches=20, seed=0):
    """A held-out loss in batches of 10 tokens."""
    rng = random.Random(seed)
    parts = tuple(({"tokens": 10 * (mean + rng.gauss(0, spread))}, {"tokens": 10}) for _ in range(batches))
    return Losses({"tokens": sum(a["tokens"] for a, _ in parts)}, {"tokens": 10 * batches}, {"tokens": 1.0}, parts)


def overfitted(held, train, batches=20):
    """At which of some evaluations it is raised; ``train``: the training loss of the ten steps before each."""
    alarms, out, rng = Alarms(RUN, Measures()), [], random.Random(1)
    for i, (h, t) in enumerate(zip(held, train, strict=True)):
        for _ in range(10):
            alarms.trained(t + rng.gauss(0, 0.05))
        out += [i for a in alarms.see(i, Measures(), h if isinstance(h, Losses) else held_out(h, batches=batches), last=False) if a.kind == OVERFITTING]
    return out


def test_overfitting_takes_a_held_out_loss_that_rises_while_the_training_loss_falls_at_two_evaluations():
    assert overfitted([3.0, 2.5, 2.6, 2.7, 2.9], [2.9, 2.3, 1.9, 1.5, 1.0]) == [3]
    assert overfitted([3.0, 2.5, 2.6, 2.4, 2.6], [2.9, 2.3, 1.9, 1.5, 1.0]) == []
    assert overfitted([3.0, 2.5, 2.6, 2.7, 2.9], [2.9, 2.3, 2.3, 2.3, 2.3]) == [], "a run that diverges does not overfit"
    assert overfitted([3.0, 2.5, 2.51, 2.51, 2.51], [2.9, 2.3, 1.9, 1.5, 1.0]) == [], "less than a hundredth"
    assert overfitted([3.0, 2.5, 2.6, 2.7, 2.9], [2.9, 2.3, 1.9, 1.5, 1.0], batches=7) == [], "too few batches to say"


def test_a_rise_that_may_be_chance_is_no_overfitting():
    noisy = [held_out(3.0, 0.5, seed=0), *(held_out(2.9 + 0.05 * i, 0.5, seed=i) for i in range(1, 5))]
    assert overfitted(noisy, [2.9, 2.3, 1.9, 1.5, 1.0]) == []


def test_an_interrupted_watch_goes_on_where_it_was():
    visits = [(2.5, 2.3), (2.6, 1.9), (2.7, 1.5), (2.8, 1.2)]

    def feed(alarms, some, first):
        out = []
        for i, (h, t) in enumerate(some, first):
            for k in range(5):  # fewer than a window, which reaches back behind the cut
                alarms.trained(t + k / 1000)
            out += alarms.see(i, measures(general=5.0), held_out(h), last=False)
        return out

    whole = Alarms(RUN, measures())
    everything = feed(whole, visits, 0)
    assert {a.kind for a in everything} == {FORGETTING, OVERFITTING}
    for cut in range(1, 4):
        one, two = Alarms(RUN, measures()), Alarms(RUN, measures())
        said = feed(one, visits[:cut], 0)
        two.recall(json.loads(json.dumps(one.kept())))
        assert said + feed(two, visits[cut:], cut) == everything and two.raised == everything
    Alarms(RUN, measures()).recall({})  # of a checkpoint from before there were alarms


# --- whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.folder(folder / "base")
    rng = random.Random(0)
    words = lambda: "".join(rng.choices("abcdefgh", k=3))  # noqa: E731
    (folder / "noise.jsonl").write_text("".join(json.dumps({"prompt": words(), "completion": words()}) + "\n" for _ in range(40)))
    rows = Task().rows("train")[:120]
    (folder / "notes.jsonl").write_text("".join(json.dumps({k: r[k] for k in ("prompt", "completion")}) + "\n" for r in rows))
    (folder / "general.txt").write_text("\n<|endoftext|>\n".join(GENERAL.read_text().split("\n<|endoftext|>\n")[:3]))
    return folder


def run_of(home, out, data, *more, model="fiddle"):
    own = [
        f"model={model}",
        f"data.train={home / data}",
        f"out={out}",
        "name=r",
        "precision=float32",
        "evaluate.samples=0",
        f"data.general={home / 'general.txt'}",
    ]
    return execute(load_run(None, [*own, *more]), reporter=QUIET)


COMMON = "method=full evaluate.every_steps={} checkpoint.every_steps={} data.validation_share={}"
OVERFITS = (COMMON.format(10, 35, 0.4) + " optim.lr=1e-2 optim.schedule=constant optim.batch_tokens=300 optim.steps=70 evaluate.forgetting=false").split()
FORGETS = (COMMON.format(2, 99, 0.1) + " optim.lr=4e-3 optim.batch_tokens=300 optim.steps=8").split()


def test_a_run_made_to_overfit_raises_its_alarm_and_can_be_stopped_by_it(home, tmp_path):
    """Pairs of random words: there is nothing to learn but the rows themselves."""
    result = run_of(home, tmp_path / "a", "noise.jsonl", *OVERFITS, model=home / "base")
    assert [a.kind for a in result.alarms] == [OVERFITTING] and result.steps == 70 and not result.stopped
    lines = [json.loads(x) for x in (result.folder / "metrics.jsonl").read_text().splitlines()]
    (line,) = [x for x in lines if x["event"] == "alarm"]
    assert line["alarm"] == OVERFITTING and line["step"] == result.alarms[0].step and "evaluate.best" in line["advice"]
    assert json.loads((result.folder / "result.json").read_text())["alarms"][0]["said"] == line["said"]
    assert f"<strong>Alarm: overfitting at step {line['step']}.</strong>" in (result.folder / "report.html").read_text()
    assert "Alarm: overfitting" in (result.artefact / "README.md").read_text()
    stopped = run_of(home, tmp_path / "b", "noise.jsonl", *OVERFITS, "evaluate.alarm=stop", model=home / "base")
    assert stopped.steps == line["step"] and stopped.stopped.startswith("overfitting: ") and stopped.best_step == result.best_step
    shutil.rmtree(tmp_path / "a" / "r" / "checkpoints" / "step-70")
    again = execute(load_run(str(result.folder / "run.yaml")), resume=result.folder, reporter=QUIET)
    assert again.alarms == result.alarms, "a run that goes on remembers its alarms"


def test_a_run_made_to_forget_raises_its_alarm_and_keeps_what_has_not_forgotten_where_it_is_to_stop(home, tmp_path, capsys):
    result = run_of(home, tmp_path / "a", "notes.jsonl", *FORGETS)
    (alarm,) = result.alarms
    assert alarm.kind == FORGETTING and "facts that were known are known no more" in alarm.said and "data.replay" in alarm.advice
    assert result.after.general.value > 1.1 * result.before.general.value and result.after.suite["facts"].value < 2 / 3
    assert result.after.suite["moved"].value > 0.3 > result.before.suite["moved"].value == 0
    stopped = run_of(home, tmp_path / "b", "notes.jsonl", *FORGETS, "evaluate.alarm=stop")
    assert stopped.steps == alarm.step == 6 < result.best_step and stopped.best_step == 2, "the later weights are better at the task, and beyond what is wanted"
    Reporter().result(stopped)
    said = " ".join(capsys.readouterr().out.split())
    assert "stopped early: forgetting: the loss on general text rose" in said and "known facts kept" in said


def test_a_healthy_run_raises_none(home, tmp_path):
    """The same rows, by the same steps of another method at its default rate."""
    result = run_of(home, tmp_path, "notes.jsonl", *FORGETS, "method=lora", "optim.lr=4.5e-3")
    assert result.alarms == [] and result.after.loss.value < result.before.loss.value - 0.2
    assert "alarm" not in (result.folder / "metrics.jsonl").read_text()


WRONG = [
    ("evaluate.alarm=loud", "accepted are warn, stop, off"),
    ("evaluate.retain=bleu", "evaluate.retain: bleu has no rows of its own"),
    ("evaluate.retain=nosuch", "evaluate.retain: "),
    ("evaluate.retain_rows=0", "evaluate.retain_rows"),
]


@pytest.mark.parametrize("setting,said", WRONG, ids=str)
def test_a_setting_that_says_nothing_is_refused_in_a_sentence(home, tmp_path, capsys, setting, said):
    common = [str(home / "noise.jsonl"), "--model", str(home / "base"), f"out={tmp_path}", "precision=float32", "name=r", "optim.steps=2"]
    assert main(["train", *common, setting]) == 2
    error = capsys.readouterr().err.strip()
    assert said in " ".join(error.split()) and error.count("\n") == 0 and not (tmp_path / "r").exists()


def test_measurements_of_different_batches_are_not_compared():
    from luthier.measuring.evaluate import rise

    with pytest.raises(LuthierError, match="different batches"):
        rise(held_out(2.0), held_out(2.0, batches=19))
