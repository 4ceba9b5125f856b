"""Judged answers to rows: all answers to one prompt in one row, so that no cut into micro-batches parts them.

Which tokens a row marks (``train``): for answers that are read by a head, the one the head reads; for answers that are written, theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..core import LuthierError, Row, examples_of, join
from ..nn.preferences import pairs_of
from .answers import Rendered, Renderer
from .codec import in_batches
from .encode import paired
from .preferences import Judged
from .rows import Counts, Dropped, Form, OverLength, Progress, sides
from .seq2seq import render_answers

SAME = "the answers of a record are the same text, so there is nothing to compare: left out"
TIED = "all answers of a record are tied, from which this objective learns nothing: left out"
Made = tuple[Judged, list[Row] | Dropped]


def render_preferences(
    items: Iterable[Judged],
    renderer: Renderer,
    form: Form,
    *,
    renders: str,
    max_tokens: int,
    over_length: OverLength,
    counts: Counts,
    progress: Progress | None = None,
) -> Iterator[Made]:
    """Each item with its one row, or why it gives none. Every answer has at most ``max_tokens``, its prompt included; all keep the same prompt."""
    if over_length == "split":
        raise LuthierError("data.over_length=split is for raw text: half an answer was not what was judged. Use truncate (cuts the prompt) or drop.")
    for batch in in_batches(items, lambda x: sum(len(m["content"]) for c in x.chats for m in c.messages)):
        how = (renderer, max_tokens, over_length, counts)
        if form.kind == "decoder":
            made = _decoded(batch, *how)
        elif renders == "ranked":
            made = _read(batch, form, *how)
        else:
            made = _written(batch, form, *how)
        for item, rows in made:
            if isinstance(rows, Dropped):
                yield item, rows
                continue
            if renders == "ranked" and form.kind == "decoder":
                rows = [replace(r, train=np.arange(len(r)) == len(r) - 1) for r in rows]
            whole = join(rows, ranks=item.ranks, margin=item.margin, good=item.good)
            if item.ranks and len({_content(r) for r in rows}) == 1:
                counts.note(SAME)
                yield item, Dropped(SAME, item.where)
            elif renders == "pairs" and len(set(item.ranks)) == 1:
                counts.note(TIED)
                yield item, Dropped(TIED, item.where)
            elif not whole.train.any():
                counts.dropped_long += 1
                yield item, Dropped(f"no token of the answers is left of max_tokens={max_tokens}", item.where)
            else:
                yield item, [whole]
        if progress:
            progress(len(batch))


def _content(row: Row) -> tuple[bytes, bytes]:
    source = row.extras.get("source")
    return row.ids.tobytes(), source.tobytes() if isinstance(source, np.ndarray) else b""


def _decoded(batch: Sequence[Judged], renderer: Renderer, max_tokens: int, over_length: OverLength, counts: Counts) -> Iterator[Made]:
    """The conversation that each answer ends; the answer is marked."""
    found = [[renderer.rendered(c) for c in item.chats] for item in batch]
    tokens = iter(renderer.encode([r for some in found for r in some if isinstance(r, Rendered)]))
    for item, some in zip(batch, found, strict=True):
        encoded = [next(tokens) for r in some if isinstance(r, Rendered)]
        if refused := next((r for r in some if isinstance(r, Dropped)), None):
            yield item, refused
            continue
        noted = Counts()
        rows = [renderer.row(r, ids, where, noted) for r, (ids, where) in zip(some, encoded, strict=True)]  # type: ignore[arg-type]
        for note in noted.notes:
            counts.note(note)
        longest = max(range(len(rows)), key=lambda i: len(rows[i]))
        if len(rows[longest]) <= max_tokens:
            yield item, rows
        elif over_length == "drop":
            counts.dropped_long += 1
            yield item, Dropped(f"{len(rows[longest])} tokens, longer than max_tokens={max_tokens}", item.where)
        else:
            short = renderer.shorten(some[longest], *encoded[longest], max_tokens, counts)  # type: ignore[arg-type]
            yield item, short if isinstance(short, Dropped) else [short if i == longest else _behind(short, r, max_tokens) for i, r in enumerate(rows)]


def _behind(other: Row, row: Row, max_tokens: int) -> Row:
    """The answer of a row behind the prompt of another; its end is cut where it must."""
    prompt, start = _start(other), _start(row)
    ids = np.concatenate([other.ids[:prompt], row.ids[start:]])[:max_tokens]
    train = np.concatenate([other.train[:prompt], row.train[start:]])[:max_tokens]
    return Row(ids, train, row.where, row.extras)


def _start(row: Row) -> int:
    """Where the answer of an example begins."""
    return int(np.argmax(row.train))


def _read(batch: Sequence[Judged], form: Form, renderer: Renderer, max_tokens: int, over_length: OverLength, counts: Counts) -> Iterator[Made]:
    """Prompt and answer as the two texts that the tokenizer joins, for an encoder or an encoder-decoder's source; the token that the head reads is marked."""
    texts: list[tuple[str, ...]] = [("\n".join(m["content"] for m in x.chats[0].messages[: x.prompt]), answer) for x in batch for answer in x.answers()]
    encoded = iter(list(paired(renderer.codec, texts, max_tokens)))
    for item in batch:
        some = [next(encoded) for _ in item.chats]
        if any(cut for *_, cut in some):
            if over_length == "drop":
                counts.dropped_long += 1
                yield item, Dropped(f"longer than max_tokens={max_tokens}", item.where)
                continue
            counts.truncated += 1
        yield item, [_row(ids, types, form, item.where) for ids, types, _ in some]


