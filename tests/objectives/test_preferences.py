"""What reward, dpo, orpo and kto owe as objectives: sums that do not depend on how rows are packed or cut, and what they read of their rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import ranked
import tiny
from luthier.core import Incompatible, LuthierError, Row, examples_of, join
from luthier.measuring.evaluate import loss_on
from luthier.methods.full import Method as Full
from luthier.methods.lora import Method as Lora
from luthier.objectives.dpo import Objective as Dpo
from luthier.objectives.kto import Objective as Kto
from luthier.objectives.orpo import Objective as Orpo
from luthier.objectives.reward import Objective as Reward
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.train import train

GOALS = [Reward(centre=0.01), Dpo(), Dpo(loss_kind="ipo"), Orpo(), Kto()]
NAMES = ["reward", "dpo", "ipo", "orpo", "kto"]
SIZES = (2, 4, 2, 3, 2)


def policy_of(family, goal, method=None):
    base, method = tiny.base(family), method or Lora()
    torch.manual_seed(0)
    made = Policy(base, method.attach(base, "default"), method=method, heads=goal.heads(base))
    if isinstance(method, Lora):
        tiny.randomise(made.delta.params, std=0.2)
    tiny.randomise(dict(made.heads.named_parameters()), std=0.5)
    return made


def sums(goal, policy, rows, packed):
    batch = goal.collate(rows, pad=0, packed=packed)
    with torch.no_grad():
        return goal.loss(policy, batch).sums, batch.units


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("goal", GOALS, ids=NAMES)
def test_packed_or_in_parts_the_sums_are_the_same(goal, family):
    if family == "bert" and not isinstance(goal, Reward):
        with pytest.raises(Incompatible, match="objective: reward"):
            goal.heads(tiny.base(family))
        return
    policy, rows = policy_of(family, goal).eval(), ranked.rows(family, goal.renders, SIZES)
    if isinstance(goal, Kto):  # its parts are parts of a step: tested below
        rows = [join(examples_of(r)[:1], **{k: r.extras[k] for k in ("ranks", "good", "margin")}, reference=r.extras["reference"][:1]) for r in rows]
    whole, units = sums(goal, policy, rows, packed=policy.base.packs)
    parts = [sums(goal, policy, rows[i : i + 2], packed=False) for i in (0, 2, 4)]
    for name in whole:
        torch.testing.assert_close(sum(s[name] for s, _ in parts), whole[name], atol=1e-4, rtol=1e-4)
        assert sum(u[name] for _, u in parts) == units[name]


@pytest.mark.parametrize("goal", GOALS, ids=NAMES)
def test_a_step_in_micro_batches_is_the_step_in_one(goal):
    rows = ranked.rows("llama", goal.renders, SIZES)

    def fit(cuts):
        policy = policy_of("llama", goal)

        class Feed:
            def __next__(self):
                return [goal.collate(rows[a:b], pad=0, packed=True) for a, b in cuts]

        optimizer = Optimizer(policy.trained(), lr=1e-2)
        steps = list(train(policy, goal, Feed(), optimizer, lr=lambda _: 1e-2, steps=4, place=Place(on="cpu")))
        return [s.loss for s in steps], [s.metrics for s in steps]

    (one, seen), (other, again) = fit([(0, 5)]), fit([(0, 1), (1, 4), (4, 5)])
    assert one == pytest.approx(other, rel=1e-4)
    for a, b in zip(seen, again, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_the_divergence_of_kto_is_of_the_whole_step():
    """Of each micro-batch alone it would be another number, clamped at zero by itself."""
    goal = Kto()
    policy, rows = policy_of("llama", goal), ranked.rows("llama", "judged", (2,) * 6)
    parts = [goal.collate(rows[i : i + 2], pad=0, packed=True) for i in (0, 2, 4)]
    alone = []
    for b in parts:
        goal.couple(policy, [b])
        alone.append(float(b.extras["kl"]))
    goal.couple(policy, parts)
    assert len({float(b.extras["kl"]) for b in parts}) == 1 and float(parts[0].extras["kl"]) not in alone
    goal.couple(policy, parts, mean=lambda x: x / 2)  # of two ranks of which the other has nothing
    assert policy.training and float(parts[0].extras["kl"]) == pytest.approx(float(goal_kl(goal, policy, rows)), abs=1e-5)


def test_the_held_out_loss_of_kto_does_not_depend_on_how_its_rows_are_grouped():
    goal = Kto()
    policy, rows = policy_of("llama", goal), ranked.rows("llama", "judged", (2,) * 6)
    one, three = ([goal.collate(rows[i : i + n], pad=0, packed=True) for i in range(0, 6, n)] for n in (6, 2))
    assert loss_on(policy, goal, three).value == pytest.approx(loss_on(policy, goal, one).value, rel=1e-5)


def goal_kl(goal, policy, rows):
    batch = goal.collate(rows, pad=0, packed=True)
    goal.couple(policy, [batch])
    return batch.extras["kl"]


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("goal", [Dpo(), Kto()], ids=["dpo", "kto"])
def test_the_reference_is_the_base_with_the_delta_off_or_what_the_rows_brought(goal, family):
    policy = policy_of(family, goal).eval()
    bare = ranked.rows(family, goal.renders, reference=False)
    live, _ = sums(goal, policy, bare, packed=policy.base.packs)
    assert policy.active == "default"
    from luthier.references import logps

    policy.use(None)
    known = [replace(r, extras={**r.extras, "reference": np.array(logps(policy, examples_of(r), tokens=64, packed=False), dtype=np.float32)}) for r in bare]
    policy.use("default")
    brought, _ = sums(goal, policy, known, packed=policy.base.packs)
    torch.testing.assert_close(live, brought, atol=1e-4, rtol=1e-4)
    made_up, _ = sums(goal, policy, ranked.rows(family, goal.renders), packed=policy.base.packs)
    assert abs(float(next(iter(made_up.values()))) - float(next(iter(live.values())))) > 1e-3


def test_at_the_start_the_policy_is_the_reference():
    goal = Dpo()
    base = tiny.base("llama")
    method = Lora()
    policy = Policy(base, method.attach(base, "default"), method=method)
    batch = goal.collate(ranked.rows("llama", "pairs", reference=False), pad=0, packed=True)
    found = goal.loss(policy, batch)
    assert float(found.sums["rankings"].detach()) / 4 == pytest.approx(np.log(2), abs=1e-6)
    assert float(found.metrics["accuracy"][0] / found.metrics["accuracy"][1]) == pytest.approx(0.5)


def test_where_the_base_is_trained_there_is_no_reference_to_ask():
    goal = Dpo()
    policy = policy_of("llama", goal, Full())
    with pytest.raises(Incompatible, match="no base left"):
        goal.loss(policy, goal.collate(ranked.rows("llama", "pairs", reference=False), pad=0, packed=True))
    assert torch.isfinite(goal.loss(policy, goal.collate(ranked.rows("llama", "pairs"), pad=0, packed=True)).sums["rankings"])


@pytest.mark.parametrize("goal", GOALS, ids=NAMES)
def test_a_row_of_which_nothing_is_learned_changes_no_sum(goal):
    rows, policy = ranked.rows("llama", goal.renders, SIZES), policy_of("llama", goal).eval()
    idle = Row(rows[1].ids, np.zeros(len(rows[1]), dtype=bool), "", rows[1].extras)
    (plain, units), (odd, more) = sums(goal, policy, rows, True), sums(goal, policy, [idle, *rows], True)
    torch.testing.assert_close(odd, plain, atol=1e-4, rtol=1e-4)
    assert units == more
    alone, none = sums(goal, policy, [idle], True)
    assert all(float(s) == 0 for s in alone.values()) and not any(none.values())


def test_each_answer_of_a_ranking_is_scored_once_a_step(monkeypatch):
    goal = Reward()
    policy, seen = policy_of("llama", goal), []
    hidden = policy.hidden
    monkeypatch.setattr(policy, "hidden", lambda batch: (seen.append(len(batch.segments)), hidden(batch))[1])
    batch = goal.collate(ranked.rows("llama", "ranked", (9, 2)), pad=0, packed=True)
    assert len(batch.extras["better"]) == 36 + 1 and batch.units["rankings"] == 2
    goal.loss(policy, batch)
    assert seen == [11]


def test_ties_pull_rewards_together_and_count_in_no_accuracy():
    goal = Reward()
    row = replace(ranked.rows("llama", "ranked", (2,))[0])
    tied = replace(row, extras={**row.extras, "ranks": (0, 0), "margin": 5.0})
    policy = policy_of("llama", goal)
    batch = goal.collate([tied], pad=0, packed=True)
    found = goal.loss(policy, batch)
    gap = float(np.subtract(*goal.predict(policy, batch)[0]["scores"]))
    assert float(found.sums["rankings"].detach()) == pytest.approx(float(np.logaddexp(0, gap) + np.logaddexp(0, -gap)) / 2, rel=1e-5)
    assert "accuracy" not in found.metrics and batch.units == {"rankings": 1, "compared": 0}
    batch = Dpo().collate([replace(tied, extras={**tied.extras, "reference": np.zeros(2)})], pad=0, packed=True)
    assert batch.units == {"rankings": 0} and len(batch.extras["better"]) == 0


def test_margins_push_clear_preferences_further_apart():
    goal, row = Reward(), ranked.rows("llama", "ranked", (2,))[0]
    policy = policy_of("llama", goal)
    losses = [float(sums(goal, policy, [replace(row, extras={**row.extras, "margin": m})], True)[0]["rankings"]) for m in (0.0, 1.0)]
    gap = float(np.subtract(*goal.predict(policy, goal.collate([row], pad=0, packed=True))[0]["scores"]))
    assert losses == pytest.approx([float(np.logaddexp(0, m - gap)) for m in (0, 1)], rel=1e-5)


def test_predictions_are_by_row_in_the_rows_order():
    for goal in (Reward(), Dpo(), Orpo()):
        rows, policy = ranked.rows("llama", goal.renders, (2, 4, 3)), policy_of("llama", goal).eval()
        together = goal.predict(policy, goal.collate(rows, pad=0, packed=True))
        assert [len(said["scores"]) for said in together] == [2, 4, 3]
        for row, said in zip(rows, together, strict=True):
            assert said["scores"] == pytest.approx(goal.predict(policy, goal.collate([row], pad=0, packed=False))[0]["scores"], abs=1e-4)


def test_answers_without_ranks_are_scored_and_not_learned_from():
    goal = Reward()
    row = join([examples_of(ranked.rows("llama", "ranked")[0])[0]], ranks=(), margin=0.0, good=None)
    policy = policy_of("llama", goal)
    batch = goal.collate([row], pad=0, packed=True)
    assert not any(batch.units.values()) and len(goal.predict(policy, batch)[0]["scores"]) == 1
    assert float(goal.loss(policy, batch).sums["rankings"].detach()) == 0


def test_settings_that_do_nothing_together_are_refused():
    with pytest.raises(LuthierError, match="label_smoothing"):
        Dpo(loss_kind="ipo", label_smoothing=0.1)
    with pytest.raises(LuthierError, match="centre"):
        Reward(centre=-1.0)
    with pytest.raises(LuthierError, match="no reward head"):
        Reward().scores(Policy(tiny.base("llama")), Reward().collate(ranked.rows("llama", "ranked"), pad=0, packed=True))
