"""The loss of each row: it adds up to the loss of all, whatever the objective, and several answers to one prompt are one row of the interval."""

import math
from dataclasses import replace

import numpy as np
import pytest

import small
import tiny
from luthier.core import LuthierError, Row
from luthier.measuring.evaluate import loss_on
from luthier.measuring.measure import group
from luthier.measuring.rowloss import by_row, losses, weighted
from luthier.objectives import masked_text, orpo, sft, text
from luthier.policy import Policy


def whole(policy, objective, rows):
    return loss_on(policy, objective, [objective.collate(g, pad=0, packed=policy.base.packs) for g in group(rows, 60, policy.base.packs)])


@pytest.mark.parametrize("goal", [sft, text, masked_text, *small.PROBLEMS], ids=["sft", "text", "masked_text", "single", "multiple", "regression"])
def test_rows_add_up_to_the_loss_of_all_and_are_what_each_is_alone(goal):
    if goal in small.PROBLEMS:
        policy, objective, rows = small.classifier("llama", goal), goal, small.labelled_rows("llama", goal)
    elif goal is masked_text:
        policy, objective, rows = Policy(tiny.base("bert")), goal.Objective(), small.hidden_rows(small.BY_MASK)
    else:
        policy, objective, rows = Policy(tiny.base("llama")), goal.Objective(), tiny.rows(7)
    found, all_ = by_row(policy, objective, rows, tokens=60), whole(policy, objective, rows)
    (term,) = objective.terms
    assert found[:, 0].sum() == pytest.approx(all_.sums[term], rel=1e-4) and found[:, 1].sum() == all_.counts[term]
    for i, row in enumerate(rows):
        alone = objective.loss(policy, objective.collate([row], pad=0, packed=policy.base.packs))
        assert found[i, 0] == pytest.approx(float(alone.sums[term].detach()), rel=1e-4, abs=1e-5)


def test_an_objective_of_pairs_is_shown_its_rows_one_by_one():
    from luthier.core import join

    pairs = [join([a, b], ranks=(0, 1)) for a, b in zip(tiny.rows(4, seed=1), tiny.rows(4, seed=2), strict=True)]
    policy, objective = Policy(tiny.base("llama")), orpo.Objective()
    found, all_ = by_row(policy, objective, pairs), whole(policy, objective, pairs)
    for k, term in enumerate(objective.terms):
        assert found[:, 2 * k].sum() == pytest.approx(all_.sums[term], rel=1e-4) and found[:, 2 * k + 1].sum() == all_.counts[term]
    assert weighted(objective.terms)(found.sum(0, keepdims=True))[0] == pytest.approx(all_.value, rel=1e-4)


class Bare:
    """A tokenizer as far as the loss needs one."""

    pad_token_id = 0

    def decode(self, ids, skip_special_tokens):
        return "xy" * len(ids)


def test_perplexity_is_e_to_the_loss_per_token_and_bits_are_of_bytes():
    policy, rows = Policy(tiny.base("llama")), tiny.rows(7)
    policy.base.tokenizer = Bare()
    found, all_ = losses(policy, text.Objective(), rows, range(7)), whole(policy, text.Objective(), rows)
    loss, perplexity, bits = (found[k].score() for k in ("loss per token", "perplexity", "bits per byte"))
    assert loss.value == pytest.approx(all_.value, rel=1e-5) and loss.n == 7
    assert [perplexity.value, perplexity.low, perplexity.high] == pytest.approx([math.exp(x) for x in (loss.value, loss.low, loss.high)], rel=1e-2)
    assert bits.value == pytest.approx(all_.bits_per_byte(2 * sum(len(r) - 1 for r in rows)), rel=1e-5)


def test_answers_to_one_prompt_hang_together():
    """Four answers to each of 10 prompts, alike within a prompt: 40 rows that say no more than 10."""
    policy, rows = Policy(tiny.base("llama")), [replace(r) for r in tiny.rows(10) for _ in range(4)]
    policy.base.tokenizer = Bare()
    together = losses(policy, sft.Objective(), rows, [i // 4 for i in range(40)])["loss per token"].score()
    apart = losses(policy, sft.Objective(), rows, range(40))["loss per token"].score()
    assert together.n == 10 and together.value == pytest.approx(apart.value)
    unlike = tiny.rows(12)
    kept = [losses(policy, sft.Objective(), unlike, places)["loss per token"].value for places in ([i // 4 for i in range(12)], range(12))]
    assert kept[0] == pytest.approx(kept[1])  # no row of a prompt is lost
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_rows_without_anything_to_score_are_refused():
    policy, bare = Policy(tiny.base("llama")), Row(np.arange(5, 12, dtype=np.int32), np.zeros(7, dtype=bool))
    policy.base.tokenizer = Bare()
    with pytest.raises(LuthierError, match="nothing to score"):
        losses(policy, sft.Objective(), [bare], [0])
