"""What a run came to in a few sentences, the same for the report and the model card: what was gained, what it cost, what was forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..amounts import clock, off, size
from .facts import GENERAL, HELD_OUT, SUITE, Facts, Number, is_kept

__all__ = ["clock", "off", "size"]  # words of this page too
LOWER = (HELD_OUT, GENERAL, SUITE["instructions"], SUITE["sampled"], SUITE["moved"])  # measures of which less is better
FEW = 10  # rows: resampling fewer gives intervals that are far too narrow


def difference(before: Number, after: Number) -> Number:
    """After minus before, with an interval where both have one: the square-and-add of their limits (MOVER; Zou and Donner, 2008, Statistics in Medicine 27).

    It takes the two as independent. They are of the same rows, so a paired interval would be narrower.
    """
    d, places = after.value - before.value, min(before.digits, after.digits)
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Number(d, after.n, after.unit, places=places)
    low = d - math.hypot(after.value - after.low, before.high - before.value)
    high = d + math.hypot(after.high - after.value, before.value - before.low)
    return Number(d, after.n, after.unit, low, high, places)


def signed(d: Number) -> str:
    """ "+1.2 [0.4, 2.0]", as `difference` gives it."""
    said = str(d)
    return said if said.startswith("-") else f"+{said}"


def sentences(facts: Facts) -> Iterator[str]:
    """The verdict. Of a run that has not finished: how it stands, then what is known."""
    if not facts.finished:
        yield _standing(facts)
    elif stopped := facts.result.get("stopped"):
        yield f"The run stopped early, after step {facts.steps:,}: {stopped}."
    before, after = facts.measures()
    yield from _gained(before, after, finished=facts.finished)
    if cost := _cost(facts):
        yield cost
    yield _forgotten(before, after)
    if facts_lost := _facts(before, after):
        yield facts_lost
    if all(a["alarm"] != "overfitting" for a in facts.alarms) and (late := _late(facts)) is not None:
        yield late


def alarms(facts: Facts) -> Iterator[tuple[str, str]]:
    """(which alarm, what was seen and what to do) of those that the run raised."""
    for a in facts.alarms:
        yield f"Alarm: {a['alarm']} at step {a['step']:,}", f"{a['said'][:1].upper()}{a['said'][1:]}. What to do: {a['advice']}."


def _standing(facts: Facts) -> str:
    of = "" if facts.planned is None else f" of {facts.planned:,}"
    if facts.failed:
        return f"The run failed after step {facts.steps:,}{of}: {str(facts.failed.get('error', 'the reason is not recorded')).rstrip('.')}."
    if facts.state.startswith("running"):
        return f"The run is under way: step {facts.steps:,}{of}. What follows is how it stood when this was written."
    return (
        f"The run was interrupted after step {facts.kept if facts.kept is not None else facts.steps:,}{of} and has no result yet; what follows is how it stood."
    )


def _gained(before: dict[str, Number], after: dict[str, Number], *, finished: bool) -> Iterator[str]:
    names = [n for n in after if n in before and not is_kept(n)]
    if not names:
        yield "What was gained is not known: there is no held-out measure both before and after."
        return
    scores = [n for n in names if n != HELD_OUT][:2]
    when = "" if finished else " at its last evaluation"
    for name in [*(n for n in names if n == HELD_OUT), *scores]:
        a, b = before[name], after[name]
        d = difference(a, b)
        verb = "stayed at" if d.value == 0 else "fell" if d.value < 0 else "rose"
        path = f"{b.value:.{b.digits}f}" if d.value == 0 else f"from {a.value:.{a.digits}f} to {b.value:.{b.digits}f} ({signed(d)})"
        unit = f" per {b.unit.rpartition('.')[2].removesuffix('s')}" if name == HELD_OUT and b.unit else ""
        rows = f", n = {b.n:,}" if b.n is not None else ""
        doubt = "; the interval holds zero, so this may be chance" if d.value and d.low is not None and d.high is not None and d.low <= 0 <= d.high else ""
        if name != HELD_OUT and b.n is not None and b.n < FEW:
            doubt = "; so few rows say next to nothing"
        worse = "; it got worse" if name == HELD_OUT and d.value > 0 else ""
        what = "The held-out loss" if name == HELD_OUT else f"The score {name}"
        yield f"{what}{unit} {verb} {path}{when}{rows}{worse}{doubt}."


def _cost(facts: Facts) -> str:
    r = facts.result
    train = facts.events("train")
    seconds = r.get("seconds") if facts.finished else sum(float(x.get("seconds") or 0) for x in train)
    if not train and facts.finished:
        return "Nothing was trained: a prompt was chosen." if facts.events("candidate") or facts.steps == 0 else ""
    parts = [f"{facts.steps:,} {'step' if facts.steps == 1 else 'steps'}"]
    if isinstance(seconds, int | float):
        parts.append(f"{clock(seconds)} of training")
    if peak := memory(facts):
        parts.append(f"{size(peak)} of memory at its peak")
    trained, whole = facts.told.get("trained"), facts.told.get("whole")
    if isinstance(trained, int) and isinstance(whole, int) and whole:
        parts.append(f"{trained:,} trained parameters ({share(trained, whole)} of {whole:,})")
    return f"It took {', '.join(parts[:-1])} and {parts[-1]}." if len(parts) > 1 else f"It took {parts[0]}."


def share(part: float, whole: float) -> str:
    """A share in per cent: "0.128 %", "100 %"."""
    return f"{100 * part / whole:.3g} %"


def memory(facts: Facts) -> int | None:
    """Peak bytes: of the GPU or of the process; None where they are not recorded."""
    said = facts.result.get("peak_bytes") or max((x.get("memory_bytes") or 0 for x in facts.events("train")), default=0)
    return int(said) if said else None


def _forgotten(before: dict[str, Number], after: dict[str, Number]) -> str:
    if GENERAL not in before or GENERAL not in after:
        return "What was forgotten was not measured."
    a, b = before[GENERAL], after[GENERAL]
    d = b.value - a.value
    path = f"from {a.value:.4f} to {b.value:.4f} ({d:+.4f})"
    tokens = f", n = {b.n:,} {b.unit}" if b.n is not None else ""
    if d > 0:
        return (
            f"On general text the loss rose {path}{tokens}: the perplexity there is {100 * math.expm1(min(d, 50.0)):.3g} % higher, which is what was forgotten."
        )
    return f"On general text the loss {'fell ' + path if d < 0 else 'stayed at ' + format(b.value, '.4f')}{tokens}: nothing was forgotten that this text shows."


def _facts(before: dict[str, Number], after: dict[str, Number]) -> str:
    """How many of the facts that were known still are."""
    a, b = before.get(SUITE["facts"]), after.get(SUITE["facts"])
    if a is None or b is None or not b.n:
        return ""
    moved = after.get(SUITE["moved"])
    far = f"; its next token on general text diverged from before by {moved.value:.3f} nats (KL)" if moved is not None else ""
    return f"Of {b.n:,} facts that the base knew, {round(b.value * b.n):,} are still known{far}."


def _late(facts: Facts) -> str | None:
    """Whether the held-out loss had been lower before the end: a sign of overfitting."""
    points = [(int(x["step"]), float(x["loss"])) for x in facts.events("evaluation") if isinstance(x.get("loss"), int | float)]
    if len(points) < 3:
        return None
    best, last = min(points, key=lambda p: p[1]), points[-1]
    if last[1] <= best[1] * 1.01 or best[0] == last[0]:
        return None
    kept = " Its weights were kept." if facts.finished and facts.result.get("best_step") == best[0] else ""
    return f"The held-out loss was lowest at step {best[0]:,} ({best[1]:.4f}) and rose to {last[1]:.4f} by step {last[0]:,}: later steps overfitted.{kept}"
