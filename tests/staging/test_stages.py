"""A file with stages: how they are laid over what is shared, what they may name, what the command line changes, and in which words mistakes are told."""

import copy

import pytest

from luthier.errors import ConfigError
from luthier.settings import config
from luthier.settings.config import load_run
from luthier.settings.run import Model
from luthier.staging.stages import has_stages, load_stages

FILE = """\
model: {id: m, template: chatml}
precision: bfloat16
name: assistant
optim: {lr: 1e-4, steps: 7}
method: {kind: lora, dropout: 0.1, rank: 4}
stages:
  reading: {objective: text, method: full, data: books.txt}
  sft:
    model: stage:reading
    method: {rank: 16}
    data: {train: chats.jsonl}
  dpo:
    model: stage:reading
    method: {rank: 16, from: stage:sft}
    objective: {kind: dpo, beta: 0.2}
    data: {train: pairs.jsonl}
    optim: {steps: 3}
"""


def written(tmp_path, text=FILE):
    file = tmp_path / "assistant.yaml"
    file.write_text(text)
    return file


def refused(source, *settings):
    with pytest.raises(ConfigError) as e:
        load_stages(source, settings)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_stage_is_a_run_laid_over_what_is_shared(tmp_path):
    stages = load_stages(written(tmp_path))
    reading, sft, dpo = stages.stages
    assert [s.folder for s in stages.stages] == ["1-reading", "2-sft", "3-dpo"] and str(stages.folder) == "runs/assistant"
    assert config.kind_of(reading.asked.method) == "full" and reading.asked.data.train == ("books.txt",)  # a new kind drops rank and dropout
    assert (sft.asked.method.rank, sft.asked.method.dropout, config.kind_of(sft.asked.objective)) == (16, 0.1, "sft")
    assert sft.asked.model == Model(id="stage:reading", template="chatml")  # a key at a time
    assert (dpo.asked.optim.lr, dpo.asked.optim.steps, sft.asked.optim.steps) == (1e-4, 3, 7)
    assert [s.needs for s in stages.stages] == [(), ("reading",), ("reading", "sft")]
    assert [(s.model_from, s.delta_from) for s in stages.stages] == [(None, None), ("reading", None), ("reading", "sft")]
    assert has_stages(written(tmp_path)) and not has_stages(written(tmp_path, "model: m\n"))


def test_what_an_earlier_stage_leaves_is_put_in_its_place_in_values_lists_and_keys(tmp_path):
    stages = load_stages(written(tmp_path))
    run = stages.stage("dpo").run({"reading": tmp_path / "1-reading" / "model", "sft": "/x/adapter"})
    assert run.model.id == str(tmp_path / "1-reading" / "model") and run.method.from_ == "/x/adapter"
    assert stages.stage("dpo").asked.method.from_ == "stage:sft"  # as asked, whatever was put there
    text = "stages:\n  a: {objective: reward}\n  b: {data: {columns: {stage:a: x, prompt: stage:a}, general: [stage:a, t.txt], train: stage:a:good}}\n"
    b = load_stages(written(tmp_path, text)).stages[1]
    d = b.run({"a": "/a/adapter"}).data
    assert d.columns == {"/a/adapter": "x", "prompt": "/a/adapter"} and d.general == ("/a/adapter", "t.txt") and b.needs == ("a",)
    assert d.train == ("/a/adapter:good",)  # a reward's label stands behind its folder


def test_another_model_does_not_inherit_what_was_said_of_the_shared_ones_weights(tmp_path):
    shared = "model: {id: m, revision: abc, random: true, trust_remote_code: true}\n"
    own = "stages:\n  a: {method: full}\n  b: {model: stage:a}\n  c: {model: {offline: true}}\n"
    a, b, c = (s.asked.model for s in load_stages(written(tmp_path, shared + own)).stages)
    assert (a.revision, a.random) == ("abc", True) and (c.revision, c.random, c.offline) == ("abc", True, True)
    assert (b.revision, b.random, b.trust_remote_code) == (None, False, True)  # or a stage would start again from random weights


def test_settings_reach_the_shared_part_one_stage_or_all_of_them(tmp_path):
    stages = load_stages(written(tmp_path), ["seed=5", "stages.sft.optim.lr=1e-3", "stages.all.evaluate.samples=0", "stages.sft.method=dora", "out=elsewhere"])
    assert [s.asked.seed for s in stages.stages] == [5, 5, 5] and [s.asked.optim.lr for s in stages.stages] == [1e-4, 1e-3, 1e-4]
    assert [s.asked.evaluate.samples for s in stages.stages] == [0, 0, 0] and str(stages.folder) == "elsewhere/assistant"
    assert config.kind_of(stages.stage("sft").asked.method) == "dora" and stages.stage("sft").asked.method.rank == 8
    assert all((s.asked.name, s.asked.out) == (None, "runs") for s in stages.stages)  # where they lie is no setting of a stage


