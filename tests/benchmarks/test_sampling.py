"""The benchmark of sampling, in small: both sides answer, greedy ids agree, and the parts add up."""

from __future__ import annotations

import pytest

pytest.importorskip("psutil", reason="psutil and rich come with the benchmarks")
from benchmarks import sampling

WORK = sampling.Work(2, 20, 3, 24)


def test_both_sides_answer_and_their_table_says_how_long_it_took():
    row = sampling.compare("fiddle", "float32", WORK, 2, with_parts=True)
    assert row["greedy"] == "equal"
    assert len(row["ours"].wall) == len(row["theirs"].wall) == 2 and min(row["ours"].cpu) > 0
    parts = row["parts"][0]
    assert all(x > 0 for x in parts.values()) and {"prompts read", "a token: linears", "a token: attention"} <= set(parts)
    text = sampling.table([row], WORK, None)
    assert "| fiddle, float32 | equal |" in text and "2 prompts of 20 tokens, 3 answers of 24 tokens each" in text and "x (median)" in text


def test_answers_that_part_are_said_to_part():
    policy, theirs = sampling.sides("fiddle", "float32")
    prompts = sampling.prompts_of(WORK, 4096)
    theirs.lm_head.weight.data.mul_(-1)
    assert sampling.equal(policy, theirs, prompts, WORK).startswith("equal up to token 1 of 24, a choice between two whose logits are")
