"""The objectives of preferences on real (tiny) models: log-probabilities and losses made slowly, one answer at a time, and TRL's losses of the same answers."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ranked
import tiny
from luthier.core import examples_of, join
from luthier.methods.lora import Method
from luthier.objectives.classify import HEAD
from luthier.objectives.dpo import Objective as Dpo
from luthier.objectives.kto import Objective as Kto
from luthier.objectives.orpo import Objective as Orpo
from luthier.objectives.reward import Objective as Reward
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.train import train

DECODERS = ["llama", "gemma2", "t5"]
BETA = 0.3


def policy_of(family, goal, seed=0):
    base, method = tiny.base(family), Method()
    delta = method.attach(base, "default")
    tiny.randomise(delta.params, seed, std=0.2)
    torch.manual_seed(seed)
    made = Policy(base, delta, method=method, heads=goal.heads(base)).eval()
    tiny.randomise(dict(made.heads.named_parameters()), std=0.5)
    return made


def slow_logp(policy, example, reference=False):
    """log p of an answer's tokens together, and how many they are, from transformers' own logits."""
    policy.use(None if reference else "default")
    ids = torch.from_numpy(example.ids).long()[None]
    with torch.no_grad():
        if "source" in example.extras:
            logits = policy.lm(input_ids=torch.from_numpy(example.extras["source"]).long()[None], decoder_input_ids=ids, use_cache=False).logits[0]
        else:
            logits = policy.lm(input_ids=ids, use_cache=False).logits[0]
    policy.use("default")
    total, n = 0.0, 0
    for t in range(1, len(example)):
        if example.train[t]:
            total += float(logits[t - 1].double().log_softmax(-1)[example.ids[t]])
            n += 1
    return total, n


def of(goal, policy, rows, packed=None):
    batch = goal.collate(rows, pad=0, packed=policy.base.packs if packed is None else packed)
    with torch.no_grad():
        found = goal.loss(policy, batch)
    return {k: float(v) / batch.units[k] for k, v in found.sums.items()}, {k: float(a / n) for k, (a, n) in found.metrics.items()}


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


# --- slow versions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(("kind", "smoothing", "normalised"), [("sigmoid", 0.0, False), ("sigmoid", 0.1, False), ("sigmoid", 0.0, True), ("ipo", 0.0, False)])
def test_dpo_is_equation_7_over_all_pairs_of_each_ranking(kind, smoothing, normalised, family):
    goal = Dpo(beta=BETA, loss_kind=kind, label_smoothing=smoothing, length_normalised=normalised)
    policy, rows = policy_of(family, goal), ranked.rows(family, "pairs", reference=False)
    per_ranking, right = [], []
    for row in rows:
        ratios = []
        for e in examples_of(row):
            (logp, n), (reference, _) = slow_logp(policy, e), slow_logp(policy, e, reference=True)
            ratios.append((logp - reference) / (n if normalised else 1))
        losses = []
        for i in range(len(ratios)):
            for j in range(i + 1, len(ratios)):
                h = ratios[i] - ratios[j]
                right.append((h > 0, 1 / math.comb(len(ratios), 2)))
                if kind == "ipo":
                    losses.append((h - 1 / (2 * BETA)) ** 2)
                else:
                    losses.append(-(1 - smoothing) * log_sigmoid(BETA * h) - smoothing * log_sigmoid(-BETA * h))
        per_ranking.append(sum(losses) / math.comb(len(ratios), 2))
    loss, metrics = of(goal, policy, rows)
    assert loss["rankings"] == pytest.approx(np.mean(per_ranking), rel=2e-4)
    assert metrics["accuracy"] == pytest.approx(sum(w for r, w in right if r) / len(rows), rel=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_orpo_is_the_cross_entropy_of_the_best_and_the_odds_against_the_others(family):
    goal = Orpo(weight=0.25)
    policy, rows = policy_of(family, goal), ranked.rows(family, "pairs")
    per_ranking, best, tokens = [], 0.0, 0
    for row in rows:
        found = [slow_logp(policy, e) for e in examples_of(row)]
        best, tokens = best - found[0][0], tokens + found[0][1]
        odds = [math.log(math.exp(s / n) / (1 - math.exp(s / n))) for s, n in found]
        losses = [-log_sigmoid(odds[i] - odds[j]) for i in range(len(odds)) for j in range(i + 1, len(odds))]
        per_ranking.append(sum(losses) / len(losses))
    loss, _ = of(goal, policy, rows)
    assert loss["rankings"] == pytest.approx(np.mean(per_ranking), rel=2e-4) and loss["tokens"] == pytest.approx(best / tokens, rel=1e-4)
    assert goal.terms == {"rankings": 0.25, "tokens": 1.0}


@pytest.mark.parametrize("family", DECODERS)
def test_kto_weighs_each_answer_against_the_divergence_on_other_answers(family):
    goal = Kto(beta=BETA, desirable=1.3, undesirable=0.6)
    policy, rows = policy_of(family, goal, seed=6), ranked.rows(family, "judged", reference=False)
    ratio = lambda e: slow_logp(policy, e)[0] - slow_logp(policy, e, reference=True)[0]  # noqa: E731
    parts = [examples_of(r) for r in rows]
    z = max(0.0, float(np.mean([ratio(other) for _, other in parts])))
    assert z > 0  # else it would weigh nothing
    losses = []
    for row, (own, _) in zip(rows, parts, strict=True):
        off = BETA * (ratio(own) - z)
        losses.append(1.3 * (1 - 1 / (1 + math.exp(-off))) if row.extras["good"] else 0.6 * (1 - 1 / (1 + math.exp(off))))
    loss, metrics = of(goal, policy, rows)
    assert loss["examples"] == pytest.approx(np.mean(losses), rel=2e-4) and metrics["kl"] == pytest.approx(z, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_reward_model_is_bradley_terry_over_all_pairs_of_each_ranking(family):
    goal = Reward(centre=0.05)
    policy, rows = policy_of(family, goal), ranked.rows(family, "ranked", sizes=(2, 4, 3))
    terms, centres = [], []
    for row in rows:
        rewards = []
        for e in examples_of(row):
            batch = goal.collate([join([e], ranks=(), margin=0.0, good=None)], pad=0, packed=False)
            with torch.no_grad():
                hidden = policy.hidden(batch)[0]
                at = 0 if family == "bert" else len(e) - 1
                rewards.append(float(policy.heads[HEAD](hidden[at])))
        pairs = [(i, j) for i in range(len(rewards)) for j in range(i + 1, len(rewards))]
        terms.append(sum(-log_sigmoid(rewards[i] - rewards[j]) for i, j in pairs) / len(pairs))
        centres.append(sum((rewards[i] + rewards[j]) ** 2 for i, j in pairs) / len(pairs))
    loss, _ = of(goal, policy, rows)
    assert loss["rankings"] == pytest.approx(np.mean(terms), rel=1e-4) and loss["centre"] == pytest.approx(np.mean(centres), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_gradient_is_that_of_the_slow_loss(family):
    """By the chain rule from log-probabilities made with transformers' own logits."""
    goal = Dpo(beta=BETA)
    policy, rows = policy_of(family, goal), ranked.rows(family, "pairs", sizes=(2, 2), reference=True)
    batch = goal.collate(rows, pad=0, packed=policy.base.packs)
    goal.loss(policy, batch).sums["rankings"].backward()
    got = {k: p.grad.clone() for k, p in policy.delta.params.items()}
    policy.zero_grad()
    total = 0.0
    for row in rows:
        ratios = []
        for e, reference in zip(examples_of(row), row.extras["reference"], strict=True):
            ids = torch.from_numpy(e.ids).long()[None]
            more = {"input_ids": torch.from_numpy(e.extras["source"]).long()[None], "decoder_input_ids": ids} if "source" in e.extras else {"input_ids": ids}
            logp = policy.lm(**more, use_cache=False).logits[0].log_softmax(-1)
            ratios.append(sum(logp[t - 1, e.ids[t]] for t in range(1, len(e)) if e.train[t]) - float(reference))
        total = total - torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1]))
    total.backward()
    for key, p in policy.delta.params.items():
        torch.testing.assert_close(got[key], p.grad, atol=2e-5, rtol=2e-3)


