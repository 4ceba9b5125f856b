"""Conversation trees with ranked replies, as OpenAssistant publishes them (Köpf et al., 2023, arXiv 2304.07327), as ordinary records.

A tree is one record: {"message_tree_id", "tree_state", "prompt": message}; a message is {"message_id", "text", "role": prompter or assistant, "lang",
"review_result", "deleted", "rank", "replies": [message, ...]}, and rank 0 is the best of its siblings. The flat tables of the same data have one message a row,
with "parent_id" in place of replies.

From a tree come rankings (a question with its ranked answers, for objectives that compare) and paths (conversations along the best answers, to learn from).

What is left out, and counted:
1. Trees whose state is another than ready_for_export: they were given up, stopped by a moderator, or are not finished.
2. Messages that were deleted, or that reviewers refused (review_result false), with all that follows them. One that nobody reviewed stays.
3. Answers without a rank where others have one; in paths, questions with several answers and no rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ..core import LuthierError
from .formats import Bad, Record

NAME = "tree"  # of the shape
READY = "ready_for_export"
ROLES = {"prompter": "user", "assistant": "assistant"}
NOT_READY = "conversation trees that were not finished or were given up"
DELETED = "messages of trees that were deleted, with what follows them"
REFUSED = "messages of trees that reviewers refused, with what follows them"
UNRANKED = "answers of trees without a rank, beside ranked ones"
UNDECIDED = "questions of trees with several answers and no rank"
ROOTLESS = "messages whose conversation does not begin in the file"

Message = dict[str, Any]


def is_tree(fields: Mapping[str, Any]) -> bool:
    """Whether a record is a conversation tree."""
    root = fields.get("prompt")
    return isinstance(root, dict) and {"text", "role"} <= root.keys()


def is_message(fields: Mapping[str, Any]) -> bool:
    """Whether a record is one message of a flat table of trees."""
    return {"message_id", "text", "role"} <= fields.keys() and fields["role"] in ROLES


# --- tables to trees -------------------------------------------------------------------------------------------------


def whole_trees(records: Iterable[Record], bad: Bad) -> Iterator[Record]:
    """Records as they are; but of a table of messages the trees, in the order of their first messages. The whole table is read before the first tree."""
    records = iter(records)
    first = next(records, None)
    if first is None:
        return
    if not is_message(first.fields):
        yield first
        yield from records
        return
    found: dict[str, tuple[Message, str]] = {}
    for record in chain([first], records):
        if not is_message(record.fields):
            bad.add(record.where, "not a message like the rows before it, which have message_id, text and role (prompter or assistant)")
        elif record.fields["message_id"] in found:
            bad.add(record.where, f"the message_id {record.fields['message_id']!r} is there already, at {found[record.fields['message_id']][1]}")
        else:
            found[record.fields["message_id"]] = ({**record.fields, "replies": []}, record.where)
    for message, _ in found.values():
        parent = message.get("parent_id")
        if parent in found:
            found[parent][0]["replies"].append(message)
    reached = 0
    for message, where in found.values():
        if message.get("parent_id") is None:
            reached += sum(1 for _ in _all(message))
            yield Record({"message_tree_id": message["message_id"], "tree_state": message.get("tree_state"), "prompt": message}, where)
    bad.leave_out(ROOTLESS, len(found) - reached)


def _all(root: Message) -> Iterator[Message]:
    waiting = [root]
    while waiting:
        message = waiting.pop()
        yield message
        waiting += message["replies"]


def in_languages(records: Iterable[Record], languages: Sequence[str], bad: Bad, found: dict[str, int] | None = None) -> Iterator[Record]:
    """The records of some languages: of trees by their first message, of others by a column lang or language. "pt" also takes pt-BR; () takes everything.

    ``found`` is where the records of each language are counted, whether they are taken or not. Raises LuthierError where no record is in any of them.
    """
    wanted, kept, others = {name.lower() for name in languages}, 0, dict[str, int]()
    for record in records:
        language = _language(record.fields["prompt"] if is_tree(record.fields) else record.fields)
        if found is not None and language:
            found[language] = found.get(language, 0) + 1
        if not wanted or {language.lower(), language.lower().partition("-")[0]} & wanted:
            kept += 1
            yield record
        else:
            others[language] = others.get(language, 0) + 1
    if others and not kept:
        raise LuthierError(f"no record is in the language {' or '.join(languages)}; found: {listed(others)}")
    bad.leave_out(f"records in other languages ({listed(others)})", sum(others.values()))


def listed(languages: Mapping[str, int]) -> str:
    """Languages and their counts in words, the commonest first."""
    return ", ".join(f"{name or 'none named'} {n:,}" for name, n in sorted(languages.items(), key=lambda x: -x[1]))


def _language(fields: Mapping[str, Any]) -> str:
    return str(fields.get("lang") or fields.get("language") or "")


# --- trees to records ------------------------------------------------------------------------------------------------


@dataclass
class _Question:
    """A message of the prompter, what was said before it, and its answers."""

    path: list[Message]
    answers: list[Message]

    def best(self) -> Message | None:
        """The best answer, or the only one; None where nobody can tell."""
        ranked = [a for a in self.answers if a.get("rank") is not None]
        if ranked:
            return min(ranked, key=lambda a: a["rank"])
        return self.answers[0] if len(self.answers) == 1 else None


def rankings(record: Record, bad: Bad) -> list[Record]:
    """The rankings of a tree, as records of what was said up to a question and its answers, best first, those of the same rank in a list of their own."""
    out = []
    for question in _questions(record, bad):
        ranked = [a for a in question.answers if a.get("rank") is not None]
        if ranked:
            bad.leave_out(UNRANKED, len(question.answers) - len(ranked))
        if len(ranked) < 2:
            continue
        places = [[a["text"] for a in ranked if a["rank"] == rank] for rank in sorted({a["rank"] for a in ranked})]
        fields = {"prompt": _messages(question.path), "ranked": [p[0] if len(p) == 1 else p for p in places]}
        out.append(_record(fields, question.path, record))
    return out


def paths(record: Record, bad: Bad) -> list[Record]:
    """Conversations along the best answers of a tree, one for each last question. Each answer is learned once: where another path has it, its weight is 0."""
    by_question = {id(q.path[-1]): q for q in _questions(record, bad)}
    bad.leave_out(UNDECIDED, sum(q.best() is None for q in by_question.values()))
    out, learned = [], set[int]()
    waiting = [[record.fields["prompt"]]] if id(record.fields["prompt"]) in by_question else []
    while waiting:
        path = waiting.pop()
        best = by_question[id(path[-1])].best()
        if best is None:
            continue
        path = [*path, best]
        asked = [r for r in _replies(best) if id(r) in by_question and by_question[id(r)].best() is not None]
        waiting += [[*path, r] for r in reversed(asked)]
        if asked:
            continue
        messages = [{**said, "weight": 0} if id(m) in learned else said for said, m in zip(_messages(path), path, strict=True)]
        learned |= {id(m) for m in path}
        out.append(_record({"messages": messages}, path, record))
    return out


def _questions(record: Record, bad: Bad) -> list[_Question]:
    """Every answered question of a tree, those that come first before those that follow; nothing of a tree that is not ready."""
    state = record.fields.get("tree_state")
    if state not in (None, READY):
        bad.leave_out(NOT_READY)
        return []
    out: list[_Question] = []
    waiting = _grown([], [record.fields["prompt"]], record, bad)
    while waiting:
        path = waiting.pop()
        further = _grown(path, _replies(path[-1]), record, bad)
        if path[-1]["role"] == "prompter" and further:
            out.append(_Question(path, [p[-1] for p in further]))
        waiting += reversed(further)
    return out


def _grown(path: list[Message], replies: Sequence[Message], record: Record, bad: Bad) -> list[list[Message]]:
    """The path with each of its replies that is kept; one that cannot be read is a bad row."""
    out = []
    for longer in ([*path, r] for r in _kept(replies, bad)):
        if reason := _fault(longer):
            bad.add(record.where, f"message {longer[-1].get('message_id', '')!r} of the tree {reason}")
        else:
            out.append(longer)
    return out


def _fault(path: Sequence[Message]) -> str | None:
    """What is wrong with the last message of a path."""
    last = path[-1]
    if last.get("role") not in ROLES:
        return f"has the role {last.get('role')!r}; prompter and assistant are accepted"
    if not isinstance(last.get("text"), str) or not last["text"].strip():
        return "has no text"
    if not isinstance(last.get("rank"), int | None):
        return f"has the rank {last['rank']!r}; a whole number is accepted, 0 for the best"
    if last["role"] == (path[-2]["role"] if len(path) > 1 else "assistant"):
        return f"is of the {last['role']} and follows " + (f"one of the {last['role']}" if len(path) > 1 else "nothing")
    return None


def _replies(message: Message) -> list[Message]:
    return message.get("replies") or []


def _kept(messages: Sequence[Message], bad: Bad) -> list[Message]:
    deleted = [m for m in messages if m.get("deleted")]
    refused = [m for m in messages if m.get("review_result") is False and not m.get("deleted")]
    bad.leave_out(DELETED, len(deleted))
    bad.leave_out(REFUSED, len(refused))
    return [m for m in messages if not m.get("deleted") and m.get("review_result") is not False]


def _messages(path: Sequence[Message]) -> list[dict[str, Any]]:
    return [{"role": ROLES[m["role"]], "content": m["text"]} for m in path]


def _record(fields: dict[str, Any], path: Sequence[Message], tree: Record) -> Record:
    """A record that says which tree it is of, and where in it."""
    of = {"message_tree_id": tree.fields.get("message_tree_id"), "message_id": path[-1].get("message_id"), "lang": _language(path[0])}
    return Record(fields | {k: v for k, v in of.items() if v}, f"{tree.where}, message {of['message_id']}" if of["message_id"] else tree.where)
