"""Hiding tokens of a text, to learn by finding them again: single tokens for encoders, spans for encoder-decoders.

Everything here is a function of the generator it is given, so what is hidden can be a function of (seed, epoch, row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KEPT, RANDOM = 0.1, 0.1  # of the chosen tokens: left as they are, replaced by a random one; the others become the mask token


@dataclass(frozen=True, eq=False)
class Hiding:
    """What a tokenizer offers for hiding tokens; one object, shared by all rows of a run."""

    usual: np.ndarray  # (K,) ids that are no special tokens: what random replacements are drawn from
    mask: int | None = None  # stands for a hidden token (encoders)
    sentinels: tuple[int, ...] = ()  # stand for hidden spans, in their order (encoder-decoders)
    start: int = 0  # the token an answer begins with
    eos: int | None = None  # the token a source and an answer end with


def choose_tokens(rng: np.random.Generator, may_N: np.ndarray, share: float) -> np.ndarray:
    """(N,) bool: a share of the positions in ``may_N``, at least one where there is one."""
    places = np.flatnonzero(may_N)
    out = np.zeros(len(may_N), dtype=bool)
    if len(places):
        out[rng.choice(places, max(1, round(share * len(places))), replace=False)] = True
    return out


def hide_tokens(rng: np.random.Generator, ids_N: np.ndarray, chosen_N: np.ndarray, mask: int, usual_K: np.ndarray) -> np.ndarray:
    """(N,) the ids with 80 % of the chosen ones masked, 10 % replaced by a random one, 10 % left (Devlin et al., 2018, section 3.1)."""
    out, where = ids_N.copy(), np.flatnonzero(chosen_N)
    drawn = rng.random(len(where))
    out[where[drawn >= KEPT + RANDOM]] = mask
    other = where[(drawn >= KEPT) & (drawn < KEPT + RANDOM)]
    out[other] = usual_K[rng.integers(len(usual_K), size=len(other))]
    return out


def choose_spans(rng: np.random.Generator, n: int, share: float, mean: float, most: int) -> np.ndarray:
    """(n,) bool: round(share n) tokens in spans of ``mean`` on average, no two of which touch; at most ``most`` spans.

    All ways to cut the hidden tokens into spans, and the others into the gaps between them, are equally likely. The first and the last gap
    may be empty. Raises ValueError for fewer than two tokens, of which none can be hidden.
    """
    if n < 2:
        raise ValueError(f"a text of {n} tokens has none to hide")
    hidden = min(max(round(share * n), 1), n - 1)
    spans = min(max(round(hidden / mean), 1), n - hidden + 1, most)
    gaps = _parts(rng, n - hidden + 2, spans + 1)  # two more than there are, so that the outer two may be empty
    gaps[0] -= 1
    gaps[-1] -= 1
    out = np.zeros(n, dtype=bool)
    at = 0
    for gap, length in zip(gaps[:-1], _parts(rng, hidden, spans), strict=True):
        out[at + gap : at + gap + length] = True
        at += gap + length
    return out


def _parts(rng: np.random.Generator, total: int, parts: int) -> np.ndarray:
    """``total`` as a sum of positive parts, each such sum equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def hide_spans(ids_N: np.ndarray, hidden_N: np.ndarray, sentinels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(source, answer): each hidden span replaced by one sentinel; the sentinels each before its span, and one more behind the last.

    Raffel et al., 2019, figure 2. "Thank you <X> me to your party <Y> week", "<X> for inviting <Y> last <Z>".
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], hidden_N, [False]]).astype(np.int8)))
    source: list[np.ndarray] = []
    answer: list[np.ndarray] = []
    at = 0
    for i, (a, b) in enumerate(edges.reshape(-1, 2).tolist()):
        source += [ids_N[at:a], np.array(sentinels[i : i + 1])]
        answer += [np.array(sentinels[i : i + 1]), ids_N[a:b]]
        at = b
    source.append(ids_N[at:])
    answer.append(np.array(sentinels[len(edges) // 2 : len(edges) // 2 + 1]))
    return np.concatenate(source).astype(np.int32), np.concatenate(answer).astype(np.int32)
