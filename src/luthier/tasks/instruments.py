"""The demo's task: facts about an instrument in a workshop, said in a fluent sentence or two. Written for this program, made by a seeded generator.

Some pairs of values (which wood with which instrument, which fault with it, which first with which last name) never occur in training; every
validation row holds such a pair, every test row one of yet others. So looking the nearest training row up does not help.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..core import LuthierError

SLOTS = ("instrument", "maker", "town", "year", "wood", "strings", "fault", "repair", "owner", "price", "ready")

# ruff: noqa: SIM905 (word lists read better as text)
INSTRUMENTS = tuple(
    "violin viola cello guitar lute mandolin banjo zither dulcimer ukulele cittern rebec bouzouki mandola vihuela psaltery theorbo".split() + ["double bass"]
)
WOODS = tuple("maple spruce cedar walnut cherry rosewood ebony pear willow poplar mahogany cypress larch beech".split())
STRINGS = ("gut", "steel", "nylon", "silk", "bronze")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
TOWNS = tuple(
    "Bristol Oxford York Dover Exeter Bath Norwich Durham Leeds Derby Chester Ely Truro Wells Kendal Perth Cardiff Dublin Cork Galway Paris Lyon Vienna Prague "
    "Milan Naples Venice Lisbon Boston Salem Albany Denver".split()
)
FIRST = tuple(
    "Anna John Mary Tom Ruth Peter Alice Henry Clara George Helen James Emma Robert Jane William Martha Edward Lucy Arthur Nora Simon Grace Philip Rose Daniel "
    "Sarah Walter Kate Samuel".split()
)
MAKER_LAST = tuple("Reed Hill Stone Marsh Carter Walsh Fisher Lake Turner Mason Foster Brook Cooper Moor West Dale Ford Glover Lane Potter".split())
OWNER_LAST = tuple("King Brown Green Bell Finch Webb Snow Cross Drake Frost Gray Hart Knight Doyle Baker North Parker Hughes Sharp White".split())

# What goes wrong, and what a workshop may do about it: things that are named with "a", except those ending in s.
FAULTS: dict[str, tuple[str, ...]] = {
    "cracked bridge": ("new bridge", "bridge repair"),
    "loose neck": ("neck reset", "hidden screw"),
    "open seam": ("seam repair", "hide glue joint"),
    "worn frets": ("fret dressing", "full fret change"),
    "split top": ("crack repair", "top patch"),
    "broken peg": ("new peg", "full set of pegs"),
    "warped fingerboard": ("planed fingerboard", "new fingerboard"),
    "dull varnish": ("coat of varnish", "hand polish"),
    "loose brace": ("brace repair", "new brace"),
    "chipped edge": ("edge inlay", "colour touch"),
    "missing nut": ("bone nut", "brass nut"),
    "rattling tailpiece": ("tailpiece wire", "new tailpiece"),
    "sunken back": ("back graft", "inside lining"),
    "deep scratch": ("filled scratch", "surface repair"),
}
NO_ARTICLE = {"worn frets", "dull varnish"}
POOLS: dict[str, tuple[str, ...]] = {
    "instrument": INSTRUMENTS,
    "town": TOWNS,
    "wood": WOODS,
    "strings": STRINGS,
    "fault": tuple(FAULTS),
    "repair": tuple(r for rs in FAULTS.values() for r in rs),
    "ready": DAYS,
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Facts stated correctly: a fact counts when its value stands in the answer and no other value of its slot does.

    The vocabulary of a slot is known, so an invented value counts against the answer even where the slot was not given (``all_facts``). Which of
    two correct names is the maker is not checked.
    """

    sizes: ClassVar[Mapping[str, int]] = {"train": 2400, "validation": 200, "test": 300}
    seed: int = 0
    """Another seed makes another data set, with other pairs held out."""

    def rows(self, split: str) -> list[dict[str, Any]]:
        """The rows of train, validation or test: prompt, completion, refs (several wordings) and the facts."""
        if split not in self.sizes:
            raise LuthierError(f"instruments has no split {split!r}; it has {', '.join(self.sizes)}")
        seen: set[str] = set()
        out: list[dict[str, Any]] = []
        attempt = 0
        while len(out) < self.sizes[split]:
            rng = random.Random(f"{self.seed} {split} {attempt}")
            attempt += 1
            facts = draw(rng)
            prompt = "; ".join(f"{k}: {v}" for k, v in facts.items())
            if self._split(facts) != split or prompt in seen:
                continue
            seen.add(prompt)
            said = list(dict.fromkeys(say(facts, rng) for _ in range(1 if split == "train" else 6)))
            out.append({"prompt": prompt, "completion": said[0], "refs": said, "facts": facts})
        return out

    def score(self, row: Mapping[str, Any], answer: str) -> dict[str, float]:
        """facts: share of the given facts stated correctly. all_facts: 1 where all are, and nothing is invented."""
        facts = {k: str(v) for k, v in (row.get("facts") or parse(row["prompt"])).items()}
        stated, wrong = check(facts, answer)
        right = stated - wrong
        return {"facts": len(right) / len(facts), "all_facts": float(len(right) == len(facts) and not wrong)}

    def _split(self, facts: Mapping[str, str]) -> str:
        """The split this combination belongs to; "" where it mixes pairs held out for different ones."""
        sides = {self._side(*pair) for pair in pairs(facts)} - {"train"}
        return "train" if not sides else sides.pop() if len(sides) == 1 else ""

    def _side(self, a: str, b: str) -> str:
        draw = int.from_bytes(hashlib.sha256(f"{self.seed}|{a}|{b}".encode()).digest()[:4], "big") % 100
        return "test" if draw < 10 else "validation" if draw < 20 else "train"


