"""What a model knows before it is trained: facts asked with several few-shot prompts, greedy and sampled, by SliCK.

Gekhman et al., 2024, arXiv 2405.05904, section 3 and its appendix: 10 prompts of 4 exemplars, one greedy answer to each and 16 at temperature 0.5, exact match.
How we differ:

1. Exemplars are drawn anew for every question, from facts of its group, never itself; so two facts of a set are asked by prompts of their own.
2. Exact match is that of the task of this name: case, spaces, a final full stop and commas inside numbers do not count. Where a statement is continued, an
   answer is right if the line begins with it and the punctuation that the pattern has behind it.
3. How often another probe would come to another category is estimated (nn/slick.py).
4. Rows with the same question are asked once and each is judged by its own answers.

Answers are kept as they come, by a hash of the model and of all prompts of a question, so a probe that was killed goes on, and one of a changed file asks what
is new. An answer's random numbers depend on its prompt and the seed alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..core import LuthierError
from ..data.codec import Codec
from ..data.facts import Fact, Pattern
from ..data.render import render_prompt, stop_ids
from ..measuring.measure import can_write
from ..nn import slick
from ..policy import Policy
from ..references import fingerprint
from ..settings.plugins import plugin

Form = Literal["auto", "chat", "qa", "text"]
AT_ONCE = 8  # questions asked and written down together
LONGEST = 64  # tokens of an answer where nothing else is asked for


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How facts are asked. ``form``: chat (exemplars are turns of a conversation), qa (lines Q: and A:) or text (statements that are continued)."""

    prompts: int = 10
    shots: int = 4
    samples: int = 16
    temperature: float = 0.5
    max_new: int | None = None
    form: Form = "auto"
    seed: int = 0
    template: str | None = None


@dataclass(frozen=True, slots=True)
class Probed:
    """What came of asking one fact. ``right``: of the samples to each prompt."""

    fact: Fact
    greedy: tuple[bool, ...]
    right: tuple[int, ...]
    samples: int  # to each prompt
    said: str  # the commonest greedy answer

    @property
    def category(self) -> str:
        """One of slick.CATEGORIES."""
        return slick.category(sum(self.greedy), len(self.greedy), sum(self.right))

    def columns(self) -> dict[str, Any]:
        """What is added to the row."""
        counts = {"greedy_right": sum(self.greedy), "greedy_asked": len(self.greedy), "sampled_right": sum(self.right)}
        return {"knowledge": self.category, **counts, "sampled_asked": self.samples * len(self.right)}