# --- what each mistake would cost ------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [Dpo(), Dpo(loss_kind="ipo"), Orpo(), Reward()], ids=["dpo", "ipo", "orpo", "reward"])
def test_the_other_order_is_another_loss_and_training_lowers_the_right_one(goal):
    """A swapped pair passes every structural test: the better answer must come out ahead."""
    rows = ranked.rows("llama", goal.renders, sizes=(2, 2))
    swapped = []
    for row in rows:
        first, second = examples_of(row)
        extras = {"reference": row.extras["reference"][::-1]} if "reference" in row.extras else {}
        swapped.append(join([second, first], ranks=(0, 1), margin=0.0, good=None, **extras))
    policy = policy_of("llama", goal)
    (one, _), (other, _) = of(goal, policy, rows), of(goal, policy, swapped)
    assert abs(one["rankings"] - other["rankings"]) > 1e-3
    batch = goal.collate(rows, pad=0, packed=True)

    class Same:
        def __next__(self):
            return [batch]

    gap = lambda: np.array([s["scores"][0] - s["scores"][1] for s in goal.predict(policy, batch)])  # noqa: E731
    before = gap()
    list(train(policy, goal, Same(), Optimizer(policy.trained(), lr=1e-2), lr=lambda _: 1e-2, steps=12, place=Place(on="cpu")))
    assert (gap() > before).all() and (gap() > 0).all()


