"""Which rows are trained and which are held out: whole groups of what would leak into one another, in an order that new data does not reshuffle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core import Row
from .labels import Labelled, name_of
from .preferences import Judged
from .prompted import Prompted
from .shapes import Chat, Document

Item = Chat | Document | Labelled | Judged | Prompted


@dataclass(frozen=True)
class Held:
    """A held-out prompt to answer: what tasks score and samples show. All answers that the data has for it are its references."""

    prompt: list[dict[str, Any]]  # messages
    references: list[str]
    tools: list[dict[str, Any]] | None
    where: str
    extras: Mapping[str, Any]  # the (first) record as it was written
    places: list[str] = field(default_factory=list)  # where each of the records stands that it was made of


@dataclass
class Group:
    """Rows that must stay on one side: those of one document, of one prompt, or of the same texts."""

    rows: list[Row] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)


def key(item: Item) -> str:
    """Equal for records that would leak into one another if they were divided: the same text, or the same opening of a conversation."""
    if isinstance(item, Judged):  # as the conversation of any of its answers: they open alike
        item = item.chats[0]
    if isinstance(item, Document | Prompted) and item.text:
        text = item.text
    elif isinstance(item, Labelled):
        text = json.dumps(item.texts)
    elif isinstance(item, Prompted):
        text = json.dumps(item.messages, sort_keys=True)
    else:
        assert isinstance(item, Chat)
        until = next(i for i, m in enumerate(item.messages) if m["role"] == "assistant")
        text = json.dumps(item.messages[:until], sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _order(groups: Mapping[str, Group], seed: int) -> list[str]:
    """Keys in an order that depends on the seed and on each key alone, so that new data does not reshuffle the old."""
    return sorted(groups, key=lambda k: hashlib.blake2b(f"{seed}:{k}".encode(), digest_size=8).digest())


def choose(groups: Mapping[str, Group], target: int, most: int, seed: int) -> dict[str, Group]:
    """Whole groups in seeded order while they fit ``target`` rows (at most ``most``)."""
    chosen: dict[str, Group] = {}
    room = min(target, most)
    for k in _order(groups, seed):
        if 0 < len(groups[k].rows) <= room:
            chosen[k] = groups[k]
            room -= len(groups[k].rows)
        if room == 0:
            break
    return chosen


def hold_out(groups: dict[str, Group], share: float, most: int, seed: int) -> dict[str, Group]:
    """Take the held-out groups out of ``groups``. At least one group stays to train on."""
    total = sum(len(g.rows) for g in groups.values())
    target = round(total * share)
    if share > 0 and total > 1:
        target = max(1, target)
    chosen = choose(groups, min(target, total - 1), most, seed) if target else {}
    if target and not chosen:
        # Few, long documents: the end of one is held out. Its beginning is trained, which is the best that can be done.
        longest = max(_order(groups, seed), key=lambda k: len(groups[k].rows))
        group = groups[longest]
        cut = min(target, most, len(group.rows) - 1)
        if cut > 0 and isinstance(group.items[0], Document):
            chosen[longest] = Group(group.rows[-cut:], group.items)
            group.rows = group.rows[:-cut]
        return chosen
    for k in chosen:
        del groups[k]
    return chosen


def records(held: Mapping[str, Group]) -> list[Held]:
    """One record for each held-out prompt, with all answers the data has for it; for labelled texts and judged answers one for each row, in the rows' order."""
    out: dict[str, Held] = {}
    for group in held.values():
        for item in group.items:
            if isinstance(item, Document):
                continue
            if isinstance(item, Prompted):
                opening = item.messages or [{"role": "user", "content": item.text}]
                out[f"row {len(out)}"] = Held(opening, list(item.references), item.tools, item.where, item.extras)
                continue
            if isinstance(item, Labelled):
                references = [] if item.label is None else [name_of(item.label)]
                out[f"row {len(out)}"] = Held([{"role": "user", "content": "\n".join(item.texts)}], references, None, item.where, item.extras)
                continue
            if isinstance(item, Judged):
                chat, answers = item.chats[0], item.answers()
                best = [a for a, rank in zip(answers, item.ranks or [0] * len(answers), strict=True) if rank == 0 and item.good is not False]
                judged = {"answers": answers, "ranks": list(item.ranks), "good": item.good}
                out[f"row {len(out)}"] = Held(chat.messages[: item.prompt], best, chat.tools, item.where, {**item.extras, **judged})
                continue
            last = max(i for i, m in enumerate(item.messages) if m["role"] == "assistant")
            asked = json.dumps(item.messages[:last], sort_keys=True)
            record = out.setdefault(asked, Held(item.messages[:last], [], item.tools, item.where, item.extras))
            record.places.append(item.where)
            answer = item.messages[last]["content"] or json.dumps(item.messages[last].get("tool_calls"))
            if answer not in record.references:
                record.references.append(answer)
    return list(out.values())
