"""The same words in many responses: how they open, how they close, and whole sentences."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

from ..words import number, sentences, short, words
from . import Again, Check, Finding, Hits, Seen, Setting, share

OPENING = 5  # words
LONG = 4  # words from which on a sentence can be boilerplate
SENTENCES = 40  # of one response that are counted, from both its ends
OFTEN, AT_LEAST = 0.02, 10  # share and number of responses that makes it worth a word
TOO_OFTEN = 0.2
NAMED = 3  # sentences that are named


class Boilerplate(Check):
    """Counts by hash, eight bytes each; the words themselves are read again in the end."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.responses = 0
        self.kinds = {"opening": (array("Q"), array("q")), "closing": (array("Q"), array("q")), "sentence": (array("Q"), array("q"))}

    def row(self, row: Seen) -> None:
        if row.split != "train" or self.setting.renders not in ("chat", "judged", "pairs"):
            return
        for answer in row.answers:
            self.responses += 1
            for kind, found in _parts(answer).items():
                keys, rows = self.kinds[kind]
                keys.extend(found)
                rows.extend([row.index] * len(found))

    def findings(self, again: Again) -> Iterator[Finding]:
        for kind, (keys, rows) in self.kinds.items():
            named = list(self._often(np.asarray(keys), np.asarray(rows)))
            if not named:
                continue
            texts = {}
            for index, row in again([int(r[0]) for _, r in named]):
                texts[index] = row
            most = len(named[0][1])
            said = "; ".join(f"{short(_words_of(kind, key, texts[int(r[0])]), 70)!r} in {share(len(r), self.responses)}" for key, r in named[:NAMED])
            hits = Hits()
            for index in named[0][1]:
                hits.add(int(index))
            yield Finding(
                name=f"repeated_{kind}",
                severity="warning" if most > TOO_OFTEN * self.responses else "note",
                title={"opening": "Many responses open alike", "closing": "Many responses close alike", "sentence": "One sentence in many responses"}[kind],
                said=f"{said}{f'; {len(named) - NAMED} more are as common' if len(named) > NAMED else ''}: the model will say so too",
                fix="nothing, where it is meant; otherwise cut it out of the responses, or keep fewer rows that have it",
                hits=hits,
                unit="responses",
                show=lambda row, kind=kind, key=named[0][0]: short(_words_of(kind, key, row), 140),  # type: ignore[misc]
            )

    def _often(self, keys: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(key, rows that have it) of all that are common, the commonest first."""
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        keys, rows = keys[order], rows[order]
        edges = np.flatnonzero(np.diff(keys)) + 1
        starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(keys)]])
        common = np.flatnonzero(ends - starts >= max(AT_LEAST, OFTEN * self.responses))
        for i in sorted(common, key=lambda i: (starts[i] - ends[i], rows[starts[i]])):
            yield int(keys[starts[i]]), rows[starts[i] : ends[i]]


def _parts(answer: str) -> dict[str, list[int]]:
    """Hashes of a response's opening, its last sentence, and those between."""
    opening = words(answer[:200])[:OPENING]
    lines = [w for w in (words(s) for s in sentences(answer)) if len(w) >= LONG]
    if len(lines) > SENTENCES:
        lines = lines[: SENTENCES // 2] + lines[-SENTENCES // 2 :]
    found = [number(" ".join(w)) for w in lines]
    return {
        "opening": [number(" ".join(opening))] if len(opening) == OPENING else [],
        "closing": found[-1:] if len(found) > 1 else [],
        "sentence": list(dict.fromkeys(found[1:-1])),
    }


def _words_of(kind: str, key: int, row: Seen) -> str:
    """The words that a hash of this row stands for."""
    for answer in row.answers:
        if kind == "opening":
            first = words(answer[:200])[:OPENING]
            if number(" ".join(first)) == key:
                return " ".join(answer.split()[:OPENING])
        for s in sentences(answer):
            if number(" ".join(words(s))) == key:
                return s
    return ""
