"""From sources to the rows that are trained and the rows that are held out, with every loss on the way counted and said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from ..core import LuthierError, Row
from .answers import Renderer
from .convert import convert
from .formats import Bad, Record, read_file
from .render import render_chats, render_chats_as_text, render_texts
from .rows import Counts, Dropped, OverLength
from .shapes import LOOK_AT, Chat, Document, Shape, detect
from .sources import files_of, read, splits_of

Say = Callable[[str], None]
Item = Chat | Document


@dataclass(frozen=True)
class Held:
    """A held-out prompt to answer: what tasks score and samples show. All answers that the data has for it are its references."""

    prompt: list[dict[str, Any]]  # messages
    references: list[str]
    tools: list[dict[str, Any]] | None
    where: str
    extras: Mapping[str, Any]  # the (first) record as it was written


@dataclass
class Prepared:
    """The data of a run."""

    train: list[Row]
    validation: list[Row]
    validation_records: list[Held]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Group:
    """Rows that must stay on one side: those of one document, or of one prompt."""

    rows: list[Row] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """The choices that reading and rendering share."""

    renderer: Renderer
    renders: Literal["text", "chat"]
    shape: str
    columns: Mapping[str, str]
    split: str
    max_tokens: int
    over_length: OverLength
    say: Say
    progress: Callable[[int], None] | None


def prepare(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    renders: Literal["text", "chat"],
    max_tokens: int,
    template: str | None = None,
    shape: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
    over_length: OverLength = "truncate",
    train_on: Literal["all", "last"] = "all",
    on_bad_row: Literal["stop", "skip"] = "stop",
    validation: Sequence[str] = (),
    validation_share: float = 0.05,
    validation_rows: int = 500,
    seed: int = 0,
    say: Say = print,
    progress: Callable[[int], None] | None = None,
) -> Prepared:
    """Read, convert, render and divide. ``say`` gets one line for each thing the user should know; ``progress`` the records rendered."""
    if not sources:
        raise LuthierError("no training data: set data.train to a file, a folder or a Hub data set id.")
    if renders == "chat" and over_length == "split":
        raise LuthierError("data.over_length=split is for raw text: half a conversation teaches nothing. Use truncate (cuts the prompt) or drop.")
    how = _Reading(
        renderer=Renderer(tokenizer, template, train_on), renders=renders, shape=shape, columns=columns or {}, split=split, max_tokens=max_tokens,
        over_length=over_length, say=say, progress=progress,
    )  # fmt: skip
    bad, counts = Bad(on_bad_row), Counts()
    facts: dict[str, Any] = {"sources": list(sources), "template": None, "max_tokens": max_tokens, "over_length": over_length}
    groups = _groups(_open(sources, how, bad, facts), how, bad, counts, facts, limit)
    _refuse_nothing(groups, how, bad, counts, facts)
    validation = validation or _beside(sources, split, say)
    if validation:
        v_bad, v_counts = Bad(on_bad_row), Counts()
        v_facts: dict[str, Any] = {}
        say("validation data:")
        held = _groups(_open(validation, how, v_bad, v_facts, split="validation"), how, v_bad, v_counts, v_facts, None)
        held = _choose(held, sum(len(g.rows) for g in held.values()), validation_rows, seed)
        both = sum(key in groups for key in held)
        facts["validation"] = {"from": list(validation), "bad_rows": v_bad.count, "prompts_also_trained": both}
        if both:
            say(f"{both} of {len(held)} validation prompts are also in the training data: their loss says less than it seems")
    else:
        held = _hold_out(groups, validation_share, validation_rows, seed)
        facts["validation"] = {"from": "training rows", "share": validation_share}
    train = [row for g in groups.values() for row in g.rows]
    held_rows = [row for g in held.values() for row in g.rows][:validation_rows]
    _count(facts, train, held_rows, bad, counts)
    _say_counts(facts, say)
    return Prepared(train, held_rows, _records(held), facts)


# --- reading --------------------------------------------------------------------------------------------------------


def _open(sources: Sequence[str], how: _Reading, bad: Bad, facts: dict[str, Any], split: str | None = None) -> Iterator[Item]:
    """Records of all sources in normal form; each file's shape is detected by itself and said."""
    shapes: dict[str, str] = facts.setdefault("shapes", {})
    for source in sources:
        files = files_of(source, split or how.split)
        opened = [(source, read(source, bad=bad, split=how.split))] if files is None else [(str(f), read_file(f, bad=bad)) for f in files]
        for name, records in opened:
            first = list(islice(records, LOOK_AT))
            if not first:
                raise LuthierError(f"{name}: no row in it.")
            shape = detect(first, shape=how.shape, columns=how.columns)
            _fits(shape, name, how, first)
            shapes[name] = str(shape)
            how.say(f"{name}: {shape}")
            for record in chain(first, records):
                yield from convert(record, shape, bad)


