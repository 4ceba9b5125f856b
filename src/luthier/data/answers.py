"""Where the answers of a conversation lie, in its text and in its tokens.

The mask comes from where the template puts each answer, never from a search for marker strings: the conversation up to an answer, with the
template's own generation prompt, must be the beginning of the whole; what stands between it and the end of that turn is the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from ..core import Row
from .codec import Codec
from .rows import Counts, Dropped
from .shapes import Chat
from .templates import Refused, Template

TrainOn = Literal["all", "last"]
Span = tuple[int, int]

SHORT_OF_TURNS = "the template renders earlier turns differently once the conversation goes on: only the last turn is trained"
ODD_PROMPT = "the template's generation prompt is not how it renders an answer: training starts where the two part"
STRADDLES = "the first token of an answer also holds the end of the prompt, so it is not trained"
NO_END = "the tokenizer has no end-of-sequence token and the template ends no turn: the model cannot learn to stop"
MARKERS = "the text of a message contains the tokenizer's special tokens, spelt out: the model reads them as such"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, up to the end of its last trained turn."""

    chat: Chat
    text: str
    spans: list[Span]  # of the trained answers, in characters
    notes: tuple[str, ...]


class Renderer:
    """A tokenizer and a template, and how answers are found in what they give."""

    def __init__(self, tokenizer: Any, template: str | None, train_on: TrainOn = "all") -> None:
        self.codec, self.template, self.train_on = Codec(tokenizer), Template(tokenizer, template), train_on
        words = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 2}
        self._special = re.compile("|".join(map(re.escape, sorted(words)))) if words else None

    # --- where the answers are ---

    def rendered(self, chat: Chat) -> Rendered | Dropped:
        """The text and the answers' spans. What comes after the last trained turn is left out: nothing learns from it."""
        notes = []
        if self._special and any(self._special.search(m["content"]) for m in chat.messages):
            notes.append(MARKERS)
        messages, tools, adapted = self.template.adapt(chat.messages, chat.tools)
        notes += adapted
        silent = {n for n, i in enumerate(_answers(chat.messages)) if i in chat.untrained}
        turns = [i for n, i in enumerate(_answers(messages)) if n not in silent]
        if self.train_on == "last":
            turns = turns[-1:]
        messages = messages[: turns[-1] + 1]
        try:
            text, spans, note = self._spans(messages, tools, turns)
        except Refused as e:
            return Dropped(f"the chat template refuses this conversation: {e}", chat.where, bad=True)
        if note:
            notes.append(note)
        spans = [(a, b) for a, b in spans if b > a and text[a:b].strip()]
        if not spans:
            return Dropped("the chat template leaves the answer out", chat.where, bad=True)
        return Rendered(chat, text, spans, tuple(notes))

    def _spans(self, messages: list[dict[str, Any]], tools: Any, turns: list[int]) -> tuple[str, list[Span], str | None]:
        text = self.template.text(messages, tools)
        spans: list[Span] = []
        for i in turns:
            before = self.template.text(messages[:i], tools, generation=True)
            after = text if i == len(messages) - 1 else self.template.text(messages[: i + 1], tools)
            if not (text.startswith(before) and text.startswith(after)):
                break
            spans.append((len(before), len(after)))
        else:
            return text, spans, None
        if self.template.marks_responses:
            text, found = self.template.marked(messages, tools)
            order = _answers(messages)
            if len(found) == len(order):
                return text, [found[order.index(i)] for i in turns], None
        last = turns[-1]
        before = self.template.text(messages[:last], tools, generation=True)
        note = SHORT_OF_TURNS if len(turns) > 1 else None
        if not text.startswith(before):
            header = self.template.text(messages[:last], tools)
            if not text.startswith(header):
                raise Refused("it renders the same opening differently once the answer follows, so the answer cannot be located")
            before, note = before[: _common(before, text)], ODD_PROMPT
            if len(before) < len(header):
                raise Refused("its generation prompt differs from the conversation itself, so the answer cannot be located")
        return text, [(len(before), len(text))], note

    # --- to tokens ---

    def encode(self, found: list[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, character spans of the tokens) of each conversation, nothing added."""
        if self.codec.fast:
            return self.codec.encode_spans([r.text for r in found])
        return [self._pieces(r) for r in found]

    def _pieces(self, r: Rendered) -> tuple[np.ndarray, np.ndarray]:
        """For tokenizers that do not tell where tokens lie: the text is cut at the answers, and each piece is tokenised by itself."""
        cuts = sorted({0, len(r.text), *(x for span in r.spans for x in span)})
        ids, where = [], []
        for a, b in pairwise(cuts):
            piece = self.codec.encode([r.text[a:b]])[0]
            ids.append(piece)
            where += [(a, b)] * len(piece)
        return np.concatenate(ids).astype(np.int32), np.array(where, dtype=np.int64).reshape(-1, 2)

    def row(self, r: Rendered, ids: np.ndarray, where: np.ndarray, counts: Counts) -> Row:
        """Ids and mask: every answer with its end-of-turn token, one beginning token, one end."""
        for note in r.notes:
            counts.note(note)
        train = np.zeros(len(ids), dtype=bool)
        straddles = False
        last = 0
        for begin, end in r.spans:
            first = int(np.searchsorted(where[:, 1], begin, side="right"))  # the first token that reaches past the beginning
            stop = int(np.searchsorted(where[:, 0], end, side="left"))
            if first < stop and self._starts(ids, where, first) < begin:
                straddles = True
                first += 1
            stop = self._after_end(ids, where, r.text, first, stop)
            train[first:stop] = True
            last = stop
        if straddles:
            counts.note(STRADDLES)
        ids, train = ids[:last], train[:last]  # the line break some templates put after the last turn's end
        if int(ids[-1]) not in self.codec.ends:
            if self.codec.eos is None:
                counts.note(NO_END)
            else:
                ids, train = np.append(ids, self.codec.eos).astype(np.int32), np.append(train, True)
        whole = self.codec.with_bos(ids, r.chat.where)
        if len(whole) > len(ids):
            train = np.concatenate([[False], train])
        return Row(whole, train, r.chat.where, r.chat.extras)

    def _starts(self, ids: np.ndarray, where: np.ndarray, i: int) -> int:
        """The first character of a token. Some tokenizers leave the space that a token begins with out of its span."""
        before = int(where[i - 1, 1]) if i else 0
        if int(where[i, 0]) > before and self.codec.tokenizer.convert_ids_to_tokens(int(ids[i]))[:1] in ("Ġ", "▁"):
            return before
        return int(where[i, 0])

    def _after_end(self, ids: np.ndarray, where: np.ndarray, text: str, first: int, stop: int) -> int:
        """Leave out what a template puts after the end-of-turn token (a line break): the model has stopped by then."""
        for i in range(stop - 1, first - 1, -1):
            if int(ids[i]) in self.codec.ends:
                return i + 1
            if text[where[i, 0] : where[i, 1]].strip():
                break
        return stop

    # --- too long ---

    def shorten(self, r: Rendered, ids: np.ndarray, where: np.ndarray, max_tokens: int, counts: Counts) -> Row | Dropped:
        """Truncate: first the earliest exchanges go, then the beginning of the longest question, last the answer's end."""
        row = self.row(r, ids, where, Counts())
        while len(row) > max_tokens and (shorter := _without_first_exchange(r.chat)) is not None:
            again = self.rendered(shorter)
            if isinstance(again, Dropped):
                return again
            r = again
            ids, where = self.encode([r])[0]
            row = self.row(r, ids, where, Counts())
        self.row(r, ids, where, counts)  # for its notes
        row = self._cut_contents(row, r, where, int(self.codec.lacks_bos(ids)), max_tokens)
        if len(row) > max_tokens:
            row = Row(row.ids[:max_tokens], row.train[:max_tokens], row.where, row.extras)
            if not row.train[1:].any():
                counts.dropped_long += 1
                return Dropped(f"the template alone fills max_tokens={max_tokens}: no token of the answer is left", r.chat.where)
            counts.cut_responses += 1
        counts.truncated += 1
        return row

    def _cut_contents(self, row: Row, r: Rendered, where: np.ndarray, ahead: int, max_tokens: int) -> Row:
        """Take tokens from the beginning of the longest messages before the last answer, so that the template's own words stay.

        An eighth of ``max_tokens`` of what was asked always stays: an answer without its question teaches to answer nothing.
        """
        at, ranges = 0, []
        for m in r.chat.messages:
            content = m["content"].strip()
            found = r.text.find(content, at, r.spans[-1][0]) if content else -1
            if found < 0:
                continue
            at = found + len(content)
            if m["role"] != "assistant":
                inside = np.flatnonzero((where[:, 0] >= found) & (where[:, 1] <= at) & (where[:, 1] > where[:, 0]))
                ranges.append((m["role"] == "system", -len(inside), inside + ahead))
        keep = np.ones(len(row), dtype=bool)
        spare = sum(len(inside) for _, _, inside in ranges) - max_tokens // 8
        fewest = max(max_tokens, len(row) - max(spare, 0))
        for _, _, inside in sorted(ranges, key=lambda x: x[:2]):  # the system prompt last: it is the shortest to say and the dearest to lose
            excess = int(keep.sum()) - fewest
            if excess > 0:
                keep[inside[:excess]] = False
        return Row(row.ids[keep], row.train[keep], row.where, row.extras)


def _without_first_exchange(chat: Chat) -> Chat | None:
    """The conversation from its second question on, the system prompt kept; None where nothing trained would be left."""
    asked = [i for i, m in enumerate(chat.messages) if m["role"] == "user"]
    learned = [i for i in _answers(chat.messages) if i not in chat.untrained]
    if len(asked) < 2 or asked[1] > learned[-1]:
        return None
    first, second = asked[:2]
    untrained = frozenset(i - (second - first) for i in chat.untrained if i >= second)
    return replace(chat, messages=chat.messages[:first] + chat.messages[second:], untrained=untrained)


def _answers(messages: list[dict[str, Any]]) -> list[int]:
    return [i for i, m in enumerate(messages) if m["role"] == "assistant"]


def _common(a: str, b: str) -> int:
    """The length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
