"""Prompts to answer, for objectives that learn from what the model itself writes: from any data that has prompts, with or without answers.

Conversations give what was said before their last answer, which becomes a reference; those that wait for an answer are prompts as they stand, and so is a
column of prompts alone; preferences and judged answers give their prompt, and their good answers as references; raw text gives the beginnings of its
paragraphs, to be continued. Equal prompts are one, with the references of all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..core import LuthierError, Row
from .answers import Renderer
from .codec import in_batches
from .convert import convert
from .formats import Bad, Record
from .preferences import LABELS, REJECTED, convert_preferences, detect_preferences, turns
from .rows import Counts, Dropped, Form, Progress
from .seq2seq import render_source
from .shapes import PAIRS, Chat, Document, Shape, detect
from .templates import Refused
from .trees import is_tree

ALONE = tuple(dict.fromkeys(["prompt", "instruction", *(p for p, _ in PAIRS)]))  # columns that are prompts by themselves
ANSWERED = {"messages", "conversations", "conversation", "text", "output", "response"}  # columns beside which no other is a prompt by itself
COMPARED = {"chosen", "rejected", "ranked"}
JUDGED = ("ranked", "pairs", "judged", "tree")  # shapes that preferences.py names
ANSWERS = ("completion", "output")  # parts of shapes that hold an answer
MADE_UP = {"role": "assistant", "content": "-"}  # a prompt is read as a conversation that has its answer
REPEATED = "rows repeat a prompt, which is answered once for the references of all"


@dataclass(frozen=True, slots=True)
class Prompted:
    """A conversation to answer, or a text to continue."""

    messages: list[dict[str, Any]]  # [] for a text
    text: str = ""
    references: tuple[str, ...] = ()
    tools: list[dict[str, Any]] | None = None
    where: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)  # the record as it was written

    def task_row(self) -> dict[str, Any]:
        """What tasks and rewards are shown of it."""
        return {**self.extras, "prompt": self.messages or self.text, "tools": self.tools, "refs": list(self.references)}


# --- columns ---------------------------------------------------------------------------------------------------------


def detect_prompts(first: Sequence[Record], *, shape: str, columns: Mapping[str, str]) -> Shape:
    """The shape of records that hold prompts: "prompts" (prompts alone), or one that shapes.py or preferences.py names.

    Raises LuthierError where no prompt can be found.
    """
    there = {name for r in first for name in r.fields}
    if set(columns) == {"prompt"}:
        if columns["prompt"] not in there:
            raise LuthierError(f"{first[0].where}: no column {columns['prompt']!r} (wanted for 'prompt'). Columns found: {', '.join(first[0].fields)}.")
        return _alone(columns["prompt"], there)
    if shape == "auto":
        compared = "ranked" in there or there & set(REJECTED) if not columns else set(columns) & COMPARED
        if compared or (is_tree(first[0].fields) and not columns):
            return detect_preferences(first, renders="pairs", columns=columns)
        if (
            not columns
            and "text" not in there
            and there & (ANSWERED | {"completion", "answer"})
            and any(isinstance(r.fields.get(n), bool) for r in first for n in LABELS)
        ):
            return detect_preferences(first, renders="judged", columns={})
        if not columns and not any(p in there and c in there for p, c in PAIRS) and not there & ANSWERED:
            name = next((name for name in ALONE if name in there), None)
            if name is not None:
                return _alone(name, there)
    return detect(first, shape=shape, columns=columns)


def _alone(name: str, there: set[str]) -> Shape:
    """Prompts alone, with what belongs to them: a system prompt, tools, what an instruction is about."""
    about = next((c for c in ("input", "context") if c in there), None) if name == "instruction" else None
    return Shape("prompts", {"prompt": name} | {c: c for c in ("system", "tools") if c in there and c != name} | ({} if about is None else {"input": about}))


# --- records ---------------------------------------------------------------------------------------------------------


def convert_prompts(record: Record, shape: Shape, bad: Bad) -> list[Prompted]:
    """The record's prompts; a bad one is reported and gives none."""
    if shape.name == "prompts":
        return _from_column(record, shape, bad)
    if shape.name in JUDGED:
        found = convert_preferences(record, shape, bad, renders="pairs")
        return [Prompted(j.chats[0].messages[: j.prompt], "", _best(j), j.chats[0].tools, j.where, j.extras) for j in found]
    whole, waits = _answered(record, shape)
    items = convert(whole, shape, bad)
    if items and isinstance(items[0], Document):
        extras = {k: v for k, v in record.fields.items() if k != shape.columns["text"]}
        paragraphs = (p.strip("\n") for p in re.split(r"\n\s*\n", items[0].text))
        return [Prompted([], p, where=record.where, extras=extras) for p in paragraphs if p.strip()]
    chats = [c for c in items if isinstance(c, Chat)]
    if not chats:
        return []
    last = max(i for i, m in enumerate(chats[0].messages) if m["role"] == "assistant")
    references = () if waits else tuple(said for c in chats if (said := _said(c.messages[last])))
    return [Prompted(chats[0].messages[:last], "", references, chats[0].tools, chats[0].where, record.fields)]


