"""Sources of reward by their names: what each gives, what they weigh, what is refused, and when a reward model is trusted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import luthier.feedback.rewards
import small
import tiny
from luthier import build, opening
from luthier.core import Answer, LuthierError, Row
from luthier.data.labels import Labelled
from luthier.data.preferences import Judged
from luthier.data.render import render_prompt
from luthier.data.shapes import Chat
from luthier.feedback.rewards import Judge, open_source, proven, short_names
from luthier.measuring.measure import predict_texts, rewards
from luthier.precision.float32 import Precision
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.saving import adapter
from luthier.settings.config import load_run
from luthier.settings.run import Run

PROMPTS = [f"{a} {b} film?" for a in ("Is this", "What of that", "Who saw the", "Why a") for b in ("slow", "fine", "dull")]
POLITE, RUDE = "what a fine story", "go away now"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, a reward model on each that has learned to tell polite from rude (runs/), a classifier (stars), sft, pairs the right and the wrong way."""
    folder = tmp_path_factory.mktemp("rewards")
    bases = {"llama": tiny.folder(folder / "llama"), "bert": small.bert(folder / "bert")}
    for name, (better, worse) in {"pairs": (POLITE, RUDE), "swapped": (RUDE, POLITE)}.items():
        lines = [json.dumps({"prompt": p, "chosen": better, "rejected": worse}) for p in PROMPTS]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    for name, base in bases.items():
        file = folder / "pairs.jsonl"
        fixed = [
            f"model={base}",
            f"data.train={file}",
            f"data.validation={file}",
            f"out={folder / 'runs'}",
            f"name={name}",
            "precision=float32",
            "place.on=cpu",
        ]
        fixed += [
            "objective={kind: reward, centre: 0.01}",
            "optim.steps=16",
            "optim.batch_examples=12",
            "optim.lr=1e-2",
            "evaluate.every_steps=99",
            "evaluate.samples=0",
        ]
        execute(load_run(None, [*fixed, "evaluate.forgetting=no", "evaluate.best=no"]), reporter=Reporter(quiet=True))
    for name, objective in (("stars", {"kind": "classify", "problem": "single", "labels": ["bad", "fair", "good"]}), ("sft", "sft")):
        policy, goal = build.assemble(run_of(bases["llama"], objective), opened(bases["llama"]))
        tiny.randomise(policy.trained(), std=0.3)
        adapter.save(policy, folder / name, objective=goal)
    (folder / "mine.py").write_text(
        "def reward(prompt, answer, row):\n    row.clear()\n    return len(answer)\n\n\n"
        "def kind(prompt, answer, row):\n    return float('fine' in answer) + len(row['refs']) + len(prompt)\n\n\n"
        "def nan(prompt, answer, row):\n    return float('nan')\n\n\n"
        "def none(prompt, answer, row):\n    return None\n\n\ndef broken(prompt, answer, row):\n    raise KeyError('no')\n"
    )
    return folder


def opened(folder):
    return build.load(str(folder), precision=Precision())


def run_of(base, objective, method="lora"):
    return Run(model={"id": str(base)}, objective=objective, method=method, precision=Precision(), place={"kind": "one", "on": "cpu"})


@pytest.fixture(scope="module")
def policy(home):
    made, _ = build.assemble(run_of(home / "llama", {"kind": "ppo", "rewards": {"bleu": 1.0}}), opened(home / "llama"))
    return made


def answer(policy, said, prompt="Is this fine film?", refs=(), stop=True, **more):
    """An answer as it would have been sampled."""
    tokenizer = policy.base.tokenizer
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer(said, add_special_tokens=False)["input_ids"] + ([tokenizer.convert_tokens_to_ids("<end>")] if stop else [])
    asked = np.array(render_prompt(messages, tokenizer), dtype=np.int32)
    task = {"prompt": messages, "tools": None, "refs": list(refs), **more}
    row = Row(asked, np.zeros(len(asked), dtype=bool), "data.jsonl:7", {"task": task})
    return Answer(row, ids, [-1.0] * len(ids), "stop" if stop else "length", said)


def judged(source, policy, answers):
    return open_source(str(source), policy, "reward9")(answers)


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_in_logs_are_short_and_different():
    names = [
        "runs/a/reward",
        "./mine.py",
        "./mine.py:kind",
        "mine2.py",
        "runs/stars/adapter:good",
        "bleu",
        'exact_match after="a/b:c"',
        "x/same",
        "y/same",
        "runs/z/",
    ]
    assert list(short_names(names).values()) == [
        "reward", "mine", "mine:kind", "mine2", "stars:good", "bleu", 'exact_match after="a/b:c"', "x/same", "y/same", "z",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["blue", "runs/nothing", "./nothing", "nothing:good", ""])
