"""A saved head is asked about two fixed texts when it is opened: the same answers, or a refusal that says what may be wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import small
import tiny
from luthier import remembered
from luthier.core import LuthierError
from luthier.opening import load
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.settings.config import load_run

SETTINGS = ["optim.steps=4", "optim.batch_examples=8", "optim.lr=1e-2", "precision=float32", "place.on=cpu", "name=r", "evaluate.samples=0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny Llama, pairs, and texts with labels."""
    folder = tmp_path_factory.mktemp("remembered")
    tiny.folder(folder / "base")
    words = small.TEXT.split()
    pairs = [{"prompt": words[i], "chosen": " ".join(words[i : i + 6]), "rejected": words[i + 1]} for i in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs))
    (folder / "labels.jsonl").write_text("".join(json.dumps({"text": words[i], "label": "ab"[i % 2]}) + "\n" for i in range(24)))
    return folder


@pytest.mark.parametrize(("objective", "method"), [("reward", "lora"), ("reward", "full"), ("classify", "lora")])
def test_a_head_answers_as_it_did_and_is_refused_where_it_does_not(home, tmp_path, objective, method):
    data = home / ("pairs.jsonl" if objective == "reward" else "labels.jsonl")
    run = load_run(
        None,
        [f"model={home / 'base'}", f"data.train={data}", f"objective={objective}", f"method={method}", f"out={tmp_path}", "model.template=plain", *SETTINGS],
    )
    made = execute(run, reporter=Reporter(quiet=True)).artefact
    kept = json.loads((made / "luthier.json").read_text())[remembered.KEY]
    again = remembered.told(load(made, precision="float32"), "plain")
    assert again == kept and kept["template"] == "plain" and len(kept["says"]) == (2 if objective == "reward" else 4)
    assert load(made, precision="bfloat16").heads  # another precision moves the scores a little, which is allowed

    wrong = tmp_path / "wrong"
    shutil.copytree(made, wrong)
    file = next(f for f in (wrong / "heads.safetensors", wrong / "adapter_model.safetensors") if f.is_file())
    tensors = load_file(file)
    torch.manual_seed(1)
    heads = [k for k in tensors if "score" in k or "label" in k]
    assert heads, sorted(tensors)
    save_file({k: v + 3 * torch.randn_like(v) if k in heads else v for k, v in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(LuthierError, match="does not answer as it did when it was saved"):
        load(wrong, precision="float32")


def test_a_folder_that_remembers_nothing_is_opened_as_before(home, tmp_path):
    run = load_run(None, [f"model={home / 'base'}", f"data.train={home / 'pairs.jsonl'}", "objective=reward", f"out={tmp_path}", *SETTINGS])
    made = execute(run, reporter=Reporter(quiet=True)).artefact
    ours = json.loads((made / "luthier.json").read_text())
    del ours[remembered.KEY]
    (made / "luthier.json").write_text(json.dumps(ours))
    assert load(made, precision="float32").heads
