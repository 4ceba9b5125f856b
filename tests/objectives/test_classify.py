"""Heads, losses and predictions, against transformers' own classifiers and slow sums."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from luthier.core import LuthierError, Row
from luthier.objectives.classify import HEAD, Head, Objective
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.train import train
from small import MULTIPLE, NUMBER, PROBLEMS, SINGLE, classifier, labelled_rows

KINDS = ["llama", "gpt2", "bert", "modernbert", "t5", "bart"]


def loss(policy, goal, some, packed=False):
    with torch.no_grad():
        return goal.loss(policy, goal.collate(some, pad=0, packed=packed))


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("goal", PROBLEMS, ids=lambda g: g.problem)
def test_packed_or_in_parts_the_sum_is_the_same(goal, family):
    policy, some = classifier(family, goal), labelled_rows(family, goal)
    whole = loss(policy, goal, some).sums["examples"]
    parts = sum(loss(policy, goal, some[i : i + 2], packed=policy.base.packs).sums["examples"] for i in (0, 2, 4))
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_step_in_micro_batches_is_the_step_in_one(family):
    from luthier.methods.lora import Method

    def fit(cuts):
        base, method = tiny.base(family), Method()
        torch.manual_seed(0)
        policy = Policy(base, method.attach(base, "default"), method=method, heads=SINGLE.heads(base))

        class Feed:
            def __next__(self):
                return [SINGLE.collate(labelled_rows(family)[a:b], pad=0, packed=base.packs) for a, b in cuts]

        optimizer = Optimizer(policy.trained(), lr=1e-2)
        steps = list(train(policy, SINGLE, Feed(), optimizer, lr=lambda _: 1e-2, steps=4, place=Place(on="cpu")))
        assert all(0 <= s.metrics["accuracy"] <= 1 for s in steps)
        return [s.loss for s in steps]

    assert fit([(0, 6)]) == pytest.approx(fit([(0, 1), (1, 4), (4, 6)]), rel=1e-5)


def test_two_texts_tell_bert_which_is_which():
    policy = classifier("bert")
    base = policy.base
    r = labelled_rows("bert", n=1)[0]
    types = (np.arange(len(r)) > 4).astype(np.int32)
    told = Row(r.ids, r.train, "", {**r.extras, "inputs": {"token_type_ids": types}})
    for packed in (False, True):
        batch = SINGLE.collate([r, told], pad=0, packed=packed)
        at = [(int(b), int(t)) for b, t in zip(batch.segments.row, batch.segments.start, strict=True)]
        got = [batch.inputs["token_type_ids"][b, t : t + len(r)].tolist() for b, t in at]
        assert got == [[0] * len(r), types.tolist()]
    with torch.no_grad():
        one, two = SINGLE.scores(policy, SINGLE.collate([r, told], pad=0, packed=False))
        hidden = base.model.bert(input_ids=torch.from_numpy(r.ids).long()[None], token_type_ids=torch.from_numpy(types).long()[None]).last_hidden_state
        torch.testing.assert_close(two[None], policy.heads[HEAD](hidden[:, 0]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(one, two, atol=1e-3)


def test_predictions_are_labels_with_probabilities():
    some = labelled_rows("llama")
    batch = lambda goal: goal.collate(some, pad=0, packed=True)  # noqa: E731
    for said in SINGLE.predict(classifier("llama"), batch(SINGLE)):
        p = said["probabilities"]
        assert sum(p.values()) == pytest.approx(1, abs=1e-5) and said["probability"] == max(p.values()) == p[said["label"]]
    for said in MULTIPLE.predict(classifier("llama", MULTIPLE), batch(MULTIPLE)):
        p = said["probabilities"]
        assert said["label"] == [n for n in MULTIPLE.labels if p[n] > 0.5]
        assert said["probability"] == pytest.approx(math.prod(x if x > 0.5 else 1 - x for x in p.values()), rel=1e-6)
    with torch.no_grad():
        scores = NUMBER.scores(classifier("llama", NUMBER), batch(NUMBER)).squeeze(-1).tolist()
    assert [s["label"] for s in NUMBER.predict(classifier("llama", NUMBER), batch(NUMBER))] == pytest.approx(scores)


@pytest.mark.parametrize("goal", PROBLEMS, ids=lambda g: g.problem)
def test_rows_that_do_not_count_change_no_sum(goal):
    """A row without a label, and a row that stands for a rank without rows."""
    some, policy = labelled_rows("llama", goal, n=4), classifier("llama", goal)
    idle = Row(some[1].ids, np.zeros(len(some[1]), dtype=bool), "", some[1].extras)
    odd, plain = loss(policy, goal, [idle, *some, Row(some[0].ids, some[0].train, "", {"label": None})]), loss(policy, goal, some)
    torch.testing.assert_close(odd.sums["examples"], plain.sums["examples"], atol=1e-5, rtol=1e-5)
    for name, (amount, count) in plain.metrics.items():
        assert float(odd.metrics[name][0]) == pytest.approx(float(amount), rel=1e-5) and int(odd.metrics[name][1]) == int(count) == 4


def test_rows_without_a_label_are_predicted_and_not_counted():
    some = labelled_rows("llama", n=3)
    bare = Row(some[0].ids, some[0].train, "", {"label": None})
    batch = SINGLE.collate([bare, *some], pad=0, packed=False)
    assert batch.units == {"examples": 3}
    policy = classifier("llama")
    torch.testing.assert_close(loss(policy, SINGLE, [bare, *some]).sums["examples"], loss(policy, SINGLE, some).sums["examples"], atol=1e-5, rtol=1e-5)
    alone = SINGLE.collate([bare], pad=0, packed=False)
    assert alone.units == {"examples": 0} and float(loss(policy, SINGLE, [bare]).sums["examples"]) == 0
    assert len(SINGLE.predict(policy, alone)) == 1


def test_the_head_stays_in_fp32_on_a_bf16_base():
    base = tiny.base("bert")
    base.model.to(torch.bfloat16)
    policy = Policy(base, heads=SINGLE.heads(base))
    assert {p.dtype for p in policy.heads.parameters()} == {torch.float32}
    assert SINGLE.scores(policy, SINGLE.collate(labelled_rows("bert"), pad=0, packed=False)).dtype == torch.float32


def test_dropout_works_in_training_alone():
    head = Head(8, 2, deep=True, dropout=0.5, std=1.0)
    x = torch.randn(4, 8)
    assert not torch.equal(head.train()(x), head(x)) and torch.equal(head.eval()(x), head(x))


def test_what_cannot_be_classified_is_refused():
    base = tiny.base("llama")
    with pytest.raises(LuthierError, match="labels are not known yet"):
        Objective().heads(base)
    with pytest.raises(LuthierError, match="'a' is there twice"):
        Objective(labels=("a", "b", "a"))
    with pytest.raises(LuthierError, match="only 'a'"):
        Objective(labels=("a",))
    with pytest.raises(LuthierError, match="no classification head"):
        SINGLE.scores(Policy(base), SINGLE.collate(labelled_rows("llama"), pad=0, packed=True))


# --- class weights --------------------------------------------------------------------------------------------------

COUNTS = {"bad": 5, "fair": 15, "good": 40}


def weighted(asked):
    return replace(SINGLE, class_weights=asked).fitted({"problem": "single", "labels": ["bad", "fair", "good"], "label_counts": COUNTS})


def test_balanced_weights_make_labels_count_alike_and_have_a_mean_of_one():
    weights = weighted("balanced").class_weights
    assert weights == {n: pytest.approx(60 / (3 * c), rel=1e-5) for n, c in COUNTS.items()}
    assert len({round(weights[n] * c, 3) for n, c in COUNTS.items()}) == 1


def test_given_weights_keep_their_ratios_and_are_not_scaled_twice():
    once = weighted({"bad": 3, "fair": 1, "good": 1})
    weights = once.class_weights
    assert weights["bad"] / weights["good"] == pytest.approx(3, rel=1e-5)
    assert sum(weights[n] * c for n, c in COUNTS.items()) == pytest.approx(60, rel=1e-4)
    for asked in (weights, weighted({"bad": 2.4, "fair": 4.7, "good": 3.7}).class_weights):  # the second would be rounded anew
        assert weighted(asked).class_weights == asked, "a run that is resumed reads back what it wrote down"


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_weighted_sum_and_its_gradient_are_torchs(family):
    goal = weighted("balanced")
    policy, some = classifier(family, goal), labelled_rows(family, goal)
    batch = goal.collate(some, pad=0, packed=False)
    labels = torch.tensor([r.extras["label"] for r in some])
    weight = torch.tensor([goal.class_weights[n] for n in goal.labels])
    heads = list(policy.heads.parameters())
    ours = goal.loss(policy, batch).sums["examples"]
    theirs = torch.nn.functional.cross_entropy(goal.scores(policy, batch), labels, weight, reduction="mean") * weight[labels].sum()
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, heads), torch.autograd.grad(theirs, heads), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert float(ours.detach()) != pytest.approx(float(SINGLE.loss(policy, batch).sums["examples"].detach()), rel=1e-3)


@pytest.mark.parametrize(
    "asked,said",
    [
        ({"bad": 1, "fair": 1, "god": 1}, "'god' is no label of the data; found bad, fair, good"),
        ({"bad": 1, "fair": 1}, "'good' is a label of the data and has no weight; found bad, fair"),
        ({"bad": 0, "fair": 1, "good": 1}, "must be above 0"),
    ],
    ids=str,
)
def test_weights_of_other_labels_are_refused(asked, said):
    with pytest.raises(LuthierError, match=said):
        weighted(asked)


def test_numbers_and_several_labels_take_no_class_weights():
    with pytest.raises(LuthierError, match="class_weights: weigh the labels of problem single"):
        replace(NUMBER, class_weights="balanced")