def _fits(shape: Shape, name: str, how: _Reading, first: Sequence[Record]) -> None:
    if shape.is_text and how.renders == "chat":
        raise LuthierError(
            f"{name}: this is raw text (columns {', '.join(first[0].fields)}), and the objective learns responses to prompts. "
            "Set objective: text to learn the text itself, or say which columns are which: data.columns={prompt: ..., completion: ...}."
        )


def _beside(sources: Sequence[str], split: str, say: Say) -> list[str]:
    """The validation files of a folder that has them by name (valid.jsonl)."""
    found = []
    for source in sources:
        if split == "train" and Path(source).expanduser().is_dir():
            found += [str(p) for p in splits_of(Path(source).expanduser()).get("validation", []) if p.stat().st_size]
    if found:
        say(f"validation files found beside the training data: {', '.join(found)}")
    return found


def _groups(items: Iterator[Item], how: _Reading, bad: Bad, counts: Counts, facts: dict[str, Any], limit: int | None) -> dict[str, _Group]:
    """Rendered rows by what must not be torn apart: the text of a document, the prompt of a chat."""
    groups: dict[str, _Group] = {}
    records = 0
    for item, rows in _rendered(islice(items, limit), how, bad, counts, facts):
        records += 1
        rows = [r for r in rows if r.train[1:].any()]
        if not rows:
            continue
        group = groups.setdefault(_key(item), _Group())
        group.rows += rows
        group.items.append(item if isinstance(item, Chat) else Document("", item.where))  # a document's text is in its rows
    facts["records"] = records
    return groups


def _rendered(items: Iterator[Item], how: _Reading, bad: Bad, counts: Counts, facts: dict[str, Any]) -> Iterator[tuple[Item, list[Row]]]:
    """Documents and conversations may come in turns (several files): each kind is rendered by its own function, in order."""
    how_much: dict[str, Any] = {"max_tokens": how.max_tokens, "over_length": how.over_length, "counts": counts, "progress": how.progress}
    for kind, some in groupby(items, type):
        if kind is Document:
            if how.renderer.codec.eos is None:
                counts.note("the tokenizer has no end-of-sequence token: documents end without one")
            yield from render_texts(cast(Iterator[Document], some), how.renderer.codec, **how_much)
            continue
        template = how.renderer.template
        if facts.get("template") is None:
            facts["template"] = template.name
            how.say(template.note or f"chat template: {template.name}")
        render: Callable[..., Iterator[tuple[Chat, Any]]] = render_chats if how.renders == "chat" else render_chats_as_text
        for chat, made in render(cast(Iterator[Chat], some), how.renderer, **how_much):
            if isinstance(made, Dropped) and made.bad:
                bad.add(made.where, made.reason, "Set model.template to one that can render it (plain, chatml, ...)")
            yield chat, [] if isinstance(made, Dropped) else [made] if isinstance(made, Row) else made


