"""How long a workload will take, before it runs: its useful operations at this machine's rate, times how far each column was found from that limit."""

from __future__ import annotations

from . import ours, peers
from .examples import examples
from .limit import useful
from .workload import Workload

# Distances from the limit as they were measured on a 2-core CPU without matrix units; the reference computes in float32 with all logits.
DEFAULT, TUNED, OURS, REFERENCE = 8.0, 3.6, 1.9, 5.0
PROCESS_S, IDLE_S = 6.5, 2.5  # imports, loading, rates of the machine; the wait until it is idle


def expected(work: Workload, repetitions: int, rate: float, *, variants: int = 0) -> float:
    """Minutes of one workload; ``variants`` of ours instead of the peers."""
    steps, _ = examples(work)
    one = sum(useful(work, rows).total for rows in steps) / len(steps) / rate
    tried = len(list(peers.of(work).candidates(work).items())[: work.tries or None])
    loading = PROCESS_S + work.parameters / 60e6
    processes = [(OURS, work.steps)] * (variants or len(ours.columns(work)))
    if not variants:
        processes += [(DEFAULT, work.steps), (TUNED, work.steps)]
    total = sum(loading + IDLE_S + distance * one * n for distance, n in processes) * repetitions
    if not variants:
        total += loading + IDLE_S + tried * (3.0 + TUNED * 1.2 * one * work.tune_steps)
    return (total + loading + REFERENCE * one) / 60
