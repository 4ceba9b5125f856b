"""The Pareto front: rows that no other row beats in everything that counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Point = Sequence[float | None]  # smaller is better; None: not measured


def front(points: Mapping[str, Point]) -> list[str]:
    """The names of the points that no other dominates: one that is nowhere worse and somewhere better. What was not measured is worse than any number."""
    known = {name: tuple(float("inf") if v is None or v != v else v for v in p) for name, p in points.items()}
    return [n for n, p in known.items() if not any(dominates(q, p) for m, q in known.items() if m != n)]


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether a is nowhere worse than b and somewhere better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))
