"""What a user can get wrong, through the command itself: one clear sentence, exit code 2, no traceback, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from luthier.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny base, good data, and a folder for bad files."""
    folder = tmp_path_factory.mktemp("bad")
    tiny.folder(folder / "base")
    good = [json.dumps({"prompt": f"word {i}", "completion": f"answer {i}"}) for i in range(12)]
    files = {
        "good.jsonl": "\n".join(good) + "\n",
        "empty.jsonl": "",
        "columns.jsonl": '{"frage": "a", "antwort": "b"}\n',
        "mixed.jsonl": good[0] + '\n{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
        "truncated.jsonl": good[0] + "\n" + good[1][:20] + "\n",
        "list.jsonl": "[1, 2]\n",
        "no_answer.jsonl": '{"prompt": "a", "completion": ""}\n' * 3,
        "roles.jsonl": '{"messages": [{"role": "assistant", "content": "b"}, {"role": "robot", "content": "a"}]}\n',
        "text.txt": "Only text, with no question and no answer.\n",
        "ragged.csv": "prompt,completion\na,b\nc,d,e\n",
        "run.yaml": "method:\n  kind: lora\n  rnak: 8\n",
        "twice.yaml": "seed: 1\nseed: 2\n",
        "notyaml.yaml": "method: [lora\n",
        "data.weird": "?",
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    (folder / "utf8.jsonl").write_bytes(good[0].encode() + b'\n{"prompt": "caf\xe9", "completion": "b"}\n')
    (folder / "nobase").mkdir()
    (folder / "pickled").mkdir()
    (folder / "pickled" / "config.json").write_text((folder / "base" / "config.json").read_text())
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text((folder / "base" / "config.json").read_text())
    (folder / "broken" / "model.safetensors").write_bytes(b"not a safetensors file")
    return folder


# (name, arguments after `train`, what the sentence must say)
CASES = [
    ("a missing file, with the nearest name", ["{h}/goood.jsonl"], r"goood\.jsonl.*good\.jsonl"),
    ("an empty file", ["{h}/empty.jsonl"], "empty"),
    ("unknown columns", ["{h}/columns.jsonl"], "frage.*antwort"),
    ("mixed shapes", ["{h}/mixed.jsonl"], r"mixed\.jsonl:?.*2"),
    ("a truncated line", ["{h}/truncated.jsonl"], r"truncated\.jsonl:2"),
    ("a row that is no object", ["{h}/list.jsonl"], r"list\.jsonl:1"),
    ("bad UTF-8", ["{h}/utf8.jsonl"], r"utf8\.jsonl:2.*UTF-8"),
    ("empty responses", ["{h}/no_answer.jsonl"], r"no_answer\.jsonl:1.*(empty|response)"),
    ("unknown roles", ["{h}/roles.jsonl"], r"roles\.jsonl:1"),
    ("text under sft", ["{h}/text.txt"], "objective: text|objective=text"),
    ("a ragged table", ["{h}/ragged.csv"], r"ragged\.csv:3"),
    ("an unknown kind of file", ["{h}/data.weird"], r"\.jsonl"),
    ("no data at all", [], "luthier train FILE|data.train"),
    ("no label left", ["{h}/good.jsonl", "data.max_tokens=8", "data.over_length=drop"], "no trained token is left"),
    ("an unknown base", ["{h}/good.jsonl", "--model", "./nowhere"], "no folder './nowhere'"),
    ("a base that cannot be fetched", ["{h}/good.jsonl", "--model", "owner/name", "model.offline=true"], "owner/name cannot be had"),
    ("a folder that is no base", ["{h}/good.jsonl", "--model", "{h}/nobase"], r"config\.json"),
    ("pickled weights", ["{h}/good.jsonl", "--model", "{h}/pickled"], "pickle"),
    ("damaged weights", ["{h}/good.jsonl", "--model", "{h}/broken"], "cannot be opened"),
    ("an unknown method", ["{h}/good.jsonl", "method=lorra"], "lorra.*did you mean lora"),
    ("an unknown objective", ["{h}/good.jsonl", "--objective", "stf"], "did you mean sft"),
    ("a typo in a key", ["{h}/good.jsonl", "method.rnak=4"], r"method\.rnak.*did you mean method\.rank"),
    ("a typo in a run file, with its line", ["{h}/run.yaml"], r"run\.yaml, line 3.*did you mean method\.rank"),
    ("a key given twice", ["{h}/twice.yaml"], "line 2.*given twice"),
    ("a file that is not YAML", ["{h}/notyaml.yaml"], "not valid YAML"),
    ("a foreign key", ["{h}/good.jsonl", "learning_rate=1e-4"], r"optim\.lr"),
    ("rank 0", ["{h}/good.jsonl", "method.rank=0"], r"method\.rank.*at least 1.*0"),
    ("a learning rate in words", ["{h}/good.jsonl", "optim.lr=fast"], r"optim\.lr.*'?fast'?.*a number"),
    ("an unknown target", ["{h}/good.jsonl", "method.targets=[qkv]"], "'qkv'; there are"),
    ("a rank that PiSSA cannot have", ["{h}/good.jsonl", "method.init=pissa", "method.rank=99"], "PiSSA takes at most"),
    ("splitting an instruction", ["{h}/good.jsonl", "data.over_length=split"], "split"),
    ("an unknown template", ["{h}/good.jsonl", "model.template=chatlm"], "chatml"),
    ("an unknown task", ["{h}/good.jsonl", "evaluate.tasks=[blue]"], "did you mean bleu"),
    ("a run that is not there", ["--resume", "{h}/nobase"], r"no run\.yaml"),
    ("a delta that is not there", ["{h}/good.jsonl", "method.from=nowhere"], r"method\.from: there is no folder 'nowhere'"),
    ("an unknown option", ["{h}/good.jsonl", "--modle", "x"], "did you mean --model"),
]


def run(arguments, capsys):
    code = main(arguments)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "says"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_it_is_one_clear_sentence_and_nothing_is_left(home, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    arguments = [a.format(h=home) for a in arguments]
    if "--model" not in arguments and "--resume" not in arguments:
        arguments += ["--model", str(home / "base")]
    settings = [] if "--resume" in arguments else ["optim.steps=2", "precision=float32"]
    code, err = run(["train", *arguments, *settings], capsys)
    assert code == 2, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in err
    assert __import__("re").search(says, errors[0], 16), errors[0]
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_where_none_is(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, err = run(["train", str(home / "good.jsonl"), "--model", str(home / "base"), "place.on=cuda"], capsys)
    assert code == 2 and "finds no CUDA device here; this machine has cpu" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_an_output_folder_that_cannot_be_written(home, tmp_path, capsys):
    (tmp_path / "fixed").mkdir(mode=0o500)
    code, err = run(["train", str(home / "good.jsonl"), "--model", str(home / "base"), f"out={tmp_path / 'fixed'}"], capsys)
    assert code == 2 and "cannot be written" in err


def test_an_output_folder_that_is_a_file(home, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, err = run(["train", str(home / "good.jsonl"), "--model", str(home / "base"), f"out={tmp_path / 'file'}"], capsys)
    assert code == 2 and "cannot be written" in err


def test_a_name_that_is_taken(home, tmp_path, capsys):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").write_text("keep")
    code, err = run(["train", str(home / "good.jsonl"), "--model", str(home / "base"), f"out={tmp_path}", "name=r"], capsys)
    assert code == 2 and "there is a run of this name already" in err and (tmp_path / "r" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "{h}/base"], "--prompt"),
        (["generate", "{h}/base", "--input", "{h}/nowhere.jsonl", "--output", "o.jsonl"], "no such file"),
        (["generate", "{h}/base", "--input", "{h}/list.jsonl", "--output", "o.jsonl"], r"list\.jsonl:1"),
        (["generate", "{h}/nobase", "--prompt", "x"], r"config\.json"),
        (["merge", "{h}/nowhere", "--output", "m"], "no such folder"),
        (["eval", "{h}/base", "--data", "{h}/good.jsonl", "--task", "blue"], "did you mean bleu"),
        (["data", "preview", "{h}/goood.jsonl", "--model", "{h}/base"], r"good\.jsonl"),
        (["chatt"], "did you mean: luthier chat"),
    ],
)
def test_the_other_verbs_do_the_same(home, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, err = run([a.format(h=home) for a in arguments], capsys)
    assert code == 2, err
    assert "Traceback" not in err and __import__("re").search(says, err, 16), err
    assert not list(tmp_path.iterdir())


def test_a_fresh_process_says_the_same(home, tmp_path):
    """No import noise around the sentence."""
    command = [sys.executable, "-m", "luthier", "train", str(home / "truncated.jsonl"), "--model", str(home / "base")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert Path(home).name in done.stderr
