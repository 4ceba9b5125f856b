"""Records that give nothing to train on: why, by kind. With the setting data.on_bad_row as it is by default the first of them stops a run."""

from __future__ import annotations

import re
from collections.abc import Iterator

from . import Again, Check, Finding, Hits

TWICE, SURROGATE = "begins with", "half a character"
# (name, title, what the reason looks like, what that means), the first that fits
KINDS: tuple[tuple[str, str, str, str], ...] = (
    ("role_order", "Roles in an order that no template has", r"the role \w+ comes|has the role|two system prompts",
     "a conversation is system (at most one, first), then user and assistant in turns; tool results follow a call"),
    ("empty", "Empty rows", r"\bis empty\b|is null|is an empty|is missing|has no text", "there is no text where one is needed"),
    ("labels_lost", "Rows with nothing to learn", r"no assistant message to learn from|leaves the answer out",
     "none of their tokens would be trained, so they only cost time"),
    ("double_bos", "Rows that begin with the beginning token twice", TWICE,
     "models see it once; the template or the text writes it, and the tokenizer adds it too"),
    ("surrogates", "Halves of characters", SURROGATE, "a \\ud800-\\udfff escape without its partner is no character, and no tokenizer takes it"),
    ("tool_calls_unread", "Tool calls that cannot be read", r"tool call|tools is|^tools:|function_call|: not JSON",
     "calls and their arguments have to be JSON"),
    ("template_refuses", "Conversations that the chat template refuses", r"the chat template refuses", "the template raises an error on them"),
)  # fmt: skip
MALFORMED = ("malformed", "Lines that cannot be read", "", "they are no rows of this format")
ODD = ("unusable", "Rows that cannot be used", "", "a part of them is of a kind that cannot be trained on")
SETTINGS = {
    "double_bos": "remove the token from the text, or set model.template to one that does not write it",
    "template_refuses": "set model.template to one that can render them (chatml, plain, ...)",
}


class Unusable(Check):
    """Each reason by its kind."""

    def __init__(self, setting: object) -> None:
        self.found: dict[str, Hits] = {}

    def fault(self, index: int, reason: str, *, in_record: bool) -> None:
        name = next((name for name, _, looks, _ in KINDS if in_record and re.search(looks, reason)), ODD[0] if in_record else MALFORMED[0])
        if not in_record and "empty object" in reason:
            name = "empty"
        self.found.setdefault(name, Hits()).add(index, reason)

    def findings(self, again: Again) -> Iterator[Finding]:
        for name, title, _, meaning in (*KINDS, ODD, MALFORMED):
            if hits := self.found.get(name):
                yield Finding(
                    name=name,
                    severity="error",
                    title=title,
                    said=f"{meaning}; training stops at the first",
                    fix=SETTINGS.get(name, "correct them") + "; or leave them out: data.on_bad_row=skip, or --fix",
                    hits=hits,
                    removes=hits,
                )
