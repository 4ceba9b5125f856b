"""The model card: front matter that the Hub reads, numbers of the run, and no path of the machine it was made on."""

import json

import yaml

from luthier.report import card
from luthier.report.facts import read


def parts(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_card_lies_beside_the_adapter_with_the_runs_numbers(made):
    text = (made / "adapter" / "README.md").read_text()
    front, body = parts(text)
    assert front == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["luthier", "lora", "sft"]}
    r = json.loads((made / "result.json").read_text())
    for when in ("before", "after"):
        assert f"{r[when]['loss']['value']:.4f}" in body and f"{r[when]['general']['value']:.4f}" in body
    assert "PeftModel.from_pretrained" in body and "luthier generate" in body and "## Limits" in body
    assert str(made.parent.parent) not in text and "data.jsonl" in body  # names of files, no folders
    assert "license" not in front


def test_names_on_the_hub_are_front_matter_and_folders_are_not(run):
    facts = read(run)
    facts.settings["model"]["id"], facts.settings["data"]["train"] = "Qwen/Qwen3-0.6B", ["tatsu-lab/alpaca", str(run)]
    front, body = parts(card.markdown(facts))
    assert front["base_model"] == "Qwen/Qwen3-0.6B" and front["datasets"] == ["tatsu-lab/alpaca"]
    assert 'AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")' in body


def test_a_method_without_a_layout_of_the_field_is_said_to_open_here_only(run):
    (run / "adapter" / "adapter_model.safetensors").rename(run / "adapter" / "delta.safetensors")
    front, body = parts(card.markdown(read(run)))
    assert front["library_name"] == "luthier" and "only luthier opens it" in body and "PeftModel" not in body


def test_an_unfinished_run_has_no_card(run):
    (run / "result.json").unlink()
    (run / "adapter" / "README.md").unlink()
    assert card.write(run) is None and not (run / "adapter" / "README.md").exists()


def test_an_adapter_in_adapterhubs_layout_opens_there_unless_it_says_more_than_that_can(run):
    folder = run / "adapter"
    (folder / "adapter_model.safetensors").rename(folder / "adapter.safetensors")
    for inner, library in (({}, "adapter-transformers"), ({"architecture": "luthier"}, "luthier")):
        (folder / "adapter_config.json").write_text(json.dumps({"config": inner}))
        front, body = parts(card.markdown(read(run)))
        assert front["library_name"] == library and ("load_adapter" in body) == (library == "adapter-transformers")
