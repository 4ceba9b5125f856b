"""luthier plan: what is printed, what it needs, what it advises, and what it refuses."""

import json
import re
import time

import pytest

from luthier.amounts import size
from luthier.cli import main
from luthier.cli.plan import verdict
from luthier.planning.fitting import Planner, changes, together
from luthier.settings.run import Run

pytestmark = pytest.mark.usefixtures("quick_clock")

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LLAMA_70B = SHAPE | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder that holds config.json and nothing else."""
    folder = tmp_path_factory.mktemp("plan") / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Such a folder, for what does not depend on sizes."""
    folder = tmp_path_factory.mktemp("plan") / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE | {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 704}))
    return folder


def said(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_configuration_is_enough_and_the_table_adds_up(base, capsys):
    code, out, err = said(capsys, "plan", "--model", base, "method.targets=[all]", "method.rank=16", "precision=bfloat16", "optim.micro_tokens=4096")
    assert code == 0, err
    trained = 24 * 16 * (2 * (1024 + 1024) + 2 * (1024 + 256) + 3 * (1024 + 2816))
    assert f"{trained:,} trained parameters" in out and "4,096 tokens, 2 examples of 2,048, packed" in out
    unit = {"GB": 1e9, "MB": 1e6}
    rows = {name: float(n.replace(",", "")) * unit[u] for name, n, u in re.findall(r"^  (\S.*?)  +([\d.,]+) (GB|MB)$", out, re.M)}
    peak = rows.pop("peak")
    assert len(rows) >= 6 and "frozen weights in bfloat16" in rows and sum(rows.values()) == pytest.approx(peak, rel=0.02)
    assert "this machine" in out and all(re.search(rf"^  {n}GB +(fits|does not fit)", out, re.M) for n in (12, 24, 48, 80))


def test_it_takes_what_train_takes(small, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"model: {small}\ndata: {{train: nowhere.jsonl, max_tokens: 512}}\nmethod: adapter\nprecision: float32\nname: run\n")
    code, out, _ = said(capsys, "plan", tmp_path / "run.yaml", "recompute=blocks")
    assert code == 0 and "method adapter" in out and "precision float32" in out and "16 examples of 512" in out and "recompute blocks" in out
    code, out, _ = said(capsys, "plan", "some.jsonl", "--model", small, "--objective", "dpo", "--method", "prefix", "precision=bfloat16")
    assert code == 0 and "objective dpo" in out and "of twice" in out
    assert main(["train", "some.jsonl", "--model", str(small), "--method", "adapter", "--dry-run"]) == 0  # the two count alike
    dry = re.search(r"([\d,]+) trained parameters", capsys.readouterr().out)[1]
    assert f"{dry} trained parameters" in said(capsys, "plan", "--model", small, "--method", "adapter")[1]


def test_what_does_not_fit_is_told_what_helps_and_by_how_much(base, capsys):
    ask = ("plan", "--model", base, "method.targets=[all]", "precision=bfloat16", "place.on=cpu", "--on", "2.5GB,6GB,0.5GB")
    code, out, _ = said(capsys, *ask)
    assert code == 0
    alone, fits, hopeless = (out.split(f"to fit {room}")[1].split("to fit")[0] for room in ("6GB", "2.5GB", "0.5GB"))
    for text in (alone, fits):
        assert re.search(r"optim\.micro_tokens=4096 +saves +[\d.]+ GB", text) and re.search(r"recompute=blocks +saves +[\d.]+ GB", text)
    assert "together they fit" in alone and "together they fit" in fits
    assert "too much" in hopeless and "use a smaller base" in hopeless
    settings = re.search(r"together they fit, in [\d.]+ GB: (.+)", fits)[1].split()
    code, out, _ = said(capsys, *ask, *settings)  # as advised
    assert code == 0 and re.search(r"^  2.5GB +fits", out, re.M) and "to fit 2.5GB" not in out


def test_each_saving_is_a_prediction_and_the_order_is_from_cheap_to_dear(base):
    run = Run(model={"id": str(base)}, method="full", objective="text", precision="bfloat16")
    planner = Planner()
    p = planner.predict(run, "cuda")
    found = {c.setting.partition("=")[0]: planner.predict(c.run, "cuda").total for c in changes(run, p)}
    assert list(found) == ["optim.micro_tokens", "recompute", "optim.state", "data.max_tokens", "method"]  # no nf4: what trains is not packed
    assert all(total < p.total for name, total in found.items() if name != "data.max_tokens")
    assert p.total - found["optim.state"] == pytest.approx(6 * p.trained, rel=0.01)
    _, settings, total = together(run, lambda r: planner.predict(r, "cuda"), int(found["recompute"]) - 1)
    assert total < found["recompute"] and settings[0] == "optim.micro_tokens=2048" and settings[1] == "recompute=blocks"


def test_a_verdict_says_what_is_left_and_what_decoded_weights_would_take(base):
    run = Run(model={"id": str(base)}, objective="text", precision="nf4", optim={"micro_tokens": 2048})
    p = Planner().predict(run, "cuda")
    assert verdict(p, p.total - 10**9) == "does not fit, 1.00 GB short"
    floats = Planner().predict(Run(model={"id": str(base)}, objective="text", precision="bfloat16", optim={"micro_tokens": 2048}), "cuda")
    assert verdict(floats, round(floats.total * 1.01)).startswith("fits, but with only")
    work = p.moments["training"].bytes
    assert p.decodable < work  # so there is a size that a third of the free memory holds, and the whole run does not
    tight = p.total + p.decodable // 2
    assert "precision.resident=no" in verdict(p, tight) and size(p.decodable) in verdict(p, tight)
    assert f"beside {size(p.decodable)}" in verdict(p, 20 * 10**9)


def test_a_70b_shape_with_all_its_advice_takes_seconds(small, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    said(capsys, "plan", "--model", small, "--on", "1MB")  # imports
    began = time.process_time()
    code, out, _ = said(capsys, "plan", "--model", tmp_path, "method.targets=[all]", "precision=bfloat16", "--on", "48GB")
    assert code == 0 and "70,553,706,496" in out and "precision=nf4" in out
    assert time.process_time() - began < 15  # three on a machine that does nothing else


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--on", "big"], "'big' is no size of memory"),
        (["--on", "0GB"], "'0GB' is no size of memory"),
        (["optim.micro_tokens=none"], "optim.micro_tokens"),
        (["--method", "loar"], "did you mean lora"),
        (["--model", "nowhere"], "there is no folder 'nowhere'"),
        (["precision=nf4", "--method", "full"], "packs them into codes"),
        (["no.yaml"], "no such run file"),
        (["--micro_tokens", "5"], "optim.micro_tokens=VALUE"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments, sentence, capsys):
    code, _, err = said(capsys, "plan", *arguments)
    assert code == 2 and sentence in err and "Traceback" not in err


def test_a_ceiling_is_planned_as_a_run_would_keep_it(base, capsys):
    asked = ["plan", "--model", base, "precision=bfloat16", "optim.micro_tokens=4096", "data.max_tokens=512", "evaluate.samples=0"]
    _, free, _ = said(capsys, *asked)
    code, _, err = said(capsys, *asked, "place.memory=100MB")
    assert code == 2 and "place.memory: 100 MB were asked for" in err
    least = float(re.search(r"the run needs ([\d.]+) GB", err)[1])  # this process is counted too, and it grows from test to test
    ceiling = f"{least + 0.1:.2f}"
    code, out, err = said(capsys, *asked, f"place.memory={ceiling}GB")
    assert code == 0, err
    assert f"place.memory is {ceiling} GB" in out and "was set" in out and "optim.micro_tokens=" in out and "place.memory is" not in free


def test_many_ranks_are_planned_by_choice_of_sharding(base, capsys):
    how = ("plan", "--model", base, "precision=bfloat16", "recompute=blocks", "optim.batch_tokens=131072", "--ranks", 16, "--nodes", 2)
    code, out, err = said(capsys, *how, "--gpu", "a100,network=10", "--on", "40GB")
    assert code == 0, err
    assert "16 ranks on 2 machines of 8, a a100 each" not in out and "16 ranks on 2 machines of 8, each an a100: 80 GB" in out and "10 GB/s of network" in out
    rows = re.findall(r"^[* ] (none|hybrid|full) +([\d.]+ GB|\d+ MB)", out, re.M)
    assert [r[0] for r in rows] == ["none", "hybrid", "full"] and re.search(r"^\* none .*fits 40GB$", out, re.M)
    assert "place.shard=none, which auto chooses" in out and "on paper" in out
    code, out, err = said(capsys, *how, "place.shard=full", "method=full")
    assert code == 0 and re.search(r"^\* full", out, re.M) and "gradients of weights" in out and "which auto chooses" not in out


def test_what_is_wrong_with_a_plan_for_many_is_said_in_a_sentence(base, capsys):
    for more, expected in (
        (("--ranks", 6, "--nodes", 4), "--ranks 6 --nodes 4: every machine has as many ranks"),
        (("--ranks", 8, "--gpu", "h10"), "Did you mean h100?"),
        (("--ranks", 8, "place.context=3"), "place.context: 3 ranks are to share each sequence, and there are 8"),
        (("--ranks", 8, "place.context=2", "method=prompt"), "place.context: method prompt lengthens the stream"),
        (("--ranks", 8, "place.shard=hybrid"), "place.shard: hybrid is not there on 8 ranks of one machine; accepted are auto, none, full"),
    ):
        code, _out, err = said(capsys, "plan", "--model", base, "precision=bfloat16", *more)
        assert code == 2 and expected in err and len(err.strip().splitlines()) == 1, err
