"""How a run draws its rows (data.sample): labels evenly, or challenging rows more often, told by the base's own loss on each before training.

Difficulty is the base's mean -log p over a row's trained tokens, given what precedes them; no step is needed and nothing is learned. What it is used for:
trivial rows (the base writes them already) and broken ones (noise, another language, a wrong column) are listed with three examples each; and the hardest of
the others are drawn more often, because uniform drawing lets the many easy rows fill the steps. A high loss is no merit in itself: mislabelled rows are hard as
well, which is why those far out are called broken and are no hard ones (Swayamdipta et al., 2020, arXiv 2009.10795, tell such regions apart by training
dynamics; here one forward of the base has to do). The values are those of `references`, on disk beside them by the content of each row and the fingerprint of
the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import references
from ..core import Incompatible, LuthierError, Row
from ..data.balance import Difficulty, Parts, by_label, difficulty
from ..data.prepare import Prepared
from ..policy import Policy
from ..settings.plugins import kind_of
from ..settings.run import Run

EXAMPLES = 3
Say = Callable[[str], None]
Tick = Callable[[int, int], None]


def check(run: Run) -> None:
    """Raise Incompatible where data.sample has nothing to act on in this run."""
    by, kind, renders = run.data.sample.by, kind_of(run.objective), run.objective.renders
    if by is None:
        return
    if hasattr(run.method, "candidates"):
        raise Incompatible(f"data.sample: method {kind_of(run.method)} trains nothing, so no row is drawn; leave it out")
    if run.data.mix is not None:
        raise Incompatible("data.sample: draws the rows of data.train, and data.mix has a rule of its own for how often each source is drawn; leave one out")
    if by == "label" and renders != "label":
        raise Incompatible(f"data.sample.by=label: objective {kind} has no labels; it is for classify. To draw challenging rows more often, set by: difficulty")
    if by == "label" and getattr(run.objective, "class_weights", None) is not None:
        raise Incompatible("data.sample.by=label: objective.class_weights weighs the labels already; use one of the two, or rare labels count twice")
    if by == "difficulty" and renders not in ("text", "chat"):
        raise Incompatible(f"data.sample.by=difficulty: is told by the loss of the next token, which objective {kind} does not train; it is for text and sft")


def drawn(run: Run, policy: Policy, prepared: Prepared, *, packed: bool, say: Say, tick: Tick) -> Parts | None:
    """How the epochs of a run are drawn, None for all rows once; what was found is said, kept in ``prepared.facts``, and rows to be dropped are dropped."""
    s = run.data.sample
    if s.by == "label":
        return _labels(run, prepared, say)
    if s.by is None:
        return None
    assert s.hard is not None and s.hardest is not None and s.trivial is not None and s.broken is not None
    loss_N = losses(run, policy, prepared.train, packed=packed, tick=tick, say=say)
    vocabulary = policy.lm.config.get_text_config().vocab_size
    found = difficulty(loss_N, vocabulary, hardest=s.hardest, trivial=s.trivial, broken=s.broken)
    for line in described(found, prepared.train, policy.base.tokenizer, s.drop, prepared.facts):
        say(line)
    keep_N = ~np.logical_or.reduce([np.zeros(len(loss_N), dtype=bool), *[{"trivial": found.trivial_N, "broken": found.broken_N}[d] for d in s.drop]])
    if not found.hard_N.any() or not keep_N.any():
        raise LuthierError(
            "data.sample: every training row is trivial or broken by these bounds, so none is left to draw; change data.sample.trivial or broken"
        )
    prepared.train[:] = [row for row, keep in zip(prepared.train, keep_N, strict=True) if keep]
    kept = Difficulty(loss_N[keep_N], found.trivial_N[keep_N], found.broken_N[keep_N], found.hard_N[keep_N], found.bounds)
    times = s.hard * len(kept.loss_N) / kept.hard_N.sum()
    say(f"sampled: {s.hard:.0%} of an epoch's {len(kept.loss_N):,} rows are drawn from the {kept.hard_N.sum():,} hardest, each {times:.2g} times an epoch")
    return kept.parts(s.hard)


def losses(run: Run, policy: Policy, rows: list[Row], *, packed: bool, tick: Tick | None = None, say: Say = lambda _: None) -> np.ndarray:
    """(N,) the loss of each row before training, in nats per trained token; from disk where it is known."""
    started = getattr(run.method, "from_", None) is not None
    how: dict[str, Any] = {"folder": Path(run.out) / ".references", "tokens": run.optim.micro_tokens, "packed": packed, "started": started, "tick": tick}
    known, said = references.known_logps(policy, rows, **how)
    say(f"difficulty, the base's own loss of {said.replace('answers', 'rows')}")
    return np.array([-known[references.digest(r)] / int(r.train[1:].sum()) for r in rows])


def described(found: Difficulty, rows: list[Row], tokenizer: Any, drop: tuple[str, ...], facts: dict[str, Any]) -> list[str]:
    """Lines about trivial, broken and hard rows, three examples each; the same goes into ``facts``."""
    q = np.quantile(found.loss_N, [0, 0.25, 0.5, 0.75, 1])
    lines = [f"loss a token over {len(rows):,} rows: median {q[2]:.2f}, half of them {q[1]:.2f} to {q[3]:.2f}, all {q[0]:.2f} to {q[4]:.2f}"]
    facts["difficulty"] = {"quantiles": [round(float(x), 4) for x in q], "bounds": {k: round(v, 4) for k, v in found.bounds.items()}}
    kinds = {"trivial": (found.trivial_N, "below", 1), "broken": (found.broken_N, "above", -1), "hard": (found.hard_N, "from", -1)}
    for name, (mask_N, word, sign) in kinds.items():
        there = np.flatnonzero(mask_N)
        there = there[np.argsort(sign * found.loss_N[there], kind="stable")]
        examples = [f"{rows[i].where}, {found.loss_N[i]:.2f}: {_shown(rows[i], tokenizer)}" for i in there[:EXAMPLES]]
        facts["difficulty"][name] = {"rows": len(there), "examples": examples}
        end = "" if name == "hard" or not len(there) else "; dropped" if name in drop else f"; kept, data.sample.drop=[{name}] leaves them out"
        lines.append(f"{name}: {len(there):,} rows ({len(there) / len(rows):.1%}), {word} {found.bounds[name]:.2f} nats a token{end}")
        lines += [f"  {e}" for e in examples]
    return lines


def _shown(row: Row, tokenizer: Any) -> str:
    """The end of what precedes a row's trained tokens, and their beginning."""
    first = int(np.argmax(row.train)) if row.train.any() else 0
    said = lambda ids: " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())  # noqa: E731
    before, after = said(row.ids[max(0, first - 20) : first]), said(row.ids[first : first + 24])
    return f"{before[-40:]} | {after[:60]}" if before else after[:90]


def _labels(run: Run, prepared: Prepared, say: Say) -> Parts:
    """Labels drawn more evenly. Raises Incompatible where a row has no single label."""
    s, labels = run.data.sample, [r.extras.get("label") for r in prepared.train]
    if not all(isinstance(label, int) for label in labels):
        raise Incompatible("data.sample.by=label: rows here have several labels or numbers, and drawing evenly needs exactly one; leave data.sample out")
    assert s.balance is not None
    parts = by_label([int(label) for label in labels if label is not None], s.balance)
    names = run.objective.labels
    most = max(c / len(r) for r, c in zip(parts.rows, parts.counts, strict=True))
    said = ", ".join(f"{names[labels[int(r[0])]]} {len(r):,} -> {c:,}" for r, c in list(zip(parts.rows, parts.counts, strict=True))[:8])
    say(f"sampled by label, rows -> drawn in an epoch: {said}{' ...' if len(parts.rows) > 8 else ''}; a row is drawn at most {math.ceil(most)} times an epoch")
    return parts
