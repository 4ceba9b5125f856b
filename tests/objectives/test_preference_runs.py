"""Whole runs on preferences: what they score and save, and that a reward model scores the same after it is opened again, here and by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.cli import main
from luthier.core import examples_of
from luthier.data.formats import Bad, Record
from luthier.data.preferences import convert_preferences, detect_preferences
from luthier.measuring.measure import predict, rewards
from luthier.opening import load
from luthier.running.progress import Reporter
from luthier.running.session import Session
from luthier.running.starting import execute
from luthier.settings.config import load_run

QUIET = Reporter(quiet=True)
PROBE = {"prompt": "Is the film fine?", "chosen": "Yes, a fine story.", "rejected": "It is dull."}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs.jsonl: polite answers are preferred to rude ones; ranked.jsonl and judged.jsonl say the same."""
    folder = tmp_path_factory.mktemp("preferences")
    prompts = [f"{a} {b} film?" for a in ("Is this", "What of that", "Who saw the", "Why a") for b in ("slow", "fine", "dull")]
    polite, middling, rude = "what a fine story", "it is slow", "go away now"
    lines = {
        "pairs": [{"prompt": p, "chosen": polite, "rejected": rude} for p in prompts],
        "ranked": [{"prompt": p, "ranked": [polite, middling, rude]} for p in prompts],
        "judged": [{"prompt": p, "completion": a, "label": a == polite} for p in prompts for a in (polite, rude)],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def settings(base: Path, file: Path, out: Path, *more: str):
    fixed = [f"model={base}", f"data.train={file}", f"data.validation={file}", f"out={out}", "name=r", "precision=float32", "place.on=cpu"]
    own = [
        "optim.steps=20",
        "optim.batch_examples=12",
        "optim.lr=1e-2",
        "evaluate.every_steps=99",
        "evaluate.samples=1",
        "evaluate.sample_tokens=4",
        "evaluate.forgetting=no",
    ]
    return load_run(None, [*fixed, *own, *more])


def probe():
    record = Record(PROBE, "probe")
    return convert_preferences(record, detect_preferences([record], renders="ranked"), Bad("fatal"), renders="ranked")


@pytest.mark.parametrize(
    ("kind", "method", "file"),
    [("decoder", "lora", "pairs"), ("decoder", "full", "ranked"), ("encoder", "lora", "ranked"), ("encoder_decoder", "lora", "pairs")],
)
def test_a_reward_model_learns_and_scores_a_probe_pair_the_same_after_reopening(
    kind: str, method: str, file: str, bases: dict[str, Path], data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    seen: list[list[float]] = []
    finish = Session._finish
    monkeypatch.setattr(Session, "_finish", lambda self, log: (finish(self, log), seen.append(self.probe()))[0])
    monkeypatch.setattr(Session, "probe", lambda self: _scored(self.policy, self.objective), raising=False)
    run = settings(bases[kind], data / f"{file}.jsonl", tmp_path, "objective={kind: reward, centre: 0.01}", f"method={method}")
    result = execute(run, reporter=QUIET)
    assert set(result.after.scores) == {"accuracy", "probability", "calibration_error"}
    assert result.after.scores["accuracy"].value == 1.0 and result.after.loss.value < result.before.loss.value
    assert result.after.loss.unit == "rankings" and result.after.loss.n == 12
    policy = load(tmp_path / "r", precision="float32")
    assert _scored(policy, policy.objective) == seen[0] and policy.objective == run.objective
    (again,) = rewards(policy, probe())
    assert again == pytest.approx(seen[0], abs=1e-5)  # both in one forward
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "r"), "--data", str(data / f"{file}.jsonl"), "--precision", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["scores"]
    name = next(n for n in found if n != "longer")
    assert found[name]["accuracy"]["value"] == 1.0 and found[name]["accuracy"]["n"] == 12 == found[name]["loss per ranking"]["n"]
    if kind == "decoder":  # whose tokens here are bytes
        assert found["longer"]["accuracy"]["value"] == pytest.approx(2 / 3 if file == "ranked" else 1.0)
    assert main(["predict", str(tmp_path / "r"), str(data / f"{file}.jsonl"), "--precision", "float32"]) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert len(lines) == 12 and all(x["answers"][0] == "what a fine story" and x["rewards"][0] == max(x["rewards"]) for x in lines)
    assert main(["generate", str(tmp_path / "r"), "--prompt", "x"]) == 2 and "a reward model" in capsys.readouterr().err


def _scored(policy, objective) -> list[float]:
    """The rewards of the probe pair, each answer alone."""
    before = policy.objective
    policy.objective = objective
    try:
        return [rewards(policy, [type(item)((c,), item.prompt)])[0][0] for item in probe() for c in item.chats]
    finally:
        policy.objective = before


def test_other_programs_open_a_reward_model_as_a_classifier_of_one_label(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    execute(settings(bases["decoder"], data / "pairs.jsonl", tmp_path, "objective=reward"), reporter=QUIET)
    policy = load(tmp_path / "r", precision="float32")
    model = AutoModelForSequenceClassification.from_pretrained(bases["decoder"], num_labels=1)
    theirs = PeftModel.from_pretrained(model, tmp_path / "r" / "adapter").eval()
    tokenizer = policy.base.tokenizer
    for answer, reward in zip((PROBE["chosen"], PROBE["rejected"]), rewards(policy, probe())[0], strict=True):
        said = [{"role": "user", "content": PROBE["prompt"]}, {"role": "assistant", "content": answer}]
        ids = tokenizer(tokenizer.apply_chat_template(said, tokenize=False), return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            assert float(theirs(input_ids=ids).logits) == pytest.approx(reward, abs=1e-4)


@pytest.mark.parametrize(
    ("objective", "file", "kind", "more"),
    [
        ("dpo", "pairs", "decoder", ()),
        ("dpo", "ranked", "encoder_decoder", ()),
        ("orpo", "pairs", "decoder", ("objective.weight=3",)),
        ("kto", "judged", "decoder", ()),
    ],
)
def test_the_better_answers_become_likelier_than_the_worse(
    objective: str, file: str, kind: str, more: tuple[str, ...], bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    run = settings(bases[kind], data / f"{file}.jsonl", tmp_path, f"objective={objective}", "optim.steps=20", *more)
    result = execute(run, reporter=QUIET)
    assert result.after.loss.value < result.before.loss.value
    if objective != "kto":
        assert result.after.scores["accuracy"].value > 0.9
    lines = [json.loads(x) for x in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    last = [x for x in lines if x["event"] == "train"][-1]
    better, worse = ("good_reward", "bad_reward") if objective == "kto" else ("better_reward", "worse_reward")
    assert last[better] > last[worse] and all(np.isfinite(v) for v in last.values() if isinstance(v, float))
    samples = [json.loads(x) for x in (tmp_path / "r" / "samples.jsonl").read_text().splitlines()]
    assert samples and samples[0]["reference"] in ("what a fine story", None)


def test_preferences_are_not_read_by_an_encoder_that_should_write(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    from luthier.core import Incompatible

    with pytest.raises(Incompatible, match="an encoder reads text and writes none"):
        execute(settings(bases["encoder"], data / "pairs.jsonl", tmp_path, "objective=dpo"), reporter=QUIET)


def test_predictions_are_those_of_the_rows(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Rows are scored in groups by length; each keeps its own scores."""
    from luthier.data.prepare import prepare

    execute(settings(bases["decoder"], data / "ranked.jsonl", tmp_path, "objective=reward", "optim.steps=2"), reporter=QUIET)
    policy = load(tmp_path / "r", precision="float32")
    rows = prepare([str(data / "ranked.jsonl")], policy.base.tokenizer, renders="ranked", max_tokens=99, say=lambda _: None).train
    together = predict(policy, policy.objective, rows, tokens=256)
    alone = [predict(policy, policy.objective, [r])[0] for r in rows]
    assert all(len(t["scores"]) == len(examples_of(r)) for t, r in zip(together, rows, strict=True))
    np.testing.assert_allclose([t["scores"] for t in together], [a["scores"] for a in alone], atol=1e-4)
