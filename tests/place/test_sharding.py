"""Sharded = replicated = one process; what a rank holds; traffic; checkpoints on other numbers of ranks. One launch of 1, 2 and 4 processes does everything.

All methods, families and precisions: `LUTHIER_SHARDING=all pytest tests/place/test_sharding.py`, some minutes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # launch.py, sharded_cases.py

import sharded_cases
from launch import launch

CASES = sharded_cases.ALL if os.environ.get("LUTHIER_SHARDING") == "all" else sharded_cases.FEW


@pytest.fixture(scope="module")
def got(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("sharding")
    sharded_cases.write(folder)
    (folder / "cases.json").write_text(json.dumps(CASES))
    return dict(zip((1, 2, 4, "1 after"), launch("sharded_cases", folder, 1, 2, 4, 1), strict=True))


def apart(one, other) -> float:
    """The largest relative difference of losses and gradient norms, step by step."""
    assert len(one) == len(other) > 0
    return max(abs(x - y) / abs(x) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_base_trains_as_one_process_does_and_as_replicated_ones(got, name):
    losses = lambda steps: [[loss] for loss, _ in steps]  # noqa: E731
    one, two, replicated = got[1]["equal"][name], got[2]["equal"][name], got[2]["equal"][f"{name}, replicated"]
    exact = name.endswith("float32")
    # what several decoder blocks send back to one encoder is added up in 16 bits, and in another order where blocks are sharded
    assert apart(two, replicated) <= (1e-3 if name.startswith("t5") and not exact else 2e-6)
    assert apart(losses(two), losses(replicated)) <= 2e-6
    assert apart(losses(one), losses(two)) <= (1e-6 if exact else 1e-3)
    assert apart(one, two) <= (2e-6 if exact else 1e-2)  # gradients of batches that were put together differently
    if name in sharded_cases.ON_FOUR:
        assert apart(losses(one), losses(got[4]["equal"][name])) <= (1e-6 if exact else 1e-3)
    assert len(got[4]["equal"]) == len(set(CASES) & set(sharded_cases.ON_FOUR)) > 0


def test_a_rank_holds_its_part_of_a_frozen_base_of_codes_and_of_everything_that_trains(got):
    for name, least in (("frozen", 1.0), ("codes", 0.99), ("trained", 1.0)):  # scales of few numbers are filled up
        held = got[2]["held"][name]
        assert least <= held["all"] / 2 / held["here"] <= 1.0, (name, held)
    assert got[2]["held"]["frozen"]["deltas whole"]
    trained, codes = got[2]["held"]["trained"], got[2]["held"]["codes"]
    assert trained["moments"] == 2 * trained["here"] and trained["gradients"] == trained["here"]
    assert "torch.uint8" in codes["kinds"] and codes["buffers"] == 14  # one offset a linear


def test_what_goes_over_the_wire_is_what_is_counted_and_what_the_formula_says(got):
    for n, cases in ((2, 3), (4, 2)):
        assert len(got[n]["traffic"]) == cases
        for name, said in got[n]["traffic"].items():
            assert said["heard"] == said["counted"] == said["said"], (n, name, said)
            assert said["heard"][0] > 0 and (said["heard"][1] > 0) == name.startswith("full")
    # 4 bits and their scales, gathered twice: a float32 base would send 7 times as much
    assert got[2]["traffic"]["lora nf4"]["heard"][0] < 0.2 * got[2]["held"]["frozen"]["all"]


def test_hybrid_shards_inside_a_machine_and_trains_the_same(got):
    hybrid = got[4]["hybrid"]
    assert hybrid["parts full"] == hybrid["parts lora"] == [0, 2]
    assert all(2 * held == whole for held, whole in (hybrid["held full"], hybrid["held lora"]))
    assert apart(hybrid["llama full float32"], got[1]["hybrid"]["llama full float32"]) <= 2e-6
    assert apart(hybrid["llama lora nf4"], got[1]["hybrid"]["llama lora nf4"]) <= 1e-2


def test_checkpoints_of_any_number_of_ranks_are_gone_on_from_by_any_other(got):
    for n in (1, 2, 4):
        saved = got[n]["checkpoints"]
        assert set(saved["on"]) == {1: {"1"}, 2: {"1", "2"}, 4: {"2"}}[n]
        for other in saved["on"]:
            assert apart(saved["on"][other], got[int(other)]["checkpoints"]["further"]) <= 2e-6, (n, other)
        assert apart(saved["best"], saved["further"][:1]) <= 2e-6  # the best were those after two steps
    by_two = [f for f in got[2]["checkpoints"]["files"] if "shard" in f]
    assert len(by_two) == 4 and all(f.endswith(".safetensors") for f in by_two)  # a file a rank, of the checkpoint and of the best


def test_one_process_goes_on_from_what_two_ranks_saved(got):
    assert apart(got["1 after"]["on 2"], got[2]["checkpoints"]["further"]) <= 2e-6


def test_a_model_that_lies_over_ranks_is_written_as_plain_files_with_an_index(got):
    for n in (1, 2, 4):
        for family, architecture in (("gpt2", "GPT2LMHeadModel"), ("llama_tied", "LlamaForCausalLM"))[: 2 if n == 2 else 1]:
            same, files, architectures, dtype = got[n]["made"][f"{family} made by {n}"]
            assert same and "model.safetensors" in files and "luthier.json" in files and architectures == [architecture] and dtype == "torch.bfloat16"
            if n > 1:
                same, files, *_ = got[n]["made"][f"{family} in files by {n}"]
                assert same and "model.safetensors.index.json" in files and sum(f.startswith("model-0") for f in files) > 3


def test_a_sharded_base_answers_as_a_whole_one(got):
    assert got[1]["answers"] == got[2]["answers"] and len(got[1]["answers"]) == 2


def test_no_rank_ever_holds_the_whole_model(got):
    """On four ranks: their part, a block gathered and on its way, the largest weight read; never a third of the whole."""
    alone, four = got[1]["loading"], got[4]["loading"]
    if not four:
        pytest.skip("no /proc/self/status here, which tells a process's own memory")
    whole = alone["whole"]
    assert whole > 30e6 and alone["copied"] > 0.7 * whole  # so a whole model would be seen; the rest lies where other things lay before
    assert whole / 4 < four["full float32"] < whole / 4 + 3 * whole / 16
    assert whole / 32 < four["lora nf4"] < 0.8 * whole  # its codes are a thirtieth; the rest is what encoding takes and gives back, which varies


def test_auto_shards_what_trains_and_what_does_not_fit_and_says_why(got):
    said = got[2]["choices"]
    assert said["all trains beside a copy"] == "whole"
    assert said["fits"] == "whole" and said["its codes fit"] == "whole"
    assert said["does not fit"] == "sharded over 2 ranks: its 75 KB are more than half of the 100 KB of a device"
    assert said["all trains"] == "sharded over 2 ranks: every weight trains"
    assert "nothing to offload; leave it out" in said["offload"]
    assert "place.shard" in said["hybrid"] and "2 processes" in said["hybrid"]
    assert "precision.resident=yes" in said["resident"]


def test_parts_may_lie_apart_from_where_they_are_computed(got):
    assert apart(got[2]["offload"]["steps"], got[1]["offload"]["steps"]) <= 2e-6


def test_parameters_are_counted_once_whoever_holds_them(got):
    for name in ("frozen", "codes", "trained"):
        assert got[1]["held"][name]["numbers"] == got[2]["held"][name]["numbers"]
