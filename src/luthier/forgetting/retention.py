"""What a run keeps of what its base could do: a small suite that ships, measured before, during and after, on the same rows each time.

- general: text of ours, or the user's (data.general); measured by the Scorer (measure.py), whole.
- instructions: short requests with answers of ours; the loss of the answers, under the chat template where the run learns conversations, else as plain
  text.
- sampled: text that fiddle wrote at temperature 1. On its own samples, the rise of fiddle's loss estimates KL(before || now); to another base it is text.
- moved: the mean KL(before || now) of the next token on general text (divergence.py).
- facts: beginnings that have one usual end (assets/general/facts.jsonl). Those that the model goes on with rightly before training are asked again.
- retained: scores of tasks with rows of their own that the user names (evaluate.retain).

A fact is known where every token of its end is the likeliest one after what stands before it, which is what greedy decoding would write; one forward asks
all. Rows are capped once, before the run, so that an evaluation costs at most SHARE of the training between two of them, but for a least part of each;
general text is not capped. A model that is no decoder gets its parts as hidden text (objective masked_text), and is asked no facts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core import LuthierError, Objective, Row, next_token_batch, scored, spread
from ..data.codec import Codec
from ..errors import ConfigError
from ..measuring.evaluate import Score, score
from ..measuring.measure import GENERAL, Mean, Measures, Scorer, answer_rows, can_write, group, to_device
from ..objectives import sft
from ..policy import Policy
from ..reading import form_of, read_data
from ..references import as_it_was
from ..settings.plugins import plugin
from ..settings.run import Data, Run
from .divergence import Moved, said, states

ASSETS = GENERAL.parent
SHARE = 0.03  # of the forward passes of training between two evaluations, a backward counted as two
LEAST, MOST = 256, 2048  # tokens of a part
FACTS = 100  # asked at most
CHATS = ("chat", "pairs", "judged", "ranked", "prompts", "mixed")  # how objectives that learn conversations have their rows rendered


@dataclass(frozen=True)
class Fact:
    """A beginning, and how it goes on."""

    prompt: str
    answer: str
    fiddle: bool = False  # fiddle goes on so


def read_facts() -> list[Fact]:
    """The facts that ship."""
    return [Fact(**json.loads(line)) for line in (ASSETS / "facts.jsonl").read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def is_right(policy: Policy, facts: Sequence[Fact]) -> list[bool]:
    """Whether a decoder's greedy continuation of each beginning is its end."""
    codec = Codec(policy.base.tokenizer)
    begun = [codec.with_bos(ids, "a fact") for ids in codec.encode([f.prompt for f in facts])]
    ends = codec.encode([f.answer for f in facts])
    rows = [
        Row(np.concatenate([b, e]).astype(np.int32), np.arange(len(b) + len(e)) >= len(b), str(i), {"place": i})
        for i, (b, e) in enumerate(zip(begun, ends, strict=True))
        if len(b) and len(e) and len(b) + len(e) <= policy.limit
    ]
    out = [False] * len(facts)
    training = policy.training
    policy.eval()
    try:
        groups = group(rows, 8192, policy.base.packs)
        for some, wrong in zip(groups, spread(policy, groups, lambda part: [_wrong(policy, g) for g in part], "facts"), strict=True):
            for s, row in enumerate(some):
                out[row.extras["place"]] = s not in wrong
    finally:
        policy.train(training)
    return out


def _wrong(policy: Policy, rows: list[Row]) -> set[int]:
    """The rows of a batch of which the likeliest next tokens are not all the trained ones."""
    batch = to_device(next_token_batch(rows, pad=policy.pad, packed=policy.base.packs), policy)
    assert batch.targets is not None
    _, target_N, example_N = scored(batch, batch.targets[..., None])
    likeliest_N = torch.cat([logp_nV.argmax(-1) for logp_nV in said(policy, states(policy, batch))])
    return set(example_N[likeliest_N != target_N].tolist())


@dataclass
class _Part:
    """Rows whose loss is measured, and the objective that reads them."""

    objective: Objective
    groups: list[list[Row]]


