"""What a template should write and the text has already: special tokens, other models' markers, thinking tags, placeholders that were never filled in."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..shapes import Chat
from ..words import short
from . import Again, Check, Finding, Hits, Seen, Setting

MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|end|>", "### Instruction:", "### Response:", "<|fim_middle|>",
)  # fmt: skip
ENDS = ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<end_of_turn>", "</s>", "<eos>", "<|end|>")
_AT_END = re.compile(rf"(?:\s*(?:{'|'.join(map(re.escape, ENDS))}))+\s*\Z")
_MARKER = re.compile("|".join(map(re.escape, MARKERS)))
THINK = re.compile(r"<(/?)(think|thinking|reasoning)>")
PLACEHOLDER = re.compile(
    r"\{\{\s*\w+\s*\}\}|\[(?:[Yy]our|[Ii]nsert|Company|Recipient)[A-Za-z' ]{0,30}\]|<(?:[Yy]our|[Ii]nsert)[ _][A-Za-z _]{1,30}>|\bTODO\b|\b[Ll]orem ipsum\b"
)
AROUND = 30


def _shown(text: str, match: re.Match[str]) -> str:
    return short(text[max(0, match.start() - AROUND) : match.end() + AROUND], 140)


class Markers(Check):
    """Special tokens that are spelt out, and the markers of templates that this model does not have."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        tokenizer = setting.renderer.codec.tokenizer
        own = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 2} | set(tokenizer.all_special_tokens)
        self.own = re.compile("|".join(map(re.escape, sorted(own, key=len, reverse=True)))) if own else None
        self.special, self.foreign, self.ended = Hits(), Hits(), Hits()

    def row(self, row: Seen) -> None:
        text = row.text
        if self.own and (match := self.own.search(text)):
            self.special.add(row.index, _shown(text, match))
        elif any(_AT_END.search(a) for a in row.answers):
            self.ended.add(row.index, short("... " + next(a for a in row.answers if _AT_END.search(a))[-60:], 140))
        elif match := _MARKER.search(text):
            self.foreign.add(row.index, _shown(text, match))

    def findings(self, again: Again) -> Iterator[Finding]:
        if self.special:
            yield Finding(
                name="special_tokens",
                severity="warning",
                title="Special tokens in the text",
                said="the model reads them as the tokens themselves: a turn may seem to end in the middle of a sentence, or another to begin",
                fix="take them out of the text: the chat template writes them",
                hits=self.special,
            )
        if self.ended:
            yield Finding(
                name="foreign_ends",
                severity="warning",
                title="Responses that end with another model's marker",
                said="for this tokenizer it is ordinary text, which the model will learn to write out before it stops",
                fix="--fix takes them out; the chat template puts this model's own there",
                hits=self.ended,
                mends=lambda text: _AT_END.sub("", text),
            )
        if self.foreign:
            yield Finding(
                name="foreign_markers",
                severity="warning",
                title="Markers of another model's template",
                said="the rows seem to be rendered already; for this tokenizer these markers are ordinary text",
                fix="give the rows as messages or prompt and response, and let model.template write the markers",
                hits=self.foreign,
            )


class Thinking(Check):
    """Thinking tags: opened and closed, and in the rendered rows as in the data."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.unbalanced, self.thinks, self.left_out = Hits(), Hits(), Hits()
        self.rows = 0

    def row(self, row: Seen) -> None:
        if row.split != "train" or self.setting.renders not in ("chat", "pairs", "judged", "ranked"):
            return
        self.rows += 1
        thoughts = [m["reasoning_content"] for m in row.item.messages if m.get("reasoning_content")] if isinstance(row.item, Chat) else []
        tags = [list(THINK.finditer(a)) for a in row.answers]
        if thoughts or any(tags):
            self.thinks.add(row.index)
        if any(not _balanced([(bool(m[1]), m[2]) for m in found]) for found in tags):
            self.unbalanced.add(row.index, next(_shown(a, found[0]) for a, found in zip(row.answers, tags, strict=True) if found))
        elif (thoughts or any(tags)) and row.rows and self._missing(row, thoughts, tags):
            self.left_out.add(row.index)

    def _missing(self, row: Seen, thoughts: list[str], tags: list[list[re.Match[str]]]) -> bool:
        """Whether a thought of the data is not in what the model reads."""
        inner = [str(t) for t in thoughts]
        for answer, found in zip(row.answers, tags, strict=True):
            inner += [answer[a.end() : b.start()] for a, b in zip(found[::2], found[1::2], strict=False)]
        decode = self.setting.renderer.codec.tokenizer.decode
        whole = "".join("".join(decode(r.ids.tolist(), skip_special_tokens=False).split()) for r in row.rows)
        return any("".join(t.split())[:40] not in whole for t in inner if t.strip())

    def findings(self, again: Again) -> Iterator[Finding]:
        if self.unbalanced:
            yield Finding(
                name="thinking_unbalanced",
                severity="warning",
                title="Thinking tags that are not closed, or not opened",
                said="what is thought and what is answered cannot be told apart",
                fix="correct the tags: <think> ... </think> before the answer",
                hits=self.unbalanced,
            )
        if self.left_out:
            yield Finding(
                name="thinking_left_out",
                severity="warning",
                title="Thoughts that the chat template leaves out",
                said="they stand in the data and not in what is trained (many templates keep only those of the last turn)",
                fix="data.train_on=last and a row for each turn; or model.template with a template that keeps them",
                hits=self.left_out,
            )
        if self.thinks and len(self.thinks) < self.rows:
            yield Finding(
                name="thinking_mixed",
                severity="note",
                title="Some responses think first, others do not",
                said=f"{len(self.thinks):,} of {self.rows:,}; nothing tells the model which is wanted unless the prompt does",
                fix="a system prompt that says so, or one kind only",
                hits=self.thinks,
            )


class Placeholders(Check):
    """Blanks that were to be filled in."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.found = Hits()

    def row(self, row: Seen) -> None:
        for answer in row.answers if row.split == "train" and self.setting.renders in ("chat", "pairs", "judged") else ():
            if match := PLACEHOLDER.search(answer):
                self.found.add(row.index, _shown(answer, match))
                return

    def findings(self, again: Again) -> Iterator[Finding]:
        if self.found:
            yield Finding(
                name="placeholders",
                severity="warning" if len(self.found) > 0.05 * max(1, self.setting.expected) else "note",
                title="Responses with blanks that were never filled in",
                said="{{name}}, [Your Name] and the like are learned as they stand",
                fix="fill them in before training",
                hits=self.found,
            )


def _balanced(tags: list[tuple[bool, str]]) -> bool:
    """Whether every tag is closed before the next is opened."""
    pairs = zip(tags[::2], tags[1::2], strict=False)
    return len(tags) % 2 == 0 and all(not a[0] and b[0] and a[1] == b[1] for a, b in pairs)
