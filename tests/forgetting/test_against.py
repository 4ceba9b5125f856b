"""Runs that replay text, hold themselves to what they were and decay towards it: what they say, refuse, and how they go on."""

import json
import shutil

import pytest
from safetensors.torch import load_file

import tiny
from luthier import build
from luthier.cli import main
from luthier.core import LuthierError, next_token_batch, scored
from luthier.forgetting.replaying import written_by_base
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.settings.config import load_run

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.folder(folder / "base")
    rows = [{"prompt": f"say {i}", "completion": f"number {i} " * (1 + i % 4)} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "chats.jsonl").write_text("".join(json.dumps({"prompt": f"ask {i}", "completion": "yes indeed"}) + "\n" for i in range(30)))
    (folder / "general.txt").write_text("\n<|endoftext|>\n".join(f"A story, number {i}, of nothing at all, told slowly." for i in range(40)))
    (folder / "labels.csv").write_text("text,label\n" + "".join(f"this is number {i},{'ab'[i % 2]}\n" for i in range(30)))
    pairs = [{"prompt": f"say {i}", "chosen": f"number {i}", "rejected": "never"} for i in range(30)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs))
    return folder


def run_of(home, out, *more, data="data.jsonl"):
    common = [
        f"model={home / 'base'}",
        f"data.train={home / data}",
        f"out={out}",
        "precision=float32",
        "name=r",
        "evaluate.samples=0",
        "optim.lr=1e-2",
        "evaluate.forgetting=false",
    ]
    return load_run(
        None, [*common, "evaluate.forgetting=false", "optim.steps=6", "optim.batch_tokens=300", "checkpoint.every_steps=3", "checkpoint.keep=9", *more]
    )


def tensors(result):
    return load_file(
        next(
            p
            for p in (result.artefact / "adapter_model.safetensors", result.artefact / "model.safetensors", result.artefact / "delta.safetensors")
            if p.exists()
        )
    )


EVERYTHING = "data.replay={source: [SOURCE, self], share: 0.3, kl: 0.2, l2sp: 0.01, self_rows: 8, self_tokens: 12}"


@pytest.mark.parametrize("method", ["lora", "full", "partial"])
def test_a_run_killed_in_the_middle_goes_on_bit_for_bit(home, tmp_path, method):
    how = [EVERYTHING.replace("SOURCE", str(home / "general.txt")), f"method={method}"]
    whole = execute(run_of(home, tmp_path / "a", *how), reporter=QUIET)
    execute(run_of(home, tmp_path / "b", *how), reporter=QUIET)
    shutil.rmtree(tmp_path / "b" / "r" / "checkpoints" / "step-6")
    again = execute(load_run(str(tmp_path / "b" / "r" / "run.yaml")), resume=tmp_path / "b" / "r", reporter=QUIET)
    one, two = tensors(whole), tensors(again)
    assert one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)
    assert whole.replayed == again.replayed


