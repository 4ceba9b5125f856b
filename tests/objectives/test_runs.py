"""Whole runs of these objectives on tiny bases: what they say, keep, predict, and how they go on."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import small
from luthier.cli import main
from luthier.core import LuthierError
from luthier.opening import load
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.settings.config import load_run

QUIET = Reporter(quiet=True)
FILMS = [("what a fine story", "good"), ("charming and often affecting", "good"), ("slow and dull", "bad"), ("the plot makes no sense", "bad")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """films.tsv, pairs.jsonl, numbers.jsonl, text.txt, chat.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    films = [(f"{text} {word}", label) for word in small.TEXT.split()[:20] for text, label in FILMS]
    (folder / "films.tsv").write_text("sentence\tlabel\n" + "".join(f"{t}\t{x}\n" for t, x in films))
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"premise": t, "hypothesis": "she said", "label": x}) + "\n" for t, x in films))
    (folder / "numbers.jsonl").write_text("".join(json.dumps({"text": t, "label": 1.5 if x == "good" else -0.5}) + "\n" for t, x in films))
    (folder / "several.jsonl").write_text("".join(json.dumps({"text": t, "labels": ["a", x] if "the" in t else [x]}) + "\n" for t, x in films))
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join([small.TEXT] * 8))
    (folder / "chat.jsonl").write_text("".join(json.dumps({"prompt": t, "completion": x}) + "\n" for t, x in films))
    return folder