def test_a_shared_setting_that_reaches_some_stages_says_which_and_one_that_reaches_none_is_refused(tmp_path):
    said = load_stages(written(tmp_path), ["optim.steps=2"])
    assert [s.asked.optim.steps for s in said.stages] == [2, 2, 3] and "optim.steps=2 is for reading, sft; dpo has its own" in said.notes
    text = FILE.replace("stages:\n", "stages:\n  first: {optim: {steps: 1}, data: x.txt, method: full}\n").replace(
        "data: books.txt}", "data: books.txt, optim: {steps: 2}}"
    )
    text = text.replace("data: {train: chats.jsonl}", "data: {train: chats.jsonl}\n    optim: {steps: 4}")
    message = refused(written(tmp_path, text), "optim.steps=2")
    assert "every stage has its own optim.steps; write stages.dpo.optim.steps=2 for one of them, stages.all.optim.steps=2 for all" in message
    notes = load_stages(written(tmp_path, text)).notes
    assert [n for n in notes if "optim.steps beside stages says nothing" in n and "line 4" in n]
    everywhere = "method: {rank: 3}\nstages:\n  a: {method: full}\n  b: {method: full}\n"
    assert any(n.startswith("method beside stages says nothing") for n in load_stages(written(tmp_path, everywhere)).notes)
    assert "every stage has its own method;" in refused(written(tmp_path, everywhere), "method.rank=4")
    assert load_stages(written(tmp_path, FILE.replace(", rank: 4", ""))).notes == ()


def test_stages_written_out_read_back_equal(tmp_path):
    stages = load_stages(written(tmp_path), ["stages.sft.optim.lr=1e-3", "seed=2"])
    again = load_stages(written(tmp_path, stages.dump()))
    assert [s.asked for s in again.stages] == [s.asked for s in stages.stages] and again.folder == stages.folder
    unnamed = load_stages({"stages": {"a": {"data": "x"}}})
    assert unnamed.name.startswith("stages-") and load_stages(written(tmp_path, unnamed.dump())).name == unnamed.name


def test_a_plain_tree_is_left_as_it_was():
    tree = {"model": "m", "stages": {"a": {"method": "full"}, "b": {"model": "stage:a"}}}
    before = copy.deepcopy(tree)
    assert load_stages(tree, ["stages.a.seed=3"]).stages[0].asked.seed == 3
    assert tree == before


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "model: stage:reading\n    method: {rank: 16}\n",
            "model: stage:reding\n    method: {rank: 16}\n",
            "line 9: stages.sft.model.id: there is no stage 'reding'; did you mean stage:reading?",
        ),
        (
            "model: stage:reading\n    method: {rank: 16}\n",
            "model: stage:dpo\n    method: {rank: 16}\n",
            "line 9: stages.sft.model.id: stage dpo comes after sft",
        ),
        ("from: stage:sft", "from: stage:dpo", "line 14: stages.dpo.method.from: a stage cannot begin from itself"),
        ("objective: text", "model: stage:x, objective: text", "line 7: stages.reading.model.id: there is no stage 'x'; reading is the first"),
        ("from: stage:sft", "from: sft", "stages.dpo.method.from: there is no folder 'sft', but a stage of that name; write stage:sft"),
        ("{rank: 16}\n", "{rnk: 16}\n", "line 10: stages.sft.method.rnk: method lora has no such key; did you mean method.rank?"),
        ("beta: 0.2", "beta: x", "line 15: stages.dpo.objective.beta: found 'x', accepted is a number"),
        ("dropout: 0.1", "droput: 0.1", "line 5: method.droput: method lora has no such key; did you mean method.dropout?"),
        ("  sft:\n", "  all:\n", "line 8: stages.all: a stage cannot be called all"),
        ("  sft:\n", "  s.f:\n", "a stage's name is letters, digits"),
        ("reading: {objective: text, method: full, data: books.txt}", "reading: text", "stages.reading: found 'text'; a stage is a mapping of settings"),
        ("reading: {objective", "reading: {name: x, objective", "line 7: stages.reading.name: a stage's folder is named by its place and its name"),
        ("reading: {objective", "reading: {objectve", "line 7: stages.reading.objectve: unknown key; did you mean objective?"),
    ],
)
def test_each_mistake_in_a_file_is_told_with_its_line_and_its_stage(tmp_path, old, new, sentence):
    assert old in FILE
    assert sentence in refused(written(tmp_path, FILE.replace(old, new)))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("stages.stf.seed=1", "stages.stf.seed=1: there is no stage 'stf'; did you mean sft?"),
        ("stages.sft=x", "one setting of a stage at a time"),
        ("stages.sft.optim.lrr=1", "stages.sft.optim.lrr=1: unknown key; did you mean optim.lr?"),
        ("stages.sft.optim.lr=x", "stages.sft.optim.lr=x: found 'x', accepted is a number"),
        ("stages.sft.out=x", "out stands beside stages"),
        ("stages.all.method.rank=3", "method full has no such key"),
    ],
)
def test_each_mistake_on_the_command_line_has_its_sentence(tmp_path, setting, sentence):
    assert sentence in refused(written(tmp_path), setting)


def test_a_file_without_a_stage_is_told_what_one_is(tmp_path):
    for text in ("stages:\n", "stages: {}\n", "stages: [a]\n", "model: m\n"):
        assert "found no stage; write one below the other" in refused(written(tmp_path, text))


def test_a_slip_in_the_word_itself_is_put_right(tmp_path):
    for word in ("stage", "Stages", "satges"):
        with pytest.raises(ConfigError, match=f"line 6: {word}: unknown key; did you mean stages"):
            load_run(written(tmp_path, FILE.replace("stages:", f"{word}:")))


def test_where_one_run_is_wanted_a_file_of_several_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"line 6: stages: these settings are several runs, the stages reading, sft, dpo, and one run .* --stage NAME one"):
        load_run(written(tmp_path))
