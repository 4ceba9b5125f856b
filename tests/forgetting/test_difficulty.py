"""Rows scored by the base's own loss before training, and what a run draws from it."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import tiny
from luthier import references
from luthier.core import LuthierError, scored
from luthier.core import next_token_batch as batch_of
from luthier.data.prepare import Prepared
from luthier.forgetting.difficulty import drawn, losses
from luthier.methods.lora import Method as Lora
from luthier.policy import Policy
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.settings.config import load_run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.folder(folder / "base")
    rows = [{"prompt": f"say {i}", "completion": f"number {i} " * (1 + i % 4)} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    labels = ["good"] * 30 + ["bad"] * 6 + ["fair"] * 12
    (folder / "labels.csv").write_text("text,label\n" + "".join(f"this is number {i},{name}\n" for i, name in enumerate(labels)))
    return folder


def run_of(home, out, *more):
    common = [
        f"model={home / 'base'}",
        f"data.train={home / 'data.jsonl'}",
        f"out={out}",
        "precision=float32",
        "name=r",
        "evaluate.samples=0",
        "evaluate.forgetting=false",
    ]
    return load_run(None, [*common, "evaluate.forgetting=false", "optim.steps=4", "optim.batch_tokens=200", *more])


def policy_of(family="llama"):
    base = tiny.base(family)
    base.hash = "0123"
    delta = Lora().attach(base, "default")
    tiny.randomise(delta.params, std=0.3)
    return Policy(base, delta, method=Lora())


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_rows_score_is_the_bases_loss_a_token_one_row_at_a_time(home, tmp_path, family):
    policy, rows = policy_of(family), tiny.rows_for(family, 7)
    got = losses(run_of(home, tmp_path), policy, rows, packed=family == "llama")
    for row, value in zip(rows, got, strict=True):
        batch = batch_of([row], pad=0, packed=False)
        with policy.reference():
            hidden, targets, _ = scored(batch, policy.hidden(batch))
            slow = -policy.score(hidden, targets)["logp"].mean()
        assert value == pytest.approx(float(slow), rel=1e-4)


def test_scores_are_kept_by_content_and_base_and_only_new_rows_are_computed(home, tmp_path, monkeypatch):
    run, rows, asked = run_of(home, tmp_path), tiny.rows(6), []
    honest = references.logps
    monkeypatch.setattr(references, "logps", lambda policy, examples, **how: asked.append(len(examples)) or honest(policy, examples, **how))
    first = losses(run, policy_of(), rows, packed=True)
    again = losses(run, policy_of(), [*rows, *tiny.rows(2, seed=9)], packed=True)
    assert asked == [6, 2] and np.array_equal(again[:6], first)
    other = policy_of()
    other.base.hash = "another"
    losses(run, other, rows, packed=True)
    assert asked == [6, 2, 6]


def test_trivial_and_broken_rows_are_listed_with_examples_and_dropped_when_asked(home, tmp_path, monkeypatch):
    rows, said = tiny.rows(20), []
    loss = np.array([0.01, 0.02, *np.linspace(2, 3, 17), 40.0])
    monkeypatch.setattr("luthier.forgetting.difficulty.losses", lambda *a, **k: loss)
    policy = policy_of()
    policy.base.tokenizer = tiny.tokenizer()
    prepared = Prepared(list(rows), [], [])
    run = run_of(home, tmp_path, "data.sample={by: difficulty, hard: 0.5, drop: [trivial, broken]}")
    parts = drawn(run, policy, prepared, packed=True, say=said.append, tick=lambda *_: None)
    text = "\n".join(said)
    assert "trivial: 2 rows (10.0%), below 0.10 nats a token; dropped" in text and "made:1, 0.01:" in text
    assert "broken: 1 rows (5.0%)" in text and "made:20, 40.00:" in text
    assert [r.where for r in prepared.train] == [f"made:{i}" for i in range(3, 20)]
    assert parts.counts == (9, 8) and parts.rows[0].tolist() == [14, 15, 16]
    assert prepared.facts["difficulty"]["broken"]["rows"] == 1


def test_a_run_draws_by_difficulty_and_goes_on_bit_for_bit(home, tmp_path):
    quiet = Reporter(quiet=True)
    how = ["data.sample={by: difficulty, hard: 0.6}", "checkpoint.every_steps=2", "checkpoint.keep=9"]
    whole = execute(run_of(home, tmp_path / "a", *how), reporter=quiet)
    execute(run_of(home, tmp_path / "b", *how), reporter=quiet)
    shutil.rmtree(tmp_path / "b" / "r" / "checkpoints" / "step-4")
    again = execute(load_run(str(tmp_path / "b" / "r" / "run.yaml")), resume=tmp_path / "b" / "r", reporter=quiet)
    one, two = ((r.artefact / "adapter_model.safetensors").read_bytes() for r in (whole, again))
    assert one == two
    facts = json.loads((whole.folder / "environment.json").read_text())["data"]["difficulty"]
    assert set(facts) == {"quantiles", "bounds", "trivial", "broken", "hard"} and len(facts["hard"]["examples"]) == 3


def test_labels_are_drawn_evenly_in_a_run(home, tmp_path, capsys):
    run = run_of(home, tmp_path, f"data.train={home / 'labels.csv'}", "objective=classify", "data.sample=label", "optim.epochs=1", "optim.steps=null")
    execute(run, reporter=Reporter())
    counts = [int(n) for n in re.findall(r"\d+ -> (\d+)", capsys.readouterr().out)]
    assert len(counts) == 3 and max(counts) - min(counts) <= 1 and sum(counts) == 46


@pytest.mark.parametrize(
    "more,said",
    [
        (["data.sample=label"], "objective sft has no labels"),
        (["data.sample=difficulty", "objective=classify"], "the loss of the next token, which objective classify does not train"),
        (["data.sample=label", "objective={kind: classify, class_weights: balanced}"], "use one of the two"),
        (["data.sample=difficulty", "method=crafted_prompt"], "trains nothing"),
        (["data.sample={by: difficulty, trivial: 99}"], "every training row is trivial or broken"),
    ],
    ids=str,
)
def test_what_has_nothing_to_act_on_is_refused(home, tmp_path, more, said):
    data = [f"data.train={home / 'labels.csv'}"] if any("classify" in m for m in more) else []
    with pytest.raises(LuthierError, match=said):
        execute(run_of(home, tmp_path, *data, *more), reporter=Reporter(quiet=True))
    assert not (tmp_path / "r").exists()


def test_settings_of_the_other_kind_are_refused(home, tmp_path):
    with pytest.raises(LuthierError, match=r"data\.sample\.balance: is of data\.sample\.by=label, and by is difficulty"):
        run_of(home, tmp_path, "data.sample={by: difficulty, balance: 1}")
    assert torch.is_grad_enabled()