class Suite:
    """The suite of one run. Made before its first step; use `of`, which gives None where the run measures nothing of it."""

    def __init__(self, scorer: Scorer, say: Callable[[str], None]):
        self.scorer, self.policy, self.run = scorer, scorer.policy, scorer.run
        self.between = _between(scorer)
        self.most = int(min(MOST, max(LEAST, SHARE * 3 * self.between / 4)))
        self.parts: dict[str, _Part] = {}
        self.facts: list[Fact] = []
        self.moved: Moved | None = None
        self.tasks = {kind: (task, rows) for kind, task, rows in _tasks(self.run)}
        if self.tasks:
            can_write(self.policy)
        if self.run.evaluate.forgetting and scorer.general_groups:
            self._read(say)
            n = self.tokens
            facts = f"{len(self.facts)} facts it knows, " if self.facts else ""
            say(f"watched for forgetting: {facts}{n:,} tokens beside general text at every evaluation, {n / (3 * self.between):.1%} of what training computes")

    @classmethod
    def of(cls, scorer: Scorer, say: Callable[[str], None]) -> Suite | None:
        """Raises LuthierError where a task that is to be retained has no rows of its own, or the model writes nothing."""
        e = scorer.run.evaluate
        return cls(scorer, say) if e.retain or e.forgetting else None

    def _read(self, say: Callable[[str], None]) -> None:
        kind, started = self.policy.base.anatomy.kind, getattr(self.run.method, "from_", None) is not None
        chats = kind != "encoder" and (kind == "encoder_decoder" or self.scorer.objective.renders in CHATS)
        asked: dict[str, tuple[Objective, str | None]] = {
            "instructions": (sft.Objective(), self.run.model.template if chats else "plain") if kind != "encoder" else (self.scorer.general, None),
            "sampled": (self.scorer.general, None),
        }
        for name, (objective, template) in asked.items():
            try:
                self.parts[name] = _Part(objective, self._grouped(self._rows(ASSETS / f"{name}.jsonl", objective, template)))
            except LuthierError as e:  # a template that refuses them: what the user wants trained is trained nevertheless
                say(f"the loss on {name} is not measured: {e}")
        general = self._grouped([r for some in self.scorer.general_groups for r in some])
        self.moved = Moved(self.policy, lambda: self._batches(self.scorer.general, general), started=started)
        if kind == "decoder":
            with as_it_was(self.policy, started):
                facts = read_facts()
                known = [f for f, right in zip(facts, is_right(self.policy, facts), strict=True) if right]
            self.facts = sorted(known, key=lambda f: _order(f.prompt.encode()))[:FACTS]

    def _rows(self, path: Path, objective: Objective, template: str | None) -> list[Row]:
        """A file that ships, as rows."""
        own = Data(train=(str(path),), max_tokens=self.run.data.max_tokens, over_length="truncate", validation_share=0.0, cache="no")
        asked = replace(self.run, objective=objective, data=own, model=replace(self.run.model, template=template))
        base = self.policy.base
        return read_data(asked, base.tokenizer, positions=self.policy.limit, say=lambda _: None, form=form_of(base)).train

    def _grouped(self, rows: Sequence[Row]) -> list[list[Row]]:
        """At most ``most`` tokens of rows, always the same ones, in micro-batches."""
        kept: list[Row] = []
        tokens = 0
        for row in sorted(rows, key=lambda r: _order(r.ids.tobytes())):
            if kept and tokens + len(row) > self.most:
                continue
            kept.append(row)
            tokens += len(row)
        return group(kept, self.run.optim.micro_tokens, self.scorer.packed)

    def _batches(self, objective: Objective, groups: list[list[Row]]) -> Iterator[Any]:
        return (to_device(objective.collate(g, pad=self.policy.pad, packed=self.scorer.packed), self.policy) for g in groups)

    @property
    def tokens(self) -> int:
        """Tokens that a measurement reads beside the general text, each forward counted."""
        own = sum(len(r) for p in self.parts.values() for g in p.groups for r in g)
        twice = 2 if self.moved is not None and self.moved.kept is None else 1
        moved = 0 if self.moved is None else twice * sum(b.tokens for b in self.moved.batches())
        codec = Codec(self.policy.base.tokenizer)
        return own + moved + sum(map(len, codec.encode([f.prompt + f.answer for f in self.facts])))

    def measure(self, into: Measures, *, say: Any = None) -> None:
        """Add the suite's numbers to a visit's."""
        for name, part in self.parts.items():
            losses = self.scorer.losses(part.objective, part.groups)
            into.suite[name] = Mean(losses.value, losses.n)
        if self.moved is not None:
            into.suite["moved"] = Mean(*self.moved.measure())
        if self.facts:
            into.suite["facts"] = Mean(float(np.mean(is_right(self.policy, self.facts))), len(self.facts), "facts")
        for kind, (task, rows) in self.tasks.items():
            into.retained |= {f"{Path(kind).stem}/{name}": s for name, s in self._scores(kind, task, rows, say).items()}

    def _scores(self, kind: str, task: Any, rows: list[dict[str, Any]], say: Any) -> dict[str, Score]:
        answers = [a["answer"] for a in answer_rows(self.policy, rows, template=self.run.model.template, say=say, label=kind)]
        return score(lambda _: answers, task, rows, seed=self.run.seed)


def _between(scorer: Scorer) -> float:
    """Tokens that are trained between two evaluations, about."""
    o, rows = scorer.run.optim, scorer.prepared.train
    step = o.batch_tokens if o.batch_examples is None or not rows else o.batch_examples * sum(map(len, rows)) / len(rows)
    return max(1.0, step * (scorer.run.evaluate.every_steps or 1))


def _tasks(run: Run) -> Iterator[tuple[str, Any, list[dict[str, Any]]]]:
    """The tasks that are to be retained, with their rows."""
    for kind in dict.fromkeys(run.evaluate.retain):
        try:
            task = plugin("tasks", kind, files=True)()
        except ConfigError as e:
            raise ConfigError(f"evaluate.retain: {e}") from None
        rows = task.rows("validation")[: run.evaluate.retain_rows]
        if not rows:
            raise LuthierError(
                f"evaluate.retain: {kind} has no rows of its own, so there is nothing of it to retain; name a task that brings rows (instruments, or your own "
                "./mine.py), or score the run's data by it with evaluate.tasks"
            )
        yield kind, task, rows


def _order(what: bytes) -> bytes:
    """A fixed order that has nothing to do with what is ordered."""
    return hashlib.blake2b(what, digest_size=8).digest()