def write(folder: str | Path, task: Task | None = None) -> list[Path]:
    """Write train.jsonl, validation.jsonl and test.jsonl, as {"prompt", "completion"}, into a folder; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    task = task or Task()
    paths = []
    for split in task.sizes:
        lines = [json.dumps({"prompt": r["prompt"], "completion": r["completion"]}, ensure_ascii=False) for r in task.rows(split)]
        paths.append(folder / f"{split}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


# --- facts -----------------------------------------------------------------------------------------------------------


def draw(rng: random.Random) -> dict[str, str]:
    """Three to eight facts of one instrument, in the order of SLOTS."""
    fault = rng.choice(list(FAULTS))
    everything = {k: rng.choice(v) for k, v in POOLS.items()} | {
        "maker": f"{rng.choice(FIRST)} {rng.choice(MAKER_LAST)}",
        "owner": f"{rng.choice(FIRST)} {rng.choice(OWNER_LAST)}",
        "year": str(rng.randint(1700, 1999)),
        "price": str(5 * rng.randint(4, 99)),
        "fault": fault,
        "repair": rng.choice(FAULTS[fault]),
    }
    chosen = {"instrument", *rng.sample(SLOTS[1:], rng.randint(2, 7))}
    if not chosen & {"wood", "fault"}:  # so that every row has a pair that can be held out
        chosen.add(rng.choice(["wood", "fault"]))
    return {k: everything[k] for k in SLOTS if k in chosen}


def pairs(facts: Mapping[str, str]) -> list[tuple[str, str]]:
    """The pairs of values by which splits are told apart."""
    own = [(facts["instrument"], facts[k]) for k in ("wood", "fault") if k in facts]
    return own + [tuple(facts[k].split(" ", 1)) for k in ("maker", "owner") if k in facts]  # type: ignore[misc]


def parse(prompt: Any) -> dict[str, str]:
    """The facts that stand in a prompt (a text, or messages whose last one holds them)."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    facts = dict(re.findall(rf"\b({'|'.join(SLOTS)}): ([^;\n]+?)\s*(?:;|\n|$)", text))
    if not facts:
        raise LuthierError(f"no facts in {text[:80]!r}; instruments scores prompts such as 'instrument: viola; wood: maple'")
    return facts


def check(facts: Mapping[str, str], answer: str) -> tuple[set[str], set[str]]:
    """Which slots are stated in an answer, and which have a wrong value (given or not)."""
    text = " ".join(answer.split())
    stated: set[str] = set()
    for slot, value in sorted(facts.items(), key=lambda f: -len(f[1])):
        if re.search(_whole(value), text, re.I):
            stated.add(slot)
    for value in sorted(facts.values(), key=len, reverse=True):  # what is right hides nothing wrong: "bass bar" is no "double bass"
        text = re.sub(_whole(value), "|", text, flags=re.I)
    for name in (facts[k] for k in ("maker", "owner") if k in facts):  # a person may be named again by one name
        text = re.sub("|".join(map(_whole, name.split())), "|", text)
    wrong = {slot for slot, pool in POOLS.items() if re.search("|".join(map(_whole, pool)), text, re.I)}
    wrong |= {"year" if len(number) == 4 else "price" for number in re.findall(r"\d+", text)}
    lasts = {slot for slot, pool in (("maker", MAKER_LAST), ("owner", OWNER_LAST)) if re.search("|".join(map(_whole, pool)), text)}
    if not lasts and re.search("|".join(map(_whole, FIRST)), text):
        lasts = {"maker" if "maker" in facts and "maker" not in stated else "owner"}
    return stated, wrong | lasts


def _whole(value: str) -> str:
    return rf"(?<!\w){re.escape(value)}(?!\w)"


# --- words -----------------------------------------------------------------------------------------------------------


