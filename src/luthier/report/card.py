"""README.md beside what a run left: a model card with the front matter that the Hugging Face Hub reads, from the same facts as the report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import atomic
from ..settings.runfile import write as yaml
from . import verdict
from .facts import GENERAL, Facts, mapping, read
from .hashes import CARD

ADAPTERHUB = "adapter-transformers"  # as the Hub calls the `adapters` library
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PIPELINES = {"sft": "text-generation", "text": "text-generation", "dpo": "text-generation", "kto": "text-generation", "orpo": "text-generation",
             "ppo": "text-generation", "grpo": "text-generation", "classify": "text-classification", "reward": "text-classification"}  # fmt: skip


def write(folder: Path) -> Path | None:
    """Write the card of a finished run beside what it left; None where it left nothing. Raises LuthierError where the folder is no run."""
    facts = read(folder)
    if facts.artefact is None:
        return None
    path = facts.artefact / CARD
    atomic.text(path, markdown(facts))
    return path


def markdown(facts: Facts) -> str:
    """The card."""
    front = {k: v for k, v in _front(facts).items() if v}
    parts = ["---", yaml(front).strip(), "---", "", f"# {facts.name}", "", *_what(facts), "", "## How to load it", "", *_load(facts), "", "## Training", ""]
    parts += [*_training(facts), "", "## Results", "", *_results(facts), "", "## Limits", "", *_limits(facts)]
    return "\n".join(parts) + "\n"


def hub_id(name: str) -> bool:
    """Whether a name is a model's or a data set's on the Hub, and not a folder here."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists() and not name.startswith(".")


def _library(facts: Facts) -> str:
    """What opens it: PEFT, transformers, or this program alone."""
    assert facts.artefact is not None
    if facts.artefact.name == "model":
        return "transformers"
    there = {p.name for p in facts.artefact.iterdir()}
    if {"adapter_config.json", "adapter_model.safetensors"} <= there:
        return "peft"
    if not {"adapter_config.json", "adapter.safetensors"} <= there:
        return "luthier"
    config = json.loads((facts.artefact / "adapter_config.json").read_text(encoding="utf-8"))
    return "luthier" if mapping(config.get("config")).get("architecture") == "luthier" else ADAPTERHUB  # what its layout cannot say is marked


def _front(facts: Facts) -> dict[str, Any]:
    model, objective = facts.model, facts.kind("objective")
    pipeline = PIPELINES.get(objective, "")
    if mapping(facts.told.get("base")).get("kind") == "encoder_decoder" and pipeline == "text-generation":
        pipeline = "text2text-generation"
    return {
        "base_model": model if hub_id(model) else "",
        "library_name": _library(facts),
        "pipeline_tag": pipeline,
        "tags": ["luthier", *dict.fromkeys(Path(k).stem for k in (facts.kind("method"), objective))],
        "datasets": [d for d in _sources(facts) if hub_id(d)],
    }


def _sources(facts: Facts) -> list[str]:
    train = mapping(facts.settings.get("data")).get("train")
    return [str(t) for t in train] if isinstance(train, list) else [str(train)] if train else []


def _name(source: str) -> str:
    """A Hub id, or the name of a file without the folders it lies in, which are nobody else's business."""
    return source if hub_id(source) else Path(source).name


def _what(facts: Facts) -> Iterator[str]:
    base, method, objective = mapping(facts.told.get("base")), Path(facts.kind("method")).stem, Path(facts.kind("objective")).stem
    what = "A model" if facts.artefact is not None and facts.artefact.name == "model" else "An adapter"
    size = f" ({base['family']}, {base['parameters']:,} parameters)" if base else ""
    yield f"{what} made from {_name(facts.model)}{size} with the method `{method}` and the objective `{objective}` by luthier."
    if base:
        yield f"It fits this base only: fingerprint `{base['hash']}`" + (f", revision `{base['revision']}`." if base.get("revision") else ".")


