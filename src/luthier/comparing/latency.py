"""How long one answer takes, asked for alone: reading the prompt, and every token after it. Through Policy.generate, as `luthier generate` goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core import Incompatible, LuthierError, Row
from ..measuring.measure import predict
from ..modelling.packed import packed
from ..modelling.site import unwrap
from ..policy import Policy
from ..saving.merging import foldable, probe_ids, write_out

SHORT, LONG = 17, 49  # new tokens: both lay weights out for decoding, so their difference is tokens alone
TIMES = 5
MOST_SECONDS = 20.0  # for one of the two ways; fewer repetitions where it is slow


@dataclass(frozen=True)
class Latency:
    """Seconds, each the median of a few."""

    prefill: float  # from a prompt to its first token; of a head, from a text to its label
    token: float | None  # each token after it; None where a head answers


def measured(policy: Policy, prompt: Sequence[int], example: Row | None = None, objective: Any = None) -> Latency:
    """Latency of one prompt. ``example`` and ``objective``: of a policy whose head answers, the row that is labelled instead."""
    if example is not None:
        return Latency(_median(policy, lambda: predict(policy, objective, [example])), None)
    room = policy.limit - len(prompt)
    if room <= LONG:
        prompt = prompt[: max(1, policy.limit - LONG - 1)]
    ask = lambda n: lambda: policy.generate([list(prompt)], max_new=n)  # noqa: E731
    first = _median(policy, ask(1))
    short, long = _median(policy, ask(SHORT)), _median(policy, ask(LONG))
    return Latency(first, max(0.0, long - short) / (LONG - SHORT))


def _median(policy: Policy, what: Callable[[], Any]) -> float:
    took: list[float] = []
    began = time.perf_counter()
    while len(took) <= TIMES and (len(took) < 3 or time.perf_counter() - began < MOST_SECONDS / 3):
        start = time.perf_counter()
        what()
        if policy.device.type == "cuda":
            torch.cuda.synchronize(policy.device)
        took.append(time.perf_counter() - start)
    return statistics.median(took[1:])  # the first lays things out and warms up


def folded(policy: Policy) -> bool:
    """Fold the delta into the base in memory, for good; whether it can be. What codes stand for is written out in floats first, as `luthier merge` does."""
    try:
        foldable(policy)
        if any(True for _ in packed(policy.lm)):
            write_out(policy, probe_ids(policy), None)
        if policy.delta is not None:
            policy.fold()
            unwrap(policy.lm)
    except (Incompatible, LuthierError):
        return False
    return True
