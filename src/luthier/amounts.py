"""Amounts as people read them: time, bytes, and by how much a prediction was off."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """ "1:02:03", or "2:03"."""
    s = max(0, round(seconds))
    return f"{s // 3600}:{s % 3600 // 60:02}:{s % 60:02}" if s >= 3600 else f"{s // 60}:{s % 60:02}"


def size(n: float) -> str:
    """Bytes in words: "1.23 GB", "45 MB", "3 KB"."""
    for unit, of, digits in (("GB", 1e9, 2), ("MB", 1e6, 0), ("KB", 1e3, 0)):
        if n >= of:
            return f"{n / of:,.{digits}f} {unit}"
    return f"{n:,.0f} B"


def seconds(n: float) -> str:
    """ "0.85 s", or "12 s"."""
    return f"{n:.2g} s" if n < 10 else f"{n:.0f} s" if n < 120 else clock(n)


def off(predicted: float, measured: float) -> str:
    """By how much a prediction was off: "4% too high"."""
    return f"{abs(predicted - measured) / measured:.0%} too {'high' if predicted > measured else 'low'}" if measured else "of nothing that was measured"
