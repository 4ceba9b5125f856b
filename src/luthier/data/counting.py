"""What reading the data came to, as facts and as sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..core import LuthierError, Row, examples_of
from . import labels, rankings
from .formats import Bad
from .rows import Counts, sides
from .trees import listed

Say = Callable[[str], None]


def refuse_nothing(max_tokens: int, bad: Bad, counts: Counts, facts: Mapping[str, Any]) -> None:
    """Raise LuthierError with the causes of there being no row."""
    causes = []
    if bad.count:
        causes.append(f"{bad.count} bad rows, the first {bad.rows[0][0]}: {bad.rows[0][1]}")
    if counts.dropped_long:
        causes.append(f"{counts.dropped_long} longer than max_tokens={max_tokens} and dropped: raise data.max_tokens or set data.over_length=truncate")
    causes += [f"{n}: {text}" for text, n in counts.notes.items()]
    causes += [f"left out: {what}: {n}" for what, n in bad.left_out.items()]
    raise LuthierError(f"no trained token is left of {facts.get('records', 0)} records. {'; '.join(causes) or 'All of them are too short: one token each.'}")


def count(facts: dict[str, Any], train: Sequence[Row], held: Sequence[Row], bad: Bad, counts: Counts) -> None:
    """Add the counts to ``facts``."""
    lengths = np.array([sum(sides(e)) for r in train for e in examples_of(r)])
    facts["rows"] = len(train)
    facts["tokens"] = int(lengths.sum())
    facts["trained_tokens"] = int(sum(int(r.train[1:].sum()) for r in train)) if facts["renders"] not in ("label", "ranked") else 0
    facts["longest"] = int(lengths.max())
    facts["median"] = int(np.median(lengths))
    facts["bad_rows"] = bad.count
    facts["bad_examples"] = [f"{where}: {reason}" for where, reason in bad.rows[:5]]
    facts["dropped_long"], facts["truncated"] = counts.dropped_long, counts.truncated
    facts["cut_responses"], facts["split"] = counts.cut_responses, counts.split
    facts["notes"] = dict(counts.notes)
    facts["left_out"] = dict(bad.left_out)
    facts["validation"]["rows"] = len(held)
    facts["validation"]["tokens"] = int(sum(sum(sides(r)) for r in held))


def learned(facts: Mapping[str, Any]) -> str:
    """How much of the tokens is learned, in words."""
    share = facts["trained_tokens"] / facts["tokens"]
    if facts["renders"] == "label":
        return "read; the labels are learned"
    if facts["renders"] == "ranked":
        return "read; which answer is better is learned"
    if facts["renders"] in ("pairs", "judged"):
        return f"{share:.0%} in the judged answers"
    if facts["renders"] == "prompts":
        return "prompts to answer"
    return f"{share:.0%} may be hidden" if facts["renders"] == "masked" else f"{share:.0%} trained"


def say_counts(facts: Mapping[str, Any], say: Say) -> None:
    """The counts, a line each."""
    say(f"{facts['rows']:,} rows, {facts['tokens']:,} tokens, {learned(facts)}; longest {facts['longest']:,}, median {facts['median']:,}")
    if "problem" in facts:
        for line in labels.said(facts, facts["rows"]):
            say(line)
    if facts["renders"] in ("ranked", "pairs", "judged"):
        for line in rankings.said(facts):
            say(line)
    if facts["bad_rows"]:
        say(f"{facts['bad_rows']:,} bad rows skipped; the first: {facts['bad_examples'][0]}")
    if len(facts.get("languages", {})) > 1:
        say(f"languages: {listed(facts['languages'])}; data.languages=[...] reads some of them only")
    for what, n in facts["left_out"].items():
        say(f"left out: {what}: {n:,}")
    if facts["dropped_long"]:
        say(f"{facts['dropped_long']:,} records longer than {facts['max_tokens']} tokens dropped")
    if facts["split"]:
        say(f"{facts['split']:,} documents longer than {facts['max_tokens']} tokens split into pieces; nothing is lost")
    if facts["truncated"]:
        say(f"{facts['truncated']:,} records longer than {facts['max_tokens']} tokens truncated{_cut(facts)}")
    for text, n in facts["notes"].items():
        say(f"{text} ({n:,} rows)")
    say(f"{facts['validation']['rows']:,} rows held out for validation")


def _cut(facts: Mapping[str, Any]) -> str:
    if facts["renders"] == "label":
        return ", the longer text first"
    if facts["renders"] in ("ranked", "pairs"):
        return f" in the prompt, the same for all answers of one; {facts['cut_responses']:,} also lost the end of an answer"
    ends = facts["cut_responses"]
    return f", of which {ends:,} also lost the end of the response" if ends else " in the prompt; every response is whole"
