"""Generated drills for pretraining fiddle: documents that teach copying, and chat turns that give the special tokens a meaning.

A model of this size and diet hardly learns from prose alone to repeat what stands in its context (the induction heads of Olsson et al., 2022,
arXiv 2209.11895), and data-to-text rests on that. So a few per cent of its text says the same thing twice, in many shapes. Words, names and
sentences are sampled from the corpus; the frames are ours. No instrument and no restaurant among them: those are what fiddle is tuned on later.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

END = "<|end|>\n"


@dataclass(frozen=True)
class Words:
    """What drills are made of, taken from the corpus."""

    common: list[str]  # lower-case words
    names: list[str]  # words written with a capital inside sentences
    sentences: list[str]
    pairs: list[tuple[str, str]]  # a sentence and the one after it
    stories: list[str]

    @classmethod
    def of(cls, documents: Sequence[str], stories: Sequence[str], rng: random.Random) -> Words:
        sample = "\n".join(rng.sample(list(documents), min(len(documents), 1500)))
        lower = Counter(re.findall(r"(?<=[a-z,] )[a-z]{3,11}\b(?!')", sample))
        upper = Counter(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,10}\b", sample))
        names = [w for w, n in upper.most_common(2500) if n > 5 and lower[w.lower()] < n]
        common = [w for w, n in lower.most_common(7000)][120:]
        split = [re.split(r"(?<=[.!?]) (?=[A-Z])", p) for p in sample.split("\n") if p and not re.search(r'["\[\]<>]', p)]
        good = [[s for s in p if 25 < len(s) < 220] for p in split]
        pairs = [(a, b) for p in good for a, b in pairwise(p)]
        return cls(common, names, [s for p in good for s in p], pairs, list(stories))


# Things with properties, and ways to say them. A slot's kind says where its values come from: n name, w word, y year, d small number.
SCHEMAS: list[tuple[dict[str, str], list[str]]] = [
    (
        {"name": "n", "home": "n", "trade": "w", "age": "d", "friend": "n", "pet": "w", "colour": "w"},
        [
            "{name} lives in {home}|, works as a {trade}|, is {age} years old|, and has a {pet} called {friend}|, all in {colour}|.",
            "{name}, a {trade} from {home}|, is {age}|; the best friend is {friend}|, the pet a {pet}|, the colour {colour}|.",
        ],
    ),
    (
        {"ship": "n", "captain": "n", "port": "n", "cargo": "w", "built": "y", "crew": "d"},
        [
            "The {ship} sailed from {port}| under Captain {captain}| with a cargo of {cargo}|. It was built in {built}| and carries a crew of {crew}|.",
            "Captain {captain} commands the {ship}|, built in {built}| and bound for {port}| with {cargo}| and {crew} men|.",
        ],
    ),
    (
        {"house": "n", "owner": "n", "rooms": "d", "garden": "w", "door": "w", "built": "y", "price": "d"},
        [
            "{house} House belongs to {owner}|, has {rooms} rooms|, a {garden} garden| and a {door} door"
            "|. It was built in {built}| and sold for {price} pounds|.",
            "Built in {built}|, {house} House has {rooms} rooms|, a {door} door| and a {garden} garden|; {owner} bought it| for {price} pounds|.",
        ],
    ),
    (
        {"book": "n", "author": "n", "year": "y", "subject": "w", "pages": "d", "cover": "w", "shelf": "d"},
        [
            "{author} wrote {book}| in {year}|. It is about {subject}|, has {pages} pages| and a {cover} cover|, and stands on shelf {shelf}|.",
            "On shelf {shelf} stands {book}|, a {cover} book of {pages} pages| about {subject}| by {author}| from {year}|.",
        ],
    ),
    (
        {"animal": "w", "called": "n", "food": "w", "keeper": "n", "weight": "d", "bed": "w"},
        [
            "The {animal} is called {called}|, eats {food}|, weighs {weight} pounds|, sleeps on {bed}| and is kept by {keeper}|.",
            "{keeper} keeps a {animal}| named {called}|, which eats {food}|, sleeps on {bed}| and weighs {weight} pounds|.",
        ],
    ),
    (
        {"traveller": "n", "from": "n", "to": "n", "by": "w", "day": "w", "luggage": "w", "miles": "d"},
        [
            "{traveller} went from {from}| to {to}| by {by}|, {miles} miles|, on a {day} day|, carrying only {luggage}|.",
            "It is {miles} miles from {from}| to {to}|; {traveller} went by {by}| on a {day} day| with {luggage}|.",
        ],
    ),
]


class Drills:
    """One drill a call, in varied formats, from one random stream."""

    def __init__(self, words: Words, rng: random.Random):
        self.words, self.rng = words, rng

    def word(self) -> str:
        return self.rng.choice(self.words.common)

    def name(self) -> str:
        r = self.rng
        return r.choice(self.words.names) if r.random() < 0.6 else f"{r.choice(self.words.names)} {r.choice(self.words.names)}"

    def value(self, kind: str) -> str:
        r = self.rng
        if kind == "y":
            return str(r.randint(1500, 2024))
        if kind == "d":
            return str(r.randint(2, 99) if r.random() < 0.7 else r.randint(100, 9999))
        if kind == "n":
            return self.name()
        return self.word() if r.random() < 0.7 else f"{self.word()} {self.word()}"

    def record(self, least: int = 2, most: int = 7) -> list[tuple[str, str]]:
        """Facts with arbitrary keys."""
        keys = self.rng.sample(self.words.common, self.rng.randint(least, most))
        return [(k, self.value(self.rng.choice("nwwyd"))) for k in keys]

    def schema(self) -> tuple[list[tuple[str, str]], str]:
        """Facts of one sensible thing and a sentence that says them."""
        r = self.rng
        slots, frames = r.choice(SCHEMAS)
        frame = r.choice(frames)
        values = {k: self.value(v) for k, v in slots.items()}
        droppable = [k for p in frame.split("|")[2:] for k in re.findall(r"{(\w+)}", p)]  # never the subject
        dropped = set(r.sample(droppable, r.randint(0, len(droppable))))
        pieces = [p for p in frame.split("|") if not (set(re.findall(r"{(\w+)}", p)) & dropped)]
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", "".join(pieces).format(**values))
        said = {k for p in pieces for k in re.findall(r"{(\w+)}", p)}
        facts = [(k, v) for k, v in values.items() if k in said]
        if r.random() < 0.5:
            r.shuffle(facts)
        text = text.rstrip(".,;") + "."
        return facts, text[:1].upper() + text[1:]

    def facts(self, facts: Sequence[tuple[str, str]]) -> str:
        """One of the ways to write facts down."""
        r = self.rng
        style: Callable[[tuple[str, str]], str]
        join, style = r.choice(
            [
                ("; ", lambda f: f"{f[0]}: {f[1]}"),
                (", ", lambda f: f"{f[0]}[{f[1]}]"),
                (", ", lambda f: f"{f[0]}={f[1]}"),
                (" | ", lambda f: f"{f[0]} | {f[1]}"),
                ("\n", lambda f: f"- {f[0]}: {f[1]}"),
                ("\n", lambda f: f"{f[0]}: {f[1]}"),
                ("\n", lambda f: f"* {f[0]} - {f[1]}"),
                ("\n", lambda f: f"| {f[0]} | {f[1]} |"),
                (", ", lambda f: f'"{f[0]}": "{f[1]}"'),
                (". ", lambda f: f"The {f[0]} is {f[1]}"),
                (", ", lambda f: f"the {f[0]} is {f[1]}"),
                (" and ", lambda f: f"{f[0]} is {f[1]}"),
                (" ", lambda f: f"({f[0]}, {f[1]})"),
            ]
        )
        text = join.join(style(f) for f in facts)
        return f"{{{text}}}" if text.startswith('"') else text

    # --- copying -----------------------------------------------------------------------------------------------------

    def copying(self) -> str:
        """One document in which the second half follows from the first."""
        kind = self.rng.choices(
            [self.same_facts, self.rewritten, self.to_sentence, self.words_again, self.passage_again, self.lookup, self.table], [3, 3, 4, 4, 2, 2, 1]
        )[0]
        return kind()

    def same_facts(self) -> str:
        one = self.facts(self.record())
        again = self.rng.choice(["\n\n", "\nAgain: ", "\nThe same facts once more:\n", "\n---\n", "\nThat is: "])
        return one + "".join(again + one for _ in range(self.rng.randint(1, 3)))

    def rewritten(self) -> str:
        records = [self.record(2, 5) for _ in range(self.rng.randint(1, 3))]
        return "\n\n".join(f"{self.facts(f)}\n{self.facts(f)}" for f in records)

    def to_sentence(self) -> str:
        link = self.rng.choice(["\n", " -> ", "\nIn words: ", "\n\n", " => ", "\nText: "])
        return "\n\n".join(f"{self.facts(f)}{link}{s}" for f, s in (self.schema() for _ in range(self.rng.randint(1, 4))))

    def words_again(self) -> str:
        r = self.rng
        pool = r.choice([self.words.common, self.words.names, self.words.common + self.words.names])
        several = [r.choice(pool) for _ in range(r.randint(5, 90))]
        join = r.choice([" ", ", ", "\n", " - "])
        one = join.join(several)
        return one + "".join(r.choice(["\n\n", "\n", " / "]) + one for _ in range(r.randint(1, 3)))

    def passage_again(self) -> str:
        r = self.rng
        first, second = r.choice(self.words.pairs)
        text = first if r.random() < 0.4 else f"{first} {second}"
        frame = r.choice(
            ['{0}\n\n"{0}"', "{0}\n{0}", '{1} read it aloud: "{0}" Then {2} read it again: "{0}"', '"{0}" said {1}. "{0}" said {2}.', "1. {0}\n2. {0}\n3. {0}"]
        )
        return frame.format(text, self.name(), self.name())

    def lookup(self) -> str:
        facts = self.record(3, 9)
        asked = self.rng.sample(facts, min(len(facts), self.rng.randint(2, 5)))
        frame = self.rng.choice(["Q: What is the {0}?\nA: {1}", "What is the {0}? {1}.", "{0} -> {1}", "The {0} is {1}."])
        return self.facts(facts) + "\n\n" + "\n".join(frame.format(*f) for f in asked)

    def table(self) -> str:
        r = self.rng
        keys = r.sample(self.words.common, r.randint(2, 4))
        rows = [[self.name(), *(self.value(r.choice("nwyd")) for _ in keys)] for _ in range(r.randint(2, 5))]
        head = f"| name | {' | '.join(keys)} |"
        body = [f"| {' | '.join(row)} |" for row in rows]
        told = [f"{row[0]}: " + ", ".join(f"the {k} is {v}" for k, v in zip(keys, row[1:], strict=True)) + "." for row in rows]
        return "\n".join([head, *body, "", *told])

    # --- chat --------------------------------------------------------------------------------------------------------

    def chat(self) -> str:
        """One conversation in fiddle's chat template."""
        r = self.rng
        text = f"<|system|>\n{r.choice(SYSTEM)}{END}" if r.random() < 0.15 else ""
        for _ in range(r.choices([1, 2, 3], [7, 2, 1])[0]):
            kind = r.choices(
                [self.ask_next, self.ask_repeat, self.ask_list, self.ask_sentence, self.ask_value, self.ask_words, self.ask_story, self.ask_tool],
                [3, 3, 2, 5, 3, 2, 1, 0.6],
            )[0]
            text += "".join(f"<|{role}|>\n{content}{END}" for role, content in kind())
        return text.rstrip("\n")

    def ask_next(self) -> list[tuple[str, str]]:
        first, second = self.rng.choice(self.words.pairs)
        return [
            ("user", self.rng.choice(["Continue: {}", "What comes next? {}", "Go on: {}", "Continue this text.\n\n{}"]).format(first)),
            ("assistant", second),
        ]

    def ask_repeat(self) -> list[tuple[str, str]]:
        r = self.rng
        text = r.choice(self.words.sentences) if r.random() < 0.6 else " ".join(self.word() for _ in range(r.randint(2, 20)))
        turns = [("user", r.choice(["Repeat after me: {}", "Say: {}", "Copy this text.\n\n{}", "Write this again: {}"]).format(text)), ("assistant", text)]
        return turns + [("user", r.choice(["Again.", "Once more, please.", "And again?"])), ("assistant", text)] * (r.random() < 0.2)

    def ask_list(self) -> list[tuple[str, str]]:
        facts = self.record(2, 6)
        asked = self.rng.choice(["Put these facts into a list: {}", "Make a list of this: {}", "{}\n\nAs a list, please."])
        return [("user", asked.format(self.facts(facts))), ("assistant", "\n".join(f"- {k}: {v}" for k, v in facts))]

    def ask_sentence(self) -> list[tuple[str, str]]:
        facts, text = self.schema()
        asked = self.rng.choice(["Put these facts into words: {}", "{}", "Write a sentence: {}", "Say this in a sentence.\n{}", "{}\n\nDescribe it."])
        return [("user", asked.format(self.facts(facts))), ("assistant", text)]

    def ask_value(self) -> list[tuple[str, str]]:
        r = self.rng
        facts = self.record(2, 7) if r.random() < 0.5 else self.schema()[0]
        asked, *more = r.sample(facts, 2)
        turns = [("user", f"{self.facts(facts)}\n\nWhat is the {asked[0]}?"), ("assistant", r.choice(["{1}", "{1}.", "The {0} is {1}."]).format(*asked))]
        return turns + [(role, text) for k, v in more for role, text in (("user", f"And the {k}?"), ("assistant", v))] * (r.random() < 0.4)

    def ask_words(self) -> list[tuple[str, str]]:
        r = self.rng
        several = r.sample(self.words.common, r.randint(2, 9))
        text = ", ".join(several)
        numbered = "\n".join(f"{i}. {w}" for i, w in enumerate(several, 1))
        question, answer = r.choice(
            [
                ("What is the first word: {}?", several[0]),
                ("What is the last word: {}?", several[-1]),
                ("Which word comes after " + several[0] + ": {}?", several[1]),
                ("Number these words: {}", numbered),
                ("Write these words one on a line: {}", "\n".join(several)),
                ("Join with a plus sign: {}", " + ".join(several)),
                ("How many words are there: {}?", str(len(several))),
            ]
        )
        return [("user", question.format(text)), ("assistant", answer)]

    def ask_story(self) -> list[tuple[str, str]]:
        story = self.rng.choice(self.words.stories)
        about = self.rng.choice(re.findall(r"(?<=[a-z] )[A-Z][a-z]{2,}|(?<= a )[a-z]{3,}", story) or ["a day"])
        return [
            ("user", self.rng.choice(["Tell me a story about {}.", "A story about {}, please.", "Write a story. It has {} in it."]).format(about)),
            ("assistant", story),
        ]

    def ask_tool(self) -> list[tuple[str, str]]:
        key, name, value = self.word(), self.name(), self.value(self.rng.choice("wyd"))
        call = f'{{"name": "look_up", "arguments": {{"what": "{key}", "of": "{name}"}}}}'
        return [
            ("user", f"What is the {key} of {name}?"),
            ("assistant", call),
            ("tool", f'{{"{key}": "{value}"}}'),
            ("assistant", f"The {key} of {name} is {value}."),
        ]


SYSTEM = [
    "You are a helpful assistant.",
    "Answer in one sentence.",
    "Be brief and kind.",
    "You write what you are told, and nothing else.",
    "You help people to write clearly.",
]
