"""Random answers to random prompts, as the rows of preferences, for tiny models without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import tiny
from luthier.core import Row, join

SIZES = (2, 3, 2, 2)


def answer(family: str, prompt: np.ndarray, said: np.ndarray, renders: str) -> Row:
    """One example as data/rankings.py makes it."""
    both = np.concatenate([prompt, said, [2]]).astype(np.int32)
    start = 2 if family == "bart" else 0
    if family in tiny.SEQ2SEQ and renders == "ranked":
        return Row(np.array([start], dtype=np.int32), np.ones(1, dtype=bool), "", {"source": both})
    if family in tiny.SEQ2SEQ:
        ids = np.concatenate([[start], said, [2]]).astype(np.int32)
        return Row(ids, np.arange(len(ids)) > 0, "", {"source": prompt.astype(np.int32)})
    place = np.arange(len(both))
    if renders == "ranked":
        return Row(both, place == (0 if family in tiny.ENCODERS else len(both) - 1))
    return Row(both, place >= len(prompt))


def rows(family: str, renders: str, sizes: Sequence[int] = SIZES, seed: int = 0, reference: bool = True) -> list[Row]:
    """Rankings of so many answers, best first, for "ranked" and "pairs"; judged answers with one to another prompt beside each for "judged".

    ``reference``: with made-up log-probabilities of a reference, where the objective has one.
    """
    rng = np.random.default_rng(seed)
    some = lambda low, high: rng.integers(3, tiny.V, rng.integers(low, high))  # noqa: E731
    out = []
    for i, k in enumerate(sizes):
        prompt = some(3, 7)
        if renders == "judged":
            examples, extras = [answer(family, prompt, some(2, 9), renders) for _ in range(2)], {"ranks": (), "good": bool(i % 2)}
        else:
            examples, extras = [answer(family, prompt, some(2, 9), renders) for _ in range(k)], {"ranks": tuple(range(k)), "good": None}
        if reference and renders != "ranked":
            extras["reference"] = -4.0 * np.array([e.train[1:].sum() for e in examples], dtype=np.float32) + rng.normal(0, 1, len(examples)).astype(np.float32)
        out.append(join(examples, margin=0.0, **extras))
    return out
