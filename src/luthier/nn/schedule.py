"""Learning-rate schedules: a factor of the peak as a pure function of the step."""

from __future__ import annotations

import math


def factor(step: int, steps: int, *, kind: str, warmup: int, floor: float = 0.0) -> float:
    """Linear warm-up over ``warmup`` steps (the first step already moves), then ``kind``: cosine, linear or constant.

    ``step`` counts from 0; cosine (Loshchilov & Hutter, 2016, arXiv 1608.03983, eq. 5, one cycle) and linear reach ``floor`` after the last.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done
    return floor + (1 - floor) * shape