def a(thing: str) -> str:
    """A thing with its article, where it takes one."""
    return thing if thing in NO_ARTICLE else f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def say(facts: Mapping[str, str], rng: random.Random) -> str:
    """Say the facts in one to three sentences, in one of many ways."""
    origin, called = _origin(dict(facts), rng)
    trouble = _trouble(dict(facts), rng, "it" if origin else called)
    if not origin:
        return _sentences(trouble)
    if len(trouble) == 1 and trouble[0].startswith("it ") and len(origin) < 90 and rng.random() < 0.4:
        return _sentences([f"{origin}, and {trouble[0]}"])
    return _sentences([origin, *trouble])


def _sentences(parts: list[str]) -> str:
    return " ".join(p[0].upper() + p[1:] + "." for p in parts)


def _origin(f: dict[str, str], rng: random.Random) -> tuple[str, str]:
    """The sentence that says what it is and where it comes from, and what to call it; the sentence is empty where the name says it all."""
    inside, wood, strings = f["instrument"], f.get("wood"), f.get("strings")
    if wood and rng.random() < 0.7:
        inside, wood = f"{wood} {inside}", None
    strung = rng.choice([f"with {strings} strings", f"strung with {strings}"]) if strings else ""
    tails = [t for t in (f"made of {wood}" if wood else "", strung) if t]
    the = rng.choice([f"the {inside}", f"this {inside}"])
    noun = f"{the}, {' and '.join(tails)}," if tails else the
    maker, town, year = f.get("maker"), f.get("town"), f.get("year")
    place = (f" in {town}" if town else "") + (f" in {year}" if year else "")
    made = rng.choice(["made", "built"])
    if maker:
        ways = [
            f"{noun} was {made} by {maker}{place}",
            f"{maker} {made} {the}{place}" + (f" from {wood}" if wood else "") + (f", {strung}" if strings else ""),
            f"{noun} is the work of {maker}" + (f" of {town}" if town else "") + (f" and dates from {year}" if year else ""),
        ]
        if place:
            ways.append(f"{made}{place}, {noun} is by {maker}")
    elif place:
        dated = f" and dates from {year}" if year else ""
        ways = [f"{noun} was {made}{place}", f"{noun} comes from {town}{dated}" if town else f"{noun} dates from {year}"]
    elif tails:
        has = f"has {strings} strings" if strings else ""
        ways = [f"{the} " + " and ".join(t for t in (f"is made of {wood}" if wood else "", has) if t), f"the workshop has {a(inside)} " + " and ".join(tails)]
    elif {"fault", "owner"} & set(f):  # those sentences name it
        return "", the
    else:
        ways = [f"this is {a(inside)}", f"the workshop has {a(inside)}"]
    return rng.choice(ways), the


def _trouble(f: dict[str, str], rng: random.Random, it: str) -> list[str]:
    """What is wrong with it, whose it is, what is done, what that costs and when it is ready."""
    out: list[str] = []
    fault, repair, owner, price, ready = (f.get(k) for k in ("fault", "repair", "owner", "price", "ready"))
    day = f"on {ready}" if ready else ""
    if fault and owner:
        has, to = a(fault), rng.choice(["in with", "to the workshop with"])
        out.append(rng.choice([f"{owner} brought {it} {to} {has}", f"{it} belongs to {owner} and has {has}", f"its owner, {owner}, says {it} has {has}"]))
        out[-1] = out[-1].replace("its owner", "the owner") if it != "it" else out[-1]
    elif fault:
        out.append(rng.choice([f"{it} has {a(fault)}", f"{it} came in with {a(fault)}", f"{it} suffers from {a(fault)}"]))
    elif owner:
        out.append(rng.choice([f"{it} belongs to {owner}", f"{owner} owns {it}", f"{it} is owned by {owner}"]))
    it = "it" if out else it
    if repair:
        cost = f", which will cost {price} pounds" if price else ""
        ways = [f"{it} needs {a(repair)}{cost}", f"{it} will get {a(repair)}" + (f" for {price} pounds" if price else "")]
        if price:
            ways.append(f"{a(repair)} will cost {price} pounds")
        said = rng.choice(ways)
        if out and said.startswith("it ") and rng.random() < 0.5:
            out[-1] += f" and {said[3:]}" if out[-1].startswith(it) else f"; {said}"
        else:
            out.append(said)
    elif price:
        out.append(
            rng.choice([f"the work on {it} will cost {price} pounds" if not out else f"the work will cost {price} pounds", f"the bill is {price} pounds"])
        )
    if ready:
        opener = "it" if out else it
        out.append(rng.choice([f"{opener} will be ready {day}", f"{opener} should be ready {day}", f"{opener} can be collected {day}"]))
    return out
