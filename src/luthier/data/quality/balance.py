"""How often each label, each short answer and each verdict is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ..labels import Labelled, name_of
from ..words import short, words
from . import Again, Check, Finding, Hits, Seen, Setting, share

UNEVEN = 10  # times as frequent
RARE = 8  # examples below which a class is hardly learned
SHORT, CLASSES, EACH = 3, 100, 10  # words of an answer that is a label; at most so many different ones; rows of each on average
ENOUGH, LONGER = 20, 0.75  # pairs, and share of pairs in which length alone would tell the better answer
NAMED = 5


class Balance(Check):
    """Labels of classification, and answers that are labels in all but name."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[int]] = {}  # the first rows of each label
        self.elsewhere: dict[str, Hits] = {}  # labels of held-out rows
        self.numbers = 0
        self.rows = 0
        self.wordy = False

    def row(self, row: Seen) -> None:
        names = self._names(row)
        if row.split != "train":
            for name in names if self.setting.renders == "label" else ():
                self.elsewhere.setdefault(name, Hits()).add(row.index, f"{row.split}: {name}")
            return
        self.rows += 1
        for name in names:
            self.counts[name] += 1
            if len(self.first.setdefault(name, [])) < 3:
                self.first[name].append(row.index)
        if len(self.counts) > 20_000:  # numbers, or answers in their own words
            self.wordy = True
            self.counts.clear()
            self.first.clear()

    def _names(self, row: Seen) -> list[str]:
        if self.setting.renders == "judged":
            return [row.label] if row.label else []
        if isinstance(row.item, Labelled):
            label = row.item.label
            if isinstance(label, float) and not label.is_integer():
                self.numbers += 1
            return [] if label is None or self.wordy else [name_of(x) for x in label] if isinstance(label, tuple) else [name_of(label)]
        if self.setting.renders != "chat" or self.wordy or len(row.answers) != 1:
            return []
        answer = row.answers[0].strip()
        self.wordy = self.wordy or (self.rows > 1000 and len(self.counts) > CLASSES and self.rows < 2 * len(self.counts))
        return [answer] if len(answer) < 60 and len(words(answer)) <= SHORT else []

    def findings(self, again: Again) -> Iterator[Finding]:
        if self.wordy or self.numbers or not self.counts:
            return
        labelled, counted = self.setting.renders in ("label", "judged"), sum(self.counts.values())
        if not labelled and (len(self.counts) > CLASSES or counted < EACH * len(self.counts) or counted < 0.9 * self.rows):
            return
        if len(self.counts) > 1:
            yield from self._uneven(counted)
        if self.setting.renders == "label":
            yield from self._spellings()
            yield from self._unknown()
            yield from self._rare()

    def _uneven(self, counted: int) -> Iterator[Finding]:
        (most, n), (least, m) = self.counts.most_common()[0], self.counts.most_common()[-1]
        if n < UNEVEN * m:
            return
        what = {"judged": "verdicts", "label": "labels"}.get(self.setting.renders, "answers")
        fix = "objective.undesirable and objective.desirable weigh them (kto)" if what == "verdicts" else "more rows of the rare ones; judge by macro-F1 too"
        yield Finding(
            name="imbalance",
            severity="warning",
            title=f"Uneven {what}",
            said=f"{short(most, 40)!r} is {n / m:.0f} times as frequent as {short(least, 40)!r}; always saying the first is right on {share(n, counted)}",
            fix=fix,
            hits=_hits(self.first[least], least),
            count=m,
            unit=f"rows of {short(least, 40)!r}, {n:,} of {short(most, 40)!r}",
        )

    def _spellings(self) -> Iterator[Finding]:
        alike: dict[str, list[str]] = {}
        for name in self.counts:
            alike.setdefault(" ".join(name.casefold().split()), []).append(name)
        hits, twice = Hits(), [sorted(names, key=lambda x: -self.counts[x]) for names in alike.values() if len(names) > 1]
        for names in twice:
            for other in names[1:]:
                for index in self.first[other]:
                    hits.add(index, f"{other!r} beside {names[0]!r}")
        if twice:
            yield Finding(
                name="label_spellings",
                severity="warning",
                title="Labels that differ only in how they are written",
                said="; ".join(" and ".join(f"{x!r} ({self.counts[x]:,})" for x in names) for names in twice[:NAMED]) + ": they become classes of their own",
                fix="write each label in one way",
                hits=hits,
                count=sum(self.counts[x] for names in twice for x in names[1:]),
            )

    def _unknown(self) -> Iterator[Finding]:
        hits = Hits()
        for name, there in self.elsewhere.items():
            for i, index in enumerate(there.rows if name not in self.counts else ()):
                hits.add(index, there.said[min(i, len(there.said) - 1)])
        if hits:
            yield Finding(
                name="unknown_labels",
                severity="error",
                title="Held-out labels that no training row has",
                said="no model trained on these rows can give them, and training stops where they are met",
                fix="correct them, add training rows that have them, or name all labels in objective.labels",
                hits=hits,
            )

    def _rare(self) -> Iterator[Finding]:
        rare = {name: n for name, n in self.counts.items() if n < RARE}
        if not rare or len(self.counts) > sum(self.counts.values()) / RARE:
            return
        hits = Hits()
        for name in sorted(rare, key=lambda x: rare[x]):
            hits.add(self.first[name][0], f"{rare[name]} rows of {name!r}")
        yield Finding(
            name="rare_labels",
            severity="note",
            title=f"Labels with fewer than {RARE} rows",
            said=", ".join(f"{short(n, 30)!r} {rare[n]}" for n in sorted(rare, key=lambda x: rare[x])[:NAMED]) + ": hardly learned, hardly measured",
            fix="more rows of them, or put them together",
            hits=hits,
            count=len(rare),
            unit="labels",
        )


class Verdicts(Check):
    """Compared answers: whether they can be told apart, and whether by their length alone."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.same, self.longer, self.shorter, self.pairs = Hits(), Hits(), Hits(), 0

    def row(self, row: Seen) -> None:
        if row.split != "train" or self.setting.renders not in ("ranked", "pairs"):
            return
        if len({a.strip() for a in row.answers}) == 1:
            self.same.add(row.index)
            return
        self.pairs += 1
        lengths = [len(words(a)) for a in row.answers]
        if len(lengths) == 2 and lengths[0] != lengths[1]:
            (self.longer if lengths[0] > lengths[1] else self.shorter).add(row.index)

    def findings(self, again: Again) -> Iterator[Finding]:
        if self.same:
            yield Finding(
                name="same_answers",
                severity="warning",
                title="Pairs whose answers are the same text",
                said="there is nothing to compare in them; training leaves them out",
                fix="--fix leaves them out",
                hits=self.same,
                removes=self.same,
            )
        more, which = max((self.longer, "longer"), (self.shorter, "shorter"), key=lambda x: len(x[0]))
        if self.pairs >= ENOUGH and len(more) >= LONGER * self.pairs:
            yield Finding(
                name="length_tells",
                severity="warning",
                title="The length tells which answer is better",
                said=f"the {which} answer is the better in {len(more) / self.pairs:.0%} of the pairs: the model learns length",
                fix="pairs of answers of like length, or objective.length_normalised where the objective has it",
                hits=more,
                unit="pairs",
            )


def _hits(rows: list[int], said: str) -> Hits:
    hits = Hits()
    for row in rows:
        hits.add(row, said)
    return hits
