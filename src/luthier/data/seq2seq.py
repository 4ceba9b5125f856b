"""Conversations for encoder-decoders: what was said before an answer is the source, the answer is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..core import LuthierError, Row
from .answers import Renderer
from .codec import in_batches
from .rows import Counts, Dropped, Form, OverLength, Progress
from .shapes import Chat
from .templates import Refused

NO_END = "the tokenizer has no end-of-sequence token: the model cannot learn to stop"


def render_answers(
    chats: Iterable[Chat], renderer: Renderer, form: Form, *, max_tokens: int, over_length: OverLength, counts: Counts, progress: Progress | None = None
) -> Iterator[tuple[Chat, list[Row] | Dropped]]:
    """Each conversation with one row for every answer that is trained, or why it gives none.

    A row's ids are the model's start token, the answer and the end of sequence; all but the first are trained. ``extras["source"]`` are the ids of
    the conversation before the answer. Each side holds at most ``max_tokens``; what is longer loses its end.
    """
    for batch in in_batches(chats, lambda c: sum(len(m["content"]) for m in c.messages)):
        for chat in batch:
            try:
                yield chat, _rows(chat, renderer, form, max_tokens, over_length, counts)
            except Refused as e:
                yield chat, Dropped(f"the chat template refuses this conversation: {e}", chat.where, bad=True)
        if progress:
            progress(len(batch))


def _rows(chat: Chat, renderer: Renderer, form: Form, max_tokens: int, over_length: OverLength, counts: Counts) -> list[Row] | Dropped:
    messages, tools, notes = renderer.template.adapt(chat.messages, chat.tools)
    for note in notes:
        counts.note(note)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    trained = [i for n, i in enumerate(answers) if n not in {n for n, i in enumerate(_answers(chat)) if i in chat.untrained}]
    rows: list[Row] = []
    for i in trained[-1:] if renderer.train_on == "last" else trained:
        source, long_source = _encoded(renderer, source_text(renderer, messages[:i], tools), max_tokens)
        answer, long_answer = _answer(renderer, messages, i, tools, max_tokens - 1, counts)
        if (long_source or long_answer) and over_length == "drop":
            counts.dropped_long += 1
            continue
        counts.truncated += long_source or long_answer
        counts.cut_responses += long_answer
        ids = np.concatenate([[form.start], answer]).astype(np.int32)
        rows.append(Row(ids, np.arange(len(ids)) > 0, chat.where, {**chat.extras, "source": source}))
    return rows or Dropped(f"longer than max_tokens={max_tokens}", chat.where)


def _answers(chat: Chat) -> list[int]:
    return [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]


def source_text(renderer: Renderer, messages: list[dict[str, Any]], tools: Any) -> str:
    """What the encoder reads: the conversation, with the generation prompt where the template has one, without a line break at its end."""
    return renderer.template.text(messages, tools, generation=True).rstrip()


def _answer(renderer: Renderer, messages: list[dict[str, Any]], i: int, tools: Any, room: int, counts: Counts) -> tuple[np.ndarray, bool]:
    """The ids of an answer with the end of sequence, and whether it had to be cut (then it has no end)."""
    text = messages[i]["content"]
    if messages[i].get("tool_calls"):  # only the template knows how it writes calls
        before, after = renderer.template.text(messages[:i], tools, generation=True), renderer.template.text(messages[: i + 1], tools)
        if not after.startswith(before):
            raise Refused("it renders the same opening differently once the answer follows, so the answer cannot be located")
        text = after[len(before) :]
    codec = renderer.codec
    ids = np.array(codec.tokenizer(text.strip(), verbose=False)["input_ids"], dtype=np.int32)
    if codec.eos is None:
        counts.note(NO_END)
    elif not len(ids) or ids[-1] != codec.eos:
        ids = np.append(ids, codec.eos).astype(np.int32)
    return ids[:room], len(ids) > room


def _encoded(renderer: Renderer, text: str, max_tokens: int) -> tuple[np.ndarray, bool]:
    """A source as the tokenizer encodes a text, with its own special tokens; cut where it is too long, these kept."""
    codec = renderer.codec
    codec.reset()
    ids = codec.tokenizer(text, verbose=False)["input_ids"]
    cut = len(ids) > max_tokens
    if cut:
        ids = codec.tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
        codec.reset()
    return np.array(ids, dtype=np.int32), cut


def render_source(messages: list[dict[str, Any]], renderer: Renderer, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """The ids an encoder reads to answer a conversation, exactly as in training."""
    messages, tools, _ = renderer.template.adapt(messages, tools)
    try:
        return _encoded(renderer, source_text(renderer, messages, tools), 1 << 30)[0].tolist()
    except Refused as e:
        raise LuthierError(f"the chat template refuses this conversation: {e}. Roles alternate: user, assistant, user; system only first.") from None
