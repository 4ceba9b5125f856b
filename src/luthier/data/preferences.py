"""Preferences: which columns hold them, and one normal form: the answers to one prompt, and how they were judged.

Pairs (chosen, rejected), rankings (ranked: best first, a list inside it for a tie) and single judged answers (label: true or false), with the prompt as
a text, as messages, or inside the answers: then what all answers begin with is the prompt. A text of turns that begin with "Human:" and "Assistant:"
(Bai et al., 2022, arXiv 2204.05862) is read as a conversation. Conversation trees with ranked replies (see trees.py) hold a ranking for each question.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..core import LuthierError
from .convert import convert
from .formats import Bad, Record
from .shapes import Chat, Shape
from .trees import NAME as TREE
from .trees import is_tree, rankings

PARTS = ("prompt", "system", "tools", "chosen", "rejected", "ranked", "completion", "label", "margin", "tie")
PROMPTS = ("prompt", "question", "query", "instruction", "messages", "conversations", "conversation")
ANSWERS = ("completion", "response", "answer", "output")
LABELS = ("label", "kto_tag")
REJECTED = ("rejected", "rejected_response", "rejected_messages")
RANKED = Shape("ranked", {"prompt": "prompt", "ranked": "ranked"})
BETWEEN = "answers between the best and the worst of a ranking: it says which are better, not whether they are good"
ALL_TIED = "records whose answers are all tied: which of them are good is not said"
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Judged:
    """Answers to one prompt, each as the conversation that it ends, and how they were judged."""

    chats: tuple[Chat, ...]
    prompt: int  # the first so many messages are the prompt, the same in all
    ranks: tuple[int, ...] = ()  # of each answer, 0 is best, equal ones are tied; () where they are not compared
    good: bool | None = None  # of a single answer
    margin: float = 0.0
    where: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)  # the record as it was written

    def answers(self) -> list[str]:
        """The answers as texts."""
        return ["\n".join(m["content"] for m in c.messages[self.prompt :] if m["content"]) for c in self.chats]


# --- columns ---------------------------------------------------------------------------------------------------------


def detect_preferences(records: Sequence[Record], *, renders: str, columns: Mapping[str, str] | None = None, judged: bool = True) -> Shape:
    """Which columns hold prompt and answers: a Shape "pairs", "ranked", "judged" or "tree". ``columns`` (ours: yours) decides first.

    ``renders``: what the objective reads: pairs and rankings ("ranked", "pairs"), or single answers ("judged", which takes pairs apart). ``judged`` False:
    the answers are to be scored, so a prompt and one answer will do. Raises LuthierError where a part is missing, naming what would be read.
    """
    first, there = records[0], {key for r in records for key in r.fields}
    if is_tree(first.fields) and not columns:
        return Shape(TREE, {"prompt": "prompt"})
    found = _mapped(first, there, columns or {})
    free = there - set(found.values())

    def look(part: str, names: Sequence[str]) -> bool:
        if part not in found and (name := next((n for n in names if n in free), None)):
            found[part] = name
        return part in found

    look("prompt", PROMPTS)
    for part in ("system", "tools", "margin", "tie"):
        look(part, (part,))
    if "completion" not in found and look("ranked", ("ranked",)):
        return _shape("ranked", found)
    pair = look("rejected", REJECTED) and (look("chosen", ("chosen",)) or _is_chat(first.fields.get(found.get("prompt", ""))))
    if pair and "completion" not in found:
        return _shape("pairs", found)
    flag = look("label", [n for n in LABELS if any(_truth(r.fields.get(n)) is not None for r in records)])
    answered = look("completion", ANSWERS) or _is_chat(first.fields.get(found.get("prompt", "")))
    if answered and "prompt" in found and (flag or not judged):
        if judged and renders != "judged":
            raise LuthierError(
                f"{first.where}: these are single answers, each judged by itself (column {found['label']!r}), and this objective compares answers to one "
                "prompt; set objective: kto, or name columns chosen and rejected"
            )
        return _shape("judged", found)
    wanted = "prompt, completion and label; or chosen and rejected" if renders == "judged" else "chosen and rejected; or ranked (a list, best first)"
    raise LuthierError(
        f"{first.where}: no judged answers are found here. Looked for: {wanted}. Columns found: {', '.join(first.fields)}. "
        "Say which is which, for example data.columns={prompt: question, chosen: better, rejected: worse}."
    )


def _shape(name: str, found: Mapping[str, str]) -> Shape:
    own = {"pairs": ("chosen", "rejected", "margin", "tie"), "ranked": ("ranked",), "judged": ("completion", "label")}[name]
    return Shape(name, {p: found[p] for p in PARTS if p in found and p in ("prompt", "system", "tools", *own)})


def _mapped(first: Record, there: set[str], columns: Mapping[str, str]) -> dict[str, str]:
    for ours, yours in columns.items():
        if ours not in PARTS:
            raise LuthierError(f"data.columns: preferences have no part {ours!r}; they have: {', '.join(PARTS)}.")
        if yours not in there:
            near = difflib.get_close_matches(yours, there, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise LuthierError(f"{first.where}: no column {yours!r} (wanted for {ours!r}). Columns found: {', '.join(first.fields)}.{hint}")
    return dict(columns)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_message(m) for m in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _begins_with_answer(messages: Any) -> bool:
    return messages[0].get("role", messages[0].get("from")) in ("assistant", "gpt", "model")


def _truth(value: Any) -> bool | None:
    """True and false, also as 1 and 0; None for anything else."""
    return bool(value) if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)) else None


# --- records ---------------------------------------------------------------------------------------------------------


class _Unusable(Exception):
    """Why a record cannot be used."""


def convert_preferences(record: Record, shape: Shape, bad: Bad, *, renders: str) -> list[Judged]:
    """The record in normal form; a bad row is reported and gives none. A tree gives its rankings.

    For ``renders`` "judged" the best answers of a ranking are good and the worst are bad; what lies between is left out, and counted.
    """
    if shape.name == TREE:
        return [item for r in rankings(record, bad) for item in convert_preferences(r, RANKED, bad, renders=renders)]
    try:
        item = _converted(record, shape)
        if renders != "judged" or item.good is not None or not item.ranks:
            return [item]
        worst = max(item.ranks)
        if worst == 0:
            bad.leave_out(ALL_TIED)
            return []
        bad.leave_out(BETWEEN, sum(0 < rank < worst for rank in item.ranks))
        ends = [(c, rank) for c, rank in zip(item.chats, item.ranks, strict=True) if rank in (0, worst)]
        return [replace(item, chats=(c,), ranks=(), good=rank == 0) for c, rank in ends]
    except _Unusable as e:
        bad.add(record.where, str(e))
        return []


def _converted(record: Record, shape: Shape) -> Judged:
    get = lambda part: record.fields.get(shape.columns[part]) if part in shape.columns else None  # noqa: E731
    prompt, column = get("prompt"), shape.columns
    good: bool | None = None
    margin, ranks = 0.0, tuple[int, ...]()
    if shape.name == "judged":
        names, answers = [column.get("completion", column["prompt"])], [get("completion")]
        if "completion" not in column:
            prompt, answers = _last_answer(prompt, column["prompt"])
        if "label" in column and (good := _truth(get("label"))) is None:
            raise _Unusable(f"column {column['label']!r} is {get('label')!r}; true and false are accepted")
    elif shape.name == "ranked":
        answers, ranks = _ranking(get("ranked"), column["ranked"])
        names = [column["ranked"]] * len(answers)
    else:
        names, answers = [column.get("chosen", column.get("prompt", "chosen")), column["rejected"]], [get("chosen"), get("rejected")]
        if "chosen" not in column:  # the conversation holds the better answer
            if _is_chat(answers[1]) and not _begins_with_answer(answers[1]):
                answers[0] = prompt  # and the worse one stands in a conversation too
            else:
                prompt, answers[:1] = _last_answer(prompt, column["prompt"])
        ranks, margin = _pair_of(record, shape)
    if "input" in record.fields and column.get("prompt") == "instruction" and isinstance(prompt, str) and isinstance(record.fields["input"], str):
        prompt = "\n".join(x for x in (prompt, record.fields["input"]) if x.strip())
    wholes, length = _conversations(prompt, answers)
    if system := get("system"):
        wholes, length = [[{"role": "system", "content": system}, *w] for w in wholes], length + 1
    chats = tuple(_chat(record, w, length, n, get("tools")) for w, n in zip(wholes, names, strict=True))
    return Judged(chats, length, ranks, good, margin, record.where, record.fields)


def _pair_of(record: Record, shape: Shape) -> tuple[tuple[int, int], float]:
    """Ranks and margin of a pair."""
    tie = record.fields.get(shape.columns.get("tie", ""))
    if tie is not None and _truth(tie) is None:
        raise _Unusable(f"column {shape.columns['tie']!r} is {tie!r}; true and false are accepted")
    margin = record.fields.get(shape.columns.get("margin", ""))
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin) or margin < 0):
        raise _Unusable(f"column {shape.columns['margin']!r} is {margin!r}; a number that is not below 0 is accepted")
    return (0, 0 if tie else 1), float(margin or 0.0)


def _ranking(value: Any, column: str) -> tuple[list[Any], tuple[int, ...]]:
    """The answers of a list, best first, and their ranks; answers in a list of their own are tied."""
    if not isinstance(value, list) or not value:
        raise _Unusable(f"column {column!r} is no list of answers; accepted: [best, ..., worst], with a list inside it for answers that are tied")
    places = [v if isinstance(v, list) and v and not _is_chat(v) else [v] for v in value]
    answers = [a for place in places for a in place]
    if len(answers) < 2:
        raise _Unusable(f"column {column!r} has one answer; at least two are needed to compare")
    return answers, tuple(i for i, place in enumerate(places) for _ in place)


def _last_answer(messages: Any, column: str) -> tuple[Any, list[Any]]:
    """A conversation without its last answer, and that answer."""
    if not _is_chat(messages) or len(messages) < 2:
        raise _Unusable(f"column {column!r} is no conversation that ends with an answer")
    return messages[:-1], [messages[-1:]]


def _conversations(prompt: Any, answers: Sequence[Any]) -> tuple[list[list[dict[str, Any]]], int]:
    """Each answer behind its prompt, as messages, and how many messages are the prompt."""
    answers = [(turns(a) or a) if isinstance(a, str) and prompt is None else [a] if _is_message(a) else a for a in answers]
    prompt = (turns(prompt) or prompt) if isinstance(prompt, str) else prompt
    if all(_is_chat(a) and not _begins_with_answer(a) for a in answers):  # conversations with their prompt
        return [list(a) for a in answers], _opening(answers)
    if prompt is None:
        if not all(isinstance(a, str) for a in answers):
            raise _Unusable("there is no prompt; accepted: a column prompt, or answers that begin with it")
        prompt, answers = _shared(answers)
    before = list(prompt) if _is_chat(prompt) else [{"role": "user", "content": prompt}]
    return [[*before, *(a if _is_chat(a) else [{"role": "assistant", "content": a}])] for a in answers], len(before)


def turns(text: str) -> list[dict[str, str]] | None:
    """The messages of a text that begins with "Human:"; None for any other. Empty turns are left out: that of the assistant at the end of a prompt is one."""
    parts = TURN.split(text.strip())
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human" or not parts[2].strip():
        return None
    out: list[dict[str, str]] = []
    for who, said in zip(parts[1::2], parts[2::2], strict=True):
        role = "user" if who == "Human" else "assistant"
        if not said.strip():
            continue
        if out and out[-1]["role"] == role:  # one who speaks twice in a row has one turn
            out[-1]["content"] += "\n\n" + said.strip()
        else:
            out.append({"role": role, "content": said.strip()})
    return out


def _opening(wholes: Sequence[Sequence[Any]]) -> int:
    """How many messages conversations begin with in common; all but the last of one alone."""
    if len(wholes) == 1:
        return len(wholes[0]) - 1
    most = min(map(len, wholes)) - 1
    same = next((i for i in range(most) if any(w[i] != wholes[0][i] for w in wholes)), most)
    if same == 0:
        raise _Unusable("the conversations do not begin alike, so there is no prompt that all of them answer")
    return same


def _shared(texts: Sequence[str]) -> tuple[str, list[str]]:
    """What texts begin with in common, up to the last space, and their rests."""
    first, last = min(texts), max(texts)  # what these two share, all between them share
    same = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))]
    same = same[: max(same.rfind(c) for c in " \n\t") + 1]
    if not same.strip():
        raise _Unusable("there is no prompt, and the answers do not begin alike; name the prompt's column, data.columns={prompt: ...}")
    return same.strip(), [t[len(same) :] for t in texts]


def _chat(record: Record, messages: list[dict[str, Any]], prompt: int, column: str, tools: Any) -> Chat:
    """A checked conversation in which only what follows the prompt is learned."""
    found = Bad("skip")
    made = convert(Record({"messages": messages, "tools": tools}, record.where), Shape("messages", {"messages": "messages", "tools": "tools"}), found)
    if found.count:
        raise _Unusable(f"column {column!r}: {found.rows[0][1]}")
    chat = made[0]
    assert isinstance(chat, Chat)
    if chat.messages[prompt]["role"] != "assistant":
        raise _Unusable(f"column {column!r}: what follows the prompt is a message of the {chat.messages[prompt]['role']}, not an answer")
    given = frozenset(i for i, m in enumerate(chat.messages[:prompt]) if m["role"] == "assistant")
    return replace(chat, untrained=given, extras={})
