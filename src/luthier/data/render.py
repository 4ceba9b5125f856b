"""Documents and conversations to token ids, with the mask of the tokens that are trained; prompts to generate from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from ..core import LuthierError, Row
from .answers import Rendered, Renderer, TrainOn
from .codec import Codec, in_batches, one_ahead
from .rows import Counts, Dropped, Kind, OverLength, Progress, text_rows
from .seq2seq import render_source
from .shapes import Chat, Document
from .templates import Refused

# --- text -----------------------------------------------------------------------------------------------------------


def render_text(doc: Document, tokenizer: Any, *, max_tokens: int, over_length: OverLength = "split") -> list[Row]:
    """The rows of one document: several where it is longer than ``max_tokens``."""
    return next(rows for _, rows in render_texts([doc], Codec(tokenizer), max_tokens=max_tokens, over_length=over_length, counts=Counts()))


def render_texts(
    docs: Iterable[Document], codec: Codec, *, max_tokens: int, over_length: OverLength, counts: Counts, progress: Progress | None = None
) -> Iterator[tuple[Document, list[Row]]]:
    """Each document with its rows. All tokens but each row's first are trained.

    Raw text has no prompt that could be cut, so ``truncate`` splits like ``split``: nothing is lost unless ``drop`` is asked for.
    """
    batches = in_batches(docs, lambda d: len(d.text))
    for batch, _, encoded in one_ahead(batches, lambda some: [d.text for d in some], codec.encode):
        for doc, ids in zip(batch, encoded, strict=True):
            ids = codec.with_bos(ids, doc.where)
            if codec.eos is not None and (not len(ids) or ids[-1] != codec.eos):
                ids = np.concatenate([ids, [codec.eos]]).astype(np.int32)
            yield doc, text_rows(ids, doc.where, max_tokens, over_length, counts)
        if progress:
            progress(len(batch))


# --- conversations --------------------------------------------------------------------------------------------------


def render_chats(
    chats: Iterable[Chat], renderer: Renderer, *, max_tokens: int, over_length: OverLength, counts: Counts, progress: Progress | None = None
) -> Iterator[tuple[Chat, Row | Dropped]]:
    """Each conversation with its row, or why it gives none."""
    if over_length == "split":
        raise LuthierError("over_length=split is for raw text: half a conversation teaches nothing. Use truncate (cuts the prompt) or drop.")
    batches = in_batches(chats, lambda c: sum(len(m["content"]) for m in c.messages))
    render = lambda some: [renderer.rendered(chat) for chat in some]  # noqa: E731
    for batch, found, encoded in one_ahead(batches, render, lambda found: renderer.encode([r for r in found if isinstance(r, Rendered)])):
        tokens = iter(encoded)
        for chat, r in zip(batch, found, strict=True):
            if isinstance(r, Dropped):
                yield chat, r
                continue
            ids, where = next(tokens)
            noted = Counts()
            row = renderer.row(r, ids, where, noted)
            if len(row) <= max_tokens:
                counts.add_notes(noted)
                yield chat, row
            elif over_length == "drop":
                counts.dropped_long += 1
                yield chat, Dropped(f"{len(row)} tokens, longer than max_tokens={max_tokens}", chat.where)
            else:
                yield chat, renderer.shorten(r, ids, where, max_tokens, counts)
        if progress:
            progress(len(batch))


def render_chat(
    chat: Chat, tokenizer: Any, template: str | None = None, *, train_on: TrainOn = "all", max_tokens: int, over_length: OverLength = "truncate"
) -> Row | Dropped:
    """The row of one conversation, or why it gives none."""
    renderer = Renderer(tokenizer, template, train_on)
    return next(row for _, row in render_chats([chat], renderer, max_tokens=max_tokens, over_length=over_length, counts=Counts()))


def render_chats_as_text(
    chats: Iterable[Chat], renderer: Renderer, *, max_tokens: int, over_length: OverLength, counts: Counts, progress: Progress | None = None
) -> Iterator[tuple[Chat, list[Row] | Dropped]]:
    """Whole conversations as documents: every token is trained, the questions too."""
    codec, template = renderer.codec, renderer.template
    for batch in in_batches(chats, lambda c: sum(len(m["content"]) for m in c.messages)):
        texts: list[str | Dropped] = []
        for chat in batch:
            messages, tools, notes = template.adapt(chat.messages, chat.tools)
            for note in notes:
                counts.note(note)
            try:
                texts.append(template.text(messages, tools))
            except Refused as e:
                texts.append(Dropped(f"the chat template refuses this conversation: {e}", chat.where, bad=True))
        encoded = iter(codec.encode([t for t in texts if isinstance(t, str)]))
        for chat, text in zip(batch, texts, strict=True):
            if isinstance(text, Dropped):
                yield chat, text
                continue
            ids = codec.with_bos(next(encoded), chat.where)
            if codec.eos is not None and not codec.ends & set(ids[-2:].tolist()):
                ids = np.append(ids, codec.eos).astype(np.int32)
            yield chat, text_rows(ids, chat.where, max_tokens, over_length, counts)
        if progress:
            progress(len(batch))


# --- generation -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _renderer(tokenizer: Any, template: str | None, own: str) -> Renderer:
    """Trying a template costs a millisecond, and prompts come one by one. ``own``: the tokenizer's template, which may be replaced."""
    return Renderer(tokenizer, template)


def render_prompt(
    messages: list[dict[str, Any]], tokenizer: Any, template: str | None = None, *, tools: list[dict[str, Any]] | None = None, kind: Kind = "decoder"
) -> list[int]:
    """The ids to generate from, exactly as in training: the conversation and the template's generation prompt; for an encoder-decoder, its source."""
    renderer = _renderer(tokenizer, template, str(tokenizer.chat_template))
    if kind == "encoder_decoder":
        return render_source(messages, renderer, tools)
    messages, tools, _ = renderer.template.adapt(messages, tools)
    try:
        text = renderer.template.text(messages, tools, generation=True)
    except Refused as e:
        raise LuthierError(f"the chat template refuses this conversation: {e}. Roles alternate: user, assistant, user; system only first.") from None
    return renderer.codec.with_bos(renderer.codec.encode([text])[0], "the prompt").tolist()


def stop_ids(tokenizer: Any, template: str | None = None, *, kind: Kind = "decoder") -> list[int]:
    """Tokens at which generation stops: the one that ends a trained turn, and the tokenizer's end of sequence (an encoder-decoder's only one)."""
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if kind == "encoder_decoder":
        return sorted(ends)
    row = render_chat(Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), tokenizer, template, max_tokens=1 << 30)
    if isinstance(row, Row) and int(row.ids[-1]) in Codec(tokenizer).ends:
        ends.add(int(row.ids[-1]))
    return sorted(ends)
