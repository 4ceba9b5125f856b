"""PPO and GRPO on real (tiny) models: losses and gradients made slowly, one answer and one token at a time, from transformers' own logits; and TRL's GRPO.

TRL has no PPO any more (1.16), so its equations are only compared with the slow version.
"""

from __future__ import annotations

import inspect
import math
import statistics
import textwrap
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import luthier.core as core
import sampled
import tiny
from luthier import voices
from luthier.core import IGNORE, answered_batch
from luthier.methods.lora import Method
from luthier.nn import rewarded
from luthier.objectives.grpo import Objective as Grpo
from luthier.objectives.ppo import Objective as Ppo
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.train import train

FAMILIES = ["llama", "gemma2", "t5"]
LAID_OUT = [("llama", True), ("llama", False), ("gemma2", True), ("gemma2", False), ("t5", False)]  # family, packed
SAMPLES = 3


def policy_of(family, value=None):
    """A policy whose delta does something, with a value voice ("own", "shared") where one is asked for."""
    base, method = tiny.base(family), Method()
    policy = Policy(base, method.attach(base, "default"), method=method).eval()
    tiny.randomise(policy.delta.params, 0, std=0.2)
    if value is not None:
        voices.add_value(policy, method, shared=value == "shared")
        tiny.randomise({k: p for k, p in policy.trained().items() if k.startswith("value.")}, 1, std=0.2)
    return policy


def forward(policy, answer, route="default"):
    """What transformers' own forward gives for one answer alone: logits (n, V) and last hidden states (n, D) of the positions that say its n tokens."""
    policy.use(route)
    prompt, ids, n = answer.prompt.ids.tolist(), list(answer.ids), len(answer.ids)
    if policy.base.anatomy.kind == "encoder_decoder":
        begun = torch.tensor([[policy.base.anatomy.decoder_start, *ids[:-1]]])
        out = policy.lm(input_ids=torch.tensor([prompt]), decoder_input_ids=begun, use_cache=False, output_hidden_states=True)
        states = out.decoder_hidden_states
    else:
        out = policy.lm(input_ids=torch.tensor([prompt + ids[:-1]]), use_cache=False, output_hidden_states=True)
        states = out.hidden_states
    policy.use("default")
    return out.logits[0, -n:], states[-1][0, -n:]


def said(policy, answer, temperature=1.0):
    """(n,) log p of an answer's tokens and (n,) entropies, at a temperature, with gradients."""
    logp_nV = (forward(policy, answer)[0].double() / temperature).log_softmax(-1)
    return logp_nV[torch.arange(len(answer.ids)), torch.tensor(answer.ids)], -(logp_nV.exp() * logp_nV).sum(-1)


def value_of(policy, answer):
    """(n,) what the value says before each token of an answer."""
    voice = policy.voices["value"]
    states = forward(policy, answer, voice.route)[1]
    return voice.heads["value"](states.detach() if voice.route == "default" else states).squeeze(-1).double()


def made(policy, temperature=1.0, seed=0, samples=SAMPLES):
    """Answers whose old log-probabilities are near enough that some ratios are clipped and some are not."""
    out = sampled.answers(sampled.prompts(3, seed), samples, seed)
    rng = np.random.default_rng(seed)
    for a in out:
        with torch.no_grad():
            now = said(policy, a, temperature)[0].numpy()
            a.tokens["logp"] = (now + 0.25 * rng.normal(size=len(now))).astype(np.float32)
            a.tokens["reference"] = (now + 0.5 * rng.normal(size=len(now))).astype(np.float32)
            if "value" in policy.voices:
                a.tokens["value"] = (value_of(policy, a).numpy() + 0.3 * rng.normal(size=len(now))).astype(np.float32)
    return out


def start_of(policy):
    return policy.base.anatomy.decoder_start if policy.base.anatomy.kind == "encoder_decoder" else None


def got(goal, policy, rows, packed, *, shared=False):
    """Each term per unit, and the gradients of everything trained, of one step as the loop makes it."""
    batch = goal.collate(rows, pad=0, packed=packed)
    parts = goal.parts(batch, 9, shared=shared)
    return step(goal, policy, parts)


class Recording(Optimizer):
    """Keeps the gradients of a step, and moves nothing."""

    def step(self):
        self.kept = {n: g.grad[s].clone().view(p.shape) for g in self.groups for n, p, s in zip(g.names, g.params, g.slices, strict=True)}


