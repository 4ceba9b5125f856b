"""Predicted memory: against every block run one by one, against what autograd saves, against the tensors of a real run, and against a process that trains."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configured import SMALL, deep, shape
from luthier import build
from luthier.core import LuthierError
from luthier.modelling.packed import PackedLinear
from luthier.modelling.site import restoring
from luthier.optim import Optimizer
from luthier.planning import microbatch, saved
from luthier.planning.memory import Plan, machine, predict, stepping, tensors_of
from luthier.planning.microbatch import batch_of, shape_of
from luthier.settings.run import Run


def training(plan, run, device, once):
    """The peak of a training step, with equal blocks run once or all of them."""
    batch, scored = batch_of(shape_of(run, plan.policy.base), plan.policy.base, plan.objective)
    plan.policy.train()
    ours = list(tensors_of(plan.policy, plan.optimizer))
    return saved.count(plan.policy, ours, device, lambda w: stepping(plan.policy, plan.objective, batch, w), scored=scored, once=plan.stacks if once else None)


WAYS = [
    ("llama", "lora", "sft", "bfloat16"),
    ("llama", "full", "text", "bfloat16"),
    ("llama", "full", "text", "float32"),
    ("llama", {"kind": "partial", "last_blocks": 3}, "text", "float32"),
    ("llama", "dora", "sft", "bfloat16"),
    ("llama", "adapter", "sft", "nf4"),
    ("llama", {"kind": "lora", "targets": ["all"]}, "dpo", "int8"),
    ("llama_tied", {"kind": "lora", "targets": ["embedding", "query"]}, "sft", "bfloat16"),
    ("gemma3", "prefix", "text", "bfloat16"),
    ("gemma2", "prompt", "sft", "bfloat16"),
    ("gpt2", "ia3", "sft", "float32"),
    ("qwen3_moe", "lora", "sft", "bfloat16"),
    ("bert", "p_tuning_v2", "classify", "bfloat16"),
    ("modernbert", "lora", "masked_text", "bfloat16"),
    ("t5", "lora", "sft", "bfloat16"),
    ("bart", "adapter", "masked_text", "float32"),
]


@pytest.mark.parametrize("recompute", ["none", "blocks"])
@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(str(x["kind"] if isinstance(x, dict) else x) for x in w))
def test_equal_blocks_run_once_count_to_the_byte_as_all_of_them(way, recompute, tmp_path):
    family, method, objective, precision = way
    run = Run(model={"id": deep(family, tmp_path)}, method=method, objective=objective, precision=precision, **SMALL)
    plan = Plan(run)
    if recompute == "blocks":
        plan.policy.lm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    lists = [len(kept) for _, kept in plan.stacks]
    device = "cpu" if recompute == "none" else "cuda"
    if precision == "nf4":
        training(plan, run, device, True)  # makes its table, once in a process
    once, each = (training(plan, run, device, o) for o in (True, False))
    assert once == each and once.bytes > 0 and once.kept > 0
    assert once.freed == pytest.approx(each.freed, rel=0.1)  # what a block lets go of the one before it is its own
    assert all(n <= {"bart": 3, "t5": 4, "modernbert": 6}.get(family, 5) for n in lists)  # blocks were left out
    assert not any(isinstance(m, saved._Standing) for m in plan.policy.lm.modules())  # and put back


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_what_is_kept_is_what_autograd_saves_on_real_tensors(family, tmp_path):
    run = Run(model={"id": deep(family, tmp_path)}, method="lora", objective="classify" if family == "bert" else "sft", precision="float32", **SMALL)
    plan = Plan(run)
    predicted = training(plan, run, "cpu", True)
    torch.manual_seed(0)
    base = build.adopt(type(plan.policy.lm)(plan.policy.lm.config).eval())
    policy, objective = build.assemble(plan.run, base)
    lengths = list(shape_of(run, base).lengths)
    lengths[-1] -= 2  # there is padding, as the prediction has it
    rows = [microbatch._row(n, i, base, objective) for i, n in enumerate(lengths)]
    batch = objective.collate(rows, pad=0, packed=base.packs)
    own = {t.untyped_storage().data_ptr() for t in [*policy.parameters(), *policy.buffers()]}
    held = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            held[t.untyped_storage().data_ptr()] = t  # alive, so that no address is given twice
        return t

    policy.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = objective.loss(policy, batch)
    assert loss.sums
    assert predicted.kept == pytest.approx(sum(t.untyped_storage().nbytes() for t in held.values()), rel=0.06)  # beside it: what the loop itself holds


@pytest.mark.parametrize(
    "method, precision",
    [("lora", "bfloat16"), ("full", "float32"), ("full", "bfloat16"), ("partial", "bfloat16"), ("prefix", "float32"), ("lora", "nf4"), ("ia3", "int8")],
)
def test_what_stands_is_to_the_byte_what_a_run_holds(method, precision, tmp_path):
    run = Run(model={"id": deep("llama", tmp_path), "random": True}, method=method, objective="text", precision=precision, **SMALL)
    standing = predict(run, "cpu").standing
    policy, _ = build.assemble(run)
    for m in policy.lm.modules():
        if isinstance(m, PackedLinear):
            m.keep(None)  # kept decoded where memory is free, which is said apart
    optimizer = Optimizer(policy.trained(), lr=1e-3)
    optimizer.step()
    there = {t.data_ptr(): t.nbytes for t in (*policy.parameters(), *policy.buffers(), *optimizer.masters().values())}
    there |= {g.grad.data_ptr(): g.grad.nbytes for g in optimizer.groups}
    there |= {t.data_ptr(): t.nbytes for state in optimizer.adam.state.values() for k, t in state.items() if k != "step"}
    predicted = sum(n for name, n in standing.items() if name not in ("program", "allocator"))
    assert (
        abs(predicted - sum(there.values())) <= 16
    )  # random weights are cast together with the 4 frequencies of the rotary embedding, which files keep in fp32


def test_recomputation_and_smaller_micro_batches_take_less_and_cuda_counts_its_own_kernels(tmp_path):
    folder = shape(tmp_path / "m", hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1408, vocab_size=32000)
    run = Run(model={"id": folder}, method="lora", objective="text", precision="bfloat16", data={"max_tokens": 512}, optim={"micro_tokens": 4096})
    work = lambda r, device="cpu": predict(r, device).moments["training"].bytes  # noqa: E731
    whole = work(run)
    assert whole / 2.1 < work(replace(run, optim=replace(run.optim, micro_tokens=2048))) < whole / 1.7  # the chunk of logits stays as large as it was
    assert work(replace(run, recompute="blocks")) < whole / 3
    prefix = Run(model={"id": folder}, method="prefix", objective="text", precision="bfloat16", data={"max_tokens": 512}, optim={"micro_tokens": 4096})
    assert work(prefix, "cuda") > 2 * work(prefix)  # grouped heads under a mask: CUDA has no kernel for it, and every score is kept
    bits = Run(model={"id": folder}, method="full", objective="text", precision="bfloat16", optim={"state": "8bit"})
    moments = [predict(bits, device).standing["moments of AdamW"] for device in ("cpu", "cuda")]
    assert moments[1] == pytest.approx(moments[0] * (2 + 8 / 256) / 8, rel=0.01)  # the CPU keeps float32


def test_on_a_cpu_narrow_pieces_of_examples_keep_their_probabilities_and_wide_ones_do_not(tmp_path):
    folder = shape(tmp_path / "m", hidden_size=256, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=16, intermediate_size=512, vocab_size=999)
    kept = {}
    for n in (256, 320):
        run = Run(model={"id": folder}, objective="text", precision="bfloat16", data={"max_tokens": n}, optim={"micro_tokens": 5 * 256 * 4})
        p = predict(run, "cpu")
        kept[n] = p.moments["training"].kept / sum(p.shape.lengths)
    scores = 4 * 16 * 256 * 2  # blocks, heads, positions seen, bytes; heads of 16 are attended by products, which keep up to 256 keys (speed/byhand.py)
    assert kept[256] - kept[320] == pytest.approx(scores * (1 - 256 / 320), rel=0.01)


def test_a_70b_shape_is_predicted_in_three_seconds_from_its_configuration(tmp_path):
    run = Run(model={"id": shape(tmp_path / "70b")}, method={"kind": "lora", "rank": 16, "targets": ["all"]}, objective="text", precision="nf4")
    predict(Run(model={"id": deep("llama", tmp_path / "warm")}, objective="text", precision="nf4", **SMALL), "cuda")  # imports
    began = time.process_time()
    p = predict(run, "cuda")
    assert time.process_time() - began < 3
    linears = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert p.whole == linears + 2 * 128256 * 8192 + (2 * 80 + 1) * 8192
    assert p.trained == 80 * 16 * (4 * 8192 + 2 * (8192 + 1024) + 3 * (8192 + 28672))
    assert p.standing["frozen weights in codes"] == pytest.approx(0.5159 * linears, rel=1e-3)


def test_weights_are_kept_decoded_where_a_third_of_the_free_memory_holds_them(tmp_path):
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1408, "vocab_size": 999}
    run = Run(model={"id": shape(tmp_path / "m", **sizes)}, objective="text", precision="nf4", **SMALL)
    p = predict(run, "cuda")
    linears = 4 * (4 * 512**2 + 3 * 512 * 1408)
    assert p.decodable == 2 * linears
    there = p.total - p.moments[p.worst].bytes
    assert p.kept_decoded(there + 7 * linears) == 2 * linears and p.kept_decoded(there + 5 * linears) == 0
    kept = predict(replace(run, precision=replace(run.precision, resident="yes")), "cuda")
    assert kept.standing["frozen weights kept decoded"] == 2 * linears and kept.decodable == 0 and "decoded weights" not in kept.moments["training"].parts


def test_answering_takes_the_cache_of_all_prompts(tmp_path):
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 512, "vocab_size": 999}
    run = Run(model={"id": shape(tmp_path / "m", **sizes)}, objective="sft", precision="bfloat16", data={"max_tokens": 1024}, evaluate={"samples": 4})
    p = predict(run, "cpu")
    cache = 8 * 2 * (4 * 64) * 2 * 4 * 1023  # blocks, keys and values, their width, bytes, prompts, tokens
    assert cache < p.moments["answers"].bytes < 3 * cache
    assert "answers" not in predict(replace(run, evaluate=replace(run.evaluate, samples=0)), "cpu").moments


class Sampled(torch.nn.Module):
    """A block that looks at what it computes."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, **kwargs):
        return self.block(x, **kwargs) * (1.0 if float(x.sum()) > 0 else 2.0)


