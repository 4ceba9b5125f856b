"""Several roles on one base: what each says, what of it learns, what it takes, and that training one does not change another."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import sampled
import small
import tiny
from luthier import build, opening, voices
from luthier.core import Incompatible, LuthierError, Row, answered_batch, join
from luthier.measuring.measure import predict
from luthier.objectives.reward import Objective as Reward
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.precision.float32 import Precision
from luthier.saving import adapter
from luthier.settings.run import Run
from luthier.train import train
from speed_forms import OFF

PPO = {"kind": "ppo", "rewards": {"bleu": 1.0}}
GRPO = {"kind": "grpo", "rewards": {"bleu": 1.0}}
FULL = {"kind": "full"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama and a tiny T5 with their tokenizers, and adapters of the Llama: a delta to start from, a reward model."""
    home = tmp_path_factory.mktemp("voices")
    found = {"llama": tiny.folder(home / "llama"), "t5": small.t5(home / "t5")}
    for name, objective in (("sft", "sft"), ("reward", "reward")):
        policy, goal = build.assemble(run(found["llama"], objective), opened(found["llama"]))
        tiny.randomise(policy.trained(), seed=len(name), std=0.3)
        adapter.save(policy, home / name, objective=goal)
        found[name] = home / name
    return found


def opened(folder):
    return build.load(str(folder), precision=Precision())


def run(folder, objective, method="lora", **more):
    return Run(model={"id": str(folder)}, objective=objective, method=method, precision=Precision(), place={"kind": "one", "on": "cpu"}, **more)


def policy_of(folders, objective=PPO, method="lora", base="llama", **more):
    """In the plain forms: these tests compare bits with bases that no run assembled."""
    return build.assemble(run(folders[base], objective, method, speed=OFF, **more), opened(folders[base]))


def batch_of(policy, goal, seed=0):
    """Answers as they are learned from, in one row where that may be."""
    start = policy.base.anatomy.decoder_start if policy.base.anatomy.kind == "encoder_decoder" else None
    rng = np.random.default_rng(seed)
    some = lambda n: rng.normal(size=n).astype(np.float32)  # noqa: E731
    rows = []
    for a in sampled.answers(sampled.prompts(3, seed), 2, seed):
        n = len(a.ids)
        rows.append(a.row(start, old=-4 + some(n), advantage=some(n), returns=some(n) + 1, value=some(n), share=np.full(n, 1 / n), reference=-4 + some(n)))
    return answered_batch(rows, pad=0, packed=policy.base.packs)


def shared(policy):
    return "value" in policy.voices and policy.voices["value"].route == policy.name


def trained(policy, goal, steps=3):
    """Some steps, moving."""
    parts = lambda: goal.parts(batch_of(policy, goal), 9, shared=shared(policy))  # noqa: E731
    optimizer = Optimizer(policy.trained(), lr=1e-2)
    list(train(policy, goal, iter([parts() for _ in range(steps)]), optimizer, lr=lambda _: 1e-2, steps=steps, place=Place(on="cpu")))
    policy.eval()


@torch.no_grad()
def said(policy, batch, *, reference=False):
    if reference:
        with policy.reference():
            return policy.hidden(batch).clone()
    return policy.hidden(batch).clone()


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "started"), [("lora", False), ("prefix", False), ("diff_pruning", False), ("lora", True), ("full", False)])
@pytest.mark.parametrize("objective", [PPO, GRPO], ids=["ppo", "grpo"])
def test_the_reference_is_the_policy_before_training_and_stays_it(method, started, objective, folders):
    policy, goal = policy_of(folders, objective, {"kind": method, "from": str(folders["sft"])} if started else method)
    batch = batch_of(policy, goal)
    policy.eval()
    plain = build.load(str(folders["llama"]), precision=Precision())
    before = said(adapter.load(plain, folders["sft"]).eval() if started else build.Policy(plain).eval(), batch)
    assert torch.equal(said(policy, batch, reference=True), before)
    if method in ("lora", "full"):  # a prefix or a gate is not nothing at the start
        assert torch.equal(said(policy, batch), before)
    assert (said(build.Policy(plain).eval(), batch) - before).abs().max() > 0.01 if started else True
    trained(policy, goal)
    assert torch.equal(said(policy, batch, reference=True), before) and (said(policy, batch) - before).abs().max() > 1e-3
    policy.train()
    with policy.reference():
        assert not policy.training and not torch.is_grad_enabled()
    assert policy.training and policy.active == "default"


def test_without_a_weight_of_the_divergence_nothing_is_kept(folders):
    policy, _ = policy_of(folders, {**GRPO, "kl": 0}, "full")
    with pytest.raises(Incompatible, match="no base left to switch to"), policy.reference():
        pass


