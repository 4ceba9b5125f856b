"""Answers to random prompts for tiny models without a tokenizer, as if they had been sampled, judged and read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import tiny
from luthier.core import Answer, Row

EOS = 2


def start_of(family: str) -> int | None:
    """The token that an encoder-decoder's answer begins with."""
    return {"bart": 2}.get(family, 0) if family in tiny.SEQ2SEQ else None


def prompts(n: int = 4, seed: int = 0, longest: int = 9) -> list[Row]:
    """Random prompts of different lengths."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        ids = rng.integers(3, tiny.V, rng.integers(3, longest)).astype(np.int32)
        out.append(Row(ids, np.zeros(len(ids), dtype=bool), f"made:{i + 1}", {"task": {"prompt": [{"role": "user", "content": f"question {i}"}], "refs": []}}))
    return out


def answers(asked: Sequence[Row], samples: int = 2, seed: int = 0, longest: int = 8) -> list[Answer]:
    """Some to each prompt, of different lengths; every third is cut off, the others end with EOS. Scores are random."""
    rng = np.random.default_rng(seed)
    out = []
    for i, row in enumerate(r for r in asked for _ in range(samples)):
        ids = rng.integers(3, tiny.V, rng.integers(1, longest)).tolist()
        cut = i % 3 == 2
        ids = ids if cut else [*ids, EOS]
        about = {"logp": -4.0, "reference": -4.0, "value": 0.2, "entropy": 3.0}
        tokens = {k: (mean + 0.3 * rng.normal(size=len(ids))).astype(np.float32) for k, mean in about.items()}
        tokens["sampled"] = tokens["logp"]
        out.append(Answer(row, ids, tokens["logp"].tolist(), "length" if cut else "stop", f"answer {i}", {"made": 0.0}, float(rng.normal()), tokens))
    return out
