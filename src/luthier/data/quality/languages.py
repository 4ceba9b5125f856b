"""Which languages the rows are in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from . import Again, Check, Finding, Hits, Seen, Setting, share

SAMPLE = 5_000  # rows that are looked at, evenly spread: naming a language takes half a millisecond
LETTERS, READ = 30, 250  # a shorter text is not judged; so many characters of a longer one are read
SURE = 0.9  # of the probability, for a language to be named
MAIN = 0.6  # share of the main language below which the data is taken to be multilingual
NAMED = 6
NONE = "zxx"  # no language at all


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class Languages(Check):
    """The language of what is learned, named by py3langid (Lui and Baldwin, 2012) where it is sure."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.every = max(1, round(setting.expected / SAMPLE))
        self.at = self.looked = 0
        self.hits: dict[str, Hits] = {}

    def row(self, row: Seen) -> None:
        if row.split != "train":
            return
        self.at += 1
        if self.at % self.every:
            return
        text = (row.answers[-1] if row.answers else row.prompt)[:READ]
        if sum(c.isalpha() for c in text) < LETTERS:
            return
        language, sure = _identifier().classify(text)
        if sure >= SURE and language != NONE:
            self.looked += 1
            self.hits.setdefault(language, Hits()).add(row.index, language)

    def findings(self, again: Again) -> Iterator[Finding]:
        counts = Counter({name: len(hits) for name, hits in self.hits.items()})
        if len(counts) < 2:
            return
        main, n = counts.most_common(1)[0]
        named = ", ".join(f"{name} {share(m, self.looked)}" for name, m in counts.most_common(NAMED))
        of = f"of {self.looked:,} rows that could be told" + (f" (every {self.every}th was looked at)" if self.every > 1 else "")
        others = Hits()
        for index, name in sorted((i, name) for name, hits in self.hits.items() if name != main for i in hits.rows):
            others.add(index, name)
        yield Finding(
            name="languages",
            severity="note",
            title="Several languages" if n < MAIN * self.looked else f"Rows in another language than most ({main})",
            said=f"{of}: {named}",
            fix="nothing, where it is meant; a column lang or language lets data.languages=[...] choose",
            hits=others,
        )