def step(goal, policy, parts):
    optimizer = Recording(policy.trained(), lr=1e-3)
    done = next(train(policy, goal, iter([parts]), optimizer, lr=lambda _: 1e-3, steps=1, clip=0, place=Place(on="cpu")))
    for p in policy.trained().values():
        p.grad = None
    policy.eval()
    return done.terms, optimizer.kept, done.metrics


def agree(gradients, policy, loss):
    """The gradients are those of a slow loss."""
    params = policy.trained()
    loss.backward()
    largest = max(float(p.grad.abs().max()) for p in params.values() if p.grad is not None)
    assert largest > 1e-3  # else there is nothing to compare
    for name, p in params.items():
        torch.testing.assert_close(gradients[name], torch.zeros_like(p) if p.grad is None else p.grad, atol=1e-5 * max(1.0, largest), rtol=2e-3)
        p.grad = None


# --- PPO -------------------------------------------------------------------------------------------------------------


def slow_ppo_rows(goal, answers, coefficient):
    """(advantage, return) of each answer's tokens: rewards with the penalty of every token, equation 16, whitened over all of them."""
    scores = [a.score - goal.missing_eos_penalty * (a.stopped == "length") for a in answers]
    scale = statistics.pstdev(scores) if goal.scale_rewards else 1.0
    advantages, returns = [], []
    for a, score in zip(answers, scores, strict=True):
        n, value = len(a.ids), a.tokens["value"]
        rewards = [-coefficient * float(a.tokens["logp"][t] - a.tokens["reference"][t]) for t in range(n)]
        rewards[-1] += score / scale
        deltas = [rewards[t] + goal.discount * (value[t + 1] if t + 1 < n else 0.0) - value[t] for t in range(n)]
        advantage = [sum((goal.discount * goal.trace) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
        advantages.append(advantage)
        returns.append([float(x + v) for x, v in zip(advantage, value, strict=True)])
    every = [x for some in advantages for x in some]
    mean, std = statistics.fmean(every), statistics.pstdev(every)
    return [[(x - mean) / std for x in some] for some in advantages] if goal.whiten else advantages, returns


@pytest.mark.parametrize("settings", [{}, {"discount": 0.9, "trace": 0.7, "whiten": False}, {"missing_eos_penalty": 2.0, "scale_rewards": False, "kl": 0.5}])
def test_ppo_rewards_the_last_token_with_the_score_and_every_token_with_its_divergence(settings):
    goal, answers = Ppo(**settings), sampled.answers(sampled.prompts(4), 2)
    rows, facts = goal.rows(answers, {}, start=None)
    advantages, returns = slow_ppo_rows(goal, answers, goal.kl)
    for row, a, advantage, back in zip(rows, answers, advantages, returns, strict=True):
        tokens = row.extras["tokens"]
        assert tokens["advantage"].tolist() == pytest.approx(advantage, abs=2e-5) and tokens["returns"].tolist() == pytest.approx(back, abs=2e-5)
        assert np.array_equal(tokens["old"], a.tokens["logp"]) and np.array_equal(tokens["value"], a.tokens["value"])
        assert row.ids.tolist() == a.prompt.ids.tolist() + a.ids and row.train.tolist() == [False] * len(a.prompt.ids) + [True] * len(a.ids)
    penalty = sum(goal.kl * float((a.tokens["logp"] - a.tokens["reference"]).sum()) for a in answers) / len(answers)
    assert facts["penalty"] == pytest.approx(penalty, abs=1e-5) and facts["kl_coefficient"] == goal.kl


def slow_ppo(goal, policy, rows, answers):
    """Policy and value losses over all answer tokens, and what of them is clipped."""
    policy_losses, value_losses, clipped = [], [], []
    for row, a in zip(rows, answers, strict=True):
        x = row.extras["tokens"]
        logp_n, entropy_n = said(policy, a, goal.temperature)
        value_n = value_of(policy, a)
        for t in range(len(a.ids)):
            ratio, advantage = torch.exp(logp_n[t] - float(x["old"][t])), float(x["advantage"][t])
            held = torch.clamp(ratio, 1 - goal.clip, 1 + goal.clip)
            policy_losses.append(-torch.min(ratio * advantage, held * advantage) - goal.entropy * entropy_n[t])
            clipped.append(float(held.detach() * advantage) < float(ratio.detach() * advantage))
            old, target = float(x["value"][t]), float(x["returns"][t])
            moved = old + torch.clamp(value_n[t] - old, -goal.value_clip, goal.value_clip)
            value_losses.append(0.5 * torch.max((value_n[t] - target) ** 2, (moved - target) ** 2))
    assert 0 < sum(clipped) < len(clipped)  # both sides of the clip
    return torch.stack(policy_losses).mean(), torch.stack(value_losses).mean(), sum(clipped) / len(clipped)


def compare_ppo(family, packed, value="own", **settings):
    goal, policy = Ppo(**{"temperature": 0.7, "entropy": 0.05, "value_weight": 0.3, **settings}), policy_of(family, value)
    answers = made(policy, goal.temperature)
    rows, _ = goal.rows(answers, {}, start=start_of(policy))
    terms, gradients, metrics = got(goal, policy, rows, packed, shared=value == "shared")
    slow_policy, slow_value, clipped = slow_ppo(goal, policy, rows, answers)
    assert terms["tokens"] == pytest.approx(float(slow_policy.detach()), abs=1e-5) and terms["values"] == pytest.approx(float(slow_value.detach()), abs=1e-5)
    assert metrics["clipped"] == pytest.approx(clipped)
    agree(gradients, policy, slow_policy + goal.value_weight * slow_value)


@pytest.mark.parametrize(("family", "packed"), LAID_OUT)
@pytest.mark.parametrize("value", ["own", "shared"])
def test_ppo_is_the_clipped_loss_of_every_answer_token(family, packed, value):
    compare_ppo(family, packed, value)


@pytest.mark.parametrize("settings", [{"temperature": 1.0, "entropy": 0.0}, {"clip": 0.1, "temperature": 2.0, "value_clip": 0.05}])
def test_ppo_at_other_settings(settings):
    compare_ppo("llama", True, **settings)


def test_only_the_value_learns_while_it_warms_up_and_nothing_holds_it():
    goal, policy = Ppo(value_clip=0.01), policy_of("llama", "own")
    rows, _ = goal.rows(made(policy), {}, start=None)
    terms, gradients, metrics = step(goal, policy, goal.parts(goal.collate(rows, pad=0, packed=True), 0, shared=False))
    assert set(terms) == {"values"} and "clipped" not in metrics
    for name, g in gradients.items():
        assert bool(g.any()) == name.startswith("value."), name
    free = [0.5 * (v - r) ** 2 for row, a in zip(rows, made(policy), strict=True) for v, r in _values(policy, row, a)]
    assert terms["values"] == pytest.approx(statistics.fmean(free), abs=1e-5)


def _values(policy, row, answer):
    with torch.no_grad():
        return zip(value_of(policy, answer).tolist(), row.extras["tokens"]["returns"].tolist(), strict=True)


# --- GRPO ------------------------------------------------------------------------------------------------------------


def slow_grpo(goal, policy, answers):
    """Equation 3 with the KL term of equation 4, answer by answer."""
    scores = [a.score - goal.missing_eos_penalty * (a.stopped == "length") for a in answers]
    high = goal.clip if goal.clip_high is None else goal.clip_high
    per_answer, tokens = [], 0
    for i, a in enumerate(answers):
        group = scores[i // SAMPLES * SAMPLES : i // SAMPLES * SAMPLES + SAMPLES]
        others = [s for j, s in enumerate(group) if j != i % SAMPLES]
        advantage = scores[i] - statistics.fmean(others if goal.baseline == "leave_one_out" else group)
        if goal.scale:
            advantage /= statistics.pstdev(group) + 1e-6
        logp_n, entropy_n = said(policy, a, goal.temperature)
        losses = []
        for t in range(len(a.ids)):
            ratio = torch.exp(logp_n[t] - float(a.tokens["logp"][t]))
            loss = -torch.min(ratio * advantage, torch.clamp(ratio, 1 - goal.clip, 1 + high) * advantage) - goal.entropy * entropy_n[t]
            off = float(a.tokens["reference"][t]) - logp_n[t]
            losses.append(loss + goal.kl * (torch.exp(off) - off - 1))
        per_answer.append(torch.stack(losses).sum() / (len(losses) if goal.average == "answers" else 1))
        tokens += len(a.ids)
    return torch.stack(per_answer).sum() / (len(answers) if goal.average == "answers" else tokens)


def compare_grpo(family, packed, **settings):
    goal, policy = Grpo(**{"samples": SAMPLES, "temperature": 0.8, "kl": 0.3, "entropy": 0.02, **settings}), policy_of(family)
    answers = made(policy, goal.temperature)
    rows, _ = goal.rows(answers, {}, start=start_of(policy))
    terms, gradients, metrics = got(goal, policy, rows, packed)
    slow = slow_grpo(goal, policy, answers)
    assert terms[goal.average] == pytest.approx(float(slow.detach()), abs=1e-5) and 0 < metrics["clipped"] < 1
    agree(gradients, policy, slow)


@pytest.mark.parametrize(("family", "packed"), LAID_OUT)
@pytest.mark.parametrize("average", ["answers", "tokens"])
def test_grpo_is_equation_3_over_every_group(family, packed, average):
    compare_grpo(family, packed, average=average)


@pytest.mark.parametrize(
    "settings", [{"scale": False, "baseline": "leave_one_out"}, {"clip_high": 0.5, "clip": 0.1}, {"kl": 0.0, "entropy": 0.0}, {"missing_eos_penalty": 1.5}]
)
def test_grpo_at_other_settings(settings):
    compare_grpo("llama", True, **settings)


def test_packed_and_padded_are_one_loss():
    policy = policy_of("llama", "own")
    goal = Ppo()
    rows, _ = goal.rows(made(policy), {}, start=None)
    (one, a, _), (other, b, _) = (got(goal, policy, rows, packed) for packed in (True, False))
    assert one == pytest.approx(other, abs=1e-5)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-3)


# --- micro-batches ---------------------------------------------------------------------------------------------------


def cut(goal, rows, sizes, packed):
    out, at = [], 0
    for n in sizes:
        out += goal.parts(goal.collate(rows[at : at + n], pad=0, packed=packed), 9, shared=False)
        at += n
    assert at == len(rows)
    return out


def compare_accumulated(goal, value=None):
    policy = policy_of("llama", value)
    rows, _ = goal.rows(made(policy), {}, start=None)
    whole = step(goal, policy, cut(goal, rows, [9], packed=True))
    for sizes in ([1, 5, 3], [2, 7]):
        terms, gradients, _ = step(goal, policy, cut(goal, rows, sizes, packed=False))
        assert terms == pytest.approx(whole[0], abs=1e-5)
        for name, g in gradients.items():
            torch.testing.assert_close(g, whole[1][name], atol=1e-5, rtol=1e-3)


GOALS = [(Ppo(), "own"), (Grpo(samples=SAMPLES, kl=0.3), None), (Grpo(samples=SAMPLES, average="tokens", entropy=0.1), None)]


@pytest.mark.parametrize(("goal", "value"), GOALS, ids=["ppo", "answers", "tokens"])
def test_micro_batches_of_any_size_are_one_big_batch(goal, value):
    compare_accumulated(goal, value)


# --- planted mistakes ------------------------------------------------------------------------------------------------


def caught(check, *args, **kwargs):
    with pytest.raises(AssertionError):
        check(*args, **kwargs)


def both_caught(family="llama", packed=True):
    caught(compare_ppo, family, packed)
    caught(compare_grpo, family, packed)


def test_a_swapped_sign_of_the_advantage_is_caught(monkeypatch):
    honest = rewarded.clipped_policy
    monkeypatch.setattr(rewarded, "clipped_policy", lambda logp, old, advantage, **how: honest(logp, old, -advantage, **how))
    both_caught()


@pytest.mark.parametrize("by", [1, -1])
def test_targets_that_are_shifted_by_one_are_caught(by, monkeypatch):
    honest = core.lay_out

    def shifted(rows, pad, packed):
        ids_BT, targets_BT, segments = honest(rows, pad, packed)
        return ids_BT, targets_BT.roll(by, 1), segments

    monkeypatch.setattr(core, "lay_out", shifted)
    both_caught()


def relaid(monkeypatch, change):
    """Collate other rows than the answers gave: ``change`` gets ids, which are trained, and what is known of each trained token."""

    def collated(self, rows, *, pad, packed):
        out = []
        for r in rows:
            ids, train, tokens = change(r.ids, r.train, dict(r.extras["tokens"]))
            out.append(replace(r, ids=ids, train=train, extras={**r.extras, "tokens": tokens}))
        return answered_batch(out, pad=pad, packed=packed)

    monkeypatch.setattr(Ppo, "collate", collated)
    monkeypatch.setattr(Grpo, "collate", collated)


def test_a_stop_token_that_does_not_count_is_caught(monkeypatch):
    def without(ids, train, tokens):
        if ids[-1] != sampled.EOS or train.sum() < 2:
            return ids, train, tokens
        return ids, np.append(train[:-1], False), {k: v[:-1] for k, v in tokens.items()}

    relaid(monkeypatch, without)
    both_caught()


def test_a_stop_token_that_counts_twice_is_caught(monkeypatch):
    def twice(ids, train, tokens):
        if ids[-1] != sampled.EOS:
            return ids, train, tokens
        return np.append(ids, ids[-1]).astype(np.int32), np.append(train, True), {k: np.append(v, v[-1]).astype(np.float32) for k, v in tokens.items()}

    relaid(monkeypatch, twice)
    both_caught()


def test_learning_a_token_of_the_prompt_is_caught(monkeypatch):
    def more(ids, train, tokens):
        train = train.copy()
        train[int(train.argmax()) - 1] = True
        return ids, train, {k: np.append(v[:1], v).astype(np.float32) for k, v in tokens.items()}

    relaid(monkeypatch, more)
    both_caught()


@pytest.mark.parametrize(("goal", "value"), GOALS, ids=["ppo", "answers", "tokens"])
def test_a_mean_instead_of_a_sum_over_micro_batches_is_caught(goal, value, monkeypatch):
    honest = type(goal).loss

    def mean(self, policy, batch):
        out = honest(self, policy, batch)
        out.sums = {k: v / batch.units[k] for k, v in out.sums.items()}
        return out

    monkeypatch.setattr(type(goal), "loss", mean)
    caught(compare_accumulated, goal, value)


def test_a_value_read_one_token_late_is_caught(monkeypatch):
    honest = core.scored

    def late(batch, hidden_BTD):
        _, target_N, example_N = honest(batch, hidden_BTD)
        return hidden_BTD.roll(-1, 1).flatten(0, 1)[(batch.targets.flatten() != IGNORE).nonzero().squeeze(1)], target_N, example_N

    monkeypatch.setattr(core, "scored", late)  # as token_values reads it
    caught(compare_ppo, "llama", True)


# --- TRL -------------------------------------------------------------------------------------------------------------


class Peer:
    """A TRL trainer without a trainer: its loss is called with log-probabilities of ours."""

    def __init__(self, **settings):
        same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, device=torch.device("cpu"), num_processes=1)
        self.__dict__ |= {"accelerator": same, "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)}, "aux_loss_enabled": False}
        self.__dict__ |= {"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": "token", "use_vllm": False}
        self.__dict__ |= {"_entropy_bonus_enabled": False, "use_adaptive_entropy": False, "model": SimpleNamespace(training=False)}
        self.__dict__ |= {"args": SimpleNamespace(delta=None, use_bias_correction_kl=False), **settings}

    def _get_per_token_logps_and_entropies(self, *_, **__):
        return self.logps, self.entropies, None


def padded(parts):
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True).double()


WIDEST = 20  # of a completion; Dr. GRPO divides by it


@pytest.mark.parametrize(
    ("loss_type", "kl", "high", "entropy"),
    [
        ("grpo", 0.3, None, 0.0),  # with a bonus it is another loss: TRL's is a mean over tokens in every case, ours averages as the loss does
        ("grpo", 0.0, 0.28, 0.0),
        ("dapo", 0.0, 0.28, 0.0),
        ("dapo", 0.04, None, 0.05),
        ("bnpo", 0.3, None, 0.05),
        ("dr_grpo", 0.3, 0.28, 0.05),
    ],
)
def test_the_loss_and_the_gradient_of_grpo_are_trls(loss_type, kl, high, entropy):
    from trl.trainer.grpo_trainer import GRPOTrainer

    average = "answers" if loss_type == "grpo" else "tokens"
    goal, policy = Grpo(samples=SAMPLES, kl=kl, clip_high=high, average=average, temperature=0.9, entropy=entropy), policy_of("llama")
    answers = made(policy, goal.temperature)
    rows, _ = goal.rows(answers, {}, start=None)
    terms, gradients, metrics = got(goal, policy, rows, True)
    found = [said(policy, a, goal.temperature) for a in answers]
    mask = padded(torch.ones(len(a.ids)) for a in answers)
    entropies = padded(e for _, e in found)
    peer = Peer(beta=kl, epsilon_low=0.2, epsilon_high=high or 0.2, loss_type=loss_type, max_completion_length=WIDEST)
    peer.__dict__ |= {"logps": padded(p for p, _ in found), "entropies": entropies, "_entropy_bonus_enabled": bool(entropy), "entropy_coef": entropy}
    blank = torch.zeros(len(answers), 1)
    inputs = {
        "prompt_ids": blank,
        "prompt_mask": blank,
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": torch.tensor([float(r.extras["tokens"]["advantage"][0]) for r in rows]).double(),
        "old_per_token_logps": padded(torch.from_numpy(a.tokens["logp"]) for a in answers),
        "ref_per_token_logps": padded(torch.from_numpy(a.tokens["reference"]) for a in answers),
        "num_items_in_batch": mask.sum(),
    }
    theirs = GRPOTrainer._compute_loss(peer, None, inputs)
    if loss_type == "dr_grpo":  # divides by a constant where ours divides by the tokens there are
        bonus = entropy * (entropies * mask).sum() / mask.sum()
        theirs = (theirs + bonus) * len(answers) * WIDEST / mask.sum() - bonus
    assert terms[average] == pytest.approx(float(theirs.detach()), abs=1e-5)
    assert metrics["clipped"] == pytest.approx(peer._metrics["eval"]["clip_ratio/region_mean"][0], abs=1e-6)
    agree(gradients, policy, theirs)


def lines_of(trainer, first, last, **known):
    """Run the lines of a trainer's scoring from the one that begins with ``first`` to the one that begins with ``last``; its advantages."""
    source = inspect.getsource(trainer._generate_and_score_completions)
    begin = source.index(first)
    begin = source.rindex("\n", 0, begin) + 1
    end = source.index("\n", source.index(last, begin))
    names = vars(inspect.getmodule(trainer)) | known
    exec(textwrap.dedent(source[begin:end]), names)
    return names["advantages"]


def scored_groups(seed=0):
    answers = sampled.answers(sampled.prompts(4, seed), SAMPLES, seed)
    return answers, torch.tensor([a.score for a in answers], dtype=torch.float64)


def advantages_of(goal, answers):
    return [float(r.extras["tokens"]["advantage"][0]) for r in goal.rows(answers, {}, start=None)[0]]


@pytest.mark.parametrize("scale", [True, False])
def test_the_advantages_of_grpo_are_trls(scale):
    """TRL divides by the deviation as it is estimated from n - 1 answers, and adds 1e-4 to it; ours is the group's own."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    answers, rewards = scored_groups()
    me = SimpleNamespace(scale_rewards="group" if scale else "none")
    first, last = "mean_grouped_rewards = torch.nanmean(rewards.view", "advantages = advantages / (std_rewards + 1e-4)"
    theirs = lines_of(GRPOTrainer, first, last, self=me, rewards=rewards, num_generations=SAMPLES)
    ours = advantages_of(Grpo(samples=SAMPLES, scale=scale), answers)
    deviations = rewards.view(-1, SAMPLES).std(1).repeat_interleave(SAMPLES).tolist()
    estimated = math.sqrt((SAMPLES - 1) / SAMPLES)
    factors = [(d * estimated + 1e-6) / (d + 1e-4) if scale else 1.0 for d in deviations]
    assert theirs.tolist() == pytest.approx([a * f for a, f in zip(ours, factors, strict=True)], abs=1e-5)


def test_the_leave_one_out_advantages_are_trls_rloo():
    from trl.trainer.rloo_trainer import RLOOTrainer

    answers, rewards = scored_groups(1)
    theirs = lines_of(
        RLOOTrainer, "grouped_rewards = rewards.view(-1, num_generations)", "advantages = rewards - baselines", rewards=rewards, num_generations=SAMPLES
    )
    ours = advantages_of(Grpo(samples=SAMPLES, baseline="leave_one_out", scale=False), answers)
    assert theirs.tolist() == pytest.approx(ours, abs=1e-5)