# --- the value -------------------------------------------------------------------------------------------------------


def test_a_value_starts_at_nothing_and_what_is_trained_has_names(folders):
    policy, goal = policy_of(folders)
    names = set(policy.trained())
    own = {n for n in names if not n.startswith("value.")}
    assert own == set(policy.delta.params) and {n.removeprefix("value.") for n in names - own} == {*own, "heads.value.weight", "heads.value.bias"}
    assert {"value.heads.value.weight", "value.heads.value.bias"} <= names
    batch = batch_of(policy, goal)
    assert not torch.any(value_of(policy, batch))
    alone, _ = policy_of(folders, {**PPO, "value": "shared"})
    assert {n for n in alone.trained() if n.startswith("value.")} == {"value.heads.value.weight", "value.heads.value.bias"} and list(alone.deltas) == [
        "default"
    ]


def value_of(policy, batch):
    from luthier.core import token_values

    return token_values(policy, batch)


@pytest.mark.parametrize("base", ["llama", "t5"])
@pytest.mark.parametrize("value", ["own", "shared"])
def test_gradients_go_to_the_value_and_not_to_the_policy(base, value, folders):
    policy, goal = policy_of(folders, {**PPO, "value": value}, base=base)
    tiny.randomise(policy.trained(), std=0.2)
    batch = batch_of(policy, goal)
    policy_part, value_part = (dict.fromkeys([unit], batch.units["tokens"]) for unit in ("tokens", "values"))
    for units, of_value in ((value_part, True), (policy_part, False)):
        batch.units = units
        sum(goal.loss(policy, batch).sums.values()).backward()
        for name, p in policy.trained().items():
            got = p.grad is not None and bool(p.grad.any())
            assert got == (name.startswith("value.") == of_value), (name, units)
            p.grad = None
    assert all(p.grad is None for p in policy.lm.parameters() if not p.requires_grad)


def test_a_value_of_its_own_says_something_else_than_one_that_shares(folders):
    policy, goal = policy_of(folders)
    tiny.randomise(policy.trained(), std=0.3)
    batch = batch_of(policy, goal)
    own = value_of(policy, batch)
    tiny.randomise({k: p for k, p in policy.trained().items() if not k.startswith("value.")}, 5, std=0.3)
    assert torch.equal(value_of(policy, batch), own)  # the policy's delta is none of its business
    tiny.randomise({k: p for k, p in policy.trained().items() if k.startswith("value.") and "heads" not in k}, 5, std=0.3)
    assert not torch.equal(value_of(policy, batch), own)


def test_a_value_starts_where_the_policy_does(folders):
    policy, _ = policy_of(folders, method={"kind": "lora", "from": str(folders["sft"])})
    assert list(policy.deltas) == ["default", "reference", "value"]
    for key, p in policy.deltas["value"].params.items():
        assert torch.equal(p, policy.delta.params[key]) and p is not policy.delta.params[key] and bool(p.any())
    assert not any(p.requires_grad for p in policy.deltas["reference"].params.values())


@pytest.mark.parametrize(("base", "targets"), [("llama", ["query", "head"]), ("t5", ["query", "head"])])
def test_what_only_the_head_reads_is_no_part_of_a_value(base, targets, folders):
    """It would get no gradient, and a run refuses to train what gets none."""
    policy, goal = policy_of(folders, method={"kind": "lora", "targets": targets}, base=base, tokens=["<new>"])
    tiny.randomise(policy.trained(), std=0.2)
    for part in goal.parts(batch_of(policy, goal), 9, shared=False):
        sum(goal.loss(policy, part).sums.values()).backward()
    assert [n for n, p in policy.trained().items() if p.grad is None] == []
    missing = {n.removeprefix("value.") for n in policy.trained() if n.startswith("value.")} ^ {*policy.delta.params, "heads.value.weight", "heads.value.bias"}
    assert all("head" in n or n == "tokens:embedding" for n in missing) and (missing or base == "t5")


@pytest.mark.parametrize("method", ["full", "partial"])
def test_methods_that_train_the_base_share_the_values_states(method, folders):
    assert shared(policy_of(folders, method=method)[0])
    with pytest.raises(Incompatible, match=r"objective\.value=own: method (full|partial) trains weights of the base"):
        policy_of(folders, {**PPO, "value": "own"}, method)


