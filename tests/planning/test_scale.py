"""The plan for many ranks: memory and traffic against ranks that really run, time against arithmetic by hand, and models that no machine here holds."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "place"))

import launch
import scale_cases

from luthier.errors import ConfigError, LuthierError
from luthier.planning.gpus import Mesh, Ring, adding, gathering, gpu
from luthier.planning.roofline import operations
from luthier.planning.scale import Layout, Scale, layouts
from luthier.settings.run import Run

LLAMA3 = {"8B": (4096, 32, 32, 8, 14336), "70B": (8192, 80, 64, 8, 28672), "405B": (16384, 126, 128, 8, 53248)}


def llama3(folder: Path, name: str) -> str:
    hidden, layers, heads, kv, ff = LLAMA3[name]
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ff}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "head_dim": 128, **shape}
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "config.json").write_text(json.dumps(config))
    return str(folder / name)


def big(folder: Path, name: str, method: str = "lora", *, recompute: str = "blocks", tokens: int = 8192, **place) -> Run:
    how = {"kind": "fsdp", "on": "cpu", **place}
    return Run(model=llama3(folder, name), method=method, precision="bfloat16", recompute=recompute, place=how, optim={"batch_tokens": tokens})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    scale_cases.write(folder)
    return folder, dict(zip((2, 4), launch.launch("scale_cases", folder, 2, 4), strict=True))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", scale_cases.CASES)
def test_memory_of_a_rank_is_within_five_percent_of_its_live_tensors_and_traffic_is_what_is_counted(name, size, measured):
    folder, real = measured
    run, found = scale_cases.run_of(folder, name, size), real[size][name]
    layout = next(x for x in layouts(Mesh(size)) if x.shard == run.place.shard)
    o = Scale(run, device="cpu").outlook(run, Mesh(size), layout)
    assert o.micro_batches == scale_cases.MICRO
    assert sum(o.standing.values()) == pytest.approx(found["standing"], rel=0.01, abs=100_000)  # what the loop keeps of its last step
    assert o.total == pytest.approx(found["peak"], rel=0.05)
    assert o.traffic == {k: n for k, n in found["traffic"].items() if k not in ("units", "losses and metrics")}


def test_a_shape_of_405_billion_is_planned_in_seconds_on_any_mesh(tmp_path):
    began = time.process_time()
    run = big(tmp_path, "405B", "full", tokens=8192 * 1024)
    scale = Scale(run, gpu("h100"))
    found = {(m.ranks, x.shard): scale.outlook(run, m, x) for m in (Mesh(8), Mesh(64, 8), Mesh(1024, 128)) for x in layouts(m)}
    assert time.process_time() - began < 60
    assert scale.plan.whole == 405_853_388_800
    whole = 405_853_388_800 * 16  # a master, a gradient and two moments, in float32
    for ranks in (8, 64, 1024):
        standing = found[ranks, "full"].standing
        assert sum(n for k, n in standing.items() if k != "program") == pytest.approx(whole / ranks, rel=0.01)
    assert found[64, "hybrid"].total == pytest.approx(found[8, "full"].total, rel=0.01)
    assert found[1024, "full"].tokens == 8192 * 1024 and found[1024, "full"].idle == 0


def test_a_step_computes_six_operations_a_parameter_and_token_and_a_third_more_where_blocks_are_recomputed(tmp_path):
    tokens, hidden, layers, _, ff = 2048, *LLAMA3["8B"][:2], *LLAMA3["8B"][3:]
    blocks, head, down = 6_979_588_096, 128256 * hidden, ff * hidden * layers
    for method, recompute, times, of_head in (("lora", "none", 4, 4), ("full", "none", 6, 6), ("full", "blocks", 8, 6)):
        run = big(tmp_path, "8B", method, recompute=recompute, tokens=tokens)
        work, _ = Scale(run, gpu("h100"))._counted(run)
        attention = 2 * tokens * tokens * hidden * layers * (3.5 if recompute == "none" else 4.5)
        again = 2 * down * tokens if recompute == "blocks" else 0  # a block's last product is not computed again: nobody reads it
        by_hand = (times * blocks + of_head * head) * tokens + attention - again
        assert work.flops == pytest.approx(by_hand, rel=0.01), (method, recompute)


def test_collectives_take_what_their_bytes_and_hops_take():
    h100 = gpu("h100,reached=1,hop=10")
    assert gathering(8e9, Ring(8, 1), h100) == pytest.approx(8e9 * 7 / 8 / 450e9 + 7 * 10e-6)
    assert gathering(8e9, Ring(8, 8), h100) == pytest.approx(8e9 * 63 / 64 / 400e9 + 63 * 10e-6)  # eight networks of 50 GB/s
    assert gathering(8e9, Ring(1, 8), h100) == pytest.approx(8e9 * 7 / 8 / 50e9 + 7 * 10e-6)
    assert adding(8e9, Ring(8, 1), h100) == pytest.approx(2 * 8e9 * 7 / 8 / 450e9 + 6 * 10e-6)
    assert gathering(8e9, Ring(1, 1), h100) == adding(8e9, Ring(1, 1), h100) == 0.0


def test_products_and_attention_are_counted_and_nothing_else():
    a, b = torch.empty(3, 4, device="meta"), torch.empty(4, 5, device="meta")
    assert operations(torch.ops.aten.mm, (a, b)) == operations(torch.ops.aten.addmm_, (a @ b, a, b)) == 2 * 3 * 4 * 5
    q, k = torch.empty(2, 4, 6, 8, device="meta"), torch.empty(2, 2, 10, 8, device="meta")
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    assert operations(flash, (q, k, k, 0.0, False)) == 2 * 2 * (2 * 4 * 6 * 10 * 8)
    assert operations(flash, (q, q, q, 0.0, True)) == 2 * 2 * (2 * 4 * 6 * 6 * 8) / 2
    assert operations(torch.ops.aten.add, (a, a)) == 0


def test_auto_replicates_what_fits_half_a_device_and_shards_inside_machines_before_it_shards_over_all(tmp_path):
    mesh = Mesh(64, 8)
    for name, method, shard in (("8B", "lora", "none"), ("70B", "lora", "hybrid"), ("405B", "lora", "full"), ("8B", "full", "full")):
        assert Scale(big(tmp_path, name, method)).auto(mesh, 80e9).shard == shard
    assert Scale(big(tmp_path, "70B")).auto(Mesh(1), 80e9).shard == "none"


def test_fewer_examples_than_ranks_leave_some_idle_and_ranks_must_divide(tmp_path):
    run = big(tmp_path, "8B", tokens=2048 * 10)
    o = Scale(run, gpu("h100")).outlook(run, Mesh(64, 8), Layout("none", 1))
    assert (o.idle, o.tokens) == (54, 2048 * 10)
    with pytest.raises(ConfigError, match=r"--ranks 10 --nodes 4"):
        Mesh(10, 4)
    shared = big(tmp_path, "8B", context=3)
    with pytest.raises(LuthierError, match=r"place\.context: 3 ranks"):
        Scale(shared).outlook(shared, Mesh(8), Layout("none", 1))


def test_a_gpu_is_named_and_its_numbers_can_be_overridden():
    assert gpu("H100,network=25").network == 25 and gpu("h100").network == 50
    with pytest.raises(ConfigError, match=r"'h10' is not in the table; accepted are a100.*Did you mean h100"):
        gpu("h10")
    for wrong in ("h100,colour=3", "h100,network=fast", "h100,network=0", "h100,network=-1"):
        with pytest.raises(ConfigError, match=r"is no number of a GPU; accepted are memory"):
            gpu(wrong)