class Probe:
    """Asks a policy facts. ``exemplars``: what the examples in its prompts are drawn from, by default the facts themselves.

    ``cache``: the folder that keeps answers. Raises LuthierError for a model that cannot write, and where exemplars are too few or settings do not fit.
    """

    def __init__(
        self,
        policy: Policy,
        facts: Sequence[Fact],
        how: Asking | None = None,
        *,
        patterns: Sequence[Pattern] = (),
        exemplars: Sequence[Fact] | None = None,
        cache: Path | None = None,
    ):
        can_write(policy)
        self.policy, self.facts, self.how, self.patterns = policy, facts, how or Asking(), patterns
        self.tokenizer, self.kind = policy.base.tokenizer, policy.base.anatomy.kind
        self.codec, self.match = Codec(self.tokenizer), plugin("tasks", "exact_match")()
        self.form = self._form()
        if self.how.shots == 0 and self.how.prompts > max(1, len(patterns)):
            raise LuthierError(f"--shots 0 --prompts {self.how.prompts}: without exemplars all prompts are the same; say --prompts {max(1, len(patterns))}")
        self.pool = self._pool(facts if exemplars is None else exemplars)
        self.stop = stop_ids(self.tokenizer, self.how.template, kind=self.kind) if self.form == "chat" else self._line_ends()
        self.max_new = self.how.max_new or self._longest()
        self._settings = [self.how.samples, self.how.temperature, self.how.seed, self.max_new, sorted(self.stop)]
        self.keys: dict[str, str] = {}  # question -> of its answers
        self.todo: list[tuple[int, str, Fact]] = []
        self.no_room = ""  # where the first question stands that does not fit
        known = fingerprint(policy)
        self.file = None if cache is None or not known else cache / f"{known}.jsonl"
        self.kept = self._read()

    def _form(self) -> str:
        form = self.how.form
        if form == "auto":
            own = self.tokenizer.chat_template or self.how.template or self.kind == "encoder_decoder"
            form = "text" if self.patterns else "chat" if own else "qa"
        if form != "chat" and self.kind == "encoder_decoder":
            raise LuthierError(f"--form {form}: an encoder-decoder answers, it does not go on; say --form chat")
        if form == "qa" and self.patterns:
            raise LuthierError("--form qa: a pattern is a statement and no question; say --form text or chat")
        return form

    def _pool(self, facts: Sequence[Fact]) -> dict[str, list[Fact]]:
        """Exemplars by group, each question once."""
        out: dict[str, dict[str, Fact]] = defaultdict(dict)
        for f in facts:
            out[f.group].setdefault(f.question, f)
        return {g: list(by.values()) for g, by in out.items()}

    def _line_ends(self) -> list[int]:
        """All tokens that hold a line break, and the end of sequence."""
        ends = [i for i in range(len(self.tokenizer)) if "\n" in self.tokenizer.decode([i])]
        return ends + ([] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)])

    def _longest(self) -> int:
        """Room for the longest answer, in eights, so that a new row of a usual length leaves the prompts of the others as they were."""
        ids = self.codec.encode([f" {a}." for f in self.facts for a in f.answers])
        return min(LONGEST, -(-(max(map(len, ids)) + 2) // 8) * 8)

    # --- prompts ---

    def prompts(self, fact: Fact) -> list[list[int]]:
        """The ids of every prompt of a question."""
        return [self._ids(fact, shown, pattern) for shown, pattern in self._shown(fact)]

    def first(self, fact: Fact) -> str:
        """The first prompt of a question, to be read by a person."""
        return self.tokenizer.decode(self.prompts(fact)[0], skip_special_tokens=self.form != "chat")

    def _shown(self, fact: Fact) -> Iterator[tuple[list[Fact], Pattern | None]]:
        """Exemplars and pattern of each prompt."""
        pool = self.pool.get(fact.group) or [f for some in self.pool.values() for f in some]
        shots = self.how.shots
        if len(pool) - any(f.question == fact.question for f in pool) < shots:
            raise LuthierError(
                f"{fact.where}: {shots} exemplars are drawn from other facts of its group ({fact.group or 'all'}), which has {len(pool)} in all; "
                "name more with --exemplars FILE, or lower --shots"
            )
        for i in range(self.how.prompts):
            draw = random.Random(f"{self.how.seed}:{i}:{fact.question}")
            others = [f for f in draw.sample(pool, min(len(pool), shots + 1)) if f.question != fact.question]
            yield others[:shots], self.patterns[i % len(self.patterns)] if self.patterns else None

    def _ids(self, fact: Fact, shown: Sequence[Fact], pattern: Pattern | None) -> list[int]:
        asked = lambda f: f.question if pattern is None else pattern.opening(f.question)  # noqa: E731
        if self.form == "chat":
            turns = [{"role": "system", "content": fact.system}] if fact.system else []
            for f in shown:
                turns += [{"role": "user", "content": asked(f)}, {"role": "assistant", "content": f.answers[0]}]
            turns.append({"role": "user", "content": asked(fact)})
            return render_prompt(turns, self.tokenizer, self.how.template, kind=self.kind)
        tail = "" if pattern is None else pattern.tail
        if self.form == "qa":
            text = "".join(f"Q: {asked(f)}\nA: {f.answers[0]}\n\n" for f in shown) + f"Q: {asked(fact)}\nA:"
        else:
            text = "".join(f"{asked(f)} {f.answers[0]}{tail}\n" for f in shown) + asked(fact)
        return self.codec.with_bos(self.codec.encode([text])[0], "the prompt").tolist()

    # --- answers ---

    def plan(self) -> int:
        """How many questions are to be asked; the others are kept from before. Raises LuthierError where none fits the model's positions."""
        first: dict[str, Fact] = {}
        for fact in self.facts:
            first.setdefault(fact.question, fact)
        todo: list[tuple[int, str, Fact]] = []
        for question, fact in first.items():
            ids = self.prompts(fact)
            longest = max(map(len, ids))
            if longest + (self.max_new if self.kind == "decoder" else 0) > self.policy.limit:
                self.no_room = self.no_room or fact.where
                continue
            key = self.keys[question] = self._key(ids)
            if key not in self.kept:
                todo.append((longest, key, fact))
        if not self.keys:
            room = f"with {self.how.shots} exemplars no question fits the {self.policy.limit:,} positions of the model; lower --shots"
            raise LuthierError(f"{self.no_room}: {room}")
        self.todo = sorted(todo, key=lambda t: t[:2])  # of like length together
        return len(self.todo)

    def run(self, tick: Callable[[int], None] | None = None) -> tuple[list[Probed], list[str]]:
        """Ask all facts: what came of each, in their order, and sentences about what could not be asked. ``tick``: questions that are done, as they come."""
        if not self.keys:
            self.plan()
        for start in range(0, len(self.todo), AT_ONCE):
            some = self.todo[start : start + AT_ONCE]
            self._keep(self._ask([(key, self.prompts(fact)) for _, key, fact in some]))
            if tick is not None:
                tick(len(some))
        probed = [self._judged(f, self.kept[self.keys[f.question]]) for f in self.facts if f.question in self.keys]
        missing = len(self.facts) - len(probed)
        said = f"{missing:,} rows do not fit the {self.policy.limit:,} positions of the model with {self.how.shots} exemplars and are left out"
        return probed, [f"{said}, the first: {self.no_room}"] if missing else []

    def _key(self, ids: list[list[int]]) -> str:
        return hashlib.blake2b(json.dumps([ids, self._settings]).encode(), digest_size=12).hexdigest()

    def _ask(self, some: Sequence[tuple[str, list[list[int]]]]) -> dict[str, dict[str, Any]]:
        """The answers to some questions: greedy ones, and of the sampled ones how often each came, prompt by prompt."""
        prompts = [p for _, ids in some for p in ids]
        numbers = [int.from_bytes(hashlib.blake2b(json.dumps(p).encode(), digest_size=7).digest(), "big") for p in prompts]
        how: dict[str, Any] = {"max_new": self.max_new, "stop": self.stop, "numbers": numbers, "seed": self.how.seed}
        greedy = self._texts(self.policy.generate(prompts, **how).ids)
        S, P = self.how.samples, self.how.prompts
        drawn = self._texts(self.policy.generate(prompts, samples=S, temperature=self.how.temperature, **how).ids) if S else []
        out = {}
        for i, (key, ids) in enumerate(some):
            here = range(i * P, i * P + len(ids))
            out[key] = {"greedy": [greedy[p] for p in here], "sampled": [dict(Counter(drawn[p * S : (p + 1) * S])) for p in here]}
        return out

    def _texts(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [self.tokenizer.decode(i, skip_special_tokens=True).strip() for i in ids]

    def _judged(self, fact: Fact, kept: dict[str, Any]) -> Probed:
        greedy = [self._line(a) for a in kept["greedy"]]
        right = tuple(sum(n for a, n in one.items() if self.is_right(fact, a, p)) for p, one in enumerate(kept["sampled"]))
        said = Counter(greedy).most_common(1)[0][0]
        return Probed(fact, tuple(self.is_right(fact, a, p) for p, a in enumerate(kept["greedy"])), right, self.how.samples, said)

    def _line(self, answer: str) -> str:
        return answer if self.form == "chat" else answer.partition("\n")[0].strip()

    def is_right(self, fact: Fact, answer: str, prompt: int = 0) -> bool:
        """Whether an answer to a prompt of this number is right."""
        line = self._line(answer)
        if self.match.score({"refs": fact.answers}, line)["exact_match"]:
            return True
        tail = self.patterns[prompt % len(self.patterns)].tail if self.patterns else ""
        return bool(tail) and self.form == "text" and line.casefold().startswith(tuple(f"{a}{tail}".casefold() for a in fact.answers))

    # --- kept answers ---

    def _read(self) -> dict[str, dict[str, Any]]:
        """What an earlier probe of the same model wrote; a line that was cut off is dropped."""
        out: dict[str, dict[str, Any]] = {}
        if self.file is not None and self.file.is_file():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                if line.endswith("}"):
                    try:
                        row = json.loads(line)
                        out[row["key"]] = {"greedy": row["greedy"], "sampled": row["sampled"]}
                    except (json.JSONDecodeError, KeyError):
                        continue
        return out

    def _keep(self, answers: dict[str, dict[str, Any]]) -> None:
        self.kept |= answers
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as f:
            if f.tell() and not self._ends_well():
                f.write("\n")
            f.write("".join(json.dumps({"key": k, **v}, ensure_ascii=False) + "\n" for k, v in answers.items()))

    def _ends_well(self) -> bool:
        assert self.file is not None
        with self.file.open("rb") as f:
            f.seek(-1, 2)
            return f.read(1) == b"\n"


# --- what it comes to -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Rows of one category. ``stable``: how likely such a row gets the same category when it is asked again."""

    category: str
    rows: int
    share: float
    low: float
    high: float
    stable: float | None


@dataclass(frozen=True)
class Report:
    """The probe of a set in numbers. ``effect``: see slick.design_effect; ``changes_N``: how likely each row changes its category when asked again."""

    shares: list[Share]
    effect: float
    changes_N: np.ndarray

    @classmethod
    def of(cls, probed: Sequence[Probed]) -> Report:
        """Raises ValueError without rows."""
        names = [p.category for p in probed]
        asked, samples = len(probed[0].greedy), probed[0].samples
        effect = slick.design_effect(np.array([p.right for p in probed]), samples)
        greedy_N, sampled_N = np.array([sum(p.greedy) for p in probed]), np.array([sum(p.right) for p in probed])
        again_N4 = slick.asked_again(greedy_N, asked, sampled_N, samples * asked, effect)
        same_N = again_N4[np.arange(len(names)), [slick.CATEGORIES.index(n) for n in names]]
        shares = []
        for name in slick.CATEGORIES:
            here = np.array([n == name for n in names])
            low, high = slick.wilson(int(here.sum()), len(names))
            shares.append(Share(name, int(here.sum()), float(here.mean()), low, high, float(same_N[here].mean()) if here.any() else None))
        return cls(shares, effect, 1 - same_N)

    def __getitem__(self, category: str) -> Share:
        return next(s for s in self.shares if s.category == category)
