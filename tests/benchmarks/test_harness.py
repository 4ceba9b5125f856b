"""The benchmark harness: its counts against slow ones, its gate against wrong gradients, and whole tiny runs of ours and of the peers."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import pytest
import torch

driver = pytest.importorskip("benchmarks.driver", reason="psutil and rich come with the benchmarks")
from benchmarks import catalogue, examples, gradients, limit, minutes, models, ours, page, peers, reference, report, switches, workload  # noqa: E402
from benchmarks.workload import Workload  # noqa: E402

TINY = Workload("tiny", hidden=16, layers=2, heads=2, ff=32, vocabulary=64, rank=2, examples=3, steps=2, threads=1)
KINDS = {
    "lora": TINY,
    "qwen2, all linears": replace(TINY, family="qwen2", heads=4, kv_heads=2, targets=workload.ALL),
    "full": replace(TINY, method="full"),
    "bert": replace(TINY, family="bert", kind="classify"),
}


def sink(path, tensors):
    with gradients.Sink(path) as s:
        for name, t in tensors.items():
            s.add(name, t)
    return path


@pytest.mark.parametrize("name", KINDS)
def test_useful_operations_equal_those_torch_counts_for_the_forward_and_backward(tmp_path, name):
    from torch.utils.flop_counter import FlopCounterMode

    work = KINDS[name]
    models.write(work, tmp_path)
    row = {"ids": list(range(3, 23)), "answer": 0, **({"label": 1} if work.kind == "classify" else {})}
    counter = FlopCounterMode(display=False)
    with counter, gradients.Sink(tmp_path / "g.bin") as s:
        reference.first_step(work, tmp_path, [row], s)
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    got = limit.useful(work, [row])
    attention = 3.5 * (4 if work.family == "bert" else 2) * 20 * 20 * 16 * 2
    unscored = (6 if work.method == "full" else 4) * 16 * 64 * (work.kind != "classify")  # the reference computes the last position's logits as well
    assert got.total - attention + unscored == pytest.approx(products, rel=0.01)


def test_a_shared_prompt_counts_once_and_the_reference_s_forward_as_well():
    pair = {"prompt": [3] * 30, "chosen": [4] * 10, "rejected": [5] * 10}
    work = replace(TINY, kind="dpo")
    products = 50 * (6 * work.block_numbers * 2 - 2 * 3 * 16 * 16 + 6 * 2 * 32 * 2 * 2 - 2 * 2 * 16 * 2)  # 30 + 10 + 10 tokens; a third of 6 is the reference's
    attention = 4.5 * 2 * 16 * (30 * 30 + 2 * (10 * 10 + 2 * 30 * 10)) * 2
    assert limit.useful(work, [pair]).linears == products + attention
    assert examples.counts([[pair]]) == [(80, 20)]
    assert limit.useful(work, [pair]).head == 6 * 20 * 16 * 64


def test_lengths_without_the_file_have_gsm8k_s_mean_and_spread(monkeypatch):
    monkeypatch.delenv("LUTHIER_DATA", raising=False)
    pairs, source = examples.lengths(20_000, seed=0)
    assert "log-normal" in source
    for values, (mean, sd) in zip(zip(*pairs, strict=True), (examples.QUESTION, examples.ANSWER), strict=True):
        assert statistics.mean(values) == pytest.approx(mean, rel=0.03)
        assert statistics.stdev(values) == pytest.approx(sd, rel=0.06)


def test_lengths_come_from_the_file_where_there_is_one(tmp_path, monkeypatch):
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k" / "train.jsonl").write_text(json.dumps({"question": "a " * 10, "answer": "b " * 20}) + "\n")
    monkeypatch.setenv("LUTHIER_DATA", str(tmp_path))
    assert examples.lengths(3, seed=0)[0] == [(13, 26)] * 3


def test_the_same_seed_makes_the_same_examples_and_every_step_has_its_number():
    steps, _ = examples.examples(TINY)
    assert steps == examples.examples(TINY)[0]
    assert [len(rows) for rows in steps] == [3, 3]
    assert all(examples.RESERVED <= i < TINY.vocabulary for rows in steps for r in rows for i in r["ids"])


def test_natural_ids_are_as_frequent_as_words_and_mean_the_same_under_every_seed():
    many = [examples._Ids(replace(TINY, natural=True, seed=seed))(20_000) for seed in (0, 1)]
    first = [statistics.mode(ids) for ids in many]
    assert first[0] == first[1]
    assert many[0].count(first[0]) / 20_000 == pytest.approx(1 / sum(1 / k for k in range(1, 62)), rel=0.1)


def test_the_rows_of_a_step_are_all_in_its_bins_and_these_are_about_as_long():
    rows = [{"ids": [0] * n} for n in (10, 10, 10, 10, 10, 50)]
    bins = examples.into_bins(rows, 2)
    assert sorted(len(r["ids"]) for b in bins for r in b) == [10, 10, 10, 10, 10, 50]
    assert [sum(len(r["ids"]) for r in b) for b in bins] == [50, 50]


@pytest.mark.parametrize("name", KINDS)
def test_the_parameter_count_is_the_model_s_own(name):
    got = models._model(KINDS[name]).num_parameters()
    assert got - (4 * 16 + 4) * (name == "bert") == KINDS[name].parameters  # without the classifier


def test_the_shapes_are_those_that_are_said():
    sizes = {w.name: w.parameters for w in (*catalogue.short(), *catalogue.long())}
    assert sizes["SFT, LoRA on q, v"] == pytest.approx(110e6, rel=0.01)
    assert sizes["BERT-base classification, LoRA on q, v"] == pytest.approx(109.5e6, rel=0.01)
    assert next(n for name, n in sizes.items() if "0.5B" in name) == pytest.approx(494e6, rel=0.01)


def test_the_short_set_is_expected_to_take_less_than_twenty_minutes_on_two_cores():
    assert sum(minutes.expected(w, 1, 0.45e12) for w in catalogue.short()) < 19


@pytest.mark.parametrize(("change", "loss", "passes"), [(0.0, 10.0, True), (1.0, 10.0, False), (0.0, 10.03, False)])
def test_the_gate_refuses_turned_gradients_and_another_loss(tmp_path, change, loss, passes):
    torch.manual_seed(0)
    want = {"a:lora_A": torch.randn(4, 8), "a:lora_B": torch.randn(8, 4)}
    got = sink(tmp_path / "got.bin", {n: 0.5 * g + change * torch.randn_like(g) for n, g in want.items()})
    verdict = driver.gate({"steps": [{"loss": loss}]}, 10.0, got, sink(tmp_path / "want.bin", want))
    assert verdict["passed"] is passes


def test_the_gate_refuses_a_missing_gradient_and_names_it(tmp_path):
    want = {"a:lora_A": torch.ones(2), "a:lora_B": torch.ones(2)}
    got = sink(tmp_path / "got.bin", {"a:lora_A": torch.ones(2)})
    verdict = driver.gate({"steps": [{"loss": 1.0}]}, 1.0, got, sink(tmp_path / "want.bin", want))
    assert not verdict["passed"]
    assert "a:lora_B" in verdict["odd"]


def test_tuning_never_chooses_what_failed_or_does_other_work():
    choices = {"rounds": {"equal": False}, "fails": {}, "wrong": {}, "leaks": {}, "slow": {}}
    tried = {"rounds": (1.0, 10.0, 1.0), "wrong": (2.0, 11.0, 1.0), "leaks": (2.5, 10.0, 0.96), "slow": (3.0, 10.0, 0.9999)}
    found = {n: {"seconds": s, "loss": x, "cosine": c} for n, (s, x, c) in tried.items()} | {"fails": {"error": "no"}}
    assert driver.fastest(found, choices, 10.0) == "slow"
    with pytest.raises(driver.ChildFailed):
        driver.fastest({"fails": {"error": "no"}}, choices, 10.0)


def test_prefixes_packed_by_the_peer_leak_and_are_not_taken_for_its_best(tmp_path):
    pytest.importorskip("trl")
    work = replace(next(w for w in catalogue.quick() if w.method == "prefix"), examples=6, steps=2, tries=3)
    models.write(work, tmp_path)
    want = tmp_path / "want.bin"
    loss = driver.child(tmp_path, work, "reference", grads=want, here=True)["loss"]
    tuning = driver.tuned(work, tmp_path, loss, want, quick=False, known={}, here=True)[0]
    packed = next(n for n in tuning["tried"] if "packed" in n)
    assert "cosine" in driver.unlike(tuning["tried"][packed], loss, driver.LOSS_TOLERANCE)
    assert tuning["chosen"] != packed
    assert packed not in tuning["known"]


def test_what_was_found_fast_before_is_tried_first():
    choices = {"a": {}, "b": {}, "c": {}, "d": {"equal": False}}
    assert list(driver.promising(choices, {"c": 1.0, "b": 2.0, "d": 0.5, "gone": 0.1}, 3)) == ["c", "b", "a"]
    assert list(driver.promising(choices, {}, 0)) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("work", catalogue.quick(), ids=lambda w: w.name.removeprefix("quick: "))
def test_ours_is_equal_to_the_reference_on_every_workload(work):
    if work.precision == "nf4":
        pytest.importorskip("bitsandbytes")
    result = driver.bench(work, repetitions=1, idle_s=0, say=lambda _: None, quick=True, variants=ours.columns(work))
    assert result["passed"], {c: x["gate"] for c, x in result["columns"].items()}
    assert all(run["summary"]["distance"] > 0 for c in result["columns"].values() for run in c["runs"])


@pytest.mark.parametrize("at", [0, 4, 5], ids=["SFT", "classification", "DPO"])
def test_the_peer_does_the_same_work_and_the_page_tells_no_speed_of_a_tiny_shape(at):
    pytest.importorskip("trl")
    work = catalogue.quick()[at]
    result = driver.bench(work, repetitions=1, idle_s=0, say=lambda _: None, quick=True)
    assert len(result["columns"]) == 3
    assert all(c["gate"]["passed"] for c in result["columns"].values())
    assert result["loss_band"] < driver.tolerance(work.kind)
    stamp = {"date": "", "machine": {"cpu": "", "cores": 2, "memory_gib": 1, "system": "", "python": "", "packages": {}, "commit": None}}
    text = page.markdown({"results": [result | stamp]})
    assert f"{peers.of(work).name(work)} tuned" in text
    assert "ours is faster by" not in text  # a tiny shape gave 11x and 0.2x on one busy machine
    assert text.index("step 1 against fp32") < text.index("tokens/s, padding")


def test_outcomes_say_which_targets_were_met_and_what_a_peer_that_does_not_run_leaves_open():
    run = lambda tokens, peak: {"runs": [{"summary": {"tokens_per_s": tokens, "peak_mib": peak, "distance": 2.0}}]}  # noqa: E731
    columns = {"ours": run(100.0, 10.0), "P as it comes": {"runs": [], "error": "refuses"}, "P tuned": run(20.0, 20.0)}
    wants = {"default": 8.0, "tuned": 4.0, "memory": 0.4, "distance": 1.8}
    got = {o["what"]: (o["got"], o["met"]) for o in report.outcomes({"columns": columns, "workload": {"wants": wants}})}
    assert got == {"default": (None, False), "tuned": (5.0, True), "memory": (None, False), "distance": (2.0, False)}


def test_ours_is_run_first_and_last_and_switches_are_held_against_the_mean_of_both():
    columns = list(switches.variants(TINY))
    assert columns[0] == ours.OURS and columns[-1] == switches.AGAIN and switches.PLAIN in columns
    made = {c: {"runs": [{}], "gate": {"passed": True}} for c in columns}
    seconds = dict.fromkeys(columns, 3.0) | {ours.OURS: 1.0, switches.AGAIN: 2.0}
    for c, s in made.items():
        s["runs"] = [{"summary": {"step_median_s": seconds[c], "step_min_s": 1.0, "peak_mib": 1.0, "distance": 1.0}}]
    rows = {r[0]: r[3] for r in switches.rows({"columns": made, "quick": False})}
    assert rows[ours.OURS] == "0.67x the time" and rows[switches.AGAIN] == "1.33x the time" and rows[switches.PLAIN] == "2.00x the time"
