"""The feed of objectives that learn from answers: what it samples, reads, lays out and keeps, and that it goes on bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import sampled
import tiny
from luthier import voices
from luthier.core import IGNORE, Answer, LuthierError, Row, answered_batch, next_token_batch, scored
from luthier.data import rollout
from luthier.data.feed import Batches
from luthier.data.rollout import Rollouts, Sampling, described, read, sample
from luthier.methods.lora import Method as Lora
from luthier.methods.prefix import Method as Prefix
from luthier.methods.prompt import Method as Prompt
from luthier.nn.rewarded import repetition
from luthier.objectives.grpo import Objective as Grpo
from luthier.objectives.ppo import Objective as Ppo
from luthier.policy import Policy

METHODS = {"lora": Lora(), "prefix": Prefix(length=3, init="random"), "prompt": Prompt(length=3, init="random")}
STOP = (2, 7, 11, 13, 29)
GRPO = Grpo(prompts=3, samples=2, max_new=6, epochs=2, minibatches=2)
PPO = Ppo(prompts=4, max_new=6, epochs=2, minibatches=2)


def policy_of(family="llama", method="lora", value=None):
    base, how = tiny.base(family), METHODS[method]
    torch.manual_seed(0)
    policy = Policy(base, how.attach(base, "default"), method=how)
    tiny.randomise(policy.delta.params, std=0.2)
    if value is not None:
        voices.add_value(policy, how, shared=value == "shared")
        tiny.randomise({k: p for k, p in policy.trained().items() if k.startswith("value.")}, 1, std=0.2)
    return policy


def how_of(policy, temperature=1.0, max_new=6, stop=STOP):
    family = policy.base.source.removeprefix("tiny-")
    return Sampling(max_new, temperature, stop, 0, lambda ids: " ".join(map(str, ids)), sampled.start_of(family))


def judge(answers):
    """Longer answers score higher, and so do even first tokens."""
    for a in answers:
        a.scores = {"made": len(a.ids) + 0.5 * (a.ids[0] % 2 == 0)}
        a.score = a.scores["made"]


def feed(policy, objective=GRPO, prompts=None, **more):
    asked = sampled.prompts(7) if prompts is None else prompts
    how = how_of(policy, objective.temperature, objective.max_new)
    settings = {"pad": 0, "packed": policy.base.packs, "micro_tokens": 40, "epochs": 2.0, "steps": None, "seed": 3, **more}
    return Rollouts(asked, policy, objective, judge, how, **settings)


def tensors(batch):
    """Everything of a micro-batch that a forward reads."""
    out = {"ids": batch.ids, "targets": batch.targets, "start": batch.segments.start, "length": batch.segments.length, **batch.extras}
    return out | ({} if batch.source is None else {"source": batch.source.ids})


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.units == b.units and tensors(a).keys() == tensors(b).keys()
        assert all(torch.equal(v, tensors(b)[k]) for k, v in tensors(a).items())


# --- sampling and reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_sampling_said_of_its_tokens_is_what_training_says(family, method, temperature):
    policy = policy_of(family, method)
    how = how_of(policy, temperature)
    asked = sampled.prompts(3)
    answers = sample(policy, asked, 3, how, numbers=[4, 0, 9], rollout=1)
    read(policy, answers, frozenset(), pad=0, packed=policy.base.packs, tokens=40, start=how.start, temperature=temperature)
    again = policy.generate([r.ids.tolist() for r in asked], samples=3, max_new=6, temperature=temperature, stop=STOP, seed=1, numbers=[4, 0, 9])
    for a, ids, tempered in zip(answers, again.ids, again.tempered, strict=True):
        assert a.ids == ids
        np.testing.assert_allclose(a.tokens["sampled"], a.logps, atol=1e-4)
        np.testing.assert_allclose(a.tokens["logp"], tempered, atol=1e-4)
        stops = [t in STOP for t in a.ids]  # the stop token is there once, at the end, and is learned like the others
        assert (stops[-1] and sum(stops) == 1) if a.stopped == "stop" else (not any(stops) and len(a.ids) == 6)
    assert {a.stopped for a in answers} == {"stop", "length"}
    assert (temperature == 1.0) == all(np.array_equal(a.tokens["sampled"], a.tokens["logp"]) for a in answers)


def test_an_answer_depends_on_its_prompts_number_and_the_rollout_alone():
    policy, asked = policy_of(), sampled.prompts(4)
    how = how_of(policy)
    whole = sample(policy, asked, 2, how, numbers=[0, 1, 2, 3])
    some = sample(policy, [asked[3], asked[1]], 2, how, numbers=[3, 1])
    assert [a.ids for a in some] == [a.ids for a in (*whole[6:], *whole[2:4])]
    assert [a.prompt.where for a in whole] == [r.where for r in asked for _ in range(2)]
    assert [a.ids for a in sample(policy, asked, 2, how, numbers=[0, 1, 2, 3], rollout=1)] != [a.ids for a in whole]
    assert whole[0].ids != whole[1].ids


def test_reading_is_without_dropout_and_leaves_the_mode_as_it_was():
    base, method = tiny.base("llama"), Lora(dropout=0.9)
    policy = Policy(base, method.attach(base, "default"), method=method)
    tiny.randomise(policy.delta.params, std=0.2)
    answers = sampled.answers(sampled.prompts(3))
    for mode in (True, False):
        policy.train(mode)
        read(policy, answers, frozenset({"reference"}), pad=0, packed=True, tokens=40, start=None, temperature=1.0)
        assert policy.training == mode
        if mode:
            first = [a.tokens["logp"].copy() for a in answers]
    assert all(np.array_equal(a.tokens["logp"], b) for a, b in zip(answers, first, strict=True))


@pytest.mark.parametrize(("family", "packed"), [("llama", True), ("llama", False), ("t5", False)])
@pytest.mark.parametrize("value", ["own", "shared"])
def test_reference_and_value_are_read_answer_by_answer(family, packed, value):
    """In groups by length, and each gets its own."""
    policy = policy_of(family, value=value).eval()
    answers = sampled.answers(sampled.prompts(4))
    how = how_of(policy, 0.8)
    wants = frozenset({"reference", "value"})
    read(policy, answers, wants, pad=0, packed=packed, tokens=30, start=how.start, temperature=0.8)
    plain = tiny.model(family).eval()
    voice = policy.voices["value"]
    for a in answers:
        assert all(len(v) == len(a.ids) for v in a.tokens.values())
        ids = a.prompt.ids.tolist()
        with torch.no_grad():
            if how.start is None:
                logits = plain(input_ids=torch.tensor([ids + a.ids])).logits[0, len(ids) - 1 : -1]
            else:
                logits = plain(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[how.start, *a.ids[:-1]]])).logits[0]
            expected = (logits / 0.8).log_softmax(-1)[torch.arange(len(a.ids)), torch.tensor(a.ids)]
            row = a.row(how.start)
            hidden_BTD = policy.hidden(next_token_batch([row], pad=0, packed=False), route=voice.route)
            values = voice.heads["value"](hidden_BTD[0, len(row) - len(a.ids) - 1 : len(row) - 1]).squeeze(-1)
        np.testing.assert_allclose(a.tokens["reference"], expected.numpy(), atol=1e-4)
        np.testing.assert_allclose(a.tokens["value"], values.numpy(), atol=1e-4)


def test_what_goes_on_from_a_text_keeps_its_space():
    """Decoders of SentencePiece leave out the space that a text begins with, so the answer alone would stick to the prompt."""
    words = {1: "Once", 2: "upon", 3: "a", 4: "time"}
    decode = lambda ids: " ".join(words[i] for i in ids)  # noqa: E731
    how = Sampling(4, 1.0, (), 0, decode, None)
    asked = Row(np.array([1, 2], dtype=np.int32), np.zeros(2, dtype=bool), "", {"task": {"prompt": "Once upon"}})
    assert rollout._said(asked, [3, 4], how) == " a time"
    assert rollout._said(replace(asked, extras={"task": {"prompt": [{"role": "user", "content": "?"}]}}), [3, 4], replace(how, decode=lambda ids: " x ")) == "x"


# --- rows and batches ------------------------------------------------------------------------------------------------


def test_the_row_of_an_answer_trains_the_answer_alone():
    prompt = Row(np.array([5, 6, 7], dtype=np.int32), np.zeros(3, dtype=bool), "a:1")
    answer = Answer(prompt, [8, 9, 2], [-1.0, -2.0, -3.0], "stop", "")
    row = answer.row(old=np.array([1.0, 2.0, 3.0]))
    assert row.ids.tolist() == [5, 6, 7, 8, 9, 2] and row.train.tolist() == [False] * 3 + [True] * 3 and row.where == "a:1" and row.ids.dtype == np.int32
    assert row.extras["tokens"]["old"].dtype == np.float32 and "source" not in row.extras
    answered = answer.row(0)
    assert answered.ids.tolist() == [0, 8, 9, 2] and answered.train.tolist() == [False, True, True, True]
    assert answered.extras["source"].tolist() == [5, 6, 7]


@pytest.mark.parametrize(("family", "packed"), [("llama", True), ("llama", False), ("t5", False)])
def test_what_is_known_of_tokens_lies_as_their_scored_positions_do(family, packed):
    answers = sampled.answers(sampled.prompts(5), 2)
    start = sampled.start_of(family)
    rows = [a.row(start, number=np.array([100.0 * i + t for t in range(len(a.ids))]), token=np.array(a.ids)) for i, a in enumerate(answers)]
    idle = Row(rows[0].ids, np.zeros(len(rows[0]), dtype=bool), "", rows[0].extras)  # stands for a rank without rows
    batch = answered_batch([*rows[:3], idle, *rows[3:]], pad=0, packed=packed)
    assert batch.shape[0] == (1 if packed else 11)
    _, target_N, example_N = scored(batch, torch.zeros(*batch.shape, 1))
    assert batch.units == {"answers": 10, "tokens": sum(len(a.ids) for a in answers)} and len(target_N) == batch.units["tokens"]
    assert torch.equal(batch.extras["token"].long(), target_N)  # every token's facts stand at the position that says it
    number_N = batch.extras["number"]
    assert torch.equal((number_N // 100).long(), torch.where(example_N > 3, example_N - 1, example_N))
    assert torch.equal(number_N % 100, torch.cat([torch.arange(float(len(a.ids))) for a in answers]))
    at = (batch.targets != IGNORE).nonzero()
    assert torch.equal(batch.ids[at[:, 0], at[:, 1] + 1], target_N)  # and one before the token itself


# --- the feed --------------------------------------------------------------------------------------------------------


def test_prompts_come_in_seeded_permutations_one_after_another():
    made = feed(policy_of())
    chosen = [i for r in range(14) for i in made._chosen(r)]
    assert len(chosen) == 42 and all(sorted(chosen[i : i + 7]) == list(range(7)) for i in range(0, 42, 7))
    assert len({tuple(chosen[i : i + 7]) for i in range(0, 42, 7)}) > 4
    assert [i for r in range(14) for i in feed(policy_of(), seed=4)._chosen(r)] != chosen
    few = feed(policy_of(), prompts=sampled.prompts(2))
    assert sorted(few._chosen(0)) == [0, 1] and sorted(few._chosen(1)) == [0, 1]


def test_how_many_steps_passes_over_the_prompts_are():
    assert feed(policy_of()).steps == 5 * 4  # twice 7 prompts, 3 at a time, 4 steps each
    assert feed(policy_of(), prompts=sampled.prompts(2), epochs=3.0).steps == 3 * 4  # fewer prompts than a rollout asks for
    assert len(feed(policy_of(), steps=9)) == 9
    with pytest.raises(LuthierError, match="no prompt to answer"):
        feed(policy_of(), prompts=[])


def test_a_run_in_which_only_the_value_would_learn_is_refused():
    with pytest.raises(LuthierError, match=r"value_warmup: only the value learns in the first 2 rollouts of 4 steps, and this run has 8 steps"):
        feed(policy_of(value="own"), replace(PPO, value_warmup=2), steps=8)
    feed(policy_of(value="own"), replace(PPO, value_warmup=2), steps=9)


def test_each_pass_sees_every_answer_once():
    made = feed(policy_of())
    for _ in range(2):
        steps = [next(made) for _ in range(2)]
        seen = sorted(tuple(b.ids[0, t : t + n].tolist()) for s in steps for b in s for t, n in zip(b.segments.start, b.segments.length, strict=True))
        assert seen == sorted(tuple(r.ids.tolist()) for r in made.rows) and len(seen) == 6
        assert all(sum(b.units["answers"] for b in s) == 3 for s in steps)
    assert made.rollout == 1 and len(made.take_events()) == 1 and made.take_events() == []
    before = made.rows
    next(made)
    assert made.rollout == 2 and made.rows is not before


def test_the_value_warms_up_alone_and_text_waits_for_it():
    policy, text = policy_of(value="own"), tiny.rows(4)
    beside = Batches(text, next_token_batch, pad=0, packed=True, batch_examples=2, steps=10**9)
    made = feed(policy, replace(PPO, ptx=0.5, ptx_data=("x",)), beside=beside)
    kinds = [[set(b.units) for b in next(made)] for _ in range(5)]
    assert all(k == {"values", "warming"} for step in kinds[:4] for k in step)
    assert {frozenset(k) for k in kinds[4]} == {frozenset({"tokens"}), frozenset({"values"}), frozenset({"text"})}
    assert beside.step == 1


def test_sampling_says_how_far_it_is():
    said = []
    made = feed(policy_of(), tick=lambda *what: said.append(what))
    made.how = replace(made.how, batch_tokens=20)  # one prompt at a time
    next(made)
    assert said == [("answers of rollout 1", 2, 6), ("answers of rollout 1", 4, 6)]  # the rest is said by the rollout's own line


def test_facts_of_a_rollout():
    made = feed(policy_of())
    next(made)
    (facts,) = made.take_events()
    assert facts["rollout"] == 1 and facts["kl"] > 0 and 0 < facts["entropy"] < np.log(tiny.V) and facts["sampling_gap"] < 1e-4
    assert facts["reward"] == facts["reward_made"] and facts["reward_by_length"] > 0.5
    lengths = [int(r.train.sum()) for r in made.rows]
    assert facts["answer_tokens"] == pytest.approx(np.mean(lengths))
    assert facts["stopped"] == pytest.approx(np.mean([int(r.ids[-1]) in STOP for r in made.rows]))
    answers = sampled.answers(sampled.prompts(3))
    answers[0].ids = [4] * len(answers[0].ids)
    answers[0].scores = answers[1].scores = {"made": 1.0, "watch_other": 3.0}
    for a in answers[2:]:
        a.scores = {"made": 1.0, "watch_other": 0.0}
    found = described(answers)
    assert found["watch_other"] == pytest.approx(1.0) and found["reward_made"] == 1.0
    assert found["repetition"] == pytest.approx(np.mean([repetition(a.ids) for a in answers]))
    gap = np.concatenate([a.tokens["logp"] - a.tokens["reference"] for a in answers]).astype(float)
    assert found["kl"] == pytest.approx(np.sum(np.exp(-gap) - 1 + gap) / len(answers), rel=1e-4)


def test_a_rollout_that_teaches_nothing_is_known():
    made = feed(policy_of())
    made.judge = lambda answers: [setattr(a, "scores", {"made": 0.0}) for a in answers]
    next(made)
    assert not made.taught
    made.judge = judge
    for _ in range(4):
        next(made)
    assert made.taught


@pytest.mark.parametrize(("by", "said"), [(0.3, r"0\.300"), (float("nan"), "nan")])
def test_sampling_that_disagrees_with_training_is_refused(by, said, monkeypatch):
    honest = Policy.generate

    def off(self, *args, **how):
        got = honest(self, *args, **how)
        got.logps = [[x + by for x in xs] for xs in got.logps]
        return got

    monkeypatch.setattr(Policy, "generate", off)
    with pytest.raises(LuthierError, match=f"sampling and training disagree about the same tokens by {said} nats in the mean"):
        next(feed(policy_of()))


def test_an_objective_may_lay_out_its_rows_by_itself():
    class Own(Grpo):
        def collate(self, rows, *, pad, packed):
            batch = super().collate(rows, pad=pad, packed=packed)
            batch.extras["mine"] = torch.ones(len(rows))
            return batch

    assert "mine" in next(feed(policy_of(), Own(prompts=3, samples=2, max_new=6)))[0].extras


# --- going on --------------------------------------------------------------------------------------------------------


def saved(state):
    """As a checkpoint keeps it: tensors in a file, the rest as JSON."""
    import json

    from safetensors.torch import load, save

    kept = load(save({k: v.contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}))
    return kept | json.loads(json.dumps({k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}))


@pytest.mark.parametrize("done", [1, 3, 4, 6])
@pytest.mark.parametrize(("family", "objective", "value"), [("llama", GRPO, None), ("llama", replace(PPO, kl_target=2.0), "own"), ("t5", GRPO, None)])
def test_going_on_gives_the_same_batches_bit_for_bit(done, family, objective, value):
    """In the middle of a rollout (1, 3, 6), whose policy is gone by then, and between two (4)."""
    policy = policy_of(family, value=value)
    made = feed(policy, objective)
    for _ in range(done):
        next(made)
    made.take_events()
    state = saved(made.state_dict())
    assert ("rows.ids" in state) == (done % 4 != 0)
    expected = [next(made) for _ in range(6)]
    later = feed(policy, objective)
    later.load_state_dict(state)
    if done % 4:  # what is under way is not sampled again
        tiny.randomise(policy.delta.params, 9, std=0.5)
        same(expected[0], next(later))
        tiny.randomise(policy.delta.params, std=0.2)
    for batches in expected[1 if done % 4 else 0 :]:
        same(batches, next(later))
    assert later.state == made.state and later.first == made.first and later.taught == made.taught
    assert [e["rollout"] for e in later.take_events()] == [e["rollout"] for e in made.take_events()]


def test_what_was_saved_does_not_change_with_what_follows():
    made = feed(policy_of(value="own"), replace(PPO, kl_target=0.1, kl_horizon=10))
    next(made)
    state = made.state_dict()
    kept = dict(state["state"])
    for _ in range(4):
        next(made)
    assert state["state"] == kept != made.state


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"prompts": sampled.prompts(6)}, {"objective": replace(GRPO, samples=3)}, {"objective": replace(GRPO, epochs=1)}]
)
def test_other_prompts_seeds_and_rollouts_are_refused(other):
    made = feed(policy_of())
    next(made)
    with pytest.raises(LuthierError, match=r"cannot resume: (seed|prompts|of_a_rollout) was .* when the checkpoint was written and is .* now"):
        feed(policy_of(), **other).load_state_dict(saved(made.state_dict()))


@pytest.mark.parametrize("objective", [replace(GRPO, samples=4, minibatches=1), replace(PPO, samples=3, minibatches=1, value_warmup=0)])
def test_the_answers_to_a_prompt_share_it_when_they_are_read_and_when_they_are_learned(objective):
    """Positions that the model saw, with equal losses."""
    found = {}
    for how in ("off", "on"):
        policy = policy_of(value="own" if isinstance(objective, Ppo) else None)
        policy.share_prompts = how
        rng = np.random.default_rng(0)
        asked = [Row(rng.integers(3, tiny.V, 30).astype(np.int32), np.zeros(30, dtype=bool), str(i), {"task": {"prompt": "?"}}) for i in range(4)]
        rollouts = feed(policy, objective, asked, micro_tokens=2000)
        if not isinstance(objective, Ppo):
            voices.keep_reference(policy, policy.method)
        seen = []
        hook = policy.lm.base_model.register_forward_pre_hook(lambda m, a, k, seen=seen: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
        first = next(rollouts)
        begun = sum((a.examples - 1) * a.tokens for a in first[0].segments.alike)
        assert begun >= len({r.ids[:30].tobytes() for r in rollouts.rows}) * (objective.samples - 1) * 30  # every prompt once
        order = [rollouts.rows[i].ids[:30].tobytes() for group in rollout._groups(rollouts.rows, 2000, True) for i in group]
        assert sum(a != b for a, b in pairwise(order)) == len(set(order)) - 1
        losses = [sum(float(v.detach()) for b in step for v in objective.loss(policy, b).sums.values()) for step in (first, next(rollouts))]
        hook.remove()
        found[how] = losses, sum(n for n in seen if n > 30)  # forwards of whole examples, not the tokens that are sampled one by one
    np.testing.assert_allclose(found["on"][0], found["off"][0], rtol=2e-4, atol=2e-5)
    assert found["on"][1] < 0.7 * found["off"][1]
