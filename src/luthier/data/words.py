"""Texts as words, and words as numbers: what duplicates, leaks and repeated sentences are found by.

A word is a run of letters or digits, lower case; a Chinese, Japanese or Korean character is one by itself, since those scripts put no space between words.
Hashes are the same in every process, so that what is found does not depend on chance.
"""

from __future__ import annotations

import re

import numpy as np
import xxhash

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}_]+")
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+|(?<=[。！？])")
_REMEMBERED = 1_000_000  # different words kept with their hash
_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing


class _Numbers(dict[str, int]):
    def __missing__(self, word: str) -> int:
        if len(self) >= _REMEMBERED:
            self.clear()
        number = self[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return number


_numbers = _Numbers()


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    return _WORD.findall(text.lower())


def number(text: str) -> int:
    """64 bits that stand for exactly this text."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def numbers(found: list[str]) -> np.ndarray:
    """(n,) uint64, one for each word."""
    return np.fromiter(map(_numbers.__getitem__, found), dtype=np.uint64, count=len(found))


def grams(numbered: np.ndarray, n: int) -> np.ndarray:
    """(len - n + 1,) uint64, one for each run of ``n`` words; a shorter text is one run of all its words, an empty one none."""
    if not len(numbered):
        return numbered
    n = min(n, len(numbered))
    count = len(numbered) - n + 1
    out = numbered[:count].copy()
    for k in range(1, n):
        out *= _STEP
        out ^= out >> np.uint64(29)
        out += numbered[k : k + count]
    return out


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text, without the space around them."""
    return [s for s in (part.strip() for part in _SENTENCE.split(text)) if s]


def short(text: str, most: int = 160) -> str:
    """A text on one line, cut in its middle where it is long; what is no character but an order to a terminal made visible."""
    line = " ".join(text.split())
    if len(line) > most:
        line = f"{line[: most * 2 // 3].rstrip()} ... {line[-most // 3 :].lstrip()}"
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in line)
