"""Settings: what is read, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.errors import ConfigError, LuthierError
from luthier.settings import config, runfile
from luthier.settings.config import Range, load_run
from luthier.settings.names import _OURS_THEIRS, FOREIGN
from luthier.settings.plugins import AXES, first_line, folder, hints, kinds, plugin, sentences, unwrap
from luthier.settings.run import Data, Log, Model, Optim, Run


def refused(*settings: str, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as e:
        load_run(file, settings)
    assert "\n" not in str(e.value)
    return str(e.value)


def written(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text)
    return file


# --- what is read ---------------------------------------------------------------------------------------------------


def test_nothing_given_is_the_default_run_with_its_plug_ins_made():
    run = load_run(None)
    assert (run.model.id, run.method.rank, run.precision, run.optim.lr) == ("fiddle", 8, "auto", None)
    assert [config.kind_of(p) for p in (run.method, run.objective, run.place)] == ["lora", "sft", "one"]


def test_a_file_is_read_and_settings_win_over_it(tmp_path):
    file = written(tmp_path, "model: m\ndata: {train: a.jsonl}\nmethod: {kind: lora, rank: 4, alpha: 8}\noptim: {lr: 1e-4}\n")
    run = load_run(file, ["method.rank=16", "optim.steps=3"])
    assert run.model == Model(id="m") and run.data == Data(train=("a.jsonl",)) and run.optim == Optim(lr=1e-4, steps=3)
    assert (run.method.rank, run.method.alpha) == (16, 8.0)


def test_a_run_written_in_python_is_the_same_object_as_one_read_from_yaml(tmp_path):
    file = written(tmp_path, "model: m\nmethod: {kind: lora, rank: 4}\nlog: wandb\n")
    assert load_run(file) == Run(model=Model(id="m"), method={"kind": "lora", "rank": 4}, log=Log(to=("wandb",)))
    assert load_run(file) == Run(model="m", method=plugin("methods", "lora")(rank=4), log="wandb")


def test_a_run_written_in_python_is_checked_like_a_file():
    with pytest.raises(ConfigError, match=r"optim\.lr: found 5, accepted is a number, above 0 and at most 1"):
        Run(optim=Optim(lr=5))
    with pytest.raises(ConfigError, match="method: no method is called 'lorra'; did you mean lora"):
        Run(method="lorra")


@pytest.mark.parametrize("method", kinds("methods"))
@pytest.mark.parametrize("objective", kinds("objectives"))
def test_a_resolved_run_reads_back_equal(tmp_path, method, objective):
    run = load_run(None, [f"method={method}", f"objective={objective}", "precision=float32", "data.train=[a, b]", "name=1e5", "data.columns={prompt: no}"])
    assert load_run(written(tmp_path, config.dump(run))) == run
    assert load_run(config.plain(run)) == run
    assert load_run(json.loads(json.dumps(config.plain(run)))) == run
    assert config.digest(load_run(config.plain(run))) == config.digest(run)
    assert (run.name, run.data.columns) == ("1e5", {"prompt": "no"})


@pytest.mark.parametrize("text", ["no", "1e-5", "0x10", "1_000", "~", "2024-01-01", "a: b", "#x", " x ", "true", "é", "", "null", "[a", "*x"])
def test_any_text_survives_the_way_to_yaml_and_back(tmp_path, text):
    run = dataclasses.replace(load_run(None), name=text)
    assert load_run(written(tmp_path, config.dump(run))).name == text
    assert yaml.safe_load(config.dump(run))["name"] == text  # other readers of YAML agree


def test_the_digest_changes_with_any_setting_and_difference_names_it():
    a, b = load_run(None), load_run(None, ["optim.lr=1e-3", "method.rank=2", "data.train=x", "evaluate.best=no"])
    assert config.digest(a) != config.digest(b) and len(config.digest(a)) == 64
    assert config.difference(config.plain(a), config.plain(b)) == [
        "data.train: [] -> [x]",
        "method.rank: 8 -> 2",
        "optim.lr: null -> 0.001",
        "evaluate.best: true -> false",
    ]
    assert config.difference(config.plain(a), config.plain(a)) == []
    assert config.difference({"method": {"kind": "lora", "rank": 8}}, {"method": {"kind": "full"}}) == ["method: lora -> full"]
    assert config.difference({"a": 1}, {"b": 1}) == ["a: 1 -> not there", "b: not there -> 1"]


def test_one_word_stands_for_what_a_section_is_about():
    run = load_run(None, ["model=m", "data=a.jsonl", "method=full", "log=wandb"])
    assert (run.model.id, run.data.train, config.kind_of(run.method), run.log.to) == ("m", ("a.jsonl",), "full", ("wandb",))
    assert load_run(None, ["data=[a, b]"]).data.train == ("a", "b")


def test_shorthand_in_a_file_leaves_room_for_settings_below_it(tmp_path):
    file = written(tmp_path, "model: m\nmethod: lora\ndata: a.jsonl\noptim:\n  # lr: 1\n")
    run = load_run(file, ["model.offline=true", "method.rank=3", "data.limit=9"])
    assert (run.model, run.method.rank, run.data) == (Model(id="m", offline=True), 3, Data(train=("a.jsonl",), limit=9))


def test_a_new_kind_drops_the_old_kinds_keys_but_not_this_lines(tmp_path):
    file = written(tmp_path, "method: {kind: lora, rank: 4}\n")
    assert config.plain(load_run(file, ["method=full"]))["method"] == {"kind": "full"}
    assert load_run(file, ["method.kind=lora"]).method.rank == 4  # the same kind: nothing is dropped
    assert load_run(written(tmp_path, "method: full\n"), ["method.rank=5", "method=lora"]).method.rank == 5  # in any order
    assert load_run(file, ["method={kind: lora, alpha: 2}"]).method == plugin("methods", "lora")(alpha=2.0)


def test_lists_take_settings_by_index(tmp_path):
    assert load_run(None, ["data.train.0=x"]).data.train == ("x",)
    assert load_run(written(tmp_path, "data: a\n"), ["data.train.1=b"]).data.train == ("a", "b")
    file = written(tmp_path, "data: {train: [a, b]}\n")
    assert load_run(file, ["data.train.0=x", "data.train.2=c"]).data.train == ("x", "b", "c")
    for place in ("5", "last"):
        assert "data.train is a list of 2; its places are numbers from 0 to 2" in refused(f"data.train.{place}=x", file=file)


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("optim.lr=1e-5", "optim.lr", 1e-5),
        ("optim.lr=1E-5", "optim.lr", 1e-5),
        ("optim.lr=.5", "optim.lr", 0.5),
        ("optim.epochs=2", "optim.epochs", 2.0),
        ("optim.batch_tokens=1e4", "optim.batch_tokens", 10_000),
        ("optim.batch_tokens=8_192", "optim.batch_tokens", 8192),
        ("optim.steps=010", "optim.steps", 10),
        ("optim.steps=null", "optim.steps", None),
        ("optim.steps=", "optim.steps", None),
        ("evaluate.best=no", "evaluate.best", False),
        ("evaluate.best=True", "evaluate.best", True),
        ("data.pack=no", "data.pack", "no"),
        ("data.pack=true", "data.pack", "yes"),
        ("model.revision=0012345", "model.revision", "0012345"),
        ("name=1.10", "name", "1.10"),
        ("place.on=cpu", "place.on", "cpu"),  # `on` is true in YAML 1.1
        ("out=$HOME", "out", "$HOME"),  # nothing is expanded
        ("name=a=b", "name", "a=b"),
    ],
)
def test_values_are_read_as_their_fields_want_them(setting, path, value):
    found: Any = load_run(None, [setting])
    for key in path.split("."):
        found = getattr(found, key)
    assert found == value and type(found) is type(value)


def test_anchors_and_merged_mappings_work(tmp_path):
    run = load_run(written(tmp_path, "data: &d {train: a, limit: 3}\n"))
    assert run.data.limit == 3
    run = load_run(written(tmp_path, "evaluate: &e {every_steps: 7}\ncheckpoint:\n  <<: *e\n  keep: 1\n"))
    assert (run.checkpoint.every_steps, run.checkpoint.keep) == (7, 1)


# --- what is refused, in one sentence -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("method.rnk=3", "method.rnk=3: method lora has no such key; did you mean method.rank?"),
        ("methd.rank=3", "methd.rank=3: methd: unknown key; did you mean method?"),
        ("optim.foo=2", "optim.foo=2: unknown key; accepted: lr, epochs, steps, batch_tokens, "),
        ("lr=3", "lr=3: unknown key; did you mean optim.lr?"),
        ("dropout=.1", "dropout=.1: unknown key; did you mean model.dropout or method.dropout?"),
        ("lora_r=8", "lora_r=8: unknown key; did you mean method.rank?"),
        ("optim.learning_rate=1", "optim.learning_rate=1: unknown key; did you mean optim.lr?"),
        ("model.max-length=8", "model.max-length=8: unknown key; did you mean data.max_tokens?"),
        ("optim.weight-decay=0", "optim.weight-decay=0: unknown key; did you mean optim.weight_decay?"),
        ("optim.lr=5", "optim.lr=5: found 5, accepted is a number, above 0 and at most 1 (Peak learning rate"),
        ("optim.lr=0", "optim.lr=0: found 0, accepted is a number, above 0 and at most 1"),
        ("optim.lr=.nan", "optim.lr=.nan: found nan, accepted is a number"),
        ("optim.epochs=.inf", "found inf, accepted is a number, above 0"),
        ("method.alpha=.inf", "method.alpha=.inf: found inf, accepted is a number"),
        ("optim.lr=fast", "optim.lr=fast: found 'fast', accepted is a number"),
        ("optim.steps=1.5", "optim.steps=1.5: found 1.5, accepted is a whole number, at least 1"),
        ("seed=true", "seed=true: found true, accepted is a whole number, at least 0"),
        ("seed=-1", "found -1, accepted is a whole number, at least 0"),
        ("evaluate.best=1", "evaluate.best=1: found 1, accepted is true or false"),
        ("model.id=[a]", "model.id=[a]: found the list ['a'], accepted is text"),
        ("out=", "out=: found nothing, accepted is text"),
        ("optim.schedule=cosin", "found 'cosin', accepted are cosine, linear, constant; did you mean cosine?"),
        ("data.pack=maybe", "found 'maybe', accepted are auto, yes, no"),
        ("log.to=wandbb", "found 'wandbb', accepted are tensorboard, wandb, trackio; did you mean wandb?"),
        ("data.train={a: b}", "found a mapping, accepted is a list"),
        ("data.columns=3", "found 3, accepted is a mapping of key: value"),
        ("optim=3", "optim=3: found 3, accepted are the keys lr, epochs"),
        ("method=lorra", "method=lorra: method.kind: no method is called 'lorra'; did you mean lora?"),
        ("objective=[a]", "found the list ['a'], accepted are "),
        ("precision=auto2", "no precision is called 'auto2'"),
        ("precision.x=1", "precision.x=1: auto takes no settings; name a kind: "),
        ("method=auto", "no method is called 'auto'"),
        ("method.rank=0", "method.rank=0: must be at least 1, found 0"),
        ("method.rank=many", "method.rank=many: found 'many', accepted is a whole number"),
        ("noequals", "'noequals': not a setting; write key=value"),
        ("=3", "not a setting; write key=value"),
        ("a..b=3", "not a setting; write key=value"),
        ("name=[a", "name=[a: not valid YAML"),
        ("optim.lr.x=1", "optim.lr.x=1: optim.lr: found a mapping, accepted is a number"),
    ],
)
def test_each_mistake_on_the_command_line_has_its_sentence(setting, sentence):
    message = refused(setting)
    assert message.startswith(sentence) or sentence in message
    assert message.startswith(setting) or "not a setting" in message


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: 1\nseed: 2\n", "run.yaml, line 2: seed: given twice (first in line 1); keep one"),
        ("optim:\n  lr: 1e-4\n  lr: 1e-3\n", "run.yaml, line 3: optim.lr: given twice (first in line 2); keep one"),
        ("optim:\n  lr: 1e-4\n  warmup: 100\n", "run.yaml, line 3: optim.warmup: found 100, accepted is a number, 0 to 1 (Warm-up, as a share of all steps)"),
        ("seed: 1\nlora_r: 8\n", "run.yaml, line 2: lora_r: unknown key; did you mean method.rank?"),
        ("method:\n  kind: lora\n  rnk: 8\n", "run.yaml, line 3: method.rnk: method lora has no such key; did you mean method.rank?"),
        ("method:\n  kind: lorra\n", "run.yaml, line 2: method.kind: no method is called 'lorra'; did you mean lora?"),
        ("method:\n  kind: lora\n  rank: 0\n", "run.yaml, line 3: method.rank: must be at least 1, found 0"),
        ("data:\n  train:\n    - a\n    - [b]\n", "run.yaml, line 4: data.train.1: found the list ['b'], accepted is text"),
        ("method.rank: 8\n", "run.yaml, line 1: method.rank: unknown key; in a file, nest it: `method: {rank: ...}`"),
        ("optim: {lr:1}\n", "run.yaml, line 1: optim.lr:1: unknown key; write `lr: 1`, with a space after the colon"),
        ("- a\n", "run.yaml: a run file is `key: value` lines, found a list"),
        ("hello\n", "run.yaml: a run file is `key: value` lines, found a single value"),
        ("optim:\n\tlr: 1\n", "run.yaml, line 2: not valid YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs"),
        ("a: [1\n", "run.yaml, line 2: not valid YAML"),
        ("seed: !!python/name:os.system x\n", "run.yaml, line 1: the tag "),
        ("? [a]\n: 1\n", "run.yaml, line 1: a key must be a single word"),
        ("data: &d\n  x: *d\n", "an alias that contains itself"),
    ],
)
def test_each_mistake_in_a_file_has_its_sentence_with_the_line(tmp_path, text, sentence):
    assert sentence in refused(file=written(tmp_path, text))


def test_a_run_file_that_is_none_is_refused_in_a_sentence(tmp_path):
    assert refused(file=tmp_path / "no.yaml").endswith("no.yaml: no such run file")
    assert "a folder; a run file is YAML" in refused(file=tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not a text file in UTF-8" in refused(file=binary)


def test_every_foreign_name_points_at_a_key_that_exists():
    assert len(FOREIGN) == sum(len(names.split()) for names in _OURS_THEIRS.values()) >= 120, "a name stands twice"
    accepted = set(hints(Run))
    for section, hint in hints(Run).items():
        inner, plug, _ = unwrap(hint)
        for cls in (plugin(plug.package, k) for k in kinds(plug.package)) if plug else (inner,):
            accepted |= {f"{section}.{name}" for name in (hints(cls) if dataclasses.is_dataclass(cls) else ())}
    assert set(_OURS_THEIRS) <= accepted
    for theirs, ours in FOREIGN.items():
        assert f"did you mean {ours}" in refused(f"{theirs}=1"), theirs


def test_read_says_where_and_runs_no_files_of_the_user(tmp_path):
    lora = plugin("methods", "lora")
    assert config.read(lora, {"rank": 3, "targets": ["key"]}, "luthier.json: method") == lora(rank=3, targets=("key",))
    with pytest.raises(ConfigError, match=r"^luthier\.json: method\.rank: found 'x', accepted is a whole number"):
        config.read(lora, {"rank": "x"}, "luthier.json: method")
    with pytest.raises(ConfigError, match="a Python file is only run where your own run file or command line names it"):
        config.read(Run, {"method": {"kind": str(tmp_path / "mine.py")}}, "x")


def test_a_field_without_default_must_be_given():
    with pytest.raises(ConfigError, match=r"needs\.size: must be given\. How big\."):
        config.read(Needs, {}, "needs")
    assert config.read(Needs, {"size": 2}, "needs") == Needs(size=2)


@dataclass(frozen=True, kw_only=True)
class Needs:
    size: int
    """How big."""


# --- plug-ins -------------------------------------------------------------------------------------------------------

MINE = '''"""Mine."""
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar, Literal
from ..core import Base, Delta

@dataclass(frozen=True, kw_only=True)
class Method:
    edits: ClassVar[Literal["outputs"]] = "outputs"
    size: int = 1
    """How big."""
'''


def test_a_method_of_the_users_own_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    run = load_run(None, ["method.kind=./mine.py", "method.size=4"])
    assert run.method.size == 4 and config.plain(run)["method"] == {"kind": str(tmp_path / "mine.py"), "size": 4}
    monkeypatch.chdir("/")
    assert load_run(config.plain(run)) == run  # a resolved run does not depend on the folder
    assert "mine" not in kinds("methods")


def test_a_file_of_the_users_own_that_is_no_method_is_refused(tmp_path):
    for text, sentence in [
        ("x = 1\n", "must define a class called Method"),
        ("class Method: pass\n", "its class Method must be a dataclass"),
        ("import nosuchthing\n", "does not import: ModuleNotFoundError"),
        ("def :\n", "does not import: SyntaxError"),
    ]:
        (tmp_path / "mine.py").write_text(text)
        (tmp_path / "mine.py").touch()
        assert sentence in refused(f"method={tmp_path / 'mine.py'}")
        (tmp_path / "mine.py").unlink()
    assert "there is no file" in refused("method=./nowhere.py")


def test_the_kinds_are_the_files():
    assert len(AXES) == 5
    for axis in AXES:
        files = sorted(p.stem for p in folder(axis).glob("*.py") if not p.stem.startswith("_"))
        assert kinds(axis) == files and files
        for kind in files:
            assert config.kind_of(plugin(axis, kind)()) == kind
            assert first_line(folder(axis) / f"{kind}.py").strip(), f"{axis}/{kind}.py has no docstring"


def test_every_setting_has_its_sentence():
    sections = [unwrap(h)[0] for h in hints(Run).values()]
    classes = [Run, *(c for c in sections if dataclasses.is_dataclass(c)), *(plugin(a, k) for a in AXES if a != "tasks" for k in kinds(a))]
    assert len(classes) >= 13
    for cls in classes:
        missing = [f.name for f in dataclasses.fields(cls) if not sentences(cls).get(f.name, "").strip().endswith((".", ")"))]
        assert not missing, f"{cls.__module__}.{cls.__name__}: {missing} have no sentence below them"


def test_ranges_say_themselves():
    assert [str(r) for r in (Range(0, 1), Range(1), Range(0, low_open=True), Range(0, 1, True), Range(None, 3))] == [
        "0 to 1",
        "at least 1",
        "above 0",
        "above 0 and at most 1",
        "at most 3",
    ]
    assert Range(0, 1).holds(0) and not Range(0, 1, True).holds(0) and not Range().holds(float("nan")) and Range().holds(-1e9)


def test_all_errors_of_settings_are_luthier_errors():
    assert issubclass(ConfigError, LuthierError) and issubclass(LuthierError, ValueError)
    from luthier import core

    assert core.LuthierError is LuthierError


# --- the schema -----------------------------------------------------------------------------------------------------


def valid(value: Any, s: dict[str, Any], whole: dict[str, Any] | None = None) -> bool:
    """The part of JSON schema that ours uses."""
    whole = whole or s
    if "$ref" in s:
        found = whole
        for part in s["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return valid(value, found, whole)
    if "not" in s and valid(value, {"type": "object"} | s["not"], whole):
        return False
    if "anyOf" in s:
        return any(valid(value, {**o}, whole) for o in s["anyOf"])
    if "const" in s:
        return value == s["const"]
    if "enum" in s:
        return any(value == e and type(value) is type(e) for e in s["enum"])
    kind = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}[s["type"]]
    if not isinstance(value, kind) or (isinstance(value, bool) and s["type"] != "boolean"):
        return False
    if s["type"] == "object":
        known, more = s.get("properties", {}), s.get("additionalProperties", True)
        named = all(re.search(s.get("propertyNames", {}).get("pattern", ""), k) for k in value)
        return (
            named
            and all(k in value for k in s.get("required", []))
            and len(value) >= s.get("minProperties", 0)
            and all(valid(v, known[k], whole) if k in known else more if isinstance(more, bool) else valid(v, more, whole) for k, v in value.items())
        )
    if s["type"] == "array":
        return all(valid(v, s["items"], whole) for v in value)
    if s["type"] in ("integer", "number"):
        return s.get("minimum", value) <= value <= s.get("maximum", value) and value > s.get("exclusiveMinimum", value - 1)
    return bool(re.search(s.get("pattern", ""), value)) if s["type"] == "string" else True


def test_the_schema_accepts_good_runs_and_refuses_bad_ones():
    s = json.loads(json.dumps(config.schema()))
    assert valid(config.plain(load_run(None, ["data.train=a", "precision=float32"])), s)
    assert valid({"model": "m", "method": "lora", "data": ["a"], "precision": "auto", "log": "wandb"}, s)
    assert valid({"data": {"train": "a", "pack": False}, "method": {"kind": "./mine.py", "size": 1}, "place": "one"}, s)
    assert valid({"method": {"rank": 4}, "objective": {"kind": "sft"}}, s)
    for bad in [{"lora_r": 8}, {"method": {"kind": "lora", "rnk": 1}}, {"method": {"kind": "full", "rank": 1}}, {"optim": {"lr": 5}}, {"optim": {"lr": 0}}]:
        assert not valid(bad, s), bad
    for bad in [{"seed": True}, {"seed": 1.5}, {"optim": {"schedule": "cosin"}}, {"method": "lorra"}, {"precision": {"kind": "auto", "x": 1}}]:
        assert not valid(bad, s), bad


def test_the_schema_knows_stages():
    s = json.loads(json.dumps(config.schema()))
    good = {
        "reading": {"objective": "text", "method": "full", "data": "a"},
        "sft": {"model": "stage:reading", "method": {"kind": "lora", "rank": 4}},
        "same": None,
    }
    assert valid({"seed": 1, "stages": good}, s)
    assert valid({"method": "adapter", "stages": {"a": {"method": {"bottleneck": 8}}}}, s)  # without its kind it takes the shared one
    for bad in [{"all": {}}, {"a.b": {}}, {"a": "text"}, {"a": {"name": "x"}}, {"a": {"lora_r": 1}}, {"a": {"optim": {"lr": 5}}}, {}]:
        assert not valid({"stages": bad}, s), bad
    for bad in [{"a": {"method": {"kind": "lora", "rnk": 1}}}, {"a": {"method": "lorra"}}, {"a": {"seed": 1.5}}]:
        assert not valid({"stages": bad}, s), bad


def test_the_schema_holds_the_sentence_of_every_field():
    s = config.schema()
    assert set(s["properties"]) == set(hints(Run)) | {"stages"}
    lr = s["properties"]["optim"]["properties"]["lr"]
    assert lr["description"].startswith("Peak learning rate") and lr["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    kinds_there = [o["properties"]["kind"].get("const") for o in s["properties"]["method"]["anyOf"] if "properties" in o]
    assert set(kinds("methods")) <= set(kinds_there)


def test_marks_of_places_move_with_the_values():
    tree = runfile.parse("a:\n  b: [1,\n   2]\n", "f")
    assert tree.values == {"a": {"b": [1, 2]}}
    assert [m.origin for m in (tree.mark(("a", "b", 1)), tree.mark(("a", "c")), tree.mark(("z",))) if m] == ["f, line 3", "f, line 1", "f, line 1"]