def test_the_value_is_not_saved_with_the_delta(folders, tmp_path):
    policy, goal = policy_of(folders)
    trained(policy, goal)
    adapter.save(policy, tmp_path / "a", objective=goal)
    assert not any("value" in k.split(".") for k in adapter.tensors_of(policy)) and set(adapter.tensors_of(policy)) == set(policy.delta.params)
    alone = opening.load(tmp_path / "a", precision="float32")
    batch = batch_of(policy, goal)
    assert torch.equal(said(alone, batch), said(policy, batch)) and list(alone.deltas) == ["default"] and not alone.heads
    whole, goal = policy_of(folders, method="full")
    trained(whole, goal)
    adapter.save(whole, tmp_path / "b", objective=goal)
    assert torch.equal(said(opening.load(tmp_path / "b", precision="float32"), batch), said(whole, batch))
    assert not any("value" in p.name or p.name == adapter.HEADS for p in (tmp_path / "b").iterdir())


# --- readers ---------------------------------------------------------------------------------------------------------


def asked(rng):
    ids = rng.integers(5, 200, rng.integers(4, 12)).astype(np.int32)
    return join([Row(ids, np.arange(len(ids)) == len(ids) - 1)], ranks=(), margin=0.0, good=None)


def test_a_reward_model_scores_on_the_policys_base_as_it_does_alone(folders):
    policy, goal = policy_of(folders)
    reader = voices.add_reader(policy, folders["reward"], "reward0")
    rows = [asked(np.random.default_rng(i)) for i in range(5)]
    alone = opening.load(folders["reward"], precision="float32")
    expected = [s["scores"][0] for s in predict(alone, alone.objective, rows)]
    assert isinstance(reader.objective, Reward) and len(set(expected)) == 5
    assert [s["scores"][0] for s in predict(reader, reader.objective, rows)] == expected
    frozen = [*policy.deltas["reward0"].params.values(), *reader.heads.parameters()]
    assert frozen and not any(p.requires_grad for p in frozen) and not any(n.startswith("reward") for n in policy.trained())
    before = copy.deepcopy([p.detach() for p in frozen])
    tiny.randomise(policy.trained(), std=0.2)
    trained(policy, goal)
    assert [s["scores"][0] for s in predict(reader, reader.objective, rows)] == expected
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True)) and policy.active == "default"
    policy.train()
    predict(reader, reader.objective, rows)
    assert policy.training


def test_all_voices_share_one_base(folders):
    policy, _ = policy_of(folders, method={"kind": "lora", "from": str(folders["sft"])})
    reader = voices.add_reader(policy, folders["reward"], "reward0")
    plain = {n: p.data_ptr() for n, p in opened(folders["llama"]).model.named_parameters()}
    deltas = {id(p) for d in policy.deltas.values() for p in d.params.values()}
    base = [p for p in policy.lm.parameters() if id(p) not in deltas]
    assert len(base) == len(plain) and reader.base.model is policy.lm and policy.voices["value"].base.model is policy.lm
    held, added = voices.resident_bytes(policy)
    one = sum(p.nbytes for p in base)
    assert held == pytest.approx(one, rel=0.02)  # and what the base keeps besides: the frequencies of its positions
    assert added == sum(p.nbytes for d in policy.deltas.values() for p in d.params.values()) + sum(p.nbytes for p in policy.voice_heads.parameters())
    assert list(policy.deltas) == ["default", "reference", "value", "reward0"] and added < one


def test_a_copy_is_counted_where_there_has_to_be_one(folders):
    policy, _ = policy_of(folders, method="full")
    held, added = voices.resident_bytes(policy)
    head = sum(p.nbytes for p in policy.voice_heads.parameters())
    assert held == pytest.approx(sum(p.nbytes for p in policy.lm.parameters()), rel=0.02) and added - head == pytest.approx(held, rel=0.02)


def test_what_cannot_be_a_reader_is_refused(folders, tmp_path):
    policy, _ = policy_of(folders)
    with pytest.raises(LuthierError, match="has no head, so it scores nothing"):
        voices.add_reader(policy, folders["sft"], "reward0")
    other = tiny.folder(tmp_path / "other", seed=5)
    elsewhere, _ = build.assemble(run(other, PPO), opened(other))
    with pytest.raises(LuthierError, match="An adapter only fits its own base"):
        voices.add_reader(elsewhere, folders["reward"], "reward0")
    with_tokens, goal = build.assemble(run(folders["llama"], "reward", tokens=["<new>"]), opened(folders["llama"]))
    adapter.save(with_tokens, tmp_path / "tokens", objective=goal)
    with pytest.raises(LuthierError, match=r"was trained with <new> added to the vocabulary; give this run the same ones: tokens=\[<new>\]"):
        voices.add_reader(policy, tmp_path / "tokens", "reward0")
    assert not any(v.startswith("reward") for v in policy.voices)
