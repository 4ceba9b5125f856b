"""Files as the users of other programs write them, read with no mapping: what is asked and what is learned of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.conftest import CHATML, byte_bpe
from luthier.core import examples_of
from luthier.data.prepare import prepare

Q, A, B = "Which pub is near the river?", "The Vaults is near it.", "None is."
U, G = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
HUMAN, GPT, WORSE = {"from": "human", "value": Q}, {"from": "gpt", "value": A}, {"from": "gpt", "value": B}
TOOL = {"name": "find", "description": "Find a pub.", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "find", "arguments": {"near": "river"}}
OPEN_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "find", "arguments": json.dumps(CALL["arguments"])}}],
}

# name: (record, what the objective reads, texts that are learned or judged, texts that are only read)
SHAPES: dict[str, tuple[dict[str, Any], str, list[str], list[str]]] = {
    "alpaca": ({"instruction": "Answer.", "input": Q, "output": A}, "chat", [A], ["Answer.", Q]),
    "alpaca without input": ({"instruction": Q, "output": A}, "chat", [A], [Q]),
    "alpaca with system and history": (
        {"instruction": Q, "input": "", "output": A, "system": "Be brief.", "history": [["Hello", "Good day"]]},
        "chat", [A, "Good day"], ["Be brief.", "Hello", Q]),
    "dolly": ({"instruction": "Answer.", "context": Q, "response": A, "category": "open_qa"}, "chat", [A], ["Answer.", Q]),
    "openai messages": ({"messages": [{"role": "system", "content": "Be brief."}, U, G]}, "chat", [A], ["Be brief.", Q]),
    "messages in parts, with loss weights": (
        {"messages": [{**U, "content": [{"type": "text", "value": Q}], "loss_weight": 0.0},
                      {**G, "content": [{"type": "text", "text": A}], "loss_weight": 1.0}]},
        "chat", [A], [Q]),
    "openai tool calls": (
        {"messages": [U, OPEN_CALL, {"role": "tool", "tool_call_id": "c1", "content": "pub 7"}, G], "tools": [{"type": "function", "function": TOOL}]},
        "chat", [A, "find"], [Q, "pub 7"]),
    "sharegpt": ({"conversations": [HUMAN, GPT], "system": "Be brief."}, "chat", [A], ["Be brief.", Q]),
    "sharegpt tool calls": (
        {"conversations": [HUMAN, {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "pub 7"}, GPT],
         "tools": json.dumps([TOOL])},
        "chat", [A, "find"], [Q, "pub 7"]),
    "prompt and completion": ({"prompt": Q, "completion": A}, "chat", [A], [Q]),
    "prompt and completion as messages": ({"prompt": [U], "completion": [G]}, "chat", [A], [Q]),
    "raw text": ({"text": f"{Q} {A}"}, "text", [A], []),
    "conversation as text": ({"messages": [U, G]}, "text", [A, Q], []),
    "dpo": ({"prompt": Q, "chosen": A, "rejected": B}, "pairs", [A, B], [Q]),
    "dpo of messages": ({"prompt": [U], "chosen": [G], "rejected": [{**G, "content": B}]}, "pairs", [A, B], [Q]),
    "dpo with its prompt inside": ({"chosen": [U, G], "rejected": [U, {**G, "content": B}]}, "pairs", [A, B], [Q]),
    "dpo of llama-factory": ({"conversations": [HUMAN], "chosen": GPT, "rejected": WORSE}, "pairs", [A, B], [Q]),
    "dpo of alpaca": ({"instruction": "Answer.", "input": Q, "chosen": A, "rejected": B}, "pairs", [A, B], ["Answer.", Q]),
    "dpo of ms-swift": ({"messages": [U, G], "rejected_response": B}, "pairs", [A, B], [Q]),
    "dpo of ms-swift, whole conversations": ({"messages": [U, G], "rejected_messages": [U, {**G, "content": B}]}, "pairs", [A, B], [Q]),
    "dpo of orca": ({"system": "Be brief.", "question": Q, "chosen": A, "rejected": B}, "pairs", [A, B], ["Be brief.", Q]),
    "hh of one text": ({"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {B}"}, "pairs", [A, B], [Q]),
    "kto": ({"prompt": Q, "completion": A, "label": True}, "judged", [A], [Q]),
    "kto of messages": ({"prompt": [U], "completion": [G], "label": True}, "judged", [A], [Q]),
    "kto of llama-factory": ({"messages": [U, G], "label": True}, "judged", [A], [Q]),
    "kto of llama-factory, by kto_tag": ({"conversations": [HUMAN, GPT], "kto_tag": True}, "judged", [A], [Q]),
    "kto of alpaca": ({"instruction": "Answer.", "input": Q, "output": A, "kto_tag": True}, "judged", [A], ["Answer.", Q]),
    "classification": ({"text": Q, "label": "question"}, "label", [], [Q]),
    "prompts": ({"prompt": Q, "answer": "42"}, "prompts", [], [Q]),
    "prompts as messages": ({"prompt": [U]}, "prompts", [], [Q]),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_file_of_another_program_is_read_with_no_mapping(tmp_path: Path, name: str, suffix: str) -> None:
    record, renders, learned, read = SHAPES[name]
    other = json.loads(json.dumps(record).replace("river", "bridge").replace('"question"', '"other"' if renders == "label" else '"question"'))
    rows = [record, {**other, **({"label": False} if record.get("label") is True else {"kto_tag": False} if "kto_tag" in record else {})}]
    file = tmp_path / f"theirs{suffix}"
    file.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = byte_bpe(template=CHATML, eos="<|im_end|>")
    said: list[str] = []
    got = prepare([str(file)], tokenizer, renders=renders, max_tokens=2000, validation_share=0, over_length="truncate", say=said.append)  # type: ignore[arg-type]
    assert len(got.train) == 2 and got.facts["bad_rows"] == 0, said
    first = examples_of(got.train[0])[: 1 if renders == "judged" else 2]
    whole = " ".join(tokenizer.decode(e.ids) for e in first)
    marked = " ".join(tokenizer.decode(e.ids[e.train]) for e in first) if renders not in ("label", "prompts") else ""
    assert all(text in whole for text in [*learned, *read]), whole
    assert all(text in marked for text in learned), marked
    assert not any(text in marked for text in read), marked


REAL = {
    "instructions/alpaca_en_demo.json": ("chat", 999), "instructions/dolly_3k.json": ("chat", 2996), "instructions/glaive_toolcall_en_demo.json": ("chat", 300),
    "instructions/identity.json": ("chat", 91), "instructions/v1_sft_demo.jsonl": ("chat", 500), "instructions/c4_demo.jsonl": ("text", 300),
    "instructions/wiki_demo.txt": ("text", 1), "preferences/dpo_en_demo.json": ("pairs", 300), "preferences/kto_en_demo.json": ("judged", 300),
    "preferences/gsm8k_pairs.jsonl": ("pairs", 3275),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_the_samples_of_other_programs_are_read_to_the_last_row(shared: Path, name: str, tokenizer: Any) -> None:
    renders, records = REAL[name]
    got = prepare([str(shared / "data" / name)], tokenizer, renders=renders, max_tokens=512, say=lambda _: None, limit=400)  # type: ignore[arg-type]
    assert got.facts["records"] == min(records, 400) and got.facts["bad_rows"] == 0
