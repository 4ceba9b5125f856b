"""The feed of objectives that learn from the model's own answers: sample, score, read, learn; again.

A rollout is a number of prompts in seeded order, the answers sampled to each, their scores, and what the voices say of every token before anything of it is
learned. Its rows are then fed like any data, several times over. Everything here depends on the seed, the prompts and the number of steps done: what is sampled
is a function of (seed, rollout, prompt, sample). A rollout that is under way is part of the state, since the policy it was sampled from is gone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import Answer, Batch, LuthierError, Policy, Rewarded, Row, answered_batch, scored, spread, token_values
from ..nn.rewarded import correlation, divergence, repetition
from .feed import Batches
from .replay import counted_as
from .rows import sides

Judge = Callable[[Sequence[Answer]], None]  # fills scores and score
DISAGREE = 0.1  # mean difference in nats of one token's log-probability, sampled and read again, at which something is wrong


@dataclass(frozen=True)
class Sampling:
    """What `sample` needs to know besides the policy and the prompts."""

    max_new: int
    temperature: float
    stop: Sequence[int]
    seed: int
    decode: Callable[[Sequence[int]], str]
    start: int | None  # the token that an encoder-decoder's answer begins with
    batch_tokens: int | None = None  # positions whose keys and values are held at a time; None: what fits into memory just then


def sample(
    policy: Policy,
    prompts: Sequence[Row],
    samples: int,
    how: Sampling,
    *,
    numbers: Sequence[int],
    rollout: int = 0,
    on_answers: Callable[[int], None] | None = None,
) -> list[Answer]:
    """``samples`` answers to each prompt, those of one prompt side by side. ``numbers``: of the prompts, for the random numbers; ``on_answers`` sees how many
    are finished."""
    again = [row for row in prompts for _ in range(samples)]
    got = policy.generate(
        [row.ids.tolist() for row in prompts],
        samples=samples,
        max_new=how.max_new,
        temperature=how.temperature,
        stop=how.stop,
        seed=how.seed * 100_003 + rollout,
        numbers=list(numbers),
        on_answers=on_answers,
        batch_tokens=how.batch_tokens,
    )
    made = zip(again, got.ids, got.logps, got.stopped, strict=True)
    return [Answer(row, ids, logps, stopped, _said(row, ids, how)) for row, ids, logps, stopped in made]


def _said(prompt: Row, ids: Sequence[int], how: Sampling) -> str:
    """An answer as text. What goes on from a text keeps the space or the line break between them."""
    if how.start is None and isinstance(prompt.extras.get("task", {}).get("prompt"), str):
        before, whole = how.decode(prompt.ids.tolist()), how.decode([*prompt.ids.tolist(), *ids])
        if whole.startswith(before):  # some tokenizers leave the first space of a text out, so the answer alone would lose it
            return whole[len(before) :]
    return how.decode(ids).strip()


def answered(
    policy: Policy,
    prompts: Sequence[Row],
    samples: int,
    how: Sampling,
    judge: Judge,
    *,
    numbers: Sequence[int],
    wants: frozenset[str],
    layout: dict[str, Any],
    rollout: int = 0,
    on_answers: Callable[[int], None] | None = None,
) -> tuple[list[Answer], dict[str, float]]:
    """Answers sampled, judged and read, each rank doing all of it for its share of the prompts; and how long each part took here. ``layout``: of `read`."""
    ranks = getattr(policy, "place", None)
    size = 1 if ranks is None else ranks.size
    times: dict[str, float] = {}

    def work(some: Sequence[int]) -> list[list[Answer]]:
        began = time.perf_counter()
        tick = None if on_answers is None else lambda done: on_answers(min(done * size, len(prompts) * samples))
        mine = [prompts[i] for i in some]
        got = sample(policy, mine, samples, how, numbers=[numbers[i] for i in some], rollout=rollout, on_answers=tick)
        sampled = time.perf_counter()
        judge(got)
        judged = time.perf_counter()
        read(policy, got, wants, start=how.start, **layout)
        times.update(sampling_seconds=sampled - began, judging_seconds=judged - sampled, reading_seconds=time.perf_counter() - judged)
        return [[replace(a, prompt=_NOBODY) for a in got[i * samples : (i + 1) * samples]] for i in range(len(some))]

    each = spread(policy, range(len(prompts)), work, "answers")
    return [replace(a, prompt=prompt) for prompt, some in zip(prompts, each, strict=True) for a in some], times


_NOBODY = Row(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool))  # all ranks have the prompts


@torch.no_grad()
def read(
    policy: Policy, answers: Sequence[Answer], wants: frozenset[str], *, pad: int, packed: bool, tokens: int, start: int | None, temperature: float
) -> None:
    """Fill ``Answer.tokens``: logp and entropy of the policy as training computes them, and reference and value where they are wanted.

    "sampled" is its log-probability at temperature 1, to compare with what sampling said; logp is at the temperature that was sampled with.
    """
    rows = [a.row(start) for a in answers]
    device = policy.device  # type: ignore[attr-defined]
    training = policy.training  # type: ignore[attr-defined]
    policy.eval()  # type: ignore[attr-defined]
    try:
        for some in _groups(rows, tokens, packed):
            batch = answered_batch([rows[i] for i in some], pad=pad, packed=packed).to(device)
            hidden_BTD = policy.hidden(batch)
            hidden_ND, target_N, _ = scored(batch, hidden_BTD)
            got = policy.score(hidden_ND, target_N, temperature=temperature, want=("logp", "entropy"))
            got["sampled"] = got["logp"] if temperature == 1.0 else policy.score(hidden_ND, target_N)["logp"]
            if "reference" in wants:
                with policy.reference():
                    other_ND, _, _ = scored(batch, policy.hidden(batch))
                    got["reference"] = policy.score(other_ND, target_N, temperature=temperature)["logp"]
            if "value" in wants:
                shared = policy.voices["value"].route == policy.name  # type: ignore[attr-defined]
                got["value"] = token_values(policy, batch, hidden_BTD if shared else None)
            _hand_out(got, [answers[i] for i in some])
    finally:
        policy.train(training)  # type: ignore[attr-defined]


def _groups(rows: Sequence[Row], tokens: int, packed: bool) -> list[list[int]]:
    """Numbers of rows of like length, in groups of at most ``tokens`` positions, padding included."""
    out: list[list[int]] = []
    total = 0
    for i in sorted(range(len(rows)), key=lambda i: sum(sides(rows[i]))):
        n = sum(sides(rows[i]))
        width = total + n if packed else (len(out[-1]) + 1) * n if out else 0
        if not out or width > tokens:
            out.append([])
            total = 0
        out[-1].append(i)
        total += n
    return out


def _hand_out(got: dict[str, Tensor], answers: Sequence[Answer]) -> None:
    cuts = np.cumsum([len(a.ids) for a in answers])[:-1]
    for name, values_N in got.items():
        for a, part in zip(answers, np.split(values_N.float().cpu().numpy(), cuts), strict=True):
            a.tokens[name] = part


class Rollouts:
    """The micro-batches of one optimizer step at a time; samples a new rollout whenever the last one has been learned from."""

    def __init__(
        self,
        prompts: Sequence[Row],
        policy: Policy,
        objective: Rewarded,
        judge: Judge,
        how: Sampling,
        *,
        pad: int,
        packed: bool,
        micro_tokens: int,
        epochs: float,
        steps: int | None,
        seed: int,
        beside: Batches | None = None,
        tick: Callable[[str, int, int], None] | None = None,
    ):
        """``epochs``: passes over the prompts, unless ``steps`` (optimizer steps) is given; ``beside``: text that every step learns too; ``tick`` sees how far
        sampling is. Raises LuthierError without prompts, and where only the value would learn."""
        if not prompts:
            raise LuthierError("there is no prompt to answer. Check data.train and the counts of dropped rows.")
        self.prompts, self.policy, self.objective, self.judge, self.how = list(prompts), policy, objective, judge, how
        self.pad, self.packed, self.micro_tokens, self.seed, self.beside, self.tick = pad, packed, micro_tokens, seed, beside, tick
        self.per_rollout = objective.epochs * objective.minibatches
        each = min(objective.prompts, len(prompts))
        self.steps: int = steps if steps is not None else max(1, math.ceil(epochs * len(prompts) / each)) * self.per_rollout
        self.warmup = getattr(objective, "value_warmup", 0)  # rollouts
        if self.steps <= self.warmup * self.per_rollout:
            raise LuthierError(
                f"objective.value_warmup: only the value learns in the first {self.warmup} rollouts of {self.per_rollout} steps, and this run has "
                f"{self.steps} steps, so the policy would never learn; raise optim.steps or optim.epochs, or lower objective.value_warmup"
            )
        value = policy.voices.get("value")
        self.shared = value is not None and value.route == policy.name  # type: ignore[attr-defined]
        self.step, self.rollout = 0, 0  # steps done, rollouts begun
        self.state: dict[str, Any] = {}  # the objective's own: the KL coefficient, the scale of scores
        self.rows: list[Row] = []
        self.inner: Batches | None = None
        self.first: dict[str, float] = {}  # facts of the first rollout
        self.events: list[dict[str, Any]] = []  # facts of rollouts that nobody has read yet
        self.stopped = ""  # why no more should be learned
        self.taught = False  # whether any answer so far was better or worse than expected: else there is nothing to learn

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __len__(self) -> int:
        return self.steps

    def __next__(self) -> list[Batch]:
        if self.step >= self.steps:
            raise StopIteration
        if self.step % self.per_rollout == 0:
            self._sample()
        assert self.inner is not None
        self.step += 1
        parts = [p for batch in next(self.inner) for p in self.objective.parts(batch, self.rollout - 1, shared=self.shared)]
        return parts + (counted_as(next(self.beside), "text") if self.beside is not None and self.rollout > self.warmup else [])

    def take_events(self) -> list[dict[str, Any]]:
        """The facts of the rollouts since the last call."""
        events, self.events = self.events, []
        return events

    # --- a rollout ---

    def _chosen(self, rollout: int) -> list[int]:
        """The prompts of a rollout: the next ones of seeded permutations, one after another."""
        n, want = len(self.prompts), min(self.objective.prompts, len(self.prompts))
        out: list[int] = []
        at = rollout * want
        while len(out) < want:
            epoch, offset = divmod(at + len(out), n)
            order = np.random.default_rng([self.seed, epoch]).permutation(n)
            out += order[offset : offset + want - len(out)].tolist()
        return out

    def _sample(self) -> None:
        chosen, o = self._chosen(self.rollout), self.objective
        answers, times = answered(
            self.policy,
            [self.prompts[i] for i in chosen],
            o.samples,
            self.how,
            self.judge,
            numbers=chosen,
            wants=o.reads,
            layout={"pad": self.pad, "packed": self.packed, "tokens": self.micro_tokens, "temperature": o.temperature},
            rollout=self.rollout,
            on_answers=self._ticked(len(chosen)),
        )
        facts = described(answers)
        self._agree(facts)
        rows, more = o.rows(answers, self.state, start=self.how.start)
        self._learn_from(rows)
        self.taught = self.taught or any(np.any(r.extras["tokens"].get("advantage", 1.0)) for r in rows)
        self.rollout += 1
        facts |= more | {k: round(v, 3) for k, v in times.items()}
        self.first = self.first or facts
        self.stopped = o.collapsed(facts, self.first)
        best = max(range(len(answers)), key=lambda i: answers[i].score)
        self.events.append(facts | {"rollout": self.rollout, "best": answers[best].text[:300], "last": answers[-1].text[:300]})

    def _ticked(self, prompts: int) -> Callable[[int], None] | None:
        if self.tick is None:
            return None
        tick, label, total = self.tick, f"answers of rollout {self.rollout + 1}", prompts * self.objective.samples
        return lambda done: tick(label, done, total) if done < total else None  # that it is over is said by the rollout's own line

    def _agree(self, facts: dict[str, float]) -> None:
        """Sampling and training must see the same model: else what is reinforced is not what was done."""
        if not facts["sampling_gap"] <= DISAGREE:  # nor is what is no number
            raise LuthierError(
                f"sampling and training disagree about the same tokens by {facts['sampling_gap']:.3f} nats in the mean (at most {DISAGREE} is noise), so what "
                "would be reinforced is not what was sampled; look at the chat template, the precision and the attention of this model (luthier doctor)"
            )

    def _learn_from(self, rows: list[Row]) -> None:
        o, ranks = self.objective, getattr(self.policy, "place", None)
        ranks = getattr(ranks, "launch", ranks)  # answers of a sharded base are everybody's, and still each rank learns from its share
        self.rows = rows
        self.inner = Batches(
            rows,
            self.objective.collate,
            pad=self.pad,
            packed=self.packed,
            batch_examples=math.ceil(len(rows) / o.minibatches),
            micro_tokens=self.micro_tokens,
            steps=self.per_rollout,
            seed=self.seed * 100_003 + self.rollout,
            rank=0 if ranks is None else ranks.rank,
            size=1 if ranks is None else ranks.size,
        )

    # --- going on ---

    def _fingerprint(self) -> dict[str, Any]:
        o = self.objective
        of_a_rollout = [o.prompts, o.samples, o.epochs, o.minibatches]
        return {"prompts": len(self.prompts), "tokens": sum(len(r) for r in self.prompts), "seed": self.seed, "of_a_rollout": of_a_rollout}

    def state_dict(self) -> dict[str, Any]:
        """Where the next step begins; tensors among the values hold the rollout that is under way."""
        out: dict[str, Any] = {"step": self.step, "rollout": self.rollout, "state": dict(self.state), "first": self.first, "taught": self.taught}
        out["batch_tokens"] = self.how.batch_tokens  # what is written together rounds together
        out |= self._fingerprint()
        if self.beside is not None:
            out["beside"] = self.beside.state_dict()
        if self.inner is not None and self.step % self.per_rollout:
            out["inner"] = self.inner.state_dict()
            out |= _as_tensors(self.rows)
        return out

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises LuthierError for other prompts or other rollouts."""
        for key, now in self._fingerprint().items():
            if state[key] != now:
                raise LuthierError(
                    f"cannot resume: {key} was {state[key]} when the checkpoint was written and is {now} now. Resume with the same data, seed and rollouts, "
                    "or start a new run."
                )
        self.step, self.rollout, self.state, self.first = state["step"], state["rollout"], dict(state["state"]), state["first"]
        self.taught = state["taught"]
        self.how = replace(self.how, batch_tokens=state["batch_tokens"])
        if self.beside is not None and "beside" in state:  # else the text is new to this run
            self.beside.load_state_dict(state["beside"])
        if "inner" in state:
            self.rollout -= 1  # the seed of its order is that of the rollout it belongs to
            self._learn_from(_from_tensors(state))
            self.rollout += 1
            assert self.inner is not None
            self.inner.load_state_dict(state["inner"])