def test_a_model_that_asks_for_values_is_refused_in_a_sentence(tmp_path):
    run = Run(model={"id": deep("llama", tmp_path)}, objective="text", precision="float32", **SMALL)
    plan = Plan(run)
    plan.policy.lm.model.layers[0] = Sampled(plan.policy.lm.model.layers[0])
    with pytest.raises(LuthierError, match="depends on the values of its weights"):
        training(plan, run, "cpu", False)
    assert not hasattr(plan.policy.score, "__wrapped__") and "score" not in vars(plan.policy)  # everything is put back
    with pytest.raises(LuthierError, match="encoder"):
        predict(Run(model={"id": deep("bert", tmp_path / "b")}, objective="sft", precision="float32", **SMALL))


def test_the_memory_of_this_machine_is_read():
    everything, free = machine(torch.device("cpu"))
    assert 0 < free <= everything and everything > 1e8


# --- a process that trains --------------------------------------------------------------------------------------------

TRAINS = """
import json, re, sys
import numpy as np, torch
torch.set_num_threads(1)
from luthier import build
from luthier.data.feed import Batches
from luthier.planning.memory import predict
from luthier.core import Row
from luthier.optim import Optimizer
from luthier.settings.run import Run
from luthier.modelling.site import restoring
from luthier.train import train

def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

run = Run(**json.loads(sys.argv[1]))
p = predict(run)
bare = resident("VmRSS")
policy, objective = build.assemble(run)
optimizer = Optimizer(policy.trained(), lr=1e-4)
n = run.data.max_tokens
rows = [Row((np.arange(n, dtype=np.int32) + i) % 1000, np.arange(n) > 0) for i in range(8)]  # no two begin alike: nothing is shared
feed = Batches(rows, objective.collate, pad=0, packed=True, batch_tokens=run.optim.batch_tokens, micro_tokens=run.optim.micro_tokens, steps=2)
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here: making random weights is over
for _ in train(policy, objective, feed, optimizer, lr=lambda _: 1e-4, steps=2, place=run.place):
    pass
predicted = sum(m for k, m in p.standing.items() if k not in ("program", "allocator")) + p.moments["training"].bytes
print(json.dumps({"measured": resident("VmHWM") - bare, "predicted": predicted}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, where a process can ask for its peak anew")
def test_a_process_that_trains_takes_what_was_predicted(tmp_path):
    folder = shape(tmp_path / "m", hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6, intermediate_size=1024, vocab_size=32000)
    run = {
        "model": {"id": folder, "random": True},
        "method": {"kind": "lora", "targets": ["all"]},
        "objective": "text",
        "precision": "float32",
        "data": {"max_tokens": 512},
        "optim": {"micro_tokens": 2048, "batch_tokens": 2048},
        "evaluate": {"samples": 0},
        "place": {"kind": "one", "on": "cpu", "threads": 1},
    }
    # The threshold lets glibc give back what is freed, so that the peak of the process is the peak of its tensors.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
    done = subprocess.run([sys.executable, "-c", TRAINS, json.dumps(run)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"measured {found['measured'] / 1e6:.0f} MB, predicted {found['predicted'] / 1e6:.0f} MB")
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15)


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("gigabytes", [12, 24])
def test_the_8b_recipes_say_what_is_predicted_and_fit_with_room(gigabytes, tmp_path):
    from luthier.settings.config import load_run

    path = RECIPES / f"llama-8b-qlora-{gigabytes}gb.yaml"
    llama_8b = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336, "max_position_embeddings": 131072}
    p = predict(load_run(str(path), [f"model.id={shape(tmp_path / 'm', **llama_8b)}"]), "cuda")
    said = [float(x) for x in re.findall(r"(\d+\.\d) GB", path.read_text())]
    frozen = sum(n for k, n in p.standing.items() if k.startswith("frozen"))
    trains = sum(n for k, n in p.standing.items() if k.startswith(("trained", "gradients", "moments")))
    assert said == [round(n / 1e9, 1) for n in (p.total, frozen, trains, p.moments["training"].bytes)]
    assert p.worst == "training" and p.total < 0.9 * gigabytes * 1e9 and p.kept_decoded(gigabytes * 10**9) == 0
