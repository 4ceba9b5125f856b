"""Runs that learn from their own answers, end to end: what they log, learn, keep and stop at; and the watch for rewards that are gamed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sampled
import tiny
from luthier import build
from luthier.core import LuthierError
from luthier.feedback.rollouts import Watch, draw
from luthier.objectives.grpo import Objective as Grpo
from luthier.objectives.ppo import Objective as Ppo
from luthier.objectives.ppo import collapse
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.saving import checkpoint
from luthier.settings.config import load_run

QUIET = Reporter(quiet=True)
HEAD = "{kind: lora, targets: [all, head]}"  # a model of random weights has little to say but by its head
MINE = '''
import os, signal

def small(prompt, answer, row):
    """The share of small letters."""
    return sum(c.islower() for c in answer) / max(1, len(answer))

def short(prompt, answer, row):
    return 1.0 if len(answer) < 20 else 0.0

def deadly(prompt, answer, row, calls=[0]):
    calls[0] += 1
    if calls[0] == int(os.environ.get("KILL_AT_ANSWER", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    return small(prompt, answer, row)
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, prompts, text, and reward functions."""
    folder = tmp_path_factory.mktemp("rollouts")
    tiny.folder(folder / "base")
    asked = [json.dumps({"prompt": f"{a} {b}?"}) for a in ("who", "what", "where") for b in ("runs", "sews", "sings", "is it", "was")]
    (folder / "prompts.jsonl").write_text("\n".join(asked))
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(f"A story, number {i}, about nothing." for i in range(20)))
    (folder / "mine.py").write_text(MINE)
    return folder


def settings(home, out, objective, *more, model=None):
    """A run on the tiny base."""
    fixed = [
        f"model={model or home / 'base'}",
        f"data.train={home / 'prompts.jsonl'}",
        "data.validation_share=0.2",
        f"out={out}",
        "name=r",
        "precision=float32",
    ]
    own = ["optim.lr=1e-2", "optim.schedule=constant", "evaluate.every_steps=99", "evaluate.samples=1", "evaluate.sample_tokens=4", "evaluate.forgetting=no"]
    return load_run(None, [*fixed, "place.on=cpu", *own, f"objective={objective}", *more])


def lines(folder, event):
    found = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x for x in found if x["event"] == event]


def reward(home, name="small"):
    return f"rewards: {{'{home}/mine.py:{name}': 1.0}}"


# --- runs ------------------------------------------------------------------------------------------------------------


def test_ppo_on_the_embedded_base_logs_what_it_does(home, tmp_path):
    said = []
    talking = Reporter(quiet=True)
    talking.note = said.append
    goal = f"{{kind: ppo, {reward(home)}, prompts: 4, max_new: 12, epochs: 1, minibatches: 2}}"
    result = execute(settings(home, tmp_path, goal, "optim.steps=5", "optim.lr=2e-3", model="fiddle"), reporter=talking)
    folder = tmp_path / "r"
    rollouts, steps = lines(folder, "rollout"), lines(folder, "train")
    assert [(x["step"], x["rollout"]) for x in rollouts] == [(1, 1), (3, 2), (5, 3)] and len(steps) == 5
    assert all({"reward", "kl", "entropy", "answer_tokens", "stopped", "repetition", "sampling_gap", "kl_coefficient", "best"} <= set(x) for x in rollouts)
    assert max(rollouts[0]["kl"], rollouts[1]["kl"]) < 1e-6 < 1e-4 < rollouts[2]["kl"]  # in the first only the value learned
    assert all(x["sampling_gap"] < 1e-4 and 1 <= x["answer_tokens"] <= 12 for x in rollouts)
    assert all(("loss_tokens" in x) == (x["step"] > 2) and "value" in x for x in steps)
    written = json.loads((folder / "result.json").read_text())
    for when in ("before", "after"):
        assert (
            set(written[when]["scores"]) == {"reward", "answer_tokens", "kl"} and written[when]["scores"]["reward"]["n"] == 3 and written[when]["loss"] is None
        )
    assert written["before"]["scores"]["kl"]["value"] < 1e-6 < 1e-4 < written["after"]["scores"]["kl"]["value"]
    assert result.after.scores["reward"].value != result.before.scores["reward"].value and (folder / "rollouts.png").stat().st_size > 10_000
    assert any("one base of 29.4 MB in memory for policy, reference and value, which add 0.5 MB; 3 copies of the model would take 88.1 MB" in s for s in said)
    assert any(s.startswith("rollout 1: reward ") for s in said)