def described(answers: Sequence[Answer]) -> dict[str, float]:
    """What is said of a rollout, whatever learns from it. KL and entropy are of the policy that was sampled, in nats."""
    scores, lengths = [a.score for a in answers], [len(a.ids) for a in answers]
    tokens = {k: np.concatenate([a.tokens[k] for a in answers]) for k in answers[0].tokens}
    gap_N = np.abs(tokens["sampled"] - np.concatenate([np.asarray(a.logps, dtype=np.float32) for a in answers]))
    out = {
        "reward": float(np.mean(scores)),
        "reward_std": float(np.std(scores)),
        **{name if name.startswith("watch_") else f"reward_{name}": float(np.mean([a.scores[name] for a in answers])) for name in answers[0].scores},
        "entropy": float(tokens["entropy"].mean()),
        "answer_tokens": float(np.mean(lengths)),
        "stopped": float(np.mean([a.stopped == "stop" for a in answers])),
        "repetition": float(np.mean([repetition(a.ids) for a in answers])),
        "reward_by_length": correlation(scores, lengths),
        "sampling_gap": float(gap_N.mean()),
        "sampling_gap_largest": float(gap_N.max()),
    }
    if "reference" in tokens:
        estimate_N = divergence(torch.from_numpy(tokens["logp"]), torch.from_numpy(tokens["reference"]), "k3")
        out |= {"kl": float(estimate_N.sum()) / len(answers), "kl_per_token": float(estimate_N.mean())}
    return out