# --- TRL -------------------------------------------------------------------------------------------------------------


class Peer:
    """A TRL trainer without a trainer: its loss is called with log-probabilities of ours."""

    def __init__(self, **settings):
        same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device=torch.device("cpu"))
        self.__dict__ |= {"accelerator": same, "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)}, "aux_loss_enabled": False}
        self.__dict__ |= {"_total_train_tokens": 0, "_tp_size": 1, "precompute_ref_logps": True, "model": SimpleNamespace(training=False), **settings}


def padded(values, masks):
    """(B, T) log-probabilities and (B, T + 1) masks of answers, padded as TRL has them."""
    width = max(map(len, values))
    logps = torch.tensor([[*v, *[0.0] * (width - len(v))] for v in values])
    mask = torch.tensor([[0, *m, *[0] * (width - len(m))] for m in masks])
    return logps, mask


def tokens_of(policy, example, reference=False):
    """log p of every token but the first, 0 where it is not trained; and which are."""
    policy.use(None if reference else "default")
    with torch.no_grad():
        logp = policy.lm(input_ids=torch.from_numpy(example.ids).long()[None]).logits[0].log_softmax(-1)
    policy.use("default")
    each = [float(logp[t - 1, example.ids[t]]) if example.train[t] else 0.0 for t in range(1, len(example))]
    return each, example.train[1:].astype(int).tolist()


class Model:
    """What TRL calls: it gives the same whatever it is asked."""

    training = False

    def __init__(self, **gives):
        self.gives = SimpleNamespace(**gives)

    def __call__(self, **_):
        return self.gives


def model(logps):
    """One that gives these log-probabilities of tokens, and zeros for what is only logged."""
    zeros = torch.zeros_like(logps)
    return Model(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


@pytest.mark.parametrize(
    ("ours", "theirs"), [({}, "sigmoid"), ({"loss_kind": "ipo", "length_normalised": True}, "ipo"), ({"length_normalised": True}, "sigmoid_norm")]
)
def test_the_loss_of_dpo_is_trls(ours, theirs):
    from trl.trainer.dpo_trainer import DPOTrainer

    goal = Dpo(beta=BETA, **ours)
    policy, rows = policy_of("llama", goal), ranked.rows("llama", "pairs", sizes=(2, 2, 2), reference=False)
    pairs = [examples_of(r) for r in rows]
    ordered = [p[0] for p in pairs] + [p[1] for p in pairs]
    logps, mask = padded(*zip(*(tokens_of(policy, e) for e in ordered), strict=True))
    reference = torch.tensor([sum(tokens_of(policy, e, reference=True)[0]) for e in ordered])
    peer = Peer(loss_types=[theirs], loss_weights=[1.0], beta=BETA, f_divergence_type="reverse_kl", ld_alpha=None, use_weighting=False)
    given = {"input_ids": mask, "completion_mask": mask, "ref_chosen_logps": reference[:3], "ref_rejected_logps": reference[3:], "attention_mask": mask}
    loss = DPOTrainer._compute_loss(peer, model(logps), given, False)
    got, metrics = of(goal, policy, rows)
    assert got["rankings"] == pytest.approx(float(loss), rel=1e-4)
    if theirs == "sigmoid":
        said = peer._metrics["eval"]
        names = {"better_reward": "rewards/chosen", "worse_reward": "rewards/rejected", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
        for own, name in (names | {"better_logp": "logps/chosen"}).items():
            assert metrics[own] == pytest.approx(said[name][0], rel=1e-3, abs=1e-5), name


def test_label_smoothing_is_trls():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    goal = Dpo(beta=BETA, label_smoothing=0.2)
    policy, rows = policy_of("llama", goal), ranked.rows("llama", "pairs", sizes=(2, 2), reference=False)
    ratios = torch.tensor([[slow_logp(policy, e)[0] - slow_logp(policy, e, reference=True)[0] for e in examples_of(r)] for r in rows])
    peer = Peer(alpha=0.0, loss_type="sigmoid", beta=BETA, label_smoothing=0.2)
    losses = CPOTrainer.cpo_loss(peer, ratios[:, 0], ratios[:, 1])[0]  # of log-ratios it is conservative DPO's
    assert of(goal, policy, rows)[0]["rankings"] == pytest.approx(float(losses.mean()), rel=1e-4)


@pytest.mark.parametrize("seed", [1, 7])
def test_the_loss_of_kto_is_trls(seed):
    from trl.trainer.kto_trainer import KTOTrainer

    goal = Kto(beta=BETA, desirable=1.3, undesirable=0.6)
    policy, rows = policy_of("llama", goal, seed), ranked.rows("llama", "judged", reference=False)
    own, other = ([examples_of(r)[i] for r in rows] for i in (0, 1))
    logps, mask = padded(*zip(*(tokens_of(policy, e) for e in own), strict=True))
    kl_logps, kl_mask = padded(*zip(*(tokens_of(policy, e) for e in other), strict=True))
    reference, kl_reference = (torch.tensor([sum(tokens_of(policy, e, reference=True)[0]) for e in some]) for some in (own, other))
    peer = Peer(loss_type="kto", beta=BETA, desirable_weight=1.3, undesirable_weight=0.6, calculate_KL=True, model=SimpleNamespace(training=False))
    peer._compute_kl_logps = lambda model, batch: kl_logps.sum(-1)
    given = {"input_ids": mask, "completion_mask": mask, "attention_mask": mask, "KL_input_ids": kl_mask, "KL_completion_mask": kl_mask}
    given |= {"label": torch.tensor([r.extras["good"] for r in rows]), "ref_logps": reference, "ref_KL_logps": kl_reference}
    loss = KTOTrainer._compute_loss(peer, model(logps), given, False)
    got, metrics = of(goal, policy, rows)
    assert got["examples"] == pytest.approx(float(loss), rel=1e-4) and metrics["kl"] == pytest.approx(peer._metrics["eval"]["kl"][0], rel=1e-3, abs=1e-6)
    assert (metrics["kl"] > 0) == (seed == 7)  # both sides of the bound at 0


def test_the_odds_ratio_is_trls():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    goal = Orpo()
    policy, rows = policy_of("llama", goal), ranked.rows("llama", "pairs", sizes=(2, 2, 2))
    means = torch.tensor([[s / n for s, n in (slow_logp(policy, e) for e in examples_of(r))] for r in rows])
    losses, *_ = ORPOTrainer.odds_ratio_loss(Peer(beta=1.0), means[:, 0], means[:, 1])
    assert of(goal, policy, rows)[0]["rankings"] == pytest.approx(-float(losses.mean()), rel=1e-4)


@pytest.mark.parametrize("centre", [0.0, 0.01])
def test_the_loss_of_a_reward_model_is_trls(centre):
    from trl.trainer.reward_trainer import RewardTrainer

    goal = Reward(centre=centre)
    policy, rows = policy_of("llama", goal), ranked.rows("llama", "ranked", sizes=(2, 2, 2))
    margins = [0.5, 0.0, 1.5]
    rows = [replace(r, extras={**r.extras, "margin": m}) for r, m in zip(rows, margins, strict=True)]
    with torch.no_grad():
        score = goal.scores(policy, goal.collate(rows, pad=0, packed=False))
    peer = Peer(args=SimpleNamespace(center_rewards_coefficient=centre or None))
    scored = Model(logits=torch.cat([score[0::2], score[1::2]])[:, None])
    loss = RewardTrainer.compute_loss(peer, scored, {"margin": torch.tensor(margins), "attention_mask": torch.ones(6, 2)})
    got, metrics = of(goal, policy, rows)
    assert sum(goal.terms[k] * v for k, v in got.items()) == pytest.approx(float(loss), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(peer._metrics["eval"]["accuracy"][0]) and metrics["margin"] == pytest.approx(
        peer._metrics["eval"]["margin"][0], rel=1e-5
    )
