"""Sampling answers: prompts read once and continued several times, in batches that fit into memory, finished rows dropped, log-probabilities kept.

Random numbers are a function of (seed, number of the prompt, sample, step), so an answer does not depend on what else is in its batch, on the order of the
prompts or on how many fit into a batch, beyond the rounding of the products that make its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core import LuthierError, Rollout
from .decoding import Steps
from .sampling import Draws, pick, seed_of


@dataclass(frozen=True)
class Choices:
    """How an answer is chosen and when it ends."""

    max_new: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: frozenset[int] = frozenset()
    seed: int = 0


@torch.no_grad()
def generate(
    steps_for: Callable[[Sequence[int]], Steps],
    prompts: Sequence[Sequence[int]],
    *,
    limit: int,
    room: Sequence[int],
    batch_tokens: int,
    batch_rows: int,
    samples: int = 1,
    max_new: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    on_token: Callable[[int], None] | None = None,
    on_answers: Callable[[int], None] | None = None,
) -> Rollout:
    """Answer every prompt ``samples`` times; see Policy.generate. ``steps_for`` gives the steps for the prompts of these indices; ``limit``: positions the
    model has; ``room``: new tokens that fit behind each prompt. Raises LuthierError for an empty or over-long prompt, and for settings out of range."""
    for i, p in enumerate(prompts):
        if not 0 < len(p) < limit:
            raise LuthierError(f"prompt {i + 1} has {len(p)} tokens; this model takes 1 to {limit - 1}")
    if numbers is not None and len(numbers) != len(prompts):
        raise LuthierError(f"{len(numbers)} numbers for {len(prompts)} prompts; every prompt has one")
    _check(samples, max_new, temperature, top_k, top_p, batch_tokens, batch_rows)
    choices = Choices(max_new, temperature, top_k, top_p, frozenset(stop), seed)
    numbers = range(len(prompts)) if numbers is None else numbers
    n = len(prompts) * samples
    out = Rollout([[] for _ in range(n)], [[] for _ in range(n)], ["length"] * n, [[] for _ in range(n)])
    done = 0
    for batch, each in batches([len(p) for p in prompts], samples, max_new, batch_tokens, batch_rows):
        steps = steps_for(batch)
        first_GV = steps.logits(steps.begin([prompts[i] for i in batch]))
        most = min(max_new, max(room[i] for i in batch))
        for start in range(0, samples, each):
            here = range(start, min(start + each, samples))
            rows = [_Row(i * samples + s, min(max_new, room[i]), seed_of(seed, numbers[i], s)) for i in batch for s in here]
            if most > 0:
                steps.fork(len(here), most, last=here.stop == samples)
                _write(steps, first_GV.repeat_interleave(len(here), 0), rows, choices, out, on_token)
            done += len(rows)
            if on_answers is not None:
                on_answers(done)
    return out


def _check(samples: int, max_new: int, temperature: float, top_k: int, top_p: float, batch_tokens: int, batch_rows: int) -> None:
    for name, value, ok, accepted in (
        ("samples", samples, samples >= 1, "1 or more"),
        ("max_new", max_new, max_new >= 0, "0 or more"),
        ("temperature", temperature, temperature >= 0, "0 (the likeliest token) or more"),
        ("top_k", top_k, top_k >= 0, "0 (all tokens) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("batch_tokens", batch_tokens, batch_tokens >= 1, "1 or more"),
        ("batch_rows", batch_rows, batch_rows >= 1, "1 or more"),
    ):
        if not ok:
            raise LuthierError(f"{name} is {value}; it takes {accepted}")


def batches(lengths: Sequence[int], samples: int, max_new: int, tokens: int, rows: int) -> Iterator[tuple[list[int], int]]:
    """Prompts answered together, shortest first, with how many answers to each at a time.

    A prompt takes its batch's longest length, and every answer ``max_new`` tokens. What is more than ``tokens`` or ``rows`` goes into the next batch; where one
    prompt alone is too much, its answers are written in several turns, and one where even that is too much.
    """
    here: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if here and ((len(here) + 1) * (lengths[i] + samples * max_new) > tokens or (len(here) + 1) * samples > rows):
            yield here, _each(lengths[here[-1]], len(here), samples, max_new, tokens, rows)
            here = []
        here.append(i)
    if here:
        yield here, _each(lengths[here[-1]], len(here), samples, max_new, tokens, rows)


def _each(length: int, prompts: int, samples: int, max_new: int, tokens: int, rows: int) -> int:
    return samples if prompts > 1 else max(1, min(samples, rows, (tokens - length) // max(1, max_new)))


@dataclass
class _Row:
    """One answer that is being written."""

    place: int  # in the rollout
    most: int
    seed: int
    finished: bool = field(default=False)


def _write(steps: Steps, logits_BV: Tensor, rows: list[_Row], choices: Choices, out: Rollout, on_token: Callable[[int], None] | None) -> None:
    """Tokens from the first logits on, until every row is finished."""
    draws = None if choices.temperature == 0.0 else Draws([r.seed for r in rows], logits_BV.device)
    for r in rows:
        r.finished = r.most < 1
    while True:
        u_B = None if draws is None else draws.next()
        token_B, logp_B, tempered_B = pick(logits_BV, u_B, choices.temperature, choices.top_k, choices.top_p)
        got = torch.stack([token_B.int(), logp_B.view(torch.int32), tempered_B.view(torch.int32)]).cpu()  # one transfer
        for r, token, logp, tempered in zip(rows, got[0].tolist(), *got[1:].view(torch.float32).tolist(), strict=True):
            if not r.finished:
                _take(r, token, logp, tempered, choices, out, on_token)
        living = [b for b, r in enumerate(rows) if not r.finished]
        if not living:
            return
        size = rounded(len(living))
        if size < len(rows) and size <= steps.drop_at * len(rows):
            kept = (living + [b for b, r in enumerate(rows) if r.finished])[:size]
            steps.keep(kept)
            token_B, rows = token_B[torch.tensor(kept, device=token_B.device)], [rows[b] for b in kept]
            if draws is not None:
                draws.keep(kept, len(living))
        logits_BV = steps.logits(steps.go_on(token_B))


def _take(row: _Row, token: int, logp: float, tempered: float, choices: Choices, out: Rollout, on_token: Callable[[int], None] | None) -> None:
    ids = out.ids[row.place]
    ids.append(token)
    out.logps[row.place].append(logp)
    out.tempered[row.place].append(tempered)
    if token in choices.stop:
        out.stopped[row.place] = "stop"
        row.finished = True
        return
    row.finished = len(ids) == row.most
    if on_token is not None:
        on_token(token)


def rounded(rows: int) -> int:
    """Rows decoded together for this many: few sizes, since on CPU every new shape of a half-precision product costs code that stays in memory."""
    return next((n for n in (1, 2, 4, 8) if rows <= n), -(-rows // 8) * 8 if rows <= 64 else -(-rows // 32) * 32)
