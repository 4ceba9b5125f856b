"""The losses of every objective against transformers' own models and slow sums over examples."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import tiny
from luthier.objectives.classify import HEAD
from luthier.objectives.masked_text import Objective as MaskedText
from luthier.objectives.sft import Objective as Sft
from luthier.policy import Policy
from small import BY_MASK, BY_SENTINEL, MULTIPLE, NUMBER, PROBLEMS, SINGLE, classifier, hidden_rows, labelled_rows

KINDS = ["llama", "gpt2", "bert", "modernbert", "t5", "bart"]


def loss(policy, goal, some, packed=False):
    with torch.no_grad():
        return goal.loss(policy, goal.collate(some, pad=0, packed=packed))


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("goal", PROBLEMS, ids=lambda g: g.problem)
def test_the_loss_is_the_slow_sum_over_examples(goal, family):
    policy = classifier(family, goal)
    some = labelled_rows(family, goal)
    with torch.no_grad():
        scores = torch.cat([goal.scores(policy, goal.collate([r], pad=0, packed=False)) for r in some]).tolist()
    total, right, off = 0.0, 0, 0.0
    for r, z in zip(some, scores, strict=True):
        y = r.extras["label"]
        if goal is SINGLE:
            total += math.log(sum(math.exp(x) for x in z)) - z[y]
            right += max(range(3), key=lambda k: z[k]) == y
        elif goal is MULTIPLE:
            p = [1 / (1 + math.exp(-x)) for x in z]
            total += sum(-math.log(q if is_one else 1 - q) for q, is_one in zip(p, y, strict=True)) / 3
            right += [q > 0.5 for q in p] == [bool(is_one) for is_one in y]
        else:
            total += (z[0] - y) ** 2
            off += abs(z[0] - y)
    got = loss(policy, goal, some)
    assert float(got.sums["examples"]) == pytest.approx(total, rel=1e-4)
    name, want = ("absolute_error", off) if goal is NUMBER else ("accuracy", right)
    assert float(got.metrics[name][0]) == pytest.approx(want, rel=1e-4) and int(got.metrics[name][1]) == len(some)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bert", "roberta"])
@pytest.mark.parametrize("goal", PROBLEMS, ids=lambda g: g.problem)
def test_with_their_weights_it_is_transformers_classifier(goal, family):
    policy = classifier(family, goal)
    config = policy.lm.config
    config.num_labels, config.pad_token_id = goal.outputs, 1 if family == "roberta" else 0
    config.problem_type = {"single": "single_label_classification", "multiple": "multi_label_classification", "regression": "regression"}[goal.problem]
    config._attn_implementation = "eager"
    theirs = AutoModelForSequenceClassification.from_config(config).eval()
    theirs.base_model.load_state_dict(policy.lm.base_model.state_dict(), strict=False)
    head = policy.heads[HEAD]
    with torch.no_grad():
        if family == "bert":
            theirs.bert.pooler.dense.load_state_dict(head.dense.state_dict())
            theirs.classifier.load_state_dict(head.out.state_dict())
        elif family == "roberta":
            theirs.classifier.dense.load_state_dict(head.dense.state_dict())
            theirs.classifier.out_proj.load_state_dict(head.out.state_dict())
        else:
            theirs.score.load_state_dict(head.out.state_dict())
    some = labelled_rows(family, goal)
    batch = goal.collate(some, pad=config.pad_token_id, packed=False)
    mask = (batch.segments.example(batch.shape) >= 0).long()
    with torch.no_grad():
        their = theirs(input_ids=batch.ids, attention_mask=mask, labels=batch.extras["label"])
        policy.lm.config._attn_implementation = "luthier" if policy.base.packs else "eager"
        torch.testing.assert_close(goal.scores(policy, batch), their.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(goal.loss(policy, batch).sums["examples"] / len(some), their.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "hiding"), [("bert", BY_MASK), ("roberta", BY_MASK), ("modernbert", BY_MASK), ("t5", BY_SENTINEL), ("bart", BY_SENTINEL)])
def test_the_loss_of_hidden_tokens_is_transformers_own(family, hiding):
    base = tiny.base(family)
    batch = MaskedText().collate(hidden_rows(replace(hiding, start=base.anatomy.decoder_start), n=5), pad=base.model.config.pad_token_id or 0, packed=False)
    with torch.no_grad():
        ours = MaskedText().loss(Policy(base), batch).sums["tokens"]
        stream = batch if batch.source is None else batch.source
        mask = (stream.segments.example(stream.shape) >= 0).long()
        base.model.config._attn_implementation = "sdpa"
        if batch.source is None:
            theirs = base.model(input_ids=batch.ids, attention_mask=mask, labels=batch.targets).loss
        else:
            theirs = base.model(input_ids=stream.ids, attention_mask=mask, decoder_input_ids=batch.ids, labels=batch.targets).loss
    torch.testing.assert_close(ours / batch.units["tokens"], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.SEQ2SEQ)
def test_the_loss_of_an_answer_is_transformers_own(family):
    base = tiny.base(family)
    batch = Sft().collate(tiny.pairs(family, 5), pad=0, packed=False)
    mask = (batch.source.segments.example(batch.source.shape) >= 0).long()
    with torch.no_grad():
        ours = Sft().loss(Policy(base), batch).sums["tokens"]
        base.model.config._attn_implementation = "sdpa"
        theirs = base.model(input_ids=batch.source.ids, attention_mask=mask, decoder_input_ids=batch.ids, labels=batch.targets).loss
    torch.testing.assert_close(ours / batch.units["tokens"], theirs, atol=1e-5, rtol=1e-5)
