"""The benchmark harness: its counts against slow ones, its gate against wrong gradients, and one whole tiny run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
driver = pytest.importorskip("benchmarks.driver", reason="psutil and rich come with the benchmarks")
from benchmarks import trl_peft, workload  # noqa: E402
from benchmarks.workload import Workload  # noqa: E402

TINY = Workload("tiny", ("q_proj", "v_proj"), hidden=16, layers=2, heads=2, ff=32, vocabulary=64, rank=2, examples=3, steps=2, threads=1)


def test_useful_operations_equal_those_torch_counts_for_the_forward_and_backward(tmp_path):
    from safetensors.torch import load_file
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    workload.write(TINY, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).requires_grad_(False)
    leaves = {n: t.requires_grad_() for n, t in load_file(tmp_path / "adapter.safetensors").items()}
    linear = torch.nn.functional.linear
    for path in {n.partition(":")[0] for n in leaves}:
        a, b = leaves[f"{path}:lora_A"], leaves[f"{path}:lora_B"]
        model.get_submodule(path).register_forward_hook(lambda _, x, y, a=a, b=b: y + linear(linear(x[0], a), b))
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.arange(3, 23)[None], use_cache=False).logits.sum().backward()
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    got = workload.useful(TINY, [20], 20)
    attention = 3.5 * 2 * 20 * 20 * 16 * 2
    assert got.linears - attention + got.head == pytest.approx(products, rel=0.01)


def test_lengths_without_the_file_have_gsm8k_s_mean_and_spread(monkeypatch):
    monkeypatch.delenv("LUTHIER_DATA", raising=False)
    pairs, source = workload.lengths(20_000, seed=0)
    assert "log-normal" in source
    for values, (mean, sd) in zip(zip(*pairs, strict=True), (workload.QUESTION, workload.ANSWER), strict=True):
        assert statistics.mean(values) == pytest.approx(mean, rel=0.03)
        assert statistics.stdev(values) == pytest.approx(sd, rel=0.06)


def test_lengths_come_from_the_file_where_there_is_one(tmp_path, monkeypatch):
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k" / "train.jsonl").write_text(json.dumps({"question": "a " * 10, "answer": "b " * 20}) + "\n")
    monkeypatch.setenv("LUTHIER_DATA", str(tmp_path))
    assert workload.lengths(3, seed=0)[0] == [(13, 26)] * 3


def test_the_same_seed_makes_the_same_examples_and_every_step_has_its_number():
    steps, _ = workload.examples(TINY)
    assert steps == workload.examples(TINY)[0]
    assert [len(rows) for rows in steps] == [3, 3]
    assert all(workload.RESERVED <= i < TINY.vocabulary for rows in steps for r in rows for i in r["ids"])


def test_the_parameter_count_is_the_model_s_own(tmp_path):
    from transformers import AutoModelForCausalLM

    workload.write(TINY, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").num_parameters() == TINY.parameters
    assert workload.full()[0].parameters == pytest.approx(110e6, rel=0.01)


@pytest.mark.parametrize(("change", "loss", "passes"), [(0.0, 10.0, True), (1.0, 10.0, False), (0.0, 10.03, False)])
def test_the_gate_refuses_turned_gradients_and_another_loss(tmp_path, change, loss, passes):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    want = {"a:lora_A": torch.randn(4, 8), "a:lora_B": torch.randn(8, 4)}
    save_file(want, tmp_path / "want.safetensors")
    save_file({n: 0.5 * g + change * torch.randn_like(g) for n, g in want.items()}, tmp_path / "got.safetensors")
    verdict = driver.gate({"steps": [{"loss": loss}]}, 10.0, tmp_path / "got.safetensors", tmp_path / "want.safetensors")
    assert verdict["passed"] is passes


def test_tuning_never_chooses_what_failed_or_does_other_work():
    choices = trl_peft.candidates(16)
    unequal = next(name for name, s in choices.items() if not s.get("equal", True))
    names = [n for n in choices if n != unequal]
    tried = {
        unequal: {"seconds": 1.0, "loss": 10.0},
        names[0]: {"error": "no"},
        names[1]: {"seconds": 2.0, "loss": 11.0},
        names[2]: {"seconds": 3.0, "loss": 10.0},
    }
    assert driver.fastest(tried, choices, 10.0) == names[2]
    with pytest.raises(driver.ChildFailed):
        driver.fastest({names[0]: {"error": "no"}}, choices, 10.0)


def test_a_whole_quick_run_ends_well_and_finds_all_columns_equal(tmp_path):
    pytest.importorskip("trl")
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (result,) = json.loads(out.read_text())["results"]
    assert len(result["columns"]) == 3
    assert all(c["gate"]["passed"] for c in result["columns"].values())
    assert result["loss_band"] < 1e-3
    from benchmarks import report

    page = report.markdown(json.loads(out.read_text()))
    assert "TRL + PEFT tuned" in page
    assert "ours is faster by" not in page  # a tiny shape gave 11x and 0.2x on one busy machine
    assert done.stdout.index("step 1 against fp32") < done.stdout.index("tokens/s")