def _load(facts: Facts) -> Iterator[str]:
    labels = facts.kind("objective") in ("classify", "reward")
    library, base = _library(facts), _name(facts.model)
    yield from (
        "```",
        f"luthier predict THIS_FOLDER texts.jsonl --model {base}" if labels else f'luthier generate THIS_FOLDER --model {base} --prompt "..."',
        "```",
    )
    if library == "peft" and not labels:
        auto = "AutoModelForSeq2SeqLM" if mapping(facts.told.get("base")).get("kind") == "encoder_decoder" else "AutoModelForCausalLM"
        yield from ("", "With PEFT, in Python:", "", "```python", "from peft import PeftModel", f"from transformers import {auto}, AutoTokenizer", "")
        yield f'model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "THIS_FOLDER")'
        yield from ('tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")', "```")
    if library == ADAPTERHUB:
        yield from ("", "With the `adapters` library, in Python, where `model` is its base:", "", "```python", "import adapters", "")
        yield from ("adapters.init(model)", 'model.load_adapter("THIS_FOLDER", set_active=True)', "```")
    if library == "transformers" and not labels:
        yield from ("", "transformers opens the folder as any model.")
    if library == "luthier":
        yield from ("", "No other program has a layout for this method, so only luthier opens it.")
    if not hub_id(facts.model) and facts.artefact is not None and facts.artefact.name == "adapter":
        yield from ("", f"`{base}` stands for the folder (or the embedded model) it was trained on: name yours.")


def _training(facts: Facts) -> Iterator[str]:
    data = facts.data
    names = ", ".join(_name(s) for s in _sources(facts)) or "see the run's settings"
    yield f"Data: {names}" + (f": {data['rows']:,} rows, {data['tokens']:,} tokens." if "rows" in data and "tokens" in data else ".")
    if data.get("truncated") or data.get("dropped_long") or data.get("bad_rows"):
        truncated, dropped, bad = (data.get(k, 0) for k in ("truncated", "dropped_long", "bad_rows"))
        yield f"Of the records {truncated:,} were truncated, {dropped:,} dropped for their length and {bad:,} bad."
    o = mapping(facts.settings.get("optim"))
    train = facts.events("train")
    if train:
        lr = f" with a peak learning rate of {o['lr']:g}" if isinstance(o.get("lr"), int | float) else ""
        where = f"seed {facts.settings.get('seed', 0)}, on {facts.environment.get('device', 'cpu')}"
        yield f"{facts.steps:,} steps{lr}, precision `{facts.kind('precision')}`, {where}."


def _results(facts: Facts) -> Iterator[str]:
    yield from verdict.sentences(facts)
    yield from (f"{which}. {said}" for which, said in verdict.alarms(facts))
    before, after = facts.measures()
    yield from ("", "| measure | before | after | n |", "|---|---:|---:|---:|")
    for name, b in after.items():
        n = "" if b.n is None else f"{b.n:,} {b.unit}".strip()
        yield f"| {name} | {before.get(name, '')} | {b} | {n} |"
    yield from ("", "Brackets are 95 % intervals by resampling rows; losses are in nats.")


def _limits(facts: Facts) -> Iterator[str]:
    before, after = facts.measures()
    held = mapping(facts.data.get("validation"))
    origin = "rows held out from the training files" if held.get("from") == "training rows" else "the validation files that the run named"
    yield f"- It was measured on {held.get('rows', 0):,} rows, {origin}; how it does on text of another kind is not known."
    if GENERAL in before and GENERAL in after:
        yield "- Forgetting was measured on a small suite of general text only; abilities that this does not show may have suffered."
    else:
        yield "- What it forgot was not measured."
    yield "- Whether its answers are true, safe or fair was not measured."
    if facts.kind("objective") in ("reward", "dpo", "kto", "orpo", "ppo", "grpo"):
        yield "- It learned what its judgements or rewards prefer, with whatever is wrong in them."
    yield "- The licences of the base and of the data apply; none is stated here."
