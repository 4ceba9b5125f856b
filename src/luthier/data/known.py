"""Rows by how well a model knows them: which are kept, how many of a category, and in which order they are written."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from ..core import LuthierError
from ..nn.slick import CATEGORIES

ORDERS = ("file", "known-first", "unknown-first")


def named(text: str, option: str) -> str:
    """A category as the user writes it, in any case. Raises LuthierError for none."""
    found = next((c for c in CATEGORIES if c.casefold() == text.strip().casefold()), None)
    if found is None:
        raise LuthierError(f"{option}: {text.strip()!r} is no category; there are {', '.join(CATEGORIES)}")
    return found


def caps_of(settings: Sequence[str]) -> dict[str, float]:
    """category -> its largest share, of "Unknown=0.1". Raises LuthierError for anything else."""
    out: dict[str, float] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise LuthierError(f"--cap {setting}: say CATEGORY=SHARE with a share from 0 to 1, for example --cap Unknown=0.1")
        out[named(name, "--cap")] = share
    return out


def capped(counts: Mapping[str, int], caps: Mapping[str, float]) -> dict[str, int]:
    """How many rows of each category may stay, so that none has more than its share of all that stay."""
    out = dict(counts)
    while True:  # less of one leaves less room for another
        before = dict(out)
        for name, share in caps.items():
            others = sum(n for c, n in out.items() if c != name)
            if share < 1:
                out[name] = min(out.get(name, 0), int(share * others / (1 - share) + 1e-9))
        if out == before:
            return out


def choose(
    categories: Sequence[str],
    *,
    keep: Sequence[str] = CATEGORIES,
    caps: Mapping[str, float] | None = None,
    order: str = "file",
    seed: int = 0,
) -> list[int]:
    """The places of the rows that stay, in the order they are written in. Which rows of a capped category stay is drawn by the seed.

    Raises LuthierError where none is left, and for an order there is not.
    """
    if order not in ORDERS:
        raise LuthierError(f"--order {order}: there are {', '.join(ORDERS)}")
    places = [i for i, c in enumerate(categories) if c in keep]
    stay = capped(Counter(categories[i] for i in places), caps or {})
    drawn = sorted(places, key=lambda i: hashlib.blake2b(f"{seed}:{i}".encode(), digest_size=8).digest())
    kept: list[int] = []
    for i in drawn:
        if stay[categories[i]] > 0:
            stay[categories[i]] -= 1
            kept.append(i)
    if not kept:
        there = ", ".join(f"{n} {c}" for c, n in Counter(categories).items())
        raise LuthierError(f"no row is left to write: the set has {there}; keep another category, or raise its cap")
    kept.sort()
    if order != "file":
        rank = {c: i for i, c in enumerate(CATEGORIES if order == "known-first" else CATEGORIES[::-1])}
        kept.sort(key=lambda i: rank[categories[i]])
    return kept
