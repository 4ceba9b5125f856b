"""A few sentences of advice that cite the rows they come from. Each rule is a line of RULES, with the reason for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..report.verdict import size
from . import scoring
from .outcome import Entry, Table

STEEP = 0.03  # of what a curve fell by in all, in its last part: more than this and it was still learning
FEW_ROWS = 50
LITTLE = 0.5  # of the best's parameters: fewer are worth a sentence
PRICE = 0.3  # nats of general text: forgetting so much more than another row is said even where that one is clearly worse
KEPT = 0.05  # nats of general text: less forgotten is worth a sentence


@dataclass(frozen=True)
class Rule:
    """What may be said, and why it is worth saying. ``says`` gives nothing where it does not apply."""

    name: str
    why: str
    says: Callable[[Table], str]


def cited(t: Table, e: Entry) -> str:
    """A row as a sentence names it: lora, rank 8 (bleu 52.0 [50.1, 53.8])."""
    return f"{e.name} ({t.measure} {number(t, e)})"


def number(t: Table, e: Entry) -> str:
    """Its quality with the interval."""
    q = e.quality
    assert q is not None
    d = digits(t)
    return f"{q.value:.{d}f} [{q.low:.{d}f}, {q.high:.{d}f}]"


def digits(t: Table) -> int:
    """Decimal places of the measure."""
    largest = max((abs(e.quality.value) for e in t.entries if e.quality is not None), default=0.0)
    return 3 if largest <= 1.5 or t.measure == scoring.LOSS else 1


def as_good(t: Table) -> list[Entry]:
    """The rows that are not clearly worse than the best, the best among them."""
    return [e for e in t.rows if e is t.best or e.clearly_worse is False]


def _best(t: Table) -> str:
    assert t.best is not None
    alone = [e for e in t.rows if e is not t.best and e.clearly_worse is False]
    if not alone:
        return (
            f"{cited(t, t.best)} is clearly the best of the {len(t.rows)} rows on these test rows."
            if len(t.rows) > 1
            else f"Only {cited(t, t.best)} was compared."
        )
    return ""


def _smallest(t: Table) -> str:
    assert t.best is not None and t.best.trained is not None
    good = [e for e in as_good(t) if e.trained is not None]
    least = min(good, key=lambda e: e.trained or 0)
    if least is t.best:
        others = [e for e in good if e is not t.best]
        return (
            f"{cited(t, t.best)} is the best and, of those not clearly below it ({', '.join(e.name for e in others)}), trains the fewest parameters."
            if others
            else ""
        )
    of = (least.trained or 0) / max(1, t.best.trained)
    if of > LITTLE:
        return f"{cited(t, t.best)} is ahead, and {cited(t, least)} not clearly below it; they train about as much."
    file = f" and a file of {size(least.bytes)} against {size(t.best.bytes)}" if least.bytes is not None and t.best.bytes else ""
    return f"{cited(t, least)} is not clearly below the best, {cited(t, t.best)}, with {100 * of:.2g} % of its trained parameters{file}."


def _kept(t: Table) -> str:
    assert t.best is not None
    good = [e for e in as_good(t) if e.forgotten is not None]
    if t.best.forgotten is None or not good:
        return ""
    least = min(good, key=lambda e: e.forgotten or 0.0)
    if least is t.best or (t.best.forgotten - (least.forgotten or 0.0)) < KEPT:
        return ""
    return f"{least.name} forgets least among these: {least.forgotten:+.2f} nats a token of general text, {t.best.name} {t.best.forgotten:+.2f}."


def _price(t: Table) -> str:
    assert t.best is not None
    much = t.best.forgotten
    if much is None or any(e is not t.best and e.forgotten is not None and much - e.forgotten >= KEPT for e in as_good(t)):
        return ""
    spared = [e for e in t.rows if e.forgotten is not None and much - e.forgotten >= PRICE]
    if not spared:
        return ""
    next_best = spared[0]  # rows come the best first
    kept = f"{next_best.forgotten:+.2f}" if next_best.forgotten is not None else ""
    return f"{t.best.name} pays for it with {much:+.2f} nats a token of general text; the best that keeps more is {cited(t, next_best)}, with {kept}."


def _baseline(t: Table) -> str:
    for e in t.baselines:
        if e.quality is None or t.best is None or t.best.quality is None or e.name.startswith("the base"):
            continue
        beaten = e.clearly_worse is True
        if not beaten:
            return f"No row clearly beats {e.name} ({t.measure} {number(t, e)}): none has learned more than that yet; train longer, or look at the data."
    return ""


def _unfinished(t: Table) -> str:
    falling = []
    for e in t.rows:
        for c in e.curves:
            if len(c) >= 4 and c[0]["loss"] - c[-1]["loss"] > 0 and (c[-2]["loss"] - c[-1]["loss"]) > STEEP * (c[0]["loss"] - c[-1]["loss"]):
                falling.append(e.name)
                break
    if not falling:
        return ""
    who = "every row" if len(falling) == len([e for e in t.rows if e.curves and len(e.curves[0]) > 1]) else ", ".join(falling)
    return f"The loss of {who} was still falling at the end, so more time may change the order."


def _one_seed(t: Table) -> str:
    if not t.rows or max(e.seeds for e in t.rows) > 1:
        return ""
    return "One seed each: intervals are of test rows and say nothing of other seeds; repeat with seed=[0,1,2] before a small difference counts."


def _few(t: Table) -> str:
    n = max((e.quality.n for e in t.rows if e.quality is not None), default=0)
    return f"Only {n} test {'blocks of rows' if t.measure == scoring.LOSS else 'rows'}: differences have to be large to show." if 0 < n < FEW_ROWS else ""


RULES = (
    Rule("best", "where one row is clearly ahead, nothing else has to be weighed", _best),
    Rule("smallest", "of rows that quality does not tell apart, fewer parameters are cheaper to train, keep and serve", _smallest),
    Rule("kept", "of rows that quality does not tell apart, the one that forgets less stays useful for other things", _kept),
    Rule("price", "what is best at the task and forgets much is not best where other things are asked of the model as well", _price),
    Rule("baseline", "a model that does not beat copying has learned to look up, not to answer", _baseline),
)
CAVEATS = (
    Rule("unfinished", "an order of half-trained rows is no order of trained ones", _unfinished),
    Rule("one seed", "seeds differ by as much as many methods do", _one_seed),
    Rule("few", "an interval over few rows is itself uncertain", _few),
)


def sentences(t: Table) -> tuple[list[str], list[str]]:
    """(advice, what to keep in mind with it)."""
    if t.best is None:
        return [], []
    return [s for r in RULES if (s := r.says(t))], [s for r in CAVEATS if (s := r.says(t))]
