"""Equal results: 50 steps of ours, of ours in its plain form and of the peer, for three seeds, on text that has something to learn.

How far the curves lie apart at equal seeds is held against how far they lie apart between seeds: a difference that is small beside that of another seed is
no difference in what is learned.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import catalogue, driver, limit, minutes, models, ours, peers, switches
from .examples import examples
from .workload import Workload

SEEDS = (0, 1, 2)
LAST = 10


def compare(*, tiny: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """{"what", "seeds", "curves", "last", "furthest", "spread", "said"}: losses by column and seed, and what they come to."""
    curves: dict[str, list[list[float]]] = {}
    for seed in SEEDS:
        work = catalogue.curved(seed, tiny=tiny)
        with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
            folder = Path(name)
            models.write(work, folder)
            for column, (kind, settings) in _columns(work).items():
                say(f"{work.name}, seed {seed}: {column}")
                result = driver.child(folder, work, kind, settings=settings, here=tiny)
                curves.setdefault(column, []).append([s["loss"] for s in result["steps"]])
    return summed(catalogue.curved(0, tiny=tiny), curves)


def summed(work: Workload, curves: dict[str, list[list[float]]]) -> dict[str, Any]:
    """What the curves come to. Distances are relative, of losses at the same step."""
    own, last = curves[ours.OURS], min(LAST, work.steps)
    furthest = {c: [_distance(a, b) for a, b in zip(own, by_seed, strict=True)] for c, by_seed in curves.items() if c != ours.OURS}
    pairs = [(i, j) for i in range(len(own)) for j in range(i)]
    spread = statistics.median(abs(x / y - 1) for i, j in pairs for x, y in zip(own[i], own[j], strict=True))
    worst = max(x for by_seed in furthest.values() for x in by_seed)
    fell = statistics.mean(c[0] - statistics.mean(c[-last:]) for c in own)
    said = (
        f"No curve is further from ours at the same seed than {worst:.1e} of the loss, at any of {work.steps} steps; between seeds, ours is {spread:.1e} "
        f"apart at the median step, {spread / worst:.0f} times as far. Over the run the loss falls by {fell:.2f} nats."
    )
    tokens, _ = examples(work)
    what = f"{work.name}: {work.steps} steps of {sum(len(r['ids']) for r in tokens[0]):,} tokens, lr {work.lr:g}, ids as frequent as words (Zipf)."
    return {
        "what": what,
        "seeds": list(SEEDS),
        "curves": curves,
        "last": {c: [statistics.mean(x[-last:]) for x in by_seed] for c, by_seed in curves.items()},
        "furthest": furthest,
        "spread": spread,
        "said": said,
    }


def _distance(a: list[float], b: list[float]) -> float:
    return max(abs(x / y - 1) for x, y in zip(a, b, strict=True))


def _columns(work: Workload) -> dict[str, tuple[str, Any]]:
    base, peer = ours.settings(work), peers.of(work)
    out: dict[str, tuple[str, Any]] = {ours.OURS: ("ours", base)}
    if (off := switches.plain()) is not None:
        out[switches.PLAIN] = ("ours", base | {"speed": off})
    return out | {peer.name(work): ("peer", next(iter(peer.candidates(work).values())))}


def expected(rate: float) -> float:
    """Minutes."""
    work = catalogue.curved(0)
    steps, _ = examples(work)
    one = limit.useful(work, steps[0]).total / rate
    return len(SEEDS) * (3 * minutes.PROCESS_S + (2 * minutes.OURS + minutes.TUNED * 1.5) * one * work.steps) / 60