def test_what_is_no_source_is_refused_with_what_is(name, policy):
    with pytest.raises(LuthierError, match=r"is no source of reward; accepted are a folder.*\(bleu, .*exact_match.*\), or your own ./file.py"):
        open_source(name, policy, "reward9")


# --- functions -------------------------------------------------------------------------------------------------------


def test_a_function_sees_the_prompt_the_answer_and_the_record(home, policy):
    answers = [answer(policy, "so fine", refs=["a", "b"]), answer(policy, "no")]
    assert judged(f"{home}/mine.py:kind", policy, answers) == [4.0, 1.0]
    assert judged(f"{home}/mine.py", policy, answers) == [7.0, 2.0]
    assert answers[0].prompt.extras["task"]["refs"] == ["a", "b"]  # what a function does to its row reaches no other
    (home / "seen.py").write_text("import json\n\n\ndef reward(*seen):\n    open(__file__ + '.json', 'w').write(json.dumps(seen))\n    return 1\n")
    assert judged(f"{home}/seen.py", policy, [answer(policy, "yes", level=3)]) == [1.0]
    prompt, said, row = json.loads((home / "seen.py.json").read_text())
    assert prompt == [{"role": "user", "content": "Is this fine film?"}] == row["prompt"] and said == "yes" and row["level"] == 3


def test_a_task_of_ones_own_rewards_by_its_first_score_or_by_the_one_that_is_named(home, policy):
    (home / "own.py").write_text(
        "class Task:\n    def rows(self, split):\n        return []\n\n"
        "    def score(self, row, answer):\n        return {'length': len(answer), 'refs': len(row['refs'])}\n"
    )
    answers = [answer(policy, "so fine", refs=["a", "b"]), answer(policy, "no", refs=["a"])]
    assert judged(f"{home}/own.py", policy, answers) == judged(f"{home}/own.py:Task", policy, answers) == [7.0, 2.0]
    assert judged(f"{home}/own.py:refs", policy, answers) == [2.0, 1.0]
    with pytest.raises(LuthierError, match="own.py:nothing': the task scored .* with length, refs, so it cannot reward"):
        judged(f"{home}/own.py:nothing", policy, answers)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nan", r"reward .*mine.py:nan: gave nan for an answer to data.jsonl:7: 'hello'; a finite number is needed"),
        ("none", r"mine.py: none failed on an answer to data.jsonl:7: TypeError: float\(\) argument"),
        ("broken", r"mine.py: broken failed on an answer to data.jsonl:7: KeyError: 'no'"),
        ("missing", r"mine.py: defines no function missing and no Task; it defines reward, kind, nan, none, broken; name a function"),
    ],
)
def test_what_is_wrong_with_a_function_is_one_sentence(function, message, home, policy):
    with pytest.raises(LuthierError, match=message):
        Judge({f"{home}/mine.py:{function}": 1.0}, (), policy)([answer(policy, "hello")])


def test_a_file_that_is_not_there_or_does_not_import_is_named(home, policy):
    (home / "bad.py").write_text("import nothing_of_the_kind\n")
    with pytest.raises(LuthierError, match=r"bad.py: does not import: ModuleNotFoundError: No module named 'nothing_of_the_kind'"):
        open_source(f"{home}/bad.py", policy, "reward9")
    with pytest.raises(LuthierError, match=r"there is no file .*other.py; paths are read from the current folder"):
        open_source(f"{home}/other.py", policy, "reward9")


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_tasks_score_against_the_references_of_the_prompt(policy):
    answers = [answer(policy, "It is 1,200.", refs=["it is 1200", "no"]), answer(policy, "so: 7", refs=["7"])]
    assert judged("exact_match", policy, answers) == [1.0, 0.0]
    assert judged("exact_match lowercase=no", policy, answers) == [0.0, 0.0] and judged("exact_match lowercase=false", policy, answers) == [0.0, 0.0]
    marked = [answer(policy, "well, so: 7", refs=["why? so: 7"]), answer(policy, "7", refs=["so: 7"])]
    assert judged('exact_match after="so: "', policy, marked) == [1.0, 0.0] and judged("exact_match after=so:", policy, marked) == [1.0, 0.0]
    assert judged("bleu", policy, [answer(policy, "a b c d", refs=["a b c d"])]) == pytest.approx([100.0])