def _as_tensors(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows end to end."""
    flat = lambda parts: torch.from_numpy(np.concatenate(parts))  # noqa: E731
    out = {
        "rows.ids": flat([r.ids for r in rows]),
        "rows.train": flat([r.train for r in rows]),
        "rows.lengths": torch.tensor([len(r) for r in rows]),
    }
    if "source" in rows[0].extras:
        out |= {"rows.source": flat([r.extras["source"] for r in rows]), "rows.source_lengths": torch.tensor([len(r.extras["source"]) for r in rows])}
    return out | {f"rows.tokens.{k}": flat([r.extras["tokens"][k] for r in rows]) for k in rows[0].extras["tokens"]}


def _from_tensors(state: dict[str, Any]) -> list[Row]:
    lengths = state["rows.lengths"].tolist()
    cut = lambda t, ns: np.split(t.numpy(), np.cumsum(ns)[:-1])  # noqa: E731
    ids, train = cut(state["rows.ids"], lengths), cut(state["rows.train"], lengths)
    trained = [int(t.sum()) for t in train]
    names = [k.removeprefix("rows.tokens.") for k in state if k.startswith("rows.tokens.")]
    tokens = {k: cut(state[f"rows.tokens.{k}"], trained) for k in names}
    extras: list[dict[str, Any]] = [{"tokens": {k: tokens[k][i] for k in names}} for i in range(len(lengths))]
    if "rows.source" in state:
        for e, source in zip(extras, cut(state["rows.source"], state["rows.source_lengths"].tolist()), strict=True):
            e["source"] = source
    return [Row(i, t, "(a sampled answer)", e) for i, t, e in zip(ids, train, extras, strict=True)]
