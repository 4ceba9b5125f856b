"""luthier train, plan and kinds with a file of several stages: what is printed, what it needs, and what is refused."""

import json
import re

import pytest

import tiny
from luthier.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny base, data, and a file with stages."""
    folder = tmp_path_factory.mktemp("train")
    tiny.folder(folder / "base")
    (folder / "books.txt").write_text("\n<|endoftext|>\n".join(f"A short story, number {i}." for i in range(20)))
    (folder / "chats.jsonl").write_text("".join(json.dumps({"prompt": f"word {i}", "completion": f"answer {i}"}) + "\n" for i in range(20)))
    (folder / "run.yaml").write_text(f"model: {folder / 'base'}\ndata: {folder / 'chats.jsonl'}\nprecision: float32\n")
    (folder / "assistant.yaml").write_text(
        f"""\
model: {folder / "base"}
precision: float32
name: assistant
out: {folder / "runs"}
data: {{general: {folder / "books.txt"}}}
optim: {{steps: 3, batch_tokens: 150, lr: 1e-2}}
evaluate: {{samples: 0}}
stages:
  reading: {{objective: text, method: full, data: {folder / "books.txt"}}}
  sft: {{model: stage:reading, method: {{kind: lora, rank: 4, targets: [query]}}, data: {folder / "chats.jsonl"}}}
"""
    )
    return folder


def said(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err
    return code, out.out, out.err


def test_a_dry_run_lists_every_stage_with_what_it_trains(home, capsys):
    code, out, err = said(capsys, "train", home / "assistant.yaml", "--dry-run", "stages.sft.method.rank=2")
    assert code == 0, err
    parts = out.split("stage 2 of 2, sft")
    assert "stage 1 of 2, reading: objective text on " in parts[0] and "100.000% of" in parts[0]
    trained = 2 * 2 * (32 + 32)  # two blocks, rank 2, a query of 32 x 32
    assert f": objective sft on what reading leaves, {home / 'runs' / 'assistant' / '2-sft'}" in parts[1] and f"{trained} trained parameters" in parts[1]
    code, out, _ = said(capsys, "train", home / "assistant.yaml", "--dry-run", "--stage", "sft")
    assert code == 0 and "stage 2 of 2, sft" in out and "reading:" not in out
    assert not (home / "runs").exists()


def test_plan_has_a_line_for_each_stage_or_one_in_full(home, capsys):
    code, out, err = said(capsys, "plan", home / "assistant.yaml", "optim.micro_tokens=512")
    assert code == 0, err
    assert re.search(r"^stage 1 reading: 32,224 trained parameters; [\d.]+ [MG]B on this machine: fits", out, re.M) and re.search(
        r"^stage 2 sft: 512 trained", out, re.M
    )
    assert f"one stage in full: luthier plan {home / 'assistant.yaml'} --stage sft" in out
    code, out, err = said(capsys, "plan", home / "assistant.yaml", "--stage", "sft", "optim.micro_tokens=512")
    assert code == 0 and "method lora: 512 trained parameters" in out and "peak" in out
    assert said(capsys, "plan", home / "assistant.yaml", "--stage", "stf")[2].strip().endswith("there is no stage 'stf'; did you mean sft?")
    assert "has no stages; it is planned as a whole" in said(capsys, "plan", home / "run.yaml", "--stage", "sft")[2]


def test_train_runs_all_stages_reports_over_all_and_goes_on(home, tmp_path, capsys):
    code, out, err = said(capsys, "train", home / "assistant.yaml", f"out={tmp_path}", "stages.sft.optim.steps=2")
    folder = tmp_path / "assistant"
    assert code == 0, err
    assert "stage 1 of 2: reading\n" in out and re.search(r"stage 2 of 2: sft \(from what reading left: model\.safetensors [0-9a-f]{12}\)", out)
    end = out.split("saved, read back and compared")[-1]
    assert re.search(r"1 reading +│ text +│ full +│ +[\d.]+ │ +[\d.]+ │", end) and re.search(r"2 sft +│ +512 │ .*2-sft/adapter", end)
    assert "general text over reading > sft: " in end and f"the report over all stages: {folder / 'report.md'}" in end
    assert f"luthier chat {folder / '2-sft' / 'adapter'}" in end and (folder / "report.md").is_file()
    code, out, err = said(capsys, "train", "--resume", folder)
    assert code == 0 and "stage sft is done" in out and "2 sft" in out and "training:" not in out
    code, _, err = said(capsys, "train", home / "assistant.yaml", f"out={tmp_path}")
    assert code == 2 and f"go on with it: luthier train --resume {folder}" in err
    code, _, err = said(capsys, "train", "--resume", folder, "stages.reading.seed=1")
    assert (
        code == 2
        and "seed: 0 -> 1" in err
        and "sft began from what is, or will be, another, so it is stale" in err
        and "--accept-changes to train reading, sft again" in err
    )
    code, out, err = said(capsys, "train", home / "assistant.yaml", "--resume", folder, "stages.sft.optim.steps=1", "--accept-changes", "--quiet")
    assert (code, out) == (0, "") and json.loads((folder / "2-sft" / "result.json").read_text())["steps"] == 1


def test_one_stage_alone_by_its_name(home, tmp_path, capsys):
    ask = ("train", home / "assistant.yaml", f"out={tmp_path}", "--quiet", "--stage")
    code, _, err = said(capsys, *ask, "sft")
    assert code == 2 and "stage sft needs what stage reading leaves, which is not there yet; train that first: --stage reading" in err
    assert said(capsys, *ask, "reading")[0] == 0 and not (tmp_path / "assistant" / "2-sft").exists()
    assert said(capsys, *ask, "sft")[0] == 0 and (tmp_path / "assistant" / "2-sft" / "adapter").is_dir()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "{h}/run.yaml", "--stage", "sft"], "--stage sft: {h}/run.yaml has no stages"),
        (["train", "{h}/chats.jsonl", "--stage", "sft"], "--stage sft: this run has no stages"),
        (["train", "{h}/assistant.yaml", "{h}/chats.jsonl"], "a file with stages names the data of each; say stages.NAME.data={h}/chats.jsonl"),
        (["train", "{h}/assistant.yaml", "stages.sft.data=no.jsonl"], "stage sft: no.jsonl: no such file"),
        (["train", "{h}/assistant.yaml", "--stage", "stf"], "there is no stage 'stf'; did you mean sft?"),
        (["train", "{h}/assistant.yaml", "stages.sft.optm.lr=1"], "stages.sft.optm.lr=1: stages.sft.optm: unknown key; did you mean optim"),
        (["train", "--resume", "{h}/base"], "no run.yaml here, so it is no run folder"),
        (["train", "{h}/assistant.yaml", "--resume", "{h}/base"], "no run.yaml here, so it is no run folder"),
    ],
)
def test_what_cannot_run_is_one_sentence(home, arguments, sentence, capsys):
    code, _, err = said(capsys, *(a.replace("{h}", str(home)) for a in arguments))
    assert code == 2 and sentence.replace("{h}", str(home)) in err and not (home / "runs").exists()


def test_the_schema_knows_stages(capsys):
    code, out, _ = said(capsys, "kinds", "--schema")
    stages = json.loads(out)["properties"]["stages"]
    assert code == 0 and "method" in stages["additionalProperties"]["anyOf"][0]["properties"]
