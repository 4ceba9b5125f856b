"""The plots of a comparison, by matplotlib where it is installed: quality by row, against parameters, against what was forgotten, and the curves."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from . import scoring
from .advice import digits
from .outcome import Entry, Table
from .pareto import front

Spot = tuple[float, float]


@dataclass(frozen=True)
class Look:
    """Colours of a page in the light or in the dark: those of report/style.py."""

    ground: str
    text: str
    soft: str
    rule: str
    series: tuple[str, ...]


# Okabe and Ito's colours, darker on white; neighbours in the order differ in lightness as well, and every row has a mark of its own.
LIGHT = Look("#ffffff", "#1c2024", "#565d66", "#d7dbe0", ("#0067a8", "#c04f00", "#007a58", "#a44a86", "#8a6d00", "#444b54", "#2a9fd6", "#9c2f2f"))
DARK = Look("#14171a", "#e8eaed", "#a9b1ba", "#363c43", ("#5db8f0", "#f0a030", "#35c79a", "#e092c2", "#e6d85c", "#c9ced4", "#8fd3ff", "#ff8f80"))
MARKS = ("o", "s", "^", "D", "v", "P", "X", "p", "*", "h", "<", ">")
STYLES = ("-", "--", "-.", ":")
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def there() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def pictures(t: Table) -> dict[str, tuple[str, Callable[[Look], Any]]]:
    """File name -> (what it shows, the figure in a look); those there are numbers for."""
    out: dict[str, tuple[str, Callable[[Look], Any]]] = {}
    if not t.rows:
        return out
    arrow = "less is better" if t.lower else "more is better"
    out["quality"] = (f"{t.measure} on the test rows, {arrow}; bars are 95 % intervals over rows", lambda look: _quality(t, look))
    if sum(bool(e.trained) for e in t.rows) > 1:
        out["parameters"] = (f"{t.measure} against trained parameters; the line is the front of these two", lambda look: _scatter(t, look, "trained"))
    if sum(e.forgotten is not None for e in t.rows) > 1:
        said = f"{t.measure} against what was forgotten: the rise of the loss on general text; the line is the front of these two"
        out["forgetting"] = (said, lambda look: _scatter(t, look, "forgotten"))
    if any(len([p for p in c if t.unit in p]) > 1 for e in t.rows for c in e.curves):
        what = t.measure if t.unit == "score" else "held-out loss"
        out["curves"] = (f"{what} on the rows to choose by, against tokens trained; the dotted line is the target", lambda look: _curves(t, look))
    return out


def png(figure: Any) -> bytes:
    """A figure as PNG."""
    import matplotlib.pyplot as plt

    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160, facecolor=figure.get_facecolor())
    plt.close(figure)
    return out.getvalue()


def inline(data: bytes) -> str:
    """A PNG as the address of a picture inside a page."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _figure(look: Look, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, height), layout="constrained")
    figure.set_facecolor(look.ground)
    ax.set_facecolor(look.ground)
    ax.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(look.soft)
    ax.tick_params(colors=look.soft, labelcolor=look.text, labelsize=9)
    ax.grid(color=look.rule, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.xaxis.label.set_color(look.text)
    ax.yaxis.label.set_color(look.text)
    return figure, ax


def _colour(t: Table, e: Entry, look: Look) -> str:
    return look.series[[r.name for r in t.rows].index(e.name) % len(look.series)]


def _mark(t: Table, e: Entry) -> str:
    return MARKS[[r.name for r in t.rows].index(e.name) % len(MARKS)]


def _quality(t: Table, look: Look) -> Any:
    rows = [e for e in [*t.rows, *t.baselines] if e.quality is not None][::-1]
    figure, ax = _figure(look, 0.9 + 0.34 * len(rows))
    ax.grid(visible=False, axis="y")
    d = digits(t)
    right = max(e.quality.high for e in rows if e.quality)
    for i, e in enumerate(rows):
        q = e.quality
        assert q is not None
        colour = look.soft if e.baseline else _colour(t, e, look)
        ax.plot([q.low, q.high], [i, i], color=colour, linewidth=2.2, solid_capstyle="butt")
        ax.plot([q.value], [i], marker="o" if e.baseline else _mark(t, e), color=colour, markersize=7, markerfacecolor=look.ground if e.baseline else colour)
        for v in e.by_seed if len(e.by_seed) > 1 else ():
            ax.plot([v], [i - 0.22], marker="|", color=colour, markersize=6)
        ax.annotate(f"{q.value:.{d}f}", (max(q.high, q.value), i), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9, color=look.text)
    ax.set_yticks(range(len(rows)), [e.name for e in rows])
    for label, e in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_color(look.soft if e.baseline else look.text)
    low = min(e.quality.low for e in rows if e.quality)
    ax.set_xlim(min(0.0, low) if right > 0 and low < 0.4 * right else low - 0.08 * (right - low), right + 0.14 * (right - min(0.0, low) or 1.0))
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlabel(t.measure + (" (less is better)" if t.lower else ""))
    return figure


def _scatter(t: Table, look: Look, what: str) -> Any:
    rows = [e for e in t.rows if getattr(e, what) is not None and e.quality is not None and (what != "trained" or e.trained)]
    figure, ax = _figure(look, 4.1)
    at = {e.name: (float(getattr(e, what)), e.quality.value if e.quality else 0.0) for e in rows}
    if what == "trained":
        ax.set_xscale("log")
    sign = 1 if t.lower else -1
    on = sorted(front({n: (x, sign * y) for n, (x, y) in at.items()}), key=lambda n: at[n])
    if len(on) > 1:
        ax.plot([at[n][0] for n in on], [at[n][1] for n in on], color=look.soft, linewidth=1.2, linestyle="--", drawstyle="steps-post", zorder=1)
    for e in rows:
        x, y = at[e.name]
        q, colour = e.quality, _colour(t, e, look)
        assert q is not None
        ax.errorbar([x], [y], yerr=[[max(0.0, y - q.low)], [max(0.0, q.high - y)]], color=colour, linewidth=1.4, marker=_mark(t, e), markersize=8, zorder=3)
    ax.margins(x=0.14, y=0.12)
    ax.set_xlabel("trained parameters" if what == "trained" else "rise of the loss on general text, nats a token (right: more forgotten)")
    ax.set_ylabel(t.measure + (" (less is better)" if t.lower else ""))
    if what == "trained":
        import matplotlib.ticker as ticker

        from ..report.chart import short

        ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: short(v)))
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    lines = [((at[e.name][0], e.quality.low), (at[e.name][0], e.quality.high)) for e in rows if e.quality]
    for a, b in itertools.pairwise(on):
        (x, y), (x2, y2) = at[a], at[b]
        lines += [((x, y), (x2, y)), ((x2, y), (x2, y2))]
    name_points(figure, ax, [(e.name, *at[e.name], look.text) for e in rows], lines)
    return figure


