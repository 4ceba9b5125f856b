"""What becomes of each category of knowledge while a model is trained: how well rows that were new to it are fitted, and whether what it knew decays.

Rows that carry a column ``knowledge`` (`luthier data knowledge --out`) are followed: a fixed sample of each category, of the trained and of the held-out rows,
by loss a token and by exact match of the greedy answer. Gekhman et al., 2024, arXiv 2405.05904, sections 4 and 5: Unknown rows are fitted more slowly, and as
they are fitted what was known is answered wrongly more often; stopping before that keeps most of the gain.

The watch is ours. At an evaluation, *Unknown is memorised* when among the followed trained Unknown rows significantly more went from wrong before training to
right than the other way, and *Known decays* when among the followed held-out rows of the three known categories significantly more went from right to wrong
since the evaluation at which most of them were right than the other way: sign tests, exact, one-sided, p < 0.025. Both together at two evaluations running
raise it. The best evaluation is the best of several and therefore flattered a little; this is why it takes two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core import LuthierError, Objective, Row, spread_answers
from ..data.facts import ALIASES
from ..data.prepare import Prepared
from ..data.render import stop_ids
from ..measuring.evaluate import loss_on
from ..measuring.measure import group, to_device
from ..nn.slick import CATEGORIES, KNOWN, sign_test
from ..policy import Policy
from ..settings.plugins import plugin
from ..settings.run import Run

COLUMN, EVENT = "knowledge", "familiarity"
SIDES = ("trained", "held_out")
LEVEL, IN_A_ROW, FEWEST = 0.025, 2, 10  # of the sign tests; evaluations; known rows held out
LONGEST = 64  # tokens of an answer

Bits = dict[str, str]  # "trained_Unknown" -> "0110...": which rows are answered rightly


@dataclass(frozen=True)
class _Followed:
    """A row as a question."""

    row: Row
    prompt: list[int]
    refs: tuple[str, ...]
    tokens: int  # of the answer


class Familiarity:
    """Follows one run. Use `of`, which gives None where there is nothing to follow."""

    def __init__(self, policy: Policy, objective: Objective, run: Run, *, packed: bool, rows: Mapping[str, Sequence[Row]]):
        """``rows``: by side and category, "trained_Unknown"."""
        self.policy, self.objective, self.run, self.packed = policy, objective, run, packed
        self.followed = {name: [_question(r, policy) for r in some] for name, some in rows.items()}
        self.match = plugin("tasks", "exact_match")()
        self.stops = run.evaluate.knowledge == "stop"
        self.watch = Watch()

    @classmethod
    def of(cls, policy: Policy, objective: Objective, prepared: Prepared, run: Run, *, packed: bool) -> Familiarity | None:
        """Raises LuthierError where the run is to stop by what it cannot see: no trained Unknown rows, or too few known ones held out."""
        e = run.evaluate
        chat = objective.renders == "chat" and not policy.heads
        sides = zip(SIDES, (prepared.train, prepared.validation), strict=True)
        rows = {} if e.knowledge == "off" or not chat else {k: v for side, some in sides for k, v in _sample(side, some, e.knowledge_rows, run.seed).items()}
        if e.knowledge == "stop" and (not rows.get("trained_Unknown") or _known(rows) < FEWEST):
            there = ", ".join(f"{len(v)} {k.replace('_', ' ')}" for k, v in rows.items()) or "none" + ("" if chat else " (only objective: sft has them)")
            raise LuthierError(
                f"evaluate.knowledge=stop needs trained rows whose column {COLUMN!r} says Unknown, and {FEWEST} held-out rows of known categories; "
                f"found: {there}. "
                "Write the column with luthier data knowledge FILE --out, and hold out more (data.validation), or say evaluate.knowledge=watch"
            )
        return cls(policy, objective, run, packed=packed, rows=rows) if rows else None

    def follow(self, step: int, write: Callable[[str, int, dict[str, Any]], None], say: Any) -> str:
        """Measure all categories, write a line to the log and say it; why to stop, "" to go on."""
        if not self.watch.first and "trained_Unknown" in self.followed and (known := _known(self.followed)) < FEWEST:
            say.note(f"{known} known rows are held out: whether what is known decays cannot be watched; {FEWEST} are needed (data.validation)")
        right = self.right()
        facts: dict[str, Any] = {}
        for name, some in self.followed.items():
            facts |= {f"{name}_loss": self._loss([f.row for f in some]), f"{name}_exact_match": right[name].count("1") / len(some), f"{name}_n": len(some)}
        write(EVENT, step, {**facts, "right": right})
        for side in SIDES:
            said = [f"{c} {facts[f'{side}_{c}_exact_match']:.0%} right, loss {facts[f'{side}_{c}_loss']:.3f}" for c in CATEGORIES if f"{side}_{c}" in right]
            if said:
                say.note(f"knowledge, {side.replace('_', ' ')} rows: {'; '.join(said)}")
        why = self.watch.see(step, right)
        if why and not self.stops:
            say.warn(f"{why}; stop earlier (evaluate.knowledge=stop) or leave such rows out (luthier data knowledge --cap Unknown=0.1)")
        return why if self.stops else ""

    def recall(self, path: Path, step: int) -> None:
        """Bring the watch to where it was after ``step``, from the lines of the log."""
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            facts = json.loads(line)
            if facts["event"] == EVENT and facts["step"] <= step:
                self.watch.see(facts["step"], facts["right"])

    def right(self) -> Bits:
        """Which followed rows the policy answers rightly, greedily."""
        every = [f for some in self.followed.values() for f in some]
        tokenizer, kind = self.policy.base.tokenizer, self.policy.base.anatomy.kind
        most = min(LONGEST, max(f.tokens for f in every) + 4)
        rollout = spread_answers(self.policy, [f.prompt for f in every], max_new=most, stop=stop_ids(tokenizer, self.run.model.template, kind=kind))
        said = iter(tokenizer.decode(ids, skip_special_tokens=True) for ids in rollout.ids)
        is_right = lambda f, answer: self.match.score({"refs": f.refs}, answer)["exact_match"] == 1  # noqa: E731
        return {name: "".join("01"[is_right(f, next(said))] for f in some) for name, some in self.followed.items()}

    def _loss(self, rows: list[Row]) -> float:
        groups = group(rows, self.run.optim.micro_tokens, self.packed)
        batches = (to_device(self.objective.collate(g, pad=self.policy.pad, packed=self.packed), self.policy) for g in groups)
        return loss_on(self.policy, self.objective, batches).value


class Watch:
    """Whether Unknown is memorised while Known decays, from which rows are right at each evaluation. The first seen is what was before training."""

    def __init__(self) -> None:
        self.first: Bits = {}
        self.best, self.best_step, self.running = "", 0, 0

    def see(self, step: int, right: Bits) -> str:
        """Take one evaluation; the sentence at the one where both were so for the second time running, else ""."""
        known = "".join(right.get(f"held_out_{c}", "") for c in KNOWN)
        new = right.get("trained_Unknown", "")
        self.first = self.first or right
        if len(known) < FEWEST or not new:
            return ""
        if known.count("1") > self.best.count("1") or not self.best:
            self.best, self.best_step = known, step
        was = self.first.get("trained_Unknown", "")
        memorised = sign_test(*changes(new, was)) < LEVEL  # rows that are right now and were wrong, against the other way
        decayed = sign_test(*changes(self.best, known)) < LEVEL
        self.running = self.running + 1 if memorised and decayed else 0
        if self.running != IN_A_ROW:
            return ""
        return (
            f"Unknown is memorised while Known decays: {_share(was)} to {_share(new)} of the trained Unknown rows are right, and {_share(self.best)} at step "
            f"{self.best_step} to {_share(known)} of the held-out known ones"
        )


def changes(a: str, b: str) -> tuple[int, int]:
    """How many rows are right in a and wrong in b, and the other way."""
    pairs = list(zip(a, b, strict=True))
    return pairs.count(("1", "0")), pairs.count(("0", "1"))


def _known(rows: Mapping[str, Sequence[Any]]) -> int:
    """How many rows of the known categories are held out."""
    return sum(len(rows.get(f"held_out_{c}", ())) for c in KNOWN)


def _share(bits: str) -> str:
    return f"{bits.count('1') / len(bits):.0%}"


def _sample(side: str, rows: Sequence[Row], most: int, seed: int) -> dict[str, list[Row]]:
    """A fixed sample of each category, one row a prompt, that new rows do not reshuffle."""
    out: dict[str, list[Row]] = {f"{side}_{c}": [] for c in CATEGORIES}
    seen: set[bytes] = set()
    keyed = [(hashlib.blake2b(str(seed).encode() + r.ids.tobytes(), digest_size=8).digest(), r) for r in rows if r.extras.get(COLUMN) in CATEGORIES]
    for _, row in sorted(keyed, key=lambda k: k[0]):
        some = out[f"{side}_{row.extras[COLUMN]}"]
        asked = np.asarray(_prompt(row)[0]).tobytes()
        if len(some) < most and asked not in seen and row.train.any():
            seen.add(asked)
            some.append(row)
    return {k: v for k, v in out.items() if v}


def _prompt(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """What is asked and what is answered in a row's last trained turn, as ids."""
    trained = np.flatnonzero(row.train)
    last = int(trained[-1]) if len(trained) else len(row) - 1
    untrained = np.flatnonzero(~row.train[:last])
    first = int(untrained[-1]) + 1 if len(untrained) else 0
    source = row.extras.get("source")
    return (source if isinstance(source, np.ndarray) else row.ids[:first]), row.ids[first : last + 1]


def _question(row: Row, policy: Policy) -> _Followed:
    prompt, answer = _prompt(row)
    said = policy.base.tokenizer.decode(answer, skip_special_tokens=True).strip()
    lists = [v for k, v in row.extras.items() if isinstance(v, list) and (k in ALIASES or said in v)]  # several right answers to one question
    more = [a for some in lists for a in some if isinstance(a, str)]
    return _Followed(row, prompt.tolist(), tuple(dict.fromkeys([said, *more])), len(answer))