def test_the_best_held_out_reward_is_kept_and_patience_goes_by_it(home, tmp_path):
    goal = f"{{kind: grpo, {reward(home)}, prompts: 4, samples: 4, max_new: 6, kl: 0}}"
    more = ["optim.steps=12", "evaluate.every_steps=1", "evaluate.patience=3", "optim.lr=0.2", "evaluate.samples=0"]
    result = execute(settings(home, tmp_path, goal, *more), reporter=QUIET)
    seen = lines(tmp_path / "r", "evaluation")
    best = max(seen, key=lambda x: x["reward"])
    assert result.best_step == best["step"] and result.after.scores["reward"].value == pytest.approx(best["reward"])
    assert len(seen) == min(12, best["step"] + 3) < 12 and result.stopped == "no better held-out reward in 3 evaluations"
    last = execute(settings(home, tmp_path / "last", goal, *more, "evaluate.best=no"), reporter=QUIET)
    assert last.best_step == last.steps if hasattr(last, "steps") else last.best_step == len(seen)


def test_grpo_weighs_two_functions_and_watches_a_third(home, tmp_path):
    sources = f"rewards: {{'{home}/mine.py:small': 2.0, '{home}/mine.py:short': -0.5}}, watch: ['{home}/mine.py:deadly']"
    goal = f"{{kind: grpo, {sources}, prompts: 2, samples: 4, max_new: 12}}"
    execute(settings(home, tmp_path, goal, "optim.steps=2", "optim.lr=2e-3", model="fiddle"), reporter=QUIET)
    rollouts = lines(tmp_path / "r", "rollout")
    assert len(rollouts) == 2
    for x in rollouts:
        assert (
            x["reward"] == pytest.approx(2 * x["reward_mine:small"] - 0.5 * x["reward_mine:short"], abs=1e-6)
            and x["watch_mine:deadly"] == x["reward_mine:small"]
        )
        assert 0 <= x["groups_alike"] <= 1
    after = json.loads((tmp_path / "r" / "result.json").read_text())["after"]["scores"]
    assert {"reward", "reward_mine:small", "reward_mine:short", "watch_mine:deadly", "answer_tokens", "kl"} == set(after)


@pytest.mark.parametrize(
    ("objective", "method", "more"),
    [
        ("{kind: grpo, REWARD, prompts: 4, samples: 8, max_new: 8, epochs: 2, kl: 0.01}", HEAD, ("optim.steps=24", "optim.lr=0.008")),
        ("{kind: ppo, REWARD, prompts: 8, samples: 4, max_new: 8, epochs: 2, minibatches: 2, kl: 0.001}", HEAD, ("optim.steps=32", "optim.lr=0.02")),
        ("{kind: ppo, REWARD, prompts: 8, samples: 4, max_new: 8, epochs: 2, minibatches: 2, kl: 0.001}", "full", ("optim.steps=32",)),
    ],
    ids=["grpo", "ppo", "ppo-full"],
)
def test_what_is_rewarded_becomes_more(objective, method, more, home, tmp_path):
    """A model of random weights writes a small letter once in ten times: signs, shifts and masks all have to be right for it to write more of them."""
    execute(settings(home, tmp_path, objective.replace("REWARD", reward(home)), f"method={method}", *more), reporter=QUIET)
    rewards = [x["reward"] for x in lines(tmp_path / "r", "rollout")]
    assert np.mean(rewards[-3:]) > 2 * np.mean(rewards[:3]), rewards


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_penalty_leads_a_policy_back_to_its_reference(estimator, home, tmp_path, monkeypatch):
    """With nothing to gain, from a policy that is far away. k3 inside a reward does not (objectives/ppo.py), which is why it is not what is used."""
    honest = build.assemble

    def elsewhere(*args, **how):
        policy, goal = honest(*args, **how)
        tiny.randomise(policy.delta.params, std=0.15)
        return policy, goal

    monkeypatch.setattr(build, "assemble", elsewhere)
    (home / "nothing.py").write_text("def reward(prompt, answer, row):\n    return 0.0\n")
    goal = f"{{kind: ppo, rewards: {{'{home}/nothing.py': 1.0}}, prompts: 12, samples: 4, max_new: 8, epochs: 1, minibatches: 2, value_warmup: 0, kl: 1, "
    execute(settings(home, tmp_path, goal + f"kl_estimator: {estimator}}}", f"method={HEAD}", "optim.steps=10"), reporter=QUIET)
    kls = [x["kl"] for x in lines(tmp_path / "r", "rollout")]
    assert kls[0] > 1.0 and (kls[-1] < 0.5 * kls[0] if estimator == "k1" else kls[-1] > kls[0]), kls


