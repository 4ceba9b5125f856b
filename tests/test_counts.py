"""Exact parameter counts of every method on a 7B Llama shape, from the meta device, against the closed formulas; and the table in docs/methods.md."""

import re
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier import build, counts
from luthier.policy import Policy
from luthier.settings.plugins import kinds, plugin

D, L, F, V = 4096, 32, 11008, 32000  # width, blocks, inner width, vocabulary
WHOLE = 2 * V * D + L * (4 * D * D + 3 * D * F + 2 * D) + D
FORMULAS = {
    "full": WHOLE,
    "partial": 4 * D * D + 3 * D * F + 2 * D,  # the last block
    "lora": L * 2 * 8 * (D + D),  # rank 8 on query and value
    "dora": L * 2 * (8 * (D + D) + D),  # and a length for every row
    "adapter": L * 2 * (2 * D * (D // 16) + D // 16 + D),  # houlsby, a sixteenth of the width
    "prefix": 20 * L * 2 * D,
    "p_tuning_v2": 20 * L * 2 * D,
    "p_tuning": 20 * D + 3 * (D * D + D),  # the vectors and the MLP over them
    "prompt": 20 * D,
    "crafted_prompt": 0,
    "ia3": L * (D + D + F),
    "diff_pruning": 2 * (L * (4 * D * D + 3 * D * F + 2 * D) + D) + L * 9 + 1,  # a difference and a gate for every weight, one more gate for every tensor
}


@pytest.fixture(scope="module")
def base():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=32, vocab_size=V))
    return build.adopt(model, source="7B")


def test_every_method_has_a_formula():
    assert set(FORMULAS) == set(kinds("methods"))


@pytest.mark.parametrize("kind", sorted(FORMULAS, key=lambda k: k != "full"))  # before others have put theirs into the base
def test_the_count_is_the_formula_and_takes_no_time(base, kind):
    method = plugin("methods", kind)()
    began = time.process_time()
    policy = Policy(base, method.attach(base, kind), method=method, name=kind)
    trained, whole = counts.total(policy)
    assert time.process_time() - began < 2
    assert (trained, whole) == (FORMULAS[kind], WHOLE)


def test_the_page_says_what_the_program_counts():
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    said = {m[1]: (int(m[2].replace(",", "")), m[3]) for m in re.finditer(r"^\| `(\w+)` \|.*?\| ([\d,]+) \| ([\d.]+) % \|", page, re.M)}
    assert set(said) == set(FORMULAS)
    for kind, (number, share) in said.items():
        assert number == FORMULAS[kind] and float(share) == float(f"{100 * number / WHOLE:.2g}"), (kind, number / WHOLE)
