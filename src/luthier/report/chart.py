"""Charts as inline SVG: lines over steps and points joined in order.

Colours and fonts come from the page's style; a value can be read by pointing at it, without JavaScript.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40  # around the plotting area
MOST = 400  # points drawn of a series; of a longer one the lowest and the highest of each stretch
POINTED = 60  # of a series of at most so many points each is marked

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    dots: bool = False  # each point is a visible dot
    notes: Sequence[str] = ()  # said when pointing at a point, in place of the numbers


@dataclass(frozen=True)
class Scale:
    """From values to pixels: the least value lies at ``start``, the greatest at ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def scales(series: Sequence[Series], *, zero: bool = False) -> tuple[Scale, Scale]:
    """Of x and y, for all points of a chart; ``zero``: y begins at 0."""
    xs, ys = ([p[i] for s in series for p in s.points] for i in (0, 1))
    x_low, x_high = _spread(min(xs), max(xs), 0.0 if len({*xs}) > 1 else 0.5)
    y_low, y_high = _spread(min(ys), max(ys), 0.06)
    if zero:
        y_low = min(0.0, min(ys))
    return Scale(x_low, x_high, LEFT, WIDTH - RIGHT), Scale(y_low, y_high, HEIGHT - BOTTOM, TOP)


def _spread(low: float, high: float, share: float) -> tuple[float, float]:
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        room = abs(high) * 0.1 or 1.0
        return low - room, high + room
    return low - share * (high - low), high + share * (high - low)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two values: at most ``most`` of them, 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(m for m in (1, 2, 5, 10, 20) if (high - low) / (step * m) <= most - 1 + 1e-9)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis or a caption: 0.00012, 3.14, 1,200, 1.2M."""
    size = abs(value)
    if size >= 1e9:
        return f"{value / 1e9:.3g}G"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0:
        return "0"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.3g}".replace("e-0", "e-")


def labels(values: Sequence[float], said: Callable[[float], str] = short) -> list[str]:
    """What stands beside ticks: as ``said`` has it; with more decimal places where two of them would read the same."""
    out = [said(v) for v in values]
    if len({*out}) == len(out) or said is not short:
        return out
    places = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-3))
    return [f"{v:,.{places}f}" for v in values]


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """Points worth drawing: all of a short series; of a long one the first, the last, and the lowest and highest of each of ``most`` / 2 stretches."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def line(
    title: str,
    series: Sequence[Series],
    *,
    x: str = "step",
    y: str = "",
    zero: bool = False,
    said: Callable[[float], str] = short,
    joined: bool = True,
) -> str:
    """A figure with its caption and legend; nothing where no series has a point. ``said``: how a value of y is written."""
    drawn = [Series(s.name, thinned(s.points), s.dots, s.notes if len(s.notes) == len(s.points) <= MOST else ()) for s in series if s.points]
    if not drawn:
        return ""
    across, up = scales(drawn, zero=zero)
    parts = [*_axes(across, up, x, y, said)]
    for i, s in enumerate(drawn, 1):
        parts += _series(s, i, across, up, said, joined)
    told = "; ".join(f"{s.name}: first {said(s.points[0][1])}, last {said(s.points[-1][1])}" for s in drawn)
    mark = lambda s: "swatch ring" if len(s.points) == 1 else "swatch"  # noqa: E731
    keys = (f'<span class="key"><span class="{mark(s)} s{i}"></span>{escape(s.name)}</span>' for i, s in enumerate(drawn, 1))
    legend = "".join(keys) if len(drawn) > 1 else ""
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}. {told}")}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}" + (f'<p class="legend">{legend}</p>' if legend else "") + "</figure>"


def _axes(across: Scale, up: Scale, x: str, y: str, said: Callable[[float], str]) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    values = ticks(up.low, up.high)
    for value, label in zip(values, labels(values, said), strict=True):
        at = up(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.2f}" y2="{at:.2f}"/>'
        yield f'<text x="{LEFT - 6}" y="{at + 3.5:.2f}" text-anchor="end">{escape(label)}</text>'
    values = ticks(across.low, across.high)
    for value, label in zip(values, labels(values), strict=True):
        at = across(value)
        yield f'<line class="axis" x1="{at:.2f}" x2="{at:.2f}" y1="{bottom}" y2="{bottom + 4}"/>'
        yield f'<text x="{at:.2f}" y="{bottom + 16}" text-anchor="middle">{escape(label)}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    yield f'<text class="unit" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
    if y:
        middle = (TOP + bottom) / 2
        yield f'<text class="unit" x="10" y="{middle}" text-anchor="middle" transform="rotate(-90 10 {middle})">{escape(y)}</text>'


def _series(s: Series, number: int, across: Scale, up: Scale, said: Callable[[float], str], joined: bool) -> Iterator[str]:
    at = [(across(px), up(py)) for px, py in s.points]
    if joined and len(at) > 1:
        yield f'<polyline class="line s{number}" points="{" ".join(f"{px:.2f},{py:.2f}" for px, py in at)}"/>'
    if len(at) > POINTED and not s.dots:
        return
    kind, radius = ("spot", 6.0) if len(at) > 1 and not s.dots else ("dot", 3.2 if len(at) > 1 else 5.0)
    for i, ((px, py), (vx, vy)) in enumerate(zip(at, s.points, strict=True)):
        note = s.notes[i] if s.notes else f"{s.name}: {said(vy)} at {short(vx)}"
        yield f'<circle class="{kind} s{number}" cx="{px:.2f}" cy="{py:.2f}" r="{radius:g}"><title>{escape(note)}</title></circle>'