def settings(base: Path, file: Path, out: Path, *more: str):
    own = ["optim.steps=12", "optim.batch_examples=16", "optim.lr=1e-2", "evaluate.every_steps=6", "checkpoint.every_steps=4", "method.dropout=0"]
    if any(m.startswith("method=") for m in more):
        own.pop()
    fixed = [f"model={base}", f"data.train={file}", f"out={out}", "name=r", "precision=float32", "place.on=cpu", "evaluate.sample_tokens=4"]
    return load_run(None, [*fixed, *own, *more])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted((run / "model").glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize(
    ("kind", "method"), [("encoder", "lora"), ("encoder", "full"), ("encoder", "prefix"), ("decoder", "lora"), ("encoder_decoder", "full"), ("decoder", "full")]
)
def test_a_classifier_trains_and_predicts_after_reopening(kind: str, method: str, bases: dict[str, Path], data: Path, tmp_path: Path, capsys) -> None:
    result = execute(
        settings(bases[kind], data / "films.tsv", tmp_path, "objective=classify", f"method={method}", f"data.validation={data / 'films.tsv'}"), reporter=QUIET
    )
    assert set(result.after.scores) == {"accuracy", "macro_f1", "matthews"} == set(result.before.scores)
    assert result.after.loss.value < result.before.loss.value and result.after.loss.unit == "examples"
    assert load_run(str(tmp_path / "r" / "run.yaml")).objective.labels == ("bad", "good")  # the run wrote them down
    samples = [json.loads(x) for x in (tmp_path / "r" / "samples.jsonl").read_text().splitlines()]
    assert all(s["answer"] in ("bad", "good") and s["reference"] in ("bad", "good") and 0.5 <= s["probability"] <= 1 for s in samples)
    capsys.readouterr()
    assert (
        main(["eval", str(tmp_path / "r"), "--data", str(data / "films.tsv"), "--precision", "float32", "--json", "--output", str(tmp_path / "o.jsonl")]) == 0
    )
    (column,) = json.loads(capsys.readouterr().out)["scores"].values()
    answers = [json.loads(x) for x in (tmp_path / "o.jsonl").read_text().splitlines()]
    said = [next(v for k, v in a.items() if k not in ("prompt", "refs")) for a in answers]
    right = sum(s == a["refs"][0] for s, a in zip(said, answers, strict=True))
    assert column["accuracy"]["value"] == pytest.approx(right / 80) and column["accuracy"]["n"] == 80 == column["loss per example"]["n"]
    assert main(["predict", str(tmp_path / "r"), str(data / "films.tsv"), "--precision", "float32", "--probabilities"]) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    by_text = dict(zip((a["prompt"][0]["content"] for a in answers), said, strict=True))
    assert len(lines) == 80 and all(by_text[x["text"]] == x["label"] for x in lines)
    assert all(x["probabilities"][x["label"]] == x["probability"] for x in lines)
    assert main(["generate", str(tmp_path / "r"), "--prompt", "x"]) == 2 and "use luthier predict" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "scores"), [("several.jsonl", {"accuracy", "macro_f1", "micro_f1"}), ("numbers.jsonl", {"squared_error", "pearson", "spearman"})]
)
def test_several_labels_and_numbers_are_learned_and_scored(file: str, scores: set[str], bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    result = execute(settings(bases["encoder"], data / file, tmp_path, "objective=classify", "optim.lr=2e-2", f"data.validation={data / file}"), reporter=QUIET)
    assert set(result.after.scores) == scores
    assert result.after.loss.value < result.before.loss.value
    policy = load(tmp_path / "r", precision="float32")
    assert policy.objective == load_run(str(tmp_path / "r" / "run.yaml")).objective


def test_a_pair_is_predicted_from_standard_input_or_a_file(bases: dict[str, Path], data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    execute(settings(bases["encoder"], data / "pairs.jsonl", tmp_path, "objective=classify"), reporter=QUIET)
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "r"), str(data / "pairs.jsonl"), "--precision", "float32", "--output", str(tmp_path / "o.jsonl")]) == 0
    lines = [json.loads(x) for x in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert len(lines) == 80 and all(x["pair"] == "she said" for x in lines)
    monkeypatch.setattr("sys.stdin", io.StringIO("slow and dull\n\nwhat a fine story\n"))
    assert main(["predict", str(tmp_path / "r")]) == 0
    assert [json.loads(x)["text"] for x in capsys.readouterr().out.splitlines()] == ["slow and dull", "what a fine story"]
    assert main(["predict", str(bases["encoder"]), str(data / "films.tsv")]) == 2 and "no classification head" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_hidden_text_is_learned_and_an_interrupted_run_goes_on_bit_for_bit(kind: str, bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    import shutil

    run = settings(
        bases[kind],
        data / "text.txt",
        tmp_path,
        "objective=masked_text",
        "data.max_tokens=32",
        "method=full",
        f"data.validation={data / 'text.txt'}",
        "checkpoint.keep=9",
    )
    result = execute(run, reporter=QUIET)
    assert result.after.loss.value < result.before.loss.value and result.after.general is not None
    whole = weights(tmp_path / "r")
    for name in ("step-8", "step-12"):
        shutil.rmtree(tmp_path / "r" / "checkpoints" / name)
    shutil.rmtree(tmp_path / "r" / "model")
    execute(load_run(str(tmp_path / "r" / "run.yaml")), resume=tmp_path / "r", reporter=QUIET)
    again = weights(tmp_path / "r")
    assert set(whole) == set(again) and all(torch.equal(whole[k], again[k]) for k in whole)


def test_an_encoder_decoder_learns_to_answer(bases: dict[str, Path], data: Path, tmp_path: Path, capsys) -> None:
    run = settings(
        bases["encoder_decoder"], data / "chat.jsonl", tmp_path, "method=full", "optim.steps=80", "evaluate.every_steps=40", "evaluate.tasks=[exact_match]"
    )
    result = execute(run, reporter=QUIET)
    assert result.after.loss.value < 0.3 * result.before.loss.value
    assert result.after.scores["exact_match"].value >= 0.5
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "r"), "--prompt", "slow and dull", "--max-new", "5", "--precision", "float32"]) == 0
    assert capsys.readouterr().out.strip() in ("good", "bad")
    assert main(["eval", str(tmp_path / "r"), "--data", str(data / "chat.jsonl"), "--task", "classification", "--precision", "float32"]) == 0
    assert main(["eval", str(tmp_path / "r"), "--data", str(data / "text.txt"), "--text", "--json"]) == 0
    assert "loss per hidden token" in capsys.readouterr().out


REFUSED = {
    ("encoder", "sft"): "an encoder reads text and writes none",
    ("encoder", "text"): "use objective: masked_text",
    ("decoder", "masked_text"): "use objective: text",
    ("encoder_decoder", "text"): "use objective: masked_text",
}


@pytest.mark.parametrize(("kind", "objective"), list(REFUSED))
def test_an_objective_says_which_model_it_does_not_serve(kind: str, objective: str, bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    file = data / ("chat.jsonl" if objective == "sft" else "text.txt")
    with pytest.raises(LuthierError, match=REFUSED[kind, objective]):
        execute(settings(bases[kind], file, tmp_path, f"objective={objective}"), reporter=QUIET)
    assert not (tmp_path / "r").exists()


def test_previews_show_labels_sources_and_what_may_be_hidden(bases: dict[str, Path], data: Path, capsys) -> None:
    def look(kind: str, file: str, objective: str) -> str:
        assert main(["data", "preview", str(data / file), "--model", str(bases[kind]), "--objective", objective]) == 0
        return " ".join(capsys.readouterr().out.split())  # lines break where the path is long

    assert "label good" in look("encoder", "films.tsv", "classify")
    assert "a source of" in look("encoder_decoder", "chat.jsonl", "sft")
    assert "tokens that may be hidden" in look("encoder", "text.txt", "masked_text")