def test_one_score_of_a_task_is_named_after_a_colon(policy):
    facts = "instrument: viola; wood: maple"
    answers = [answer(policy, "A viola of maple.", facts), answer(policy, "A viola of spruce.", facts)]
    assert judged("instruments", policy, answers) == judged("instruments:facts", policy, answers) == [1.0, 0.5]
    assert judged("instruments:all_facts", policy, answers) == [1.0, 0.0]
    with pytest.raises(LuthierError, match=r"'instruments:none': the task scored data.jsonl:7 with facts, all_facts, so it cannot reward this answer"):
        judged("instruments:none", policy, answers)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_match", r"rewards: 'exact_match' cannot score an answer to data.jsonl:7: a row to be scored needs refs"),
        ("exact_match aftr=x", "aftr: unknown key; did you mean after"),
        ("exact_match after", "'after' is no setting; say name=value"),
        ('exact_match after="x', "no closing quotation; settings are quoted as in a shell"),
    ],
)
def test_a_task_that_cannot_reward_says_why(name, message, policy):
    with pytest.raises(LuthierError, match=message):
        judged(name, policy, [answer(policy, "x")])


# --- models ----------------------------------------------------------------------------------------------------------


def alone(home, name, answers, precision="float32"):
    items = [Judged((Chat([*a.prompt.extras["task"]["prompt"], {"role": "assistant", "content": a.text}]),), 1) for a in answers]
    return [s[0] for s in rewards(opening.load(home / "runs" / name, precision=precision), items)]


def test_a_reward_model_of_the_same_base_is_a_voice_of_it(home, policy):
    answers = [answer(policy, s) for s in (POLITE, RUDE, "it is slow and dull")]
    before = set(policy.voices)
    source = open_source(str(home / "runs" / "llama"), policy, "reward1")
    assert set(policy.voices) - before == {"reward1"} and policy.voices["reward1"].base.model is policy.lm
    scores = source(answers)
    assert scores == pytest.approx(alone(home, "llama", answers), abs=1e-4) and scores[0] > scores[1]
    assert source([answer(policy, POLITE, stop=False)])[0] != scores[0]  # it reads what was sampled: the end of the turn is missing here
    long = answer(policy, POLITE)
    long.ids = long.ids * 200
    with pytest.raises(LuthierError, match=r"reads 512 tokens, and a prompt with its answer has \d+"):
        source([long])


def test_a_reward_model_of_another_base_reads_the_text(home, policy):
    answers = [answer(policy, s) for s in (POLITE, "", RUDE)]
    source = open_source(str(home / "runs" / "bert" / "adapter"), policy, "reward2")
    assert "reward2" not in policy.voices
    scores = source(answers)
    expected = alone(home, "bert", [answers[0], answers[2]], "auto")
    assert [scores[0], scores[2]] == pytest.approx(expected, abs=1e-5) and scores[0] > scores[2]
    assert scores[1] == min(expected)  # nothing was said, which is as bad as the worst


@pytest.mark.parametrize("method", ["full", "partial"])
def test_training_the_base_itself_does_not_move_the_reward(method, home, tmp_path):
    """A reward model that shares weights with the policy would otherwise be trained to please itself."""
    trained, goal = build.assemble(run_of(home / "llama", {"kind": "grpo", "rewards": {"bleu": 1.0}}, method), opened(home / "llama"))
    source = open_source(str(home / "runs" / "llama"), trained, "reward0")
    answers = [answer(trained, s) for s in (POLITE, RUDE)]
    before = source(answers)
    tiny.randomise(trained.delta.params, std=0.1)
    assert source(answers) == before and ("reward0" in trained.voices) == (method == "partial")
    adapter.save(trained, tmp_path / "saved", objective=goal)


def test_a_classifier_rewards_the_log_odds_of_a_label(home, policy):
    answers = [answer(policy, "a fine story"), answer(policy, "dull"), answer(policy, "")]
    text = answer(policy, " upon a time")
    text.prompt = Row(text.prompt.ids, text.prompt.train, "t:1", {"task": {"prompt": "Once", "refs": []}})
    found = predict_texts(opening.load(home / "stars", precision="float32"), [Labelled((t,), None) for t in ("a fine story", "dull", " ", "Once upon a time")])
    odds = [math.log(f["probabilities"]["good"] / (1 - f["probabilities"]["good"])) for f in found]
    assert judged(f"{home}/stars:good", policy, [*answers, text]) == pytest.approx(odds, abs=1e-4)
    for name in (f"{home}/stars", f"{home}/stars:best"):
        with pytest.raises(LuthierError, match="say which label is rewarded, .*stars:LABEL; its labels are bad, fair, good"):
            open_source(name, policy, "reward3" if name.endswith("best") else "reward4")