def test_the_run_says_what_was_replayed_and_what_it_bought(home, tmp_path, capsys):
    run = run_of(home, tmp_path, EVERYTHING.replace("SOURCE", str(home / "general.txt")), "optim.steps=12")
    result = execute(run, reporter=(reporter := Reporter()))
    reporter.result(result)
    said = capsys.readouterr().out
    assert "loss on replayed text" in said and "8 texts of" in said and "decay towards the start (L2-SP, 0.01): the changes of 4 matrices" in said
    assert result.before.replayed and result.after.replayed and result.after.replayed.value < result.before.replayed.value
    assert result.replayed["share"] == pytest.approx(0.3, abs=0.03)
    lines = [json.loads(x) for x in (result.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if x["event"] == "train"]
    assert sum(x.get("units_replay", 0) for x in steps) > 0 and all(x["penalty"] >= 0 for x in steps)
    kls = [x["loss_kl"] for x in steps if "loss_kl" in x]
    assert kls[0] < 1e-6 < kls[-1], "nothing has moved before the first step"
    assert all(x["loss"] == pytest.approx(x["loss_tokens"], rel=1e-6) for x in steps), "what is logged is the objective's own loss"
    assert json.loads((result.folder / "result.json").read_text())["replayed"] == result.replayed


KINDS = [
    ("data.jsonl", ["objective=sft"]),
    ("general.txt", ["objective=text"]),
    ("labels.csv", ["objective=classify"]),
    ("pairs.jsonl", ["objective=dpo"]),
    ("pairs.jsonl", ["objective=reward"]),
    ("pairs.jsonl", ["objective=orpo"]),
    ("pairs.jsonl", ["objective=kto"]),
]


@pytest.mark.parametrize("data,more", KINDS, ids=str)
def test_every_objective_replays(home, tmp_path, data, more):
    result = execute(
        run_of(home, tmp_path, f"data.replay={{source: [{home / 'chats.jsonl'}, {home / 'general.txt'}], share: 0.2, kl: 0.1}}", *more, data=data),
        reporter=QUIET,
    )
    assert result.replayed["tokens"] > 0 and result.after.replayed is not None


def test_the_divergence_holds_the_model_back(home, tmp_path):
    general = ["evaluate.forgetting=true", f"data.general={home / 'general.txt'}"]
    free = execute(run_of(home, tmp_path / "a", *general), reporter=QUIET)
    held = execute(run_of(home, tmp_path / "b", *general, "data.replay.kl=5"), reporter=QUIET)
    decayed = execute(run_of(home, tmp_path / "c", *general, "data.replay.l2sp=100"), reporter=QUIET)
    drift = lambda r: abs(r.after.general.value - r.before.general.value)  # noqa: E731
    assert drift(held) < drift(free) and drift(decayed) < drift(free)
    change = lambda r: sum(float((tensors(r)[k] @ tensors(r)[k.replace("lora_B", "lora_A")]).norm()) for k in tensors(r) if "lora_B" in k)  # noqa: E731
    assert change(decayed) < 0.5 * change(free)


def test_a_run_that_starts_from_a_delta_is_held_to_that_and_decays_towards_it(home, tmp_path):
    first = execute(run_of(home, tmp_path / "a"), reporter=QUIET)
    held = "data.replay={kl: 0.5, l2sp: 0.01}"
    second = execute(run_of(home, tmp_path / "b", f"method={{kind: lora, from: {first.artefact}}}", held, "optim.steps=2"), reporter=QUIET)
    steps = [json.loads(x) for x in (second.folder / "metrics.jsonl").read_text().splitlines() if '"train"' in x]
    assert steps[0]["loss_kl"] < 1e-6 < steps[1]["loss_kl"] and steps[0]["penalty"] < 1e-6 < steps[1]["penalty"]


# --- what the base writes itself ------------------------------------------------------------------------------------------


def written(home, out, *more, said=None, seed=0):
    run = run_of(home, out, f"seed={seed}", "data.replay={source: self, self_rows: 6, self_tokens: 10}", *more)
    policy, _ = build.assemble(run)
    return written_by_base(run, policy, folder=out / ".replay", say=(said if said is not None else []).append, tick=lambda *_: None), policy


def test_what_the_base_writes_is_seeded_kept_and_found_again(home, tmp_path):
    said = []
    first, _ = written(home, tmp_path / "a", said=said)
    assert "kept in" in said[0] and len(first) == 6 and all(1 < len(r) <= 10 for r in first)
    again, _ = written(home, tmp_path / "a", said=said)
    elsewhere, _ = written(home, tmp_path / "b")
    other, _ = written(home, tmp_path / "b", seed=1)
    same = lambda a, b: [r.ids.tolist() for r in a] == [r.ids.tolist() for r in b]  # noqa: E731
    assert "found in" in said[1] and same(first, again) and same(first, elsewhere) and not same(first, other)
    file = next((tmp_path / "a" / ".replay").rglob("*.jsonl"))
    file.write_text(file.read_text()[:-20])
    damaged, _ = written(home, tmp_path / "a")
    assert same(first, damaged), "a damaged file is written anew"


def test_it_is_the_base_that_writes_whatever_the_delta_does(home, tmp_path, monkeypatch):
    plain, _ = written(home, tmp_path / "a")
    honest = build.assemble

    def moved(run):
        policy, objective = honest(run)
        tiny.randomise(policy.delta.params, std=1.0)
        return policy, objective

    monkeypatch.setattr(build, "assemble", moved)
    loud, _ = written(home, tmp_path / "b")
    assert [r.ids.tolist() for r in plain] == [r.ids.tolist() for r in loud]


def test_its_samples_follow_the_bases_own_distribution(home, tmp_path):
    """The mean log p of sampled tokens is minus the entropy, within sampling error: at another temperature it would not be."""
    run = run_of(home, tmp_path, "data.replay={source: self, self_rows: 300, self_tokens: 10}")
    policy, _ = build.assemble(run)
    rows = written_by_base(run, policy, folder=tmp_path, say=lambda _: None, tick=lambda *_: None)
    batch = next_token_batch(rows, pad=1, packed=True)
    with policy.reference():
        hidden, targets, _ = scored(batch, policy.hidden(batch))
        got = policy.score(hidden, targets, want=("logp", "entropy"))
    gap = got["logp"] + got["entropy"]
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / len(gap) ** 0.5


# --- what is refused -------------------------------------------------------------------------------------------------------

WRONG = [
    (["data.replay.share=0.1"], "data.replay.share=0.1: nothing is replayed"),
    (["data.replay=nosuch.txt"], "data.replay.source: nosuch.txt: no such file"),
    (["data.replay.source=nosuch.txt"], "data.replay.source: nosuch.txt: no such file"),
    (["data.replay={source: GENERAL, self_rows: 5}"], "the base writes no text here"),
    (["data.replay={source: GENERAL, weight: 0}"], "what is replayed would teach nothing"),
    (["data.replay={source: GENERAL, share: 1}"], "found 1, accepted is a number, above 0 and at most 0.9"),
    (["data.replay={source: GENERAL, kl_on: replay}"], "there is no divergence to take"),
    (["data.replay={kl: 0.1, kl_on: replay}"], "data.replay.kl_on: nothing is replayed"),
    (["data.replay.shares=0.1"], "did you mean data.replay.share?"),
    (["data.replay.l2sp=0.1", "method=prefix"], "does not start as the base"),
    (["data.replay.l2sp=0.1", "method=diff_pruning"], "a penalty of its own"),
    (["data.replay.kl=0.1", "method=crafted_prompt"], "trains nothing, so it forgets nothing"),
    (["data.replay.kl=0.1", "objective={kind: grpo, rewards: {bleu: 1.0}}"], "objective.kl holds it to what it was; leave this out"),
    (["data.replay.source=self", "objective={kind: ppo, rewards: {bleu: 1.0}}"], "objective.ptx with ptx_data replays text"),
]


@pytest.mark.parametrize("more,said", WRONG, ids=lambda x: str(x)[:50])
def test_what_does_nothing_is_refused_in_a_sentence_through_the_command(home, tmp_path, capsys, more, said):
    more = [m.replace("GENERAL", str(home / "general.txt")) for m in more]
    common = [str(home / "data.jsonl"), "--model", str(home / "base"), f"out={tmp_path}", "precision=float32", "name=r", "optim.steps=2"]
    assert main(["train", *common, *more]) == 2
    error = capsys.readouterr().err.strip()
    assert said in " ".join(error.split()) and error.count("\n") == 0
    assert not (tmp_path / "r").exists()


def test_a_classifier_is_held_on_replayed_text_only(home, tmp_path):
    with pytest.raises(LuthierError, match="objective classify trains no next token"):
        execute(run_of(home, tmp_path, "objective=classify", "data.replay.kl=0.1", data="labels.csv"), reporter=QUIET)