def _row(ids: np.ndarray, types: np.ndarray, form: Form, where: str) -> Row:
    if form.kind == "encoder_decoder":
        return Row(np.array([form.start], dtype=np.int32), np.ones(1, dtype=bool), where, {"source": ids})
    extras = {"inputs": {"token_type_ids": types}} if form.token_types and types.any() else {}
    return Row(ids, np.arange(len(ids)) == 0, where, extras)


def _written(batch: Sequence[Judged], form: Form, renderer: Renderer, max_tokens: int, over_length: OverLength, counts: Counts) -> Iterator[Made]:
    """The prompt as the source of an encoder-decoder, the answer as what it writes."""
    for item in batch:
        made = [rows for _, rows in render_answers(item.chats, renderer, form, max_tokens=max_tokens, over_length=over_length, counts=counts)]
        if refused := next((r for r in made if isinstance(r, Dropped)), None):
            yield item, refused
        else:
            yield item, [rows[-1] for rows in made if not isinstance(rows, Dropped)]


# --- answers to other prompts ----------------------------------------------------------------------------------------


def with_others(rows: Sequence[Row], *, max_tokens: int, seed: int) -> list[Row]:
    """Rows of one judged answer with a second example: the same prompt, answered by what was said to another. KTO measures its divergence on these.

    Which other is a function of the seed and the rows. A row to which no other prompt is found stays as it is.
    """
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    place = {row: at for at, row in enumerate(order)}
    out = []
    for i, row in enumerate(rows):
        own = examples_of(row)[0]
        for step in range(1, min(len(rows), 50)):
            other = examples_of(rows[order[(place[i] + step) % len(rows)]])[0]
            if not _same_prompt(own, other):
                extras = {k: row.extras[k] for k in ("ranks", "margin", "good")}
                out.append(join([own, _answered_by(own, other, max_tokens)], **extras))
                break
        else:
            out.append(row)
    return out


def _same_prompt(a: Row, b: Row) -> bool:
    if "source" in a.extras:
        return np.array_equal(a.extras["source"], b.extras["source"])
    return np.array_equal(a.ids[: _start(a)], b.ids[: _start(b)])


def _answered_by(own: Row, other: Row, max_tokens: int) -> Row:
    if "source" in own.extras:
        return Row(other.ids, other.train, own.where, {"source": own.extras["source"]})
    return replace(_behind(own, other, max_tokens), where=own.where)


# --- what is said of them --------------------------------------------------------------------------------------------


def counted(rows: Sequence[Row], renders: str) -> dict[str, Any]:
    """What ``facts`` say of the judgements: how many pairs and ties, and how often the longer answer is the better; or how many answers are good."""
    if renders == "judged":
        good = sum(bool(r.extras["good"]) for r in rows)
        return {"good": good, "bad": len(rows) - good}
    pairs = ties = longer = equal = 0
    for row in rows:
        length = [sum(sides(e)) for e in examples_of(row)]
        for better, worse, tied in pairs_of(row.extras["ranks"]):
            pairs, ties = pairs + 1, ties + tied
            if not tied:
                longer, equal = longer + (length[better] > length[worse]), equal + (length[better] == length[worse])
    share = (longer + equal / 2) / (pairs - ties) if pairs > ties else 0.5
    return {"answers": sum(len(r.extras["ranks"]) for r in rows), "pairs": pairs, "ties": ties, "longer_is_better": share}


def said(facts: Mapping[str, Any]) -> Iterator[str]:
    """Lines about the judgements."""
    if "good" in facts:
        yield f"{facts['good']:,} good answers and {facts['bad']:,} bad ones"
        if not facts["good"] or not facts["bad"]:
            yield "all answers are judged alike: there is nothing to tell them apart by"
        return
    ties = f", {facts['ties']:,} of them ties" if facts["ties"] else ""
    yield f"{facts['answers']:,} answers in {facts['rows']:,} rankings: {facts['pairs']:,} pairs{ties}"
    share = facts["longer_is_better"]
    which = "longer" if share >= 0.5 else "shorter"
    yield f"always preferring the {which} answer would be right on {max(share, 1 - share):.1%} of the pairs: that, not one half, is what to beat"
