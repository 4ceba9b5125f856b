"""Conversations: what is said after the last answer, tools that were never declared, prompts that say nothing, answers that break off."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..shapes import Chat
from ..words import short, words
from . import Again, Check, Finding, Hits, Seen, Setting, share

LONG = 40  # words from which on an answer that ends without a stop is taken to break off
_ENTRY = re.compile(r"\s*(?:[-*•·–#]|\w{1,3}[.)])\s*")
STOPS = ".!?:;)]}>\"'`*|_~…»”’。！？）】」』॥।؟#$%=+-/\\"


class Turns(Check):
    """What is in a conversation and is not trained, and what was meant to be and is not there."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.behind, self.blank, self.broken = Hits(), Hits(), Hits()
        self.answers = 0

    def row(self, row: Seen) -> None:
        if row.split != "train" or not isinstance(row.item, Chat):
            return
        last = row.item.messages[-1]
        if last["role"] != "assistant":
            self.behind.add(row.index, f"{last['role']}: {short(last['content'], 100)}")
        if any(m["role"] == "user" and not m["content"].strip() for m in row.item.messages):
            self.blank.add(row.index)
        self.answers += 1
        if any(_breaks_off(a) for a in row.answers):
            self.broken.add(row.index, "... " + short(next(a for a in row.answers if _breaks_off(a))[-80:], 100))

    def findings(self, again: Again) -> Iterator[Finding]:
        if self.blank:
            yield Finding(
                name="empty_prompts",
                severity="warning",
                title="Empty prompts",
                said="the answer is learned to no question",
                fix="write the question, or --fix leaves them out; plain text is learned with objective: text",
                hits=self.blank,
                removes=self.blank,
            )
        if self.behind:
            yield Finding(
                name="unanswered",
                severity="note",
                title="Conversations that end with a question",
                said="what comes after the last answer is left out: nothing is learned from it",
                fix="nothing, or add the answer",
                hits=self.behind,
            )
        if len(self.broken) > 0.001 * self.answers:
            yield Finding(
                name="broken_off",
                severity="warning" if len(self.broken) > 0.05 * self.answers else "note",
                title="Long responses that stop in the middle of a sentence",
                said=f"{share(len(self.broken), self.answers)} of the responses; they may have been cut off where they were made, and teach to stop anywhere",
                fix="look at some; sample them again with room for the whole answer",
                hits=self.broken,
            )


class Tools(Check):
    """Calls of tools against the tools that are declared."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.undeclared, self.arguments = Hits(), Hits()

    def row(self, row: Seen) -> None:
        if row.split != "train" or not isinstance(row.item, Chat):
            return
        calls = [c["function"] for m in row.item.messages for c in m.get("tool_calls") or ()]
        if not calls:
            return
        known = {t["function"].get("name"): t["function"] for t in row.item.tools or ()}
        wrong = next((c["name"] for c in calls if c["name"] not in known), None)
        if wrong is not None:
            self.undeclared.add(row.index, f"{wrong} is called; declared: {', '.join(map(str, known)) or 'nothing'}")
            return
        if fault := next((f for c in calls if (f := _fault(c, known[c["name"]].get("parameters")))), None):
            self.arguments.add(row.index, fault)

    def findings(self, again: Again) -> Iterator[Finding]:
        if self.undeclared:
            yield Finding(
                name="tools_undeclared",
                severity="warning",
                title="Calls of tools that are not declared",
                said="the model learns to call what it was not offered",
                fix="declare the tools in a column tools",
                hits=self.undeclared,
            )
        if self.arguments:
            yield Finding(
                name="tool_arguments",
                severity="warning",
                title="Tool calls with the wrong arguments",
                said="they lack one that the declaration requires, or have one it does not know",
                fix="correct the calls or the declarations",
                hits=self.arguments,
            )


def _fault(call: dict[str, Any], schema: Any) -> str | None:
    """What is wrong with a call's arguments by the declared JSON schema: names only."""
    given = call["arguments"]
    if not isinstance(given, dict):
        return f"{call['name']}: the arguments are no object"
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        return None
    if lacking := [name for name in schema.get("required") or () if name not in given]:
        return f"{call['name']} lacks {lacking[0]}"
    if (odd := [name for name in given if name not in schema["properties"]]) and schema.get("additionalProperties") in (None, False):
        return f"{call['name']} has no {odd[0]}; it has: {', '.join(schema['properties']) or 'nothing'}"
    return None


def _breaks_off(answer: str) -> bool:
    """Whether a long text ends on a word or a comma, and not as the last entry of a list would."""
    end = answer.rstrip()
    if not end or end[-1] in STOPS or not (end[-1].isalpha() or end[-1] == ","):
        return False
    *before, last = [line for line in end.splitlines() if line.strip()]
    if _ENTRY.match(last) or (before and before[-1].rstrip()[-1] not in STOPS):  # the last entry of a list ends so too
        return False
    return len(words(last)) >= 8 and len(words(end)) >= LONG


class Remarks(Check):
    """What the renderer has to say of rows: how many it is said of."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.said: dict[str, Hits] = {}

    def row(self, row: Seen) -> None:
        for text in row.notes if row.split == "train" else ():
            self.said.setdefault(text, Hits()).add(row.index)

    def findings(self, again: Again) -> Iterator[Finding]:
        for i, (text, hits) in enumerate(self.said.items()):
            if "special tokens, spelt out" in text or "no end-of-sequence" in text or "same text" in text:
                continue  # each a finding of its own
            title, _, rest = text.partition(": ")
            yield Finding(
                name="rendering" if not i else f"rendering_{i + 1}",
                severity="note",
                title=f"{title[0].upper()}{title[1:]}",
                said=rest or "so the chat template and the tokenizer make it",
                fix="nothing, or another model.template",
                hits=hits,
            )
