"""The three questions that lm-eval asks, against slow answers; and, where it is installed, a task of its own over a file."""

import json

import pytest
import torch

import tiny
from luthier.cli import main
from luthier.core import LuthierError
from luthier.evaluating.harness import _read, continued, likelihoods
from luthier.policy import Policy

PAIRS = [([5, 6, 7], [8, 9]), ([5], [10, 11, 12]), ([9, 9, 9, 9, 9, 9], [4]), ([7, 8], [9, 5])]


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny.base("llama")).eval()


@torch.no_grad()
def slow(policy, before, after):
    logits = policy.lm(input_ids=torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return float(sum(row[t] for row, t in zip(logits, after, strict=True))), all(int(row.argmax()) == t for row, t in zip(logits, after, strict=True))


def test_likelihoods_are_those_of_each_pair_alone(policy):
    likely = [([5, 6, 7], [int(policy.lm(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())])]
    found = likelihoods(policy, PAIRS + likely, tokens=12)
    for (logp, greedy), pair in zip(found, PAIRS + likely, strict=True):
        wanted = slow(policy, *pair)
        assert logp == pytest.approx(wanted[0], rel=1e-4) and greedy == wanted[1]
    assert found[-1][1] and not all(greedy for _, greedy in found)


def test_a_context_that_is_too_long_loses_its_beginning(policy):
    long = [5 + i % 20 for i in range(policy.limit + 10)]
    (found,) = likelihoods(policy, [(long, [7, 8])])
    assert found[0] == pytest.approx(slow(policy, long[-(policy.limit - 2) :], [7, 8])[0], rel=1e-4)
    with pytest.raises(LuthierError, match="request 1 has no continuation"):
        likelihoods(policy, [([5], [])])


class Letters:
    """Token 5 is an a, and so on."""

    pad_token_id = 0

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(92 + i) for i in ids)


def test_what_is_written_ends_before_the_first_of_the_texts_that_end_it(policy):
    policy.base.tokenizer = Letters()
    (whole,) = continued(policy, [[5, 6]], {"max_gen_toks": 6}, stop=[], seed=0)
    assert len(whole) == 6
    assert continued(policy, [[5, 6]], {"max_gen_toks": 6, "until": [whole[3]]}, stop=[], seed=0) == [whole.split(whole[3])[0]]
    assert continued(policy, [[5, 6]], {"max_gen_toks": 6, "until": whole[0]}, stop=[], seed=0) == [""]


def test_means_over_documents_get_our_intervals_and_other_numbers_the_harness_error():
    samples = [{"acc": float(i < 3), "bits_per_byte": (-8.0, 4), "filter": "none"} for i in range(4)]
    results = {"acc,none": 0.75, "acc_stderr,none": 0.25, "bits_per_byte,none": 2.885, "f1,none": 0.5, "f1_stderr,none": 0.1, "mc,none": 0.2, "alias": "t"}
    made, scores = _read({"results": {"t": results}, "samples": {"t": samples}, "n-samples": {"t": {"effective": 4}}}, 0)
    assert set(made) == {"t acc", "t bits_per_byte"} and made["t bits_per_byte"].lower_is_better
    assert (scores["t acc"].low, scores["t acc"].n) == (pytest.approx(0.3006, abs=1e-3), 4)
    assert scores["t bits_per_byte"].value == pytest.approx(2.885, abs=1e-3)
    assert (scores["t f1"].low, scores["t f1"].high) == (pytest.approx(0.304, abs=1e-4), pytest.approx(0.696, abs=1e-4))
    assert str(scores["t mc"]) == "0.200 n=4"


def test_without_the_package_the_error_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert main(["eval", "fiddle", "--harness", "arc_easy"]) == 2
    assert "pip install 'luthier[harness]'" in capsys.readouterr().err
    assert main(["eval", "fiddle", "--harness", "arc_easy", "--data", "x.jsonl", "--by", "length"]) == 2
    assert "leave out --data, --by" in capsys.readouterr().err


def test_a_local_task_runs_on_a_base(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    tiny.folder(tmp_path / "base")
    rows = [{"q": f"word {i}", "right": " answer", "wrong": " other"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "tasks").mkdir()
    text = f"""task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    (tmp_path / "tasks" / "words.yaml").write_text(text)
    ask = ["eval", str(tmp_path / "base"), "--harness-tasks", str(tmp_path / "tasks"), "--json", "--harness"]
    assert main([*ask, "words"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["base"]["words acc"]["n"] == 6
    assert main([*ask, "wurds"]) == 2 and "did you mean words" in capsys.readouterr().err
