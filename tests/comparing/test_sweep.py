"""Which lists are swept and which are a setting's own value; rows and their names."""

from __future__ import annotations

import pytest

from luthier.comparing.sweep import METHODS, rows_of, takes_list
from luthier.errors import ConfigError

DATA = "data.train=[a.jsonl]"


def names(*settings, file=None):
    return [r.name for r in rows_of(file, [DATA, *settings]).rows]


def test_with_nothing_but_data_the_usual_methods_are_compared():
    asked = rows_of(None, [DATA])
    assert [r.name for r in asked.rows] == list(METHODS)
    assert asked.seeds == (0,) and asked.rates == () and not asked.chosen


def test_a_method_that_a_file_describes_is_one_of_them_with_its_settings():
    asked = rows_of({"data": "a.jsonl", "method": {"kind": "lora", "rank": 32}}, [])
    assert asked.rows[0].name == "lora" and asked.rows[0].run.method.rank == 32
    assert len(asked.rows) == len(METHODS)


def test_a_list_where_a_setting_takes_one_value_is_an_axis():
    asked = rows_of(None, [DATA, "methods=[lora,full]", "method.rank=[4,8]", "precision=[float32,bfloat16]"])
    assert [r.name for r in asked.rows] == [
        "lora, rank 4, float32", "lora, rank 4, bfloat16", "lora, rank 8, float32", "lora, rank 8, bfloat16", "full, float32", "full, bfloat16"
    ]  # fmt: skip
    assert [r.run.method.rank for r in asked.rows[:4]] == [4, 4, 8, 8]
    assert asked.notes == ["full has no rank: compared without"]


def test_a_list_where_a_setting_is_a_list_is_its_value_and_a_list_of_lists_an_axis():
    (one,) = rows_of(None, [DATA, "method=lora", "method.targets=[query,value]", "evaluate.tasks=[bleu,exact_match]"]).rows
    assert one.run.method.targets == ("query", "value") and one.run.evaluate.tasks == ("bleu", "exact_match")
    two = rows_of(None, [DATA, "method=lora", "method.targets=[[query,value],[all]]"]).rows
    assert [(r.name, r.run.method.targets) for r in two] == [("lora, targets query+value", ("query", "value")), ("lora, targets all", ("all",))]


@pytest.mark.parametrize(
    ("key", "own"),
    [
        ("method.rank", False), ("method.targets", True), ("evaluate.tasks", True), ("data.train", True), ("data", True), ("model", False), ("optim.lr", False),
        ("objective.labels", True), ("objective", False), ("data.languages", True), ("log", True), ("tokens", True), ("data.replay.source", True),
        ("data.replay.share", False), ("data.replay", True), ("data.train.0", False), ("seed", False), ("data.columns.prompt", False), ("no.such", False),
    ],
)  # fmt: skip
def test_the_type_of_the_field_decides(key, own):
    assert takes_list(key.split("."), {"method": "lora", "objective": "classify", "precision": "auto", "place": "one"}) is own


def test_seeds_are_repetitions_and_rates_are_searched():
    asked = rows_of(None, [DATA, "method=lora", "seed=[0,1,2]", "optim.lr=[1e-3,3e-3]"])
    assert [r.name for r in asked.rows] == ["lora"]
    assert asked.seeds == (0, 1, 2) and asked.rates == (1e-3, 3e-3)


def test_a_file_may_hold_lists_to_sweep_as_well():
    asked = rows_of({"data": "a.jsonl", "methods": ["lora", "full"], "seed": [3, 4], "optim": {"weight_decay": [0.0, 0.1], "steps": 5}}, [])
    assert [r.name for r in asked.rows] == ["lora, weight_decay 0.0", "lora, weight_decay 0.1", "full, weight_decay 0.0", "full, weight_decay 0.1"]
    assert asked.seeds == (3, 4) and {r.run.optim.steps for r in asked.rows} == {5}


def test_a_setting_on_the_command_line_wins_over_the_file():
    asked = rows_of({"data": "a.jsonl", "methods": ["lora", "full"], "seed": [3, 4]}, ["method=dora", "seed=1", "method.rank=2", "method.rank=[3,5]"])
    assert [r.name for r in asked.rows] == ["dora, rank 3", "dora, rank 5"]
    assert asked.seeds == (1,)


def test_methods_may_bring_their_settings():
    assert names("methods=[lora,{kind: lora, rank: 64},lora]") == ["lora", "lora, rank 64"]  # one twice is one


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["methods=[lora,lorra]"], "no method is called 'lorra'; did you mean lora"),
        (["method.rnk=[4,8]"], "did you mean method.rank"),
        (["method.rank=[]"], "method.rank=.*an axis of no values"),
        (["methods=[]"], "names none"),
        (["seed=[0,x]"], "seed=x: found 'x'"),
        (["method=lora", "method.rank=[4,x]"], "method.rank=x: found 'x'"),
        (["name=[a,b]"], "name: the comparison names its runs itself"),
        (["out=there"], "out: say --out FOLDER"),
        (["optm.lr=[1,2]"], "optm.*did you mean optim"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(settings, said):
    with pytest.raises(ConfigError, match=said):
        rows_of(None, [DATA, *settings])


def test_a_file_with_stages_is_refused(tmp_path):
    (tmp_path / "s.yaml").write_text("data: a.jsonl\nstages:\n  one: {method: lora}\n")
    with pytest.raises(ConfigError, match="several runs"):
        rows_of(tmp_path / "s.yaml", [])
