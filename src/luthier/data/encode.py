"""One text or two to the ids of one row, as the model's own tokenizer joins them; documents to rows whose tokens may be hidden."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import numpy as np

from ..core import LuthierError, Row
from ..nn.corruption import Hiding
from .codec import Codec, in_batches
from .labels import Labelled
from .rows import Counts, Form, OverLength, Progress
from .shapes import Document

# --- labelled texts -------------------------------------------------------------------------------------------------


def render_labelled(
    items: Iterable[Labelled], codec: Codec, form: Form, *, max_tokens: int, over_length: OverLength, counts: Counts, progress: Progress | None = None
) -> Iterator[tuple[Labelled, list[Row]]]:
    """Each item with its row, whose ``extras["label"]`` is the label as it stands in the data; no row where it is dropped for its length.

    Encoders and the sources of encoder-decoders get what the tokenizer makes of one text or a pair, token types included where the model has them.
    Decoders get the text, two of them joined by the separator. What is too long loses the end of the longer text first.
    """
    if over_length == "split":
        raise LuthierError("data.over_length=split is for raw text: half a text has no label of its own. Use truncate or drop.")
    for batch in in_batches(items, lambda x: sum(map(len, x.texts))):
        for _, some in groupby(batch, lambda x: len(x.texts)):
            same = list(some)
            encode = _joined if form.kind == "decoder" else paired
            for item, (ids, types, cut) in zip(same, encode(codec, [x.texts for x in same], max_tokens), strict=True):
                if cut and over_length == "drop":
                    counts.dropped_long += 1
                    yield item, []
                    continue
                counts.truncated += cut
                extras: dict[str, Any] = {"label": item.label}
                if form.token_types and types.any():
                    extras["inputs"] = {"token_type_ids": types}
                if form.kind == "encoder_decoder":
                    extras["source"], ids = ids, np.array([form.start], dtype=np.int32)
                yield item, [Row(ids, np.ones(len(ids), dtype=bool), item.where, extras)]
        if progress:
            progress(len(batch))


Encoded = tuple[np.ndarray, np.ndarray, bool]  # ids, token types, whether something was cut


def paired(codec: Codec, texts: list[tuple[str, ...]], max_tokens: int) -> Iterator[Encoded]:
    """The tokenizer's own encoding of one text or a pair."""

    def encode(some: list[tuple[str, ...]], **how: Any) -> Any:
        codec.reset()
        return codec.tokenizer(
            *map(list, zip(*some, strict=True)), return_token_type_ids=True, return_attention_mask=False, verbose=False, **how
        )  # fmt: skip

    whole = encode(texts)
    for i, ids in enumerate(whole["input_ids"]):
        types = whole["token_type_ids"][i] if "token_type_ids" in whole else [0] * len(ids)
        cut = len(ids) > max_tokens
        if cut:
            one = encode([texts[i]], truncation="longest_first", max_length=max_tokens)
            ids, types = one["input_ids"][0], one["token_type_ids"][0] if "token_type_ids" in one else types
        yield np.array(ids, dtype=np.int32), np.array(types[: len(ids)], dtype=np.int32), cut
    codec.reset()


def _joined(codec: Codec, texts: list[tuple[str, ...]], max_tokens: int) -> Iterator[Encoded]:
    """Beginning token, text, and for a pair the separator and the second text."""
    sides = [codec.encode([t[side] for t in texts]) for side in range(len(texts[0]))]
    between = codec.separator if len(sides) > 1 else np.array([], dtype=np.int32)
    ahead = int(codec.lacks_bos(sides[0][0]))
    for parts in zip(*sides, strict=True):
        kept = shorter([len(p) for p in parts], max_tokens - len(between) - ahead)
        cut = sum(kept) < sum(map(len, parts))
        first, *second = [p[:n] for p, n in zip(parts, kept, strict=True)]
        ids = codec.with_bos(np.concatenate([first, *(x for p in second for x in (between, p))]).astype(np.int32), "a text")
        yield ids, np.zeros(len(ids), dtype=np.int32), cut


def shorter(lengths: list[int], room: int) -> list[int]:
    """Lengths that fit ``room`` together: tokens are taken from the longest, and from both where they are equal."""
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    a, b = lengths
    if a + b <= room:
        return lengths
    half = room // 2
    return [room - b, b] if b <= half else [a, room - a] if a <= half else [room - half, half]


# --- texts whose tokens will be hidden ------------------------------------------------------------------------------


def hiding_of(codec: Codec, form: Form) -> Hiding:
    """What this tokenizer hides tokens by. Raises LuthierError where it has no mask token (encoders) or no sentinels (encoder-decoders)."""
    tokenizer = codec.tokenizer
    special = set(tokenizer.all_special_ids)
    vocabulary = tokenizer.get_vocab()
    numbered = {int(m[1]): i for t, i in vocabulary.items() if (m := re.fullmatch(r"▁?<extra_id_(\d+)>", t))}
    sentinels = tuple(numbered[k] for k in sorted(numbered))
    usual = np.array(sorted(set(vocabulary.values()) - special - set(sentinels)))
    if form.kind == "encoder":
        if tokenizer.mask_token_id is None:
            raise LuthierError("objective masked_text: this tokenizer has no mask token ([MASK], <mask>) to hide tokens from an encoder by; name it there")
        return Hiding(usual, mask=tokenizer.mask_token_id)
    if len(sentinels) < 2:
        raise LuthierError(
            "objective masked_text: this tokenizer has no sentinel tokens (<extra_id_0>, <extra_id_1>, ...), which stand for the hidden spans of a "
            "text; T5's has. Add some to the tokenizer and the model's vocabulary, or train with objective: sft"
        )
    return Hiding(usual, sentinels=sentinels, start=form.start, eos=codec.eos)


def render_masked(
    docs: Iterable[Document], codec: Codec, form: Form, *, max_tokens: int, over_length: OverLength, counts: Counts, progress: Progress | None = None
) -> Iterator[tuple[Document, list[Row]]]:
    """Each document with its pieces, end to end. ``train`` marks the tokens that may be hidden: all but the special ones. Which are hidden is chosen later."""
    hiding = hiding_of(codec, form)
    before, after = codec.around if form.kind == "encoder" else (_NONE, _NONE)
    room = max_tokens - len(before) - len(after) - (form.kind != "encoder" and codec.eos is not None)
    special = np.array(sorted({*codec.tokenizer.all_special_ids, *hiding.sentinels}))
    for batch in in_batches(docs, lambda d: len(d.text)):
        for doc, ids in zip(batch, codec.encode([d.text for d in batch]), strict=True):
            if len(ids) > room and over_length == "drop":
                counts.dropped_long += 1
                yield doc, []
                continue
            counts.split += len(ids) > room
            pieces = [ids[at : at + room] for at in range(0, len(ids), room)]
            rows = []
            for piece in pieces:
                if len(piece) < 2:  # one token alone: nothing around it to tell it by
                    continue
                whole = np.concatenate([before, piece, after]).astype(np.int32)
                rows.append(Row(whole, ~np.isin(whole, special), doc.where, {"hiding": hiding}))
            yield doc, rows
        if progress:
            progress(len(batch))


_NONE = np.array([], dtype=np.int32)
