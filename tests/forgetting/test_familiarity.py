"""Following the categories of knowledge in a tiny run, and the watch over them on planted evaluations."""

import json
import random

import pytest

import tiny
from luthier.core import LuthierError
from luthier.data.known import CATEGORIES
from luthier.forgetting.familiarity import Watch
from luthier.running.starting import execute
from luthier.settings.config import load_run
from tinyruns import Said

WORDS = ["red", "green", "blue", "one", "two", "three"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.folder(folder / "base")
    rng = random.Random(0)
    rows = [{"prompt": f"{i} {rng.choice(WORDS)}", "completion": rng.choice(WORDS), "knowledge": CATEGORIES[i % 4]} for i in range(80)]
    rows[0]["completion"] = [rows[0]["completion"], "other"]
    for name, some in (("train", rows[:48]), ("held", rows[48:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    plain = [{k: v for k, v in r.items() if k != "knowledge"} for r in rows]
    (folder / "plain.jsonl").write_text("".join(json.dumps(r) + "\n" for r in plain))
    return folder


def settings(home, out, *more, train="train.jsonl"):
    return load_run(
        None,
        [
            f"model={home / 'base'}",
            f"data.train={home / train}",
            f"data.validation={home / 'held.jsonl'}",
            f"out={out}",
            "name=r",
            "method=full",
            "precision=float32",
            "optim.steps=12",
            "optim.batch_tokens=600",
            "optim.lr=1e-2",
            "evaluate.every_steps=4",
            "checkpoint.every_steps=4",
            "evaluate.samples=0",
            "evaluate.forgetting=false",
            "evaluate.knowledge_rows=6",
            *more,
        ],
    )


def events(folder, name="familiarity"):
    return [e for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if e["event"] == name]


def test_each_category_s_loss_and_exact_match_are_followed_before_and_at_every_evaluation(home, tmp_path):
    said = Said()
    execute(settings(home, tmp_path, "optim.steps=60", "evaluate.every_steps=20"), reporter=said)
    lines = events(tmp_path / "r")
    assert [e["step"] for e in lines] == [0, 20, 40, 60]
    names = {f"{side}_{c}" for side in ("trained", "held_out") for c in CATEGORIES}
    for line in lines:
        assert set(line["right"]) == names
        for name in names:
            assert line[f"{name}_n"] == len(line["right"][name]) == 6
            assert line[f"{name}_exact_match"] == line["right"][name].count("1") / 6 and line[f"{name}_loss"] > 0
    for c in CATEGORIES:  # 48 rows of one word each, sixty steps: the trained rows are fitted, those held out cannot be
        assert lines[-1][f"trained_{c}_loss"] < 0.7 * lines[0][f"trained_{c}_loss"]
        assert lines[-1][f"held_out_{c}_loss"] > lines[-1][f"trained_{c}_loss"]
    assert sum(lines[-1][f"trained_{c}_exact_match"] for c in CATEGORIES) > sum(lines[0][f"trained_{c}_exact_match"] for c in CATEGORIES)
    shown = [n for n in said.notes if n.startswith("knowledge, ")]
    assert len(shown) == 8 and shown[0].startswith("knowledge, trained rows: HighlyKnown 0% right, loss ")


def test_the_losses_are_those_of_the_rows_one_by_one(home, tmp_path):
    from luthier import opening
    from luthier.data.prepare import prepare
    from luthier.references import logps

    execute(settings(home, tmp_path, "evaluate.knowledge_rows=100", "evaluate.best=false", "optim.steps=4"), reporter=Said())
    policy = opening.load(tmp_path / "r", precision="float32")
    rows = prepare([str(home / "held.jsonl")], policy.base.tokenizer, renders="chat", max_tokens=500, validation_share=0.0, say=lambda _: None).train
    for c in CATEGORIES:
        here = [r for r in rows if r.extras["knowledge"] == c]
        alone = -sum(logps(policy, [r], tokens=1000, packed=False)[0] for r in here) / sum(int(r.train.sum()) for r in here)
        assert events(tmp_path / "r")[-1][f"held_out_{c}_loss"] == pytest.approx(alone, rel=1e-4)


def test_a_row_is_right_by_any_of_its_answers(home):
    from luthier import opening
    from luthier.data.prepare import prepare
    from luthier.forgetting.familiarity import Familiarity

    policy = opening.load(home / "base", precision="float32")
    prepared = prepare([str(home / "train.jsonl")], policy.base.tokenizer, renders="chat", max_tokens=500, validation_share=0.0, say=lambda _: None)
    run = load_run(None, [f"model={home / 'base'}", "evaluate.knowledge_rows=99"])
    found = Familiarity.of(policy, run.objective, prepared, run, packed=True)
    every = [f for some in found.followed.values() for f in some]
    assert len(every) == 48  # the two answers of the first row are one question
    first = next(f for f in every if "other" in f.refs)
    assert len(first.refs) == 2 and policy.base.tokenizer.decode(first.prompt).endswith("<end><assistant>")
    assert all(len(f.refs) == 1 and f.refs[0] in WORDS for f in every if f is not first)


def test_rows_without_the_column_and_runs_that_turn_it_off_are_left_alone(home, tmp_path):
    execute(settings(home, tmp_path, "data.validation=[]", train="plain.jsonl"), reporter=Said())
    assert not events(tmp_path / "r")
    said = Said()
    execute(settings(home, tmp_path, f"data.validation={home / 'plain.jsonl'}", "optim.steps=1", "name=half"), reporter=said)
    assert len(events(tmp_path / "half")) == 2 and sum(n.startswith("0 known rows are held out: whether") for n in said.notes) == 1
    execute(settings(home, tmp_path, "evaluate.knowledge=off", "name=off"), reporter=Said())
    assert not events(tmp_path / "off")


def test_stopping_by_what_cannot_be_seen_is_refused(home, tmp_path):
    with pytest.raises(LuthierError, match=r"evaluate.knowledge=stop needs trained rows whose column 'knowledge' says Unknown.*found: 6 held out High"):
        execute(settings(home, tmp_path, "evaluate.knowledge=stop", train="plain.jsonl"), reporter=Said())
    with pytest.raises(LuthierError, match=r"found: .*6 trained Unknown.* hold out more \(data.validation\)"):
        execute(settings(home, tmp_path, "evaluate.knowledge=stop", f"data.validation={home / 'plain.jsonl'}"), reporter=Said())
    assert not (tmp_path / "r").exists()


def evaluations(*shares, n=20):
    """(trained Unknown, held-out known) shares that are right, as rows."""
    row = lambda share: "1" * round(share * n) + "0" * (n - round(share * n))  # noqa: E731
    return [{"trained_Unknown": row(u), "held_out_HighlyKnown": row(k)[: n // 2], "held_out_MaybeKnown": row(k)[n // 2 :]} for u, k in shares]


def raised(*shares, n=20):
    watch = Watch()
    return [bool(watch.see(i, e)) for i, e in enumerate(evaluations(*shares, n=n))]


def test_the_watch_is_raised_where_unknown_is_memorised_while_known_decays_twice_running():
    assert raised((0, 0.9), (0.1, 0.95), (0.5, 0.6), (0.6, 0.55), (0.7, 0.5)) == [False, False, False, True, False]
    watch = Watch()
    said = [watch.see(i, e) for i, e in enumerate(evaluations((0, 0.9), (0.1, 0.95), (0.5, 0.6), (0.6, 0.55)))][-1]
    assert (
        said == "Unknown is memorised while Known decays: 0% to 60% of the trained Unknown rows are right, and 95% at step 1 to 55% of the held-out known ones"
    )


@pytest.mark.parametrize(
    "shares",
    [
        ((0, 0.9), (0.6, 0.9), (0.7, 0.9), (0.8, 0.85)),  # memorised, nothing decays
        ((0, 0.9), (0, 0.5), (0, 0.4), (0.05, 0.3)),  # decays, nothing memorised
        ((0, 0.9), (0.5, 0.5), (0.5, 0.9), (0.5, 0.5)),  # never twice running
        ((0.6, 0.9), (0.6, 0.5), (0.6, 0.5), (0.6, 0.5)),  # was known before
        ((0, 0.9), (0.25, 0.6), (0.25, 0.7), (0.25, 0.7)),  # 5 of 20: p = 1/32 is above the level
    ],
)
def test_either_alone_or_once_does_not_raise_it(shares):
    assert raised(*shares) == [False] * 4


def test_too_few_held_out_known_rows_say_nothing():
    assert raised((0, 1), (1, 0), (1, 0), (1, 0), n=9) == [False] * 4
    assert raised((0, 1), (1, 0), (1, 0), (1, 0), n=10) == [False, False, True, False]


def planted(monkeypatch):
    """The evaluations of a run that memorises and forgets, whatever it trains."""
    from luthier.forgetting.familiarity import Familiarity

    todo = iter(evaluations((0, 0.9), (0.5, 0.4), (0.6, 0.4), (0.7, 0.3)))
    only = lambda some: {k: v for k, v in some.items() if k in ("trained_Unknown", "held_out_HighlyKnown", "held_out_MaybeKnown")}  # noqa: E731
    was = Familiarity.__init__

    def init(self, *a, rows, **k):
        was(self, *a, rows=only(rows), **k)

    monkeypatch.setattr(Familiarity, "__init__", init)
    monkeypatch.setattr(Familiarity, "right", lambda self: next(todo))


@pytest.mark.parametrize("setting", ["watch", "stop"])
def test_a_run_is_warned_or_stopped(home, tmp_path, monkeypatch, setting):
    planted(monkeypatch)
    said = Said()
    result = execute(settings(home, tmp_path, f"evaluate.knowledge={setting}", "evaluate.knowledge_rows=10"), reporter=said)
    sentence = "Unknown is memorised while Known decays: 0% to 60%"
    if setting == "stop":
        assert result.steps == 8 and result.stopped.startswith(sentence)
    else:
        assert result.steps == 12 and not result.stopped
        assert next(w for w in said.warnings if "Known decays" in w).startswith(sentence) and sum("Known decays" in w for w in said.warnings) == 1


def test_a_resumed_run_s_watch_stands_where_it_stood(home, tmp_path, monkeypatch):
    planted(monkeypatch)
    full = settings(home, tmp_path, "evaluate.knowledge=stop", "evaluate.knowledge_rows=10")

    class Killed(Said):
        def evaluated(self, step, m, *, best):
            if step.step == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(full, reporter=Killed())
    assert [e["step"] for e in events(tmp_path / "r")] == [0, 4]
    result = execute(full, resume=tmp_path / "r", reporter=Said())  # the next planted evaluation is the second that is so
    assert result.steps == 8 and "Known decays" in result.stopped