def name_points(figure: Any, ax: Any, named: Sequence[tuple[str, float, float, str]], lines: Sequence[tuple[Spot, Spot]] = ()) -> list[Any]:
    """Write names beside points where they cover neither one another nor a point or line (upright or level), and stay inside; the nearest free side wins."""
    figure.canvas.draw()  # places are only known then
    renderer, inside = figure.canvas.get_renderer(), ax.get_window_extent()
    pixel = ax.transData.transform
    scale = figure.dpi / 72
    taken = [(x - 6 * scale, y - 6 * scale, x + 6 * scale, y + 6 * scale) for x, y in (pixel((px, py)) for _, px, py, _ in named)]
    for start, end in lines:
        (x0, y0), (x1, y1) = pixel(start), pixel(end)
        taken.append((min(x0, x1) - 2 * scale, min(y0, y1) - 2 * scale, max(x0, x1) + 2 * scale, max(y0, y1) + 2 * scale))
    out = []
    for name, x, y, colour in sorted(named, key=lambda p: -p[2]):
        best = None
        for far in (9, 16, 26, 38, 52):
            for dx, dy in SIDES:
                align = {1: "left", -1: "right", 0: "center"}[dx], {1: "bottom", -1: "top", 0: "center"}[dy]
                how = {"ha": align[0], "va": align[1], "fontsize": 9, "color": colour}
                made = ax.annotate(name, (x, y), xytext=(dx * far, dy * far), textcoords="offset points", **how)
                found = made.get_window_extent(renderer)
                here = (found.x0, found.y0, found.x1, found.y1)
                made.remove()
                covered = sum(_overlap(here, there) for there in taken)
                outside = here[0] < inside.x0 or here[2] > inside.x1 or here[1] < inside.y0 or here[3] > inside.y1
                worth = (covered + (1e6 if outside else 0.0), far)
                if best is None or worth < best[0]:
                    best = (worth, (dx * far, dy * far), how, here)
            if best is not None and best[0][0] == 0:
                break
        assert best is not None
        _, offset, how, here = best
        line = {"arrowprops": {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6}} if max(map(abs, offset)) > 16 else {}
        out.append(ax.annotate(name, (x, y), xytext=offset, textcoords="offset points", **how, **line))
        taken.append(here)
    return out


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _curves(t: Table, look: Look) -> Any:
    figure, ax = _figure(look, 4.1)
    for i, e in enumerate(t.rows):
        for k, c in enumerate(e.curves):
            points = [(p["tokens"] / 1000, p[t.unit]) for p in c if t.unit in p]
            if len(points) < 2:
                continue
            style = {"color": _colour(t, e, look), "linestyle": STYLES[i // len(look.series) % len(STYLES)], "marker": _mark(t, e), "markersize": 4.5}
            ax.plot(*zip(*points, strict=True), linewidth=1.7 if k == 0 else 0.9, alpha=1.0 if k == 0 else 0.55, label=e.name if k == 0 else None, **style)
    if t.target is not None:
        ax.axhline(t.target, color=look.soft, linewidth=1.1, linestyle=":")
    ax.set_xlabel("tokens trained, thousands")
    ax.set_ylabel(f"{t.measure} (rows to choose by)" if t.unit == "score" else f"{scoring.LOSS} (rows to choose by)")
    ax.set_xlim(left=0)
    ax.legend(fontsize=9, frameon=False, labelcolor=look.text, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
