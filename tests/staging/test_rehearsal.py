"""What is found before the first stage starts, and how much each stage trains."""

import json

import pytest
import torch

import small
import tiny
from luthier import counts
from luthier.errors import LuthierError
from luthier.running.progress import Reporter
from luthier.staging import rehearsal
from luthier.staging.rehearsal import assemble, rehearse, standing_in
from luthier.staging.relay import train_stages
from luthier.staging.stages import load_stages


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny base, a tiny T5, and data."""
    folder = tmp_path_factory.mktemp("rehearsal")
    tiny.folder(folder / "base")
    tiny.folder(folder / "other", seed=1)
    small.bert(folder / "bert")
    (folder / "books.txt").write_text("A story about nothing at all.\n<|endoftext|>\nAnother one.\n" * 4)
    (folder / "chats.jsonl").write_text("".join(json.dumps({"prompt": f"word {i}", "completion": "yes"}) + "\n" for i in range(8)))
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"prompt": f"word {i}", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(8)))
    return folder


def tree(home, out="/nowhere"):
    """text, sft, dpo."""
    lora = {"kind": "lora", "rank": 4}
    return {
        "model": str(home / "base"),
        "precision": "float32",
        "name": "s",
        "out": str(out),
        "stages": {
            "reading": {"objective": "text", "method": "full", "data": str(home / "books.txt")},
            "sft": {"model": "stage:reading", "method": lora, "data": str(home / "chats.jsonl")},
            "dpo": {"model": "stage:reading", "method": lora | {"from": "stage:sft"}, "objective": "dpo", "data": str(home / "pairs.jsonl")},
        },
    }


def said_of(home, **changes):
    """What is said of the stages with some settings of theirs changed: stage=(section, value)."""
    asked = tree(home)
    for stage, settings in changes.items():
        asked["stages"][stage] |= settings
    stages = load_stages(asked)
    with pytest.raises(LuthierError) as e:
        rehearse(stages, stages.stages, {})
    assert "\n" not in str(e.value)
    return str(e.value)


LORA = {"kind": "lora", "rank": 4, "from": "stage:sft"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dpo": {"data": "nowhere.jsonl"}}, "stage dpo: nowhere.jsonl: no such file or folder"),
        ({"dpo": {"data": {"train": "{home}/pairs.jsonl", "validation": "no.jsonl"}}}, "stage dpo: no.jsonl: no such file"),
        ({"dpo": {"data": {"train": "{home}/pairs.jsonl", "general": "no.txt"}}}, "stage dpo: no.txt: no such file"),
        ({"dpo": {"data": {"train": []}}}, "stage dpo: data.train: names no file"),
        ({"dpo": {"data": "{home}/chats.jsonl"}}, "stage dpo: {home}/chats.jsonl:1: no judged answers are found here"),
        ({"sft": {"data": "{home}/books.txt"}}, "stage sft: {home}/books.txt: this is raw text"),
        ({"sft": {"model": "no/such/model"}}, "stage sft: model.id: there is no folder 'no/such/model'"),
        ({"sft": {"method": {"kind": "lora", "targets": ["nothing"]}}}, "stage sft: targets: nothing in this model (llama) is called 'nothing'"),
        ({"sft": {"model": "{home}/bert"}}, "stage sft: objective sft: an encoder reads text and writes none"),
        ({"reading": {"precision": "nf4"}}, "stage reading: method full trains the base's own weights, and precision nf4"),
        ({"reading": {"method": "lora"}}, "stage sft: model.id: stage reading leaves an adapter (lora), which is no model by itself"),
        (
            {"dpo": {"method": LORA | {"from": "stage:reading"}}},
            "stage dpo: method.from: stage reading leaves a whole model (full); name it as model: stage:reading",
        ),
        ({"dpo": {"method": {"kind": "ia3", "from": "stage:sft"}}}, "stage dpo: method.from: stage sft leaves a delta of lora, and this stage's method is ia3"),
        ({"dpo": {"model": "{home}/other"}}, "stage dpo: method.from: stage sft trains on stage:reading and this stage on {home}/other"),
        ({"dpo": {"method": LORA | {"rank": 8}}}, "stage dpo: method: stage sft, whose delta this one goes on from, has a tensor of (4, 32) at model.layers.0"),
        ({"dpo": {"method": LORA | {"alpha": 3}}}, "has a scale of 4.0 at model.layers.0.self_attn.q_proj, and this one a scale of 0.75"),
        ({"dpo": {"method": LORA | {"targets": ["query"]}}}, "and this one nothing at model.layers.0.self_attn.v_proj"),
        ({"dpo": {"method": LORA | {"from": "runs/nowhere"}}}, "stage dpo: method.from: there is no folder 'runs/nowhere'"),
        ({"sft": {"tokens": ["<x>"]}}, "stage dpo: tokens: stage sft adds <x> and this stage none"),
        ({"reading": {"tokens": ["<x>"]}, "sft": {"tokens": ["<x>"]}}, "stage sft: tokens: '<x>' is already in this model's vocabulary"),
        ({"dpo": {"objective": {"kind": "dpo", "reference": "live"}}}, "stage dpo: objective.reference=live: this run starts from a saved delta"),
    ],
)
def test_what_would_end_a_later_stage_is_found_before_the_first(home, changes, sentence):
    filled = json.loads(json.dumps(changes).replace("{home}", str(home)))
    assert sentence.replace("{home}", str(home)) in said_of(home, **filled)


def test_nothing_is_written_where_a_stage_cannot_run(home, tmp_path):
    asked = tree(home, tmp_path / "runs")
    asked["stages"]["dpo"]["data"] = "nowhere.jsonl"
    with pytest.raises(LuthierError, match="stage dpo: nowhere"):
        train_stages(asked, reporter=Reporter(quiet=True))
    assert not (tmp_path / "runs").exists()


def test_a_file_of_ones_own_that_gives_no_reward_is_found_before_the_first_stage(home, tmp_path):
    (tmp_path / "empty.py").write_text("def measure(prompt, answer, row):\n    return 1.0\n")
    asked = {"model": str(home / "base"), "precision": "float32", "data": str(home / "chats.jsonl"), "method": "lora", "objective": {"kind": "grpo"}}
    for source, sentence in ((f"{tmp_path}/empty.py", "stage a: .*empty.py: defines no function reward and no Task"), ("./no.py", "there is no './no.py'")):
        stages = load_stages({"stages": {"a": asked | {"objective": {"kind": "grpo", "rewards": {source: 1.0}}}}})
        with pytest.raises(LuthierError, match=sentence):
            rehearse(stages, stages.stages, {})


def test_good_stages_pass_and_say_so(home):
    stages, said = load_stages(tree(home)), []
    tried = rehearse(stages, stages.stages, {}, say=said.append)
    assert [t.stage.name for t in tried] == ["reading", "sft", "dpo"] and len(said) == 3
    assert all(p.device.type == "meta" for t in tried for p in t.policy.lm.parameters())


def test_the_first_records_are_not_believed_where_all_of_them_say_otherwise(home, tmp_path, monkeypatch):
    """Two labels, the second in the last rows alone: the first records hold one, which would be refused."""
    rows = [{"text": f"word {i}", "label": "a" if i < 9 else "b"} for i in range(12)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setattr(rehearsal, "FIRST", 6)
    stages = load_stages({"model": str(home / "base"), "precision": "float32", "stages": {"a": {"objective": "classify", "data": str(tmp_path / "l.jsonl")}}})
    with pytest.raises(LuthierError):
        cut = load_stages(
            {
                "model": str(home / "base"),
                "precision": "float32",
                "stages": {"a": {"objective": "classify", "data": {"train": str(tmp_path / "l.jsonl"), "limit": 6}}},
            }
        )
        rehearse(cut, cut.stages, {})
    rehearse(stages, stages.stages, {})


def test_a_stage_counts_what_it_will_train_tokens_of_earlier_stages_included(home, tmp_path):
    asked = tree(home, tmp_path)
    asked |= {"optim": {"steps": 1, "batch_tokens": 100}, "evaluate": {"samples": 0, "forgetting": False}}
    asked["stages"]["reading"]["tokens"] = ["<x>", "<y>"]
    asked["stages"]["lora"] = dict(asked["stages"]["sft"])
    asked["stages"]["sft"]["method"] = "full"
    del asked["stages"]["dpo"]
    stages = load_stages(asked)
    before = {s.name: counts.total(assemble(stages, s, {}).policy) for s in stages.stages}
    done = train_stages(stages, reporter=Reporter(quiet=True))
    assert before == {n: (r.trained, r.total) for n, r in done.results.items()}
    assert before["sft"][0] == before["reading"][0]
    made = {"reading": done.folder / "1-reading" / "model"}
    assert counts.total(assemble(stages, stages.stage("sft"), made).policy) == before["sft"]


def test_a_model_that_is_not_made_is_stood_in_for_by_the_one_it_begins_from(home):
    stages = load_stages(tree(home))
    run, tokens = standing_in(stages, stages.stage("dpo"), {})
    assert run.model.id == str(home / "base") and tokens == ()
    assert standing_in(stages, stages.stage("dpo"), {"reading": home / "other"})[0].model.id == str(home / "other")


def test_scores_of_a_stage_come_from_one_that_learned_to_score(home):
    class Learned:
        rewards = {"stage:sft": 1.0}  # noqa: RUF012
        watch = ()
        renders = "prompts"

    asked = load_stages(tree(home))
    from dataclasses import replace

    stage = replace(asked.stage("dpo"), asked=_with(asked.stage("dpo").asked, Learned()))
    with pytest.raises(LuthierError, match="objective.rewards: stage sft learns sft, which scores no answers"):
        rehearsal.check_handed(asked, stage)


def _with(run, objective):
    """The run, with an objective that no file stands for."""
    object.__setattr__(run, "objective", objective)
    return run


def test_rehearsing_leaves_the_random_numbers_of_a_run_alone(home, tmp_path):
    """A stage is seeded when it starts, whatever was tried before."""
    asked = tree(home, tmp_path) | {"optim": {"steps": 1, "batch_tokens": 100}, "evaluate": {"samples": 0, "forgetting": False}}
    asked["stages"] = {"a": {"model": {"id": str(home / "base"), "random": True}, "method": "full", "objective": "text", "data": str(home / "books.txt")}}
    losses = []
    for name in ("x", "y"):
        torch.manual_seed(len(losses))
        losses.append(train_stages(asked | {"name": name}, reporter=Reporter(quiet=True)).results["a"].before.loss.value)
    assert losses[0] == losses[1]
