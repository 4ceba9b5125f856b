"""Show rows as the model will see them: which tokens are trained, and what became of the data on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core import Row, examples_of
from . import labels, rankings
from .counting import learned

OPEN, CLOSE = "⟦", "⟧"  # around trained tokens where there is no colour
HEAD, TAIL = 300, 100  # tokens shown of a longer row


def counts_table(facts: Mapping[str, Any]) -> Table:
    """What ``prepare`` counted, one fact a line."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, shape in facts["shapes"].items():
        table.add_row("shape", f"{name}: {shape}")
    if facts["template"]:
        table.add_row("chat template", facts["template"])
    table.add_row("records", f"{facts['records']:,}")
    table.add_row("rows", f"{facts['rows']:,} to train, {facts['validation']['rows']:,} held out")
    table.add_row("tokens", f"{facts['tokens']:,}")
    if facts["renders"] in ("text", "chat", "pairs", "judged"):
        table.add_row("trained tokens", f"{facts['trained_tokens']:,} ({facts['trained_tokens'] / facts['tokens']:.0%})")
    else:
        table.add_row("learned", learned(facts))
    for line in labels.said(facts, facts["rows"]) if "problem" in facts else ():
        table.add_row("labels", line)
    for line in rankings.said(facts) if facts["renders"] in MEANT_OF_ANSWERS else ():
        table.add_row("judgements", line)
    table.add_row("length of a row", f"median {facts['median']:,}, longest {facts['longest']:,}, limit {facts['max_tokens']:,}")
    table.add_row(f"over length ({facts['over_length']})", _over(facts))
    table.add_row("bad rows", f"{facts['bad_rows']:,}" + "".join(f"\n{line}" for line in facts["bad_examples"]))
    for what, n in facts["left_out"].items():
        table.add_row("left out", f"{what}: {n:,}")
    for text, n in facts["notes"].items():
        table.add_row("note", f"{text} ({n:,} rows)")
    return table


def _over(facts: Mapping[str, Any]) -> str:
    parts = [
        (facts["dropped_long"], "dropped"),
        (facts["split"], "split into pieces, nothing lost"),
        (facts["truncated"], "truncated"),
        (facts["cut_responses"], "of these without the end of the response"),
    ]
    return ", ".join(f"{n:,} {what}" for n, what in parts if n) or "none"


def spans(row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, trained) of the runs of tokens that are trained or not. Decoded from the beginning each time, so that no space is lost."""
    edges = [0, *(np.flatnonzero(np.diff(row.train)) + 1).tolist(), len(row)]
    decode = lambda end: tokenizer.decode(row.ids[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)  # noqa: E731
    texts = ["", *(decode(end) for end in edges[1:])]
    return [(after[len(before) :], bool(row.train[start])) for before, after, start in zip(texts, texts[1:], edges, strict=False)]


def pieces(row: Row, tokenizer: Any) -> list[tuple[str, bool | None]]:
    """`spans` of a row with the middle of a long one left out: there stands how many tokens that were, and None."""
    gap = len(row) - HEAD - TAIL
    if gap <= 0:
        return [*spans(row, tokenizer)]
    return [*spans(_part(row, 0, HEAD), tokenizer), (f" ... {gap:,} tokens ... ", None), *spans(_part(row, len(row) - TAIL, len(row)), tokenizer)]


def shown(row: Row, tokenizer: Any, *, colour: bool) -> Text:
    """A row: trained tokens in bold green on a terminal, in brackets elsewhere; the middle of a long one left out."""
    out = Text()
    for text, trained in pieces(row, tokenizer):
        if trained is None:
            out.append(text, style="italic")
        elif colour:
            out.append(text, style="bold green" if trained else "dim")
        else:
            out.append(f"{OPEN}{text}{CLOSE}" if trained else text)
    return out


def _part(row: Row, start: int, end: int) -> Row:
    return Row(row.ids[start:end], row.train[start:end], row.where, row.extras)


MEANT_OF_ANSWERS = {
    "ranked": "tokens at which an answer's score is read",
    "pairs": "tokens of the answers, whose log-probabilities are compared,",
    "judged": "tokens of the answers, whose log-probabilities are learned from,",
}
MEANING = {"masked": "tokens that may be hidden", "label": "", "text": "trained tokens", "chat": "trained tokens"} | MEANT_OF_ANSWERS


def show(rows: list[Row], tokenizer: Any, facts: Mapping[str, Any], console: Console) -> None:
    """The counts, then the rows: their source where they have one, and their label."""
    colour = console.is_terminal and not console.no_color
    console.print(counts_table(facts))
    if meaning := MEANING[facts["renders"]]:
        console.print(Text(f"\n{meaning} are {'green' if colour else f'between {OPEN} and {CLOSE}'}; the others are read, not learned"))
    for row in rows:
        if facts["renders"] in MEANT_OF_ANSWERS:
            _show_answers(row, tokenizer, console, colour=colour)
            continue
        source, label = row.extras.get("source"), facts["renders"] == "label"
        own = "" if label and isinstance(source, np.ndarray) else f"{len(row):,} tokens, {int(row.train.sum()):,} trained"
        read = f"a source of {len(source):,} tokens" if isinstance(source, np.ndarray) else ""
        said = f"{len(row):,} tokens" if label and not read else ", ".join(x for x in (read, own) if x)
        console.print(Text(f"\n--- {row.where}: {said}" + (f", label {_label(row, facts)}" if label else ""), style="bold"))
        if isinstance(source, np.ndarray):
            console.print(shown(Row(source, np.zeros(len(source), dtype=bool)), tokenizer, colour=colour), soft_wrap=True)
        if not label:
            console.print(shown(row, tokenizer, colour=colour), soft_wrap=True)
        elif not read:
            console.print(shown(Row(row.ids, np.zeros(len(row), dtype=bool)), tokenizer, colour=colour), soft_wrap=True)


def _show_answers(row: Row, tokenizer: Any, console: Console, *, colour: bool) -> None:
    """Every answer with its prompt, and how it was judged."""
    examples, ranks, margin = examples_of(row), row.extras["ranks"], row.extras["margin"]
    console.print(Text(f"\n--- {row.where}: {len(ranks) or 1} answers" + (f", margin {margin:g}" if margin else ""), style="bold"))
    for i, example in enumerate(examples):
        if not ranks:
            said = ("good" if row.extras["good"] else "bad") if i == 0 else "an answer to another prompt: the divergence from the reference is measured on it"
        else:
            tied = ranks.count(ranks[i]) > 1
            said = f"place {ranks[i] + 1} of {max(ranks) + 1}{', tied' if tied else ''}" if len(ranks) > 2 or tied else ("better", "worse")[i]
        source = example.extras.get("source")
        marked = f"{len(example):,} tokens, {int(example.train.sum()):,} marked"
        read = f"a source of {len(source):,} tokens, " if isinstance(source, np.ndarray) else ""
        console.print(Text(f"{said}: {read}{marked}", style="italic"))
        if isinstance(source, np.ndarray):
            console.print(shown(Row(source, np.zeros(len(source), dtype=bool)), tokenizer, colour=colour), soft_wrap=True)
        console.print(shown(example, tokenizer, colour=colour), soft_wrap=True)


def _label(row: Row, facts: Mapping[str, Any]) -> str:
    label = row.extras["label"]
    if facts["problem"] == "regression":
        return f"{label:g}"
    names = facts["labels"]
    return names[label] if facts["problem"] == "single" else ", ".join(n for n, is_one in zip(names, label, strict=True) if is_one) or "none"