def _from_column(record: Record, shape: Shape, bad: Bad) -> list[Prompted]:
    """A prompt alone: a text, or messages that wait for an answer."""
    column = shape.columns["prompt"]
    value = record.fields.get(column)
    before: list[Any] = []
    if isinstance(value, str) and value.strip():
        about = record.fields.get(shape.columns.get("input", ""))
        asked = f"{value}\n{about}" if isinstance(about, str) and about.strip() else value
        before = turns(asked) or [{"role": "user", "content": asked}]  # type: ignore[assignment]
    elif isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        before = list(value)
    if not before:
        bad.add(record.where, f"column {column!r} is no prompt: a text or a list of messages is accepted")
        return []
    if _is_answer(before[-1]):
        bad.add(record.where, f"column {column!r} ends with an answer, and a prompt waits for one; data.columns={{messages: {column}}} takes the answer away")
        return []
    kept: dict[str, Any] = {part: record.fields[part] for part in ("system", "tools") if part in shape.columns and part in record.fields}
    whole = Record({"messages": [*before, MADE_UP], **kept}, record.where)
    chats = convert(whole, Shape("messages", {name: name for name in whole.fields}), bad)
    return [Prompted(c.messages[:-1], "", (), c.tools, c.where, record.fields) for c in chats if isinstance(c, Chat)]


def _is_answer(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role", message.get("from")) in ("assistant", "gpt", "model")


def _answered(record: Record, shape: Shape) -> tuple[Record, bool]:
    """The record with an answer where it has none, and whether it had none."""
    for part in ("messages", "conversations"):
        said = record.fields.get(shape.columns.get(part, ""))
        if isinstance(said, list) and said and not _is_answer(said[-1]):
            return Record({**record.fields, shape.columns[part]: [*said, MADE_UP]}, record.where), True
    for part in ANSWERS:
        if (column := shape.columns.get(part)) is not None and not record.fields.get(column):
            return Record({**record.fields, column: MADE_UP["content"]}, record.where), True
    return record, False


def _said(message: Mapping[str, Any]) -> str:
    return str(message["content"] or json.dumps(message.get("tool_calls")))


def _best(judged: Any) -> tuple[str, ...]:
    """The best of compared answers, or the one that was found good."""
    if judged.good is False:
        return ()
    return tuple(a for a, rank in zip(judged.answers(), judged.ranks or (0,), strict=True) if rank == 0)


# --- rows ------------------------------------------------------------------------------------------------------------


def together(items: Iterable[Prompted], counts: Counts) -> list[Prompted]:
    """Equal prompts as one, in the order of their first, with the references of all."""
    out: dict[str, Prompted] = {}
    for item in items:
        key = json.dumps([item.messages, item.text, item.tools], sort_keys=True)
        there = out.setdefault(key, item)
        if there is not item:
            counts.note(REPEATED)
            out[key] = replace(there, references=tuple(dict.fromkeys(there.references + item.references)))
    return list(out.values())


def render_prompts(
    items: Iterable[Prompted],
    renderer: Renderer,
    form: Form,
    *,
    max_tokens: int,
    beginning: int,
    counts: Counts,
    progress: Progress | None = None,
) -> Iterator[tuple[Prompted, Row | Dropped]]:
    """Each prompt once, with the row whose ids are what is generated from; ``extras["task"]`` is what rewards are shown.

    ``max_tokens``: a longer prompt is dropped, since half a question is another one; ``beginning``: so many first tokens of a paragraph of raw text are its
    prompt, and a shorter one gives none.
    """
    for batch in in_batches(together(items, counts), lambda p: sum(len(m["content"]) for m in p.messages) + len(p.text)):
        for item in batch:
            yield item, _row(item, renderer, form, max_tokens, beginning, counts)
        if progress:
            progress(len(batch))


def _row(item: Prompted, renderer: Renderer, form: Form, max_tokens: int, beginning: int, counts: Counts) -> Row | Dropped:
    task, codec = item.task_row(), renderer.codec
    if item.messages:
        try:
            ids = _asked(item, renderer, form)
        except (Refused, LuthierError) as e:
            return Dropped(f"the chat template refuses this conversation: {e}", item.where, bad=True)
    else:
        ids = codec.encode([item.text])[0]
        ids = ids if form.kind == "encoder_decoder" else codec.with_bos(ids, item.where)
        if len(ids) < beginning:
            counts.note(f"paragraphs shorter than objective.beginning={beginning} tokens give no prompt")
            return Dropped(f"{len(ids)} tokens, fewer than objective.beginning={beginning}", item.where)
        ids = ids[:beginning]
        task["prompt"] = codec.tokenizer.decode(ids, skip_special_tokens=True)
        if form.kind == "encoder_decoder":  # whose tokenizer ends what is read
            before, behind = codec.around
            ids = np.concatenate([before, ids, behind])
    if len(ids) > max_tokens:
        counts.dropped_long += 1
        return Dropped(f"a prompt of {len(ids)} tokens leaves no room for an answer in {max_tokens}", item.where)
    return Row(ids.astype(np.int32), np.zeros(len(ids), dtype=bool), item.where, {"task": task})


def _asked(item: Prompted, renderer: Renderer, form: Form) -> np.ndarray:
    """The ids of a conversation up to where its answer begins."""
    if form.kind == "encoder_decoder":
        return np.array(render_source(item.messages, renderer, item.tools), dtype=np.int32)
    messages, tools, _ = renderer.template.adapt(item.messages, item.tools)
    text = renderer.template.text(messages, tools, generation=True)
    return renderer.codec.with_bos(renderer.codec.encode([text])[0], item.where)
