"""Examples of random tokens that share prompts."""

from __future__ import annotations

import numpy as np

import tiny
from luthier.core import Row


def answers(*prompts: tuple[int, tuple[int, ...]], seed: int = 0) -> list[Row]:
    """Examples of random tokens: (tokens of a prompt, tokens of each answer to it), prompt after prompt."""
    rng = np.random.default_rng(seed)
    some = lambda n: rng.integers(3, tiny.V, n)  # noqa: E731
    out = []
    for p, lengths in prompts:
        prompt = some(p)
        for i, n in enumerate(lengths):
            own = some(n)
            own[0] = 3 + (own[0] + i) % (tiny.V - 3) if p else own[0]
            out.append(Row(np.concatenate([prompt, own]).astype(np.int32), np.arange(p + n) >= max(p, 1), f"made:{len(out) + 1}"))
    return out
