"""Characters that a wrong encoding, an editor or a web page has left in the text. What can be put right without guessing, --fix puts right."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from ..words import short
from . import Again, Check, Finding, Hits, Seen, Setting

REPLACED = re.compile("\ufffd")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# soft hyphen, zero-width space, left-to-right and right-to-left marks and overrides, byte order mark; not the joiners, which Indic scripts and emoji need
UNSEEN = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{2,5}|#x[0-9a-fA-F]{2,5});")
ESCAPE = re.compile(r"(?:\\n){2}|[a-z.,:]\\n[A-Z\d-]|\\u[0-9a-f]{4}")
# a Latin letter beside a Cyrillic or Greek one that looks like a Latin one
MIXED = re.compile(r"[A-Za-z][АВЕКМНОРСТХаеорсухіјѕΑΒΕΖΗΙΚΜΝΟΡΤΥΧο]|[АВЕКМНОРСТХаеорсухіјѕΑΒΕΖΗΙΚΜΝΟΡΤΥΧο][A-Za-z]")
AROUND = 30  # characters shown before and behind


def _mojibake(text: str) -> re.Match[str] | None:
    """Where UTF-8 was read as another encoding, by what the ftfy library knows of such sequences; None where undoing it changes nothing."""
    from ftfy import fix_encoding
    from ftfy.badness import BADNESS_RE

    found = BADNESS_RE.search(text)
    return found if found and fix_encoding(text) != text else None


def _repaired(text: str) -> str:
    from ftfy import fix_encoding

    return text if text.isascii() or not _mojibake(text) else fix_encoding(text)


def _without(pattern: re.Pattern[str]) -> Callable[[str], str]:
    return lambda text: pattern.sub("", text)


# name, severity, title, what it means, how it is found, only where there is more than ASCII, what --fix makes of a text, what is to be done
KINDS: tuple[tuple[str, str, str, str, Callable[[str], re.Match[str] | None], bool, Callable[[str], str] | None, str], ...] = (
    ("mojibake", "warning", "Text that was read in the wrong encoding", "UTF-8 was taken for Latin-1 or Windows-1252 on the way: Ã¼ for ü, â€™ for ’",
     _mojibake, True, _repaired, "read the source as UTF-8; --fix undoes it"),
    ("replacement_characters", "warning", "Characters that are lost", "U+FFFD stands where a character could not be read; what it was is gone",
     REPLACED.search, True, None, "read the source again in its own encoding"),
    ("control_characters", "warning", "Control characters", "they are orders to a terminal or rests of another format, and no text",
     CONTROL.search, False, _without(CONTROL), "--fix takes them out"),
    ("unseen_characters", "note", "Characters that cannot be seen", "zero-width spaces, direction marks and soft hyphens split words into odd tokens",
     UNSEEN.search, True, _without(UNSEEN), "--fix takes them out"),
    ("mixed_scripts", "note", "Words of two alphabets", "a Cyrillic or Greek letter that looks like a Latin one makes a word that no dictionary has",
     MIXED.search, True, None, "correct them, if they are not meant"),
    ("entities", "note", "HTML entities", "&amp; and the like are learned as they stand",
     ENTITY.search, False, None, "nothing where the text is HTML; else write the characters themselves"),
    ("escapes", "note", "Escapes that were not undone", "a backslash and an n, not a line break (text that was escaped twice)",
     ESCAPE.search, False, None, "undo the second escaping where the text is no program"),
)  # fmt: skip
CHEAP = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f&\\]")  # nothing to be found in ASCII without one of these


class Encoding(Check):
    """Each kind by its pattern."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.found = {kind[0]: Hits() for kind in KINDS}

    def row(self, row: Seen) -> None:
        text = row.text
        plain = text.isascii()
        if plain and not CHEAP.search(text):
            return
        for name, _, _, _, find, beyond, _, _ in KINDS:
            if not (plain and beyond) and (match := find(text)):
                self.found[name].add(row.index, short(text[max(0, match.start() - AROUND) : match.end() + AROUND], 140))
                text = _repaired(text) if name == "mojibake" else text  # whose odd characters are its own, and no finding of their own

    def findings(self, again: Again) -> Iterator[Finding]:
        for name, severity, title, meaning, _, _, mend, fix in KINDS:
            if hits := self.found[name]:
                yield Finding(
                    name=name,
                    severity=severity,  # type: ignore[arg-type]
                    title=title,
                    said=meaning,
                    fix=fix,
                    hits=hits,
                    mends=mend,
                )
