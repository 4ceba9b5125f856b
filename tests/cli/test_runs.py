"""luthier runs: lists, shows, compares and reports runs; what is missing or damaged is a sentence."""

import json
import shutil

import pytest

import tiny
from luthier.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two runs that differ in rank and learning rate; one cut off, one damaged, one without settings that can be read, a folder that is none."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.folder(folder / "base")
    rows = [{"prompt": f"word {i}", "completion": f"answer {i}"} for i in range(30)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = folder / "runs"
    settings = ["optim.steps=4", "optim.batch_tokens=200", "precision=float32", f"out={out}", "evaluate.samples=0", "checkpoint.every_steps=2"]
    for name, more in (("a", ["optim.lr=2e-2"]), ("b", ["optim.lr=1e-2", "method.rank=2", "evaluate.tasks=[exact_match]"])):
        assert main(["train", str(folder / "data.jsonl"), "--model", str(folder / "base"), "--quiet", *settings, *more, f"name={name}"]) == 0
    for copy in ("cut", "torn", "unreadable"):
        shutil.copytree(out / "a", out / copy)
    for name in ("result.json", "facts.json"):
        (out / "cut" / name).unlink()
    shutil.rmtree(out / "cut" / "checkpoints" / "step-4")
    with (out / "torn" / "metrics.jsonl").open("a") as f:
        f.write('{"event": "train", "st')
    (out / "torn" / "result.json").write_bytes(b"\xff\xfe{")
    (out / "unreadable" / "run.yaml").write_text("model: [\n")
    (out / "notes").mkdir()
    return out


def said(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err
    return code, out.out, out.err


def result(home, name):
    return json.loads((home / name / "result.json").read_text())


def test_the_list_has_a_line_a_run_and_a_sentence_for_what_is_damaged(home, capsys):
    code, out, _ = said(capsys, "runs", "--in", home)
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert code == 0 and {"a", "b", "cut", "torn"} <= set(lines) and "notes" not in lines
    r = result(home, "a")
    assert f"{r['before']['loss']['value']:.4f} -> {r['after']['loss']['value']:.4f}" in lines["a"] and lines["a"].rstrip().endswith("finished")
    assert f"{r['before']['general']['value']:.4f} -> {r['after']['general']['value']:.4f}" in lines["a"] and " lora " in lines["a"] and " base " in lines["a"]
    assert f"exact_match {result(home, 'b')['after']['scores']['exact_match']['value']:.3f}" in lines["b"]
    assert "interrupted at step 2" in lines["cut"]
    assert "torn: result.json is damaged" in out and "torn: metrics.jsonl: 1 line of" in out
    assert f"{home / 'unreadable'}: its settings cannot be read" in out


def test_a_folder_without_runs_and_one_that_is_not_there_are_sentences(home, tmp_path, capsys):
    for where, sentence in ((tmp_path, "there are no runs here"), (tmp_path / "x", "there is no such folder")):
        code, _, err = said(capsys, "runs", "--in", where)
        assert code == 2 and sentence in err and err.count("\n") == 1


def test_show_tells_what_was_asked_what_it_came_to_and_what_to_do(home, capsys):
    code, out, _ = said(capsys, "runs", "--in", home, "show", "b")
    assert code == 0 and out.startswith("b: finished") and "method.rank: 2" in out
    assert f"{result(home, 'b')['after']['loss']['value']:.4f}" in out and "luthier eval" in out and "report.html" in out
    code, out, _ = said(capsys, "runs", "show", home / "cut")
    assert code == 0 and "interrupted after step 2" in out and f"luthier train --resume {home / 'cut'}" in out


def test_diff_has_only_what_differs_and_both_results(home, capsys):
    code, out, _ = said(capsys, "runs", "--in", home, "diff", "a", "b")
    first, second = out.split("results:")
    rows = [line.split("│") for line in first.splitlines() if "│" in line]
    keys = {r[0].strip(): (r[1].strip(), r[2].strip()) for r in rows}
    assert code == 0 and keys["optim.lr"] == ("0.02", "0.01") and keys["method.rank"][1] == "2"
    assert not {"name", "out", "seed", "model.id"} & set(keys)
    for name in "ab":
        assert f"{result(home, name)['after']['loss']['value']:.4f}" in second
    assert f"{result(home, 'a')['trained']:,}" in second and "no setting differs" in said(capsys, "runs", "--in", home, "diff", "a", "torn")[1]


def test_report_writes_the_page_and_the_card_again(home, capsys):
    (home / "a" / "report.html").unlink()
    (home / "a" / "adapter" / "README.md").unlink()
    code, out, _ = said(capsys, "runs", "--in", home, "report", "a")
    assert code == 0 and out.count("wrote ") == 2 and (home / "a" / "adapter" / "README.md").is_file()
    assert "the prediction is" in (home / "a" / "report.html").read_text()
    code, out, _ = said(capsys, "runs", "--in", home, "report", "cut", "--no-plan")
    assert code == 0 and "interrupted" in (home / "cut" / "report.html").read_text()


def test_a_wrong_name_gets_the_right_one(home, capsys):
    for arguments, sentence in (
        (("show", "tron"), "did you mean torn?"),
        (("show", home / "notes"), "no run.yaml here"),
        (("show", "unreadable"), "its settings cannot be read"),
        (("diff", "a", "zzz"), "there are a, b, cut"),
        (("shwo", "a"), "shwo"),
    ):
        code, _, err = said(capsys, "runs", "--in", home, *arguments)
        assert code == 2 and sentence in err, err