def _key(item: Item) -> str:
    """Equal for records that would leak into one another if they were divided: the same text, or the same opening of a conversation."""
    if isinstance(item, Document):
        text = item.text
    else:
        until = next(i for i, m in enumerate(item.messages) if m["role"] == "assistant")
        text = json.dumps(item.messages[:until], sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


# --- dividing -------------------------------------------------------------------------------------------------------


def _order(groups: Mapping[str, _Group], seed: int) -> list[str]:
    """Keys in an order that depends on the seed and on each key alone, so that new data does not reshuffle the old."""
    return sorted(groups, key=lambda k: hashlib.blake2b(f"{seed}:{k}".encode(), digest_size=8).digest())


def _choose(groups: Mapping[str, _Group], target: int, most: int, seed: int) -> dict[str, _Group]:
    """Whole groups in seeded order while they fit ``target`` rows (at most ``most``)."""
    chosen: dict[str, _Group] = {}
    room = min(target, most)
    for key in _order(groups, seed):
        if 0 < len(groups[key].rows) <= room:
            chosen[key] = groups[key]
            room -= len(groups[key].rows)
        if room == 0:
            break
    return chosen


def _hold_out(groups: dict[str, _Group], share: float, most: int, seed: int) -> dict[str, _Group]:
    """Take the held-out groups out of ``groups``. At least one group stays to train on."""
    total = sum(len(g.rows) for g in groups.values())
    target = round(total * share)
    if share > 0 and total > 1:
        target = max(1, target)
    chosen = _choose(groups, min(target, total - 1), most, seed) if target else {}
    if target and not chosen:
        # Few, long documents: the end of one is held out. Its beginning is trained, which is the best that can be done.
        key = max(_order(groups, seed), key=lambda k: len(groups[k].rows))
        group = groups[key]
        cut = min(target, most, len(group.rows) - 1)
        if cut > 0 and isinstance(group.items[0], Document):
            chosen[key] = _Group(group.rows[-cut:], group.items)
            group.rows = group.rows[:-cut]
        return chosen
    for key in chosen:
        del groups[key]
    return chosen


def _records(held: Mapping[str, _Group]) -> list[Held]:
    """One record for each held-out prompt, with all answers the data has for it."""
    out: dict[str, Held] = {}
    for group in held.values():
        for chat in group.items:
            if isinstance(chat, Document):
                continue
            last = max(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
            key = json.dumps(chat.messages[:last], sort_keys=True)
            record = out.setdefault(key, Held(chat.messages[:last], [], chat.tools, chat.where, chat.extras))
            answer = chat.messages[last]["content"] or json.dumps(chat.messages[last].get("tool_calls"))
            if answer not in record.references:
                record.references.append(answer)
    return list(out.values())


# --- counting -------------------------------------------------------------------------------------------------------


def _refuse_nothing(groups: Mapping[str, _Group], how: _Reading, bad: Bad, counts: Counts, facts: dict[str, Any]) -> None:
    if groups:
        return
    causes = []
    if bad.count:
        causes.append(f"{bad.count} bad rows, the first {bad.rows[0][0]}: {bad.rows[0][1]}")
    if counts.dropped_long:
        causes.append(f"{counts.dropped_long} longer than max_tokens={how.max_tokens} and dropped: raise data.max_tokens or set data.over_length=truncate")
    causes += [f"{n}: {text}" for text, n in counts.notes.items()]
    raise LuthierError(f"no trained token is left of {facts.get('records', 0)} records. {'; '.join(causes) or 'All of them are too short: one token each.'}")


def _count(facts: dict[str, Any], train: Sequence[Row], held: Sequence[Row], bad: Bad, counts: Counts) -> None:
    lengths = np.array([len(r) for r in train])
    facts["rows"] = len(train)
    facts["tokens"] = int(lengths.sum())
    facts["trained_tokens"] = int(sum(int(r.train[1:].sum()) for r in train))
    facts["longest"] = int(lengths.max())
    facts["median"] = int(np.median(lengths))
    facts["bad_rows"] = bad.count
    facts["bad_examples"] = [f"{where}: {reason}" for where, reason in bad.rows[:5]]
    facts["dropped_long"], facts["truncated"] = counts.dropped_long, counts.truncated
    facts["cut_responses"], facts["split"] = counts.cut_responses, counts.split
    facts["notes"] = dict(counts.notes)
    facts["validation"]["rows"] = len(held)
    facts["validation"]["tokens"] = int(sum(len(r) for r in held))


def _say_counts(facts: Mapping[str, Any], say: Say) -> None:
    share = facts["trained_tokens"] / facts["tokens"]
    say(f"{facts['rows']:,} rows, {facts['tokens']:,} tokens, {share:.0%} trained; longest {facts['longest']:,}, median {facts['median']:,}")
    if facts["bad_rows"]:
        say(f"{facts['bad_rows']:,} bad rows skipped; the first: {facts['bad_examples'][0]}")
    if facts["dropped_long"]:
        say(f"{facts['dropped_long']:,} records longer than {facts['max_tokens']} tokens dropped")
    if facts["split"]:
        say(f"{facts['split']:,} documents longer than {facts['max_tokens']} tokens split into pieces; nothing is lost")
    if facts["truncated"]:
        ends = facts["cut_responses"]
        cut = f", of which {ends:,} also lost the end of the response" if ends else " in the prompt; every response is whole"
        say(f"{facts['truncated']:,} records longer than {facts['max_tokens']} tokens truncated{cut}")
    for text, n in facts["notes"].items():
        say(f"{text} ({n:,} rows)")
    say(f"{facts['validation']['rows']:,} rows held out for validation")