# --- going on --------------------------------------------------------------------------------------------------------

STEPS = 11
KILLED = """
import os, signal
from luthier import optim
from luthier.cli import main
honest, calls = optim.Optimizer.step, [0]

def step(self):
    calls[0] += 1
    if calls[0] == int(os.environ.get("KILL_AT_STEP", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    honest(self)

optim.Optimizer.step = step
import sys
sys.exit(main(sys.argv[1:]))
"""


def test_sigkill_and_resume_give_the_same_bits(home, tmp_path, whole):
    """Killed in the middle of an update, resumed, killed while the next rollout is judged, resumed. PPO with a value of its own, an adaptive coefficient,
    running scales, dropout and text beside: all of it has to come back."""
    for arguments, variable, at, reached in (
        (_killed(home, tmp_path), "KILL_AT_STEP", 7, 6),
        (["--resume", str(tmp_path / "r")], "KILL_AT_ANSWER", 2, 8),
    ):
        command, env = [sys.executable, "-c", KILLED, "train", *arguments], {**os.environ, variable: str(at)}
        process = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert checkpoint.steps(tmp_path / "r")[-1] == reached
    execute(load_run(str(tmp_path / "r" / "run.yaml")), resume=tmp_path / "r", reporter=QUIET)
    mine, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (tmp_path / "r", whole))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    last = [load_file(f / "checkpoints" / f"step-{STEPS}" / "state.safetensors") for f in (tmp_path / "r", whole)]
    assert last[0].keys() == last[1].keys() and all(torch.equal(v, last[1][k]) for k, v in last[0].items())
    timed = ("sampling_seconds", "judging_seconds", "reading_seconds", "time")
    same = [[{k: v for k, v in x.items() if k not in timed} for x in lines(f, "rollout")] for f in (tmp_path / "r", whole)]
    assert same[0] == same[1] and len(same[0]) == 3
    losses = [[(x["step"], x["loss"]) for x in lines(f, "train")] for f in (tmp_path / "r", whole)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def _killed(home, out):
    goal = f"{{kind: ppo, {reward(home, 'deadly')}, prompts: 4, max_new: 8, epochs: 2, minibatches: 2, kl_target: 0.5, kl_horizon: 50, ptx: 0.3, "
    goal += f"ptx_data: ['{home / 'text.txt'}'], ptx_tokens: 60}}"
    fixed = [
        str(home / "prompts.jsonl"),
        "--model",
        str(home / "base"),
        "data.validation_share=0.2",
        f"out={out}",
        "name=r",
        "precision=float32",
        "place.on=cpu",
    ]
    own = [f"optim.steps={STEPS}", "optim.lr=1e-2", "method.dropout=0.1", "evaluate.every_steps=99", "checkpoint.every_steps=1", "evaluate.samples=0"]
    return [*fixed, *own, "evaluate.forgetting=no", f"objective={goal}"]


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """The folder of the run that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole")
    _, _, model, *rest = _killed(home, out)
    execute(load_run(None, [f"data.train={home / 'prompts.jsonl'}", f"model={model}", *rest]), reporter=QUIET)
    return out / "r"


def test_text_is_learned_beside_the_rewards_once_the_value_has_warmed_up(whole):
    steps = lines(whole, "train")
    assert [x["units_text"] > 0 for x in steps] == [x["units_tokens"] > 0 for x in steps] == [False] * 4 + [True] * 7
    assert all(x["loss_text"] > 0 for x in steps[4:]) and "loss_text" not in steps[0]


def test_an_adaptive_coefficient_follows_the_divergence(whole):
    rollouts = lines(whole, "rollout")
    first, second, third = (x["kl_coefficient"] for x in rollouts)
    assert first == 0.05 and second == pytest.approx(0.05 * (1 - 0.2 * 4 / 50)) and (third > second) == (rollouts[1]["kl"] > 0.5)
    goal = Ppo(kl=0.2, kl_target=1.0, kl_horizon=100)
    for off, direction in ((3.0, 1), (0.01, -1)):
        answers, state = sampled.answers(sampled.prompts(5)), {}
        for a in answers:
            a.tokens["reference"] = a.tokens["logp"] - off
        goal.rows(answers, state, start=None)
        assert np.sign(state["kl"] - 0.2) == direction
        _, facts = goal.rows(answers, state, start=None)
        assert facts["kl_coefficient"] == pytest.approx(0.2 * (1 + direction * 0.2 * 10 / 100))
    state = {}
    Ppo(kl=0.2).rows(sampled.answers(sampled.prompts(5)), state, start=None)
    assert state["kl"] == 0.2


# --- stopping --------------------------------------------------------------------------------------------------------


def test_a_policy_that_collapses_is_stopped_with_the_reason(home, tmp_path):
    goal = f"{{kind: grpo, {reward(home)}, prompts: 4, samples: 4, max_new: 8, kl: 0.01, stop_kl: 0.5}}"
    warned = []
    said = Reporter(quiet=True)
    said.warn = warned.append
    result = execute(settings(home, tmp_path, goal, f"method={HEAD}", "optim.steps=60", "optim.lr=0.05"), reporter=said)
    assert result.steps < 60 and "nats an answer away from its reference, more than stop_kl=0.5; raise objective.kl or lower optim.lr" in result.stopped
    assert [w for w in warned if w.startswith("stopping: ")] == [f"stopping: {result.stopped}"]
    assert checkpoint.steps(tmp_path / "r")[-1] == result.steps and lines(tmp_path / "r", "rollout")[-1]["kl"] > 0.5 and (tmp_path / "r" / "adapter").is_dir()


def test_collapse_is_told_from_the_first_rollout():
    first = {"kl": 0.0, "entropy": 3.0, "answer_tokens": 40.0}
    bounds = {"kl": 10.0, "entropy": 0.1, "length": 0.25}
    assert collapse(first, first, **bounds) == ""
    assert collapse({"kl": 9.9, "entropy": 0.31, "answer_tokens": 10.5}, first, **bounds) == ""
    assert "10.1 nats an answer" in collapse(first | {"kl": 10.1}, first, **bounds)
    assert "entropy fell to 0.290" in collapse(first | {"entropy": 0.29}, first, **bounds)
    assert "shrank to 9.9 tokens from 40.0" in collapse(first | {"answer_tokens": 9.9}, first, **bounds)
    assert collapse({"kl": 99.0, "entropy": 0.0, "answer_tokens": 1.0}, first, kl=0, entropy=0, length=0) == ""
    assert collapse({"entropy": 2.0, "answer_tokens": 30.0}, {"entropy": 2.0, "answer_tokens": 30.0}, **bounds) == ""  # no reference is read


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("{kind: ppo}", r"objective.rewards: names nothing; say what is rewarded"),
        ("{kind: grpo, rewards: {bleu: 1.0}, samples: 1}", "samples"),
        ("{kind: grpo, rewards: {bleu: 1.0}, baseline: leave_one_out}", "set scale=no with baseline=leave_one_out"),
        ("{kind: ppo, rewards: {bleu: 1.0}, ptx: 0.5}", "ptx_data: must name text"),
        ("{kind: ppo, rewards: {bleu: 1.0}, prompts: 2, minibatches: 3}", r"minibatches: 3 steps a pass need at least as many answers, and a rollout has 2"),
        ("{kind: ppo, rewards: {bleu: 1.0}, max_new: 600}", "leave no room for a prompt in the 512 positions"),
        ("{kind: ppo, rewards: {bleu: 1.0}, prompts: 4, minibatches: 2, epochs: 1}", "rewards: 'bleu' cannot score an answer to .*prompts.jsonl:.* needs refs"),
    ],
)
def test_what_cannot_be_learned_from_is_said_before_anything_is_written(objective, message, home, tmp_path):
    with pytest.raises(LuthierError, match=message):
        execute(settings(home, tmp_path, objective, "optim.steps=6"), reporter=QUIET)
    assert not (tmp_path / "r").exists()


# --- the watch -------------------------------------------------------------------------------------------------------


def series(n=30, seed=0, **rise):
    """Facts of rollouts that move by so much from the first to the last, with some noise."""
    rng = np.random.default_rng(seed)
    about = {"reward": 1.0, "watch_judge": 1.0, "answer_tokens": 20.0, "repetition": 0.1, "reward_by_length": 0.0}
    noise = {"reward": 0.1, "watch_judge": 0.1, "answer_tokens": 1.0, "repetition": 0.01, "reward_by_length": 0.05}
    return [
        {
            "rollout": i + 1,
            "reward_std": 0.2,
            "kl": 0.1,
            "entropy": 2.0,
            **{k: v + rise.get(k, 0.0) * i / n + noise[k] * rng.normal() for k, v in about.items()},
        }
        for i in range(n)
    ]


def warnings(rollouts):
    watch = Watch()
    return [w for facts in rollouts for w in watch.see(facts)]


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ({"reward": 2.0, "watch_judge": -1.0}, r"the reward rose and judge fell, from 1\.\d* to 0\.\d*: the policy is learning to please the reward only"),
        ({"reward": 2.0, "answer_tokens": 30.0, "reward_by_length": 1.2}, "the reward rose and so did length, from .* it may be length that pays"),
        ({"reward": 2.0, "repetition": 0.6}, "the reward rose and answers repeat themselves"),
    ],
)
def test_a_reward_that_is_gamed_is_warned_of_once(moves, message):
    (said,) = warnings(series(60, **moves))
    assert re.search(message, said) and re.match(r"rollout \d+: ", said)
    assert warnings(series(60, **{k: v for k, v in moves.items() if k != "reward"})) == []  # the reward itself has to rise
    assert warnings(series(60, reward=2.0)) == []


def test_a_run_that_goes_on_has_seen_what_came_before(tmp_path):
    gamed = series(60, reward=3.0, watch_judge=-2.0)
    whole, logged = Watch(), tmp_path / "metrics.jsonl"
    assert [bool(whole.see(facts)) for facts in gamed].count(True) == 1
    said = [{"event": "train", "step": 1, "loss": 0.1}, *({"event": "rollout", "step": 4 * i, **facts} for i, facts in enumerate(gamed, start=1))]
    logged.write_text("\n".join(map(json.dumps, said)))
    for done in (8, 50):
        later = Watch.before(logged, 4 * done + 2)
        assert [r["rollout"] for r in later.rollouts] == list(range(1, done + 1)) and later.raised == ({"watch_judge"} if done == 50 else set())
        assert sum(len(later.see(facts)) for facts in gamed[done:]) == (done == 8)
    assert Watch.before(tmp_path / "nothing", 9).rollouts == []


def test_every_alarm_is_raised_once_and_none_early():
    said = warnings(series(80, reward=3.0, watch_judge=-2.0, answer_tokens=40.0, reward_by_length=1.5, repetition=0.8))
    assert len(said) == 3 and all(int(w.split()[1][:-1]) >= Watch.FEWEST for w in said)
    assert warnings(series(5, reward=30.0, watch_judge=-30.0)) == []


def test_noise_raises_no_alarm():
    raised = [bool(warnings(series(60, seed, reward=rise))) for seed in range(25) for rise in (0.0, 2.0)]
    assert sum(raised) <= 1, raised


def test_the_picture_shows_every_rollout(tmp_path):
    assert draw(series(12, reward=1.0), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    alone = [{k: v for k, v in x.items() if k not in ("kl", "watch_judge")} for x in series(3)]
    assert draw(alone, tmp_path / "b.png") and (tmp_path / "b.png").stat().st_size > 5000
    with pytest.raises(LuthierError, match="there is no rollout to draw"):
        draw([], tmp_path / "c.png")


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw(series(3), tmp_path / "a.png") and not (tmp_path / "a.png").exists()


def test_a_group_whose_answers_are_all_alike_is_counted():
    answers = sampled.answers(sampled.prompts(4), 2)
    for a in answers[:2]:
        a.score = 1.0
    assert Grpo(samples=2).rows(answers, {}, start=None)[1]["groups_alike"] == 0.25


@pytest.mark.parametrize("goal", ["grpo, prompts: 2, samples: 2, kl: 0", "ppo, prompts: 4, epochs: 1, minibatches: 2, kl: 0"])
def test_rewards_that_say_nothing_yet_do_not_end_a_run(goal, home, tmp_path):
    """Where every answer is equally bad nothing moves, and that is no fault of the settings."""
    (home / "zero.py").write_text("def reward(prompt, answer, row):\n    return 0.0\n")
    run = settings(home, tmp_path, f"{{kind: {goal}, rewards: {{'{home}/zero.py': 1.0}}, max_new: 4}}", "optim.steps=5", "optim.weight_decay=0")
    assert execute(run, reporter=QUIET).steps == 5