def test_folders_that_score_nothing_are_refused(home, policy):
    with pytest.raises(LuthierError, match="has no head, so it scores nothing"):
        open_source(str(home / "sft"), policy, "reward5")
    with pytest.raises(LuthierError, match="was not trained to score answers"):
        open_source(str(home / "bert"), policy, "reward6")
    with pytest.raises(LuthierError, match="a reward model has no labels; name its folder alone"):
        open_source(f"{home}/runs/llama:good", policy, "reward7")


# --- the judge -------------------------------------------------------------------------------------------------------


def test_sources_are_weighted_and_added_and_what_is_watched_is_not(home, policy):
    judge = Judge({f"{home}/mine.py": 0.5, "exact_match": -2.0}, ("bleu", f"{home}/mine.py:kind"), policy)
    answers = [answer(policy, "so fine", refs=["so fine"]), answer(policy, "no", refs=["so fine"])]
    for _ in range(2):  # judged again, nothing adds up
        judge(answers)
        assert answers[0].scores == {"mine": 7.0, "exact_match": 1.0, "watch_bleu": pytest.approx(100.0), "watch_mine:kind": 3.0}
        assert [a.score for a in answers] == [0.5 * 7 - 2, 0.5 * 2]


# --- trust -----------------------------------------------------------------------------------------------------------


def verdict(home, policy, name="llama", pairs=(), folder=None):
    source = str(folder or home / "runs" / name)
    run = run_of(home / "llama", {"kind": "ppo", "rewards": {source: 1.0}, "pairs": list(pairs)})
    judge = Judge.__new__(Judge)
    judge.names = short_names([source])
    return proven(source, judge, run)


def test_a_reward_model_that_tells_answers_apart_is_trusted(home, policy):
    said = verdict(home, policy)
    assert said.startswith("llama: 1.000 [0.758, 1.000] n=12 of held-out pairs in order (its own training's held-out pairs)")


@pytest.mark.parametrize(("name", "kind"), [("llama", "decoder"), ("bert", "encoder")])
def test_it_is_measured_on_the_pairs_that_the_run_names(name, kind, home, policy, monkeypatch):
    """As rows of the reward model's own kind, which may be another than the policy's."""
    honest, forms = luthier.feedback.rewards.read_data, []
    monkeypatch.setattr(luthier.feedback.rewards, "read_data", lambda *a, **how: (forms.append(how["form"].kind), honest(*a, **how))[1])
    assert f"{name}: 1.000 [0.758, 1.000] n=12" in verdict(home, policy, name, [str(home / "pairs.jsonl")])
    with pytest.raises(
        LuthierError, match=r"puts 0\.000 \[0\.000, 0\.242\] n=12 of held-out pairs in order \(.*swapped.jsonl\), which is no better than chance"
    ):
        verdict(home, policy, name, [str(home / "swapped.jsonl")])
    assert forms == [kind, kind]


def test_one_of_which_little_or_nothing_is_known_is_not(home, policy, tmp_path):
    ours = json.loads((home / "runs" / "llama" / "adapter" / adapter.OURS).read_text())
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in (home / "runs" / "llama" / "adapter").iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    ours["training"]["after"]["scores"]["accuracy"] |= {"value": 0.62, "low": 0.49, "high": 0.71}
    (copied / adapter.OURS).write_text(json.dumps(ours))
    with pytest.raises(LuthierError, match=r"puts 0\.620 \[0\.490, 0\.710\] n=12 .* no better than chance, so the policy would learn noise"):
        verdict(home, policy, folder=copied)
    ours["training"]["after"]["scores"]["accuracy"]["low"] = 0.51
    (copied / adapter.OURS).write_text(json.dumps(ours))
    assert "0.620" in verdict(home, policy, folder=copied)
    del ours["training"]
    (copied / adapter.OURS).write_text(json.dumps(ours))
    with pytest.raises(LuthierError, match=r"nothing is known of how well .*copied tells held-out answers apart; name pairs .* objective.pairs=\[FILE\]"):
        verdict(home, policy, folder=copied)


def test_other_sources_need_no_proof(home, policy):
    run = run_of(home / "llama", {"kind": "ppo", "rewards": {"bleu": 1.0}})
    judge = Judge({"bleu": 1.0}, (), policy)
    assert [proven(n, judge, run) for n in ("bleu", f"{home}/mine.py", f"{home}/stars:good", f"{home}/stars")] == ["", "", "", ""]
    assert replace(run, seed=1).objective.check_rewards
