"""The examples of every step: lengths from GSM8K where it is at hand, token ids random, all of a seed.

A row is {"ids", "answer": where the answer begins} (sft, text), {"ids", "label"} (classify) or {"prompt", "chosen", "rejected"} (dpo).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from .workload import Workload

Row = dict[str, Any]
RESERVED = 3  # ids 0, 1, 2: pad, end, unknown
WORDS_TO_TOKENS = 1.3
# (mean, standard deviation) of WORDS_TO_TOKENS x words over GSM8K's 7,473 training rows: for where the file is not at hand.
QUESTION, ANSWER = (58.6, 22.7), (67.2, 34.8)
DOCUMENT, LONGEST = (180.0, 130.0), 512  # raw text: tokens of a document


def lengths(n: int, seed: int) -> tuple[list[tuple[int, int]], str]:
    """(question, answer) token lengths of n examples, and where they come from."""
    rng = np.random.default_rng([seed, 1])
    path = Path(os.environ.get("LUTHIER_DATA", "")) / "data" / "gsm8k" / "train.jsonl"
    if "LUTHIER_DATA" in os.environ and path.is_file():
        with path.open(encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        chosen = rng.choice(len(rows), size=n, replace=n > len(rows))
        sizes = [[max(2, round(WORDS_TO_TOKENS * len(rows[i][key].split()))) for key in ("question", "answer")] for i in chosen]
        return [(q, a) for q, a in sizes], f"GSM8K train, {WORDS_TO_TOKENS} x words"
    pairs = zip(_log_normal(rng, n, *QUESTION), _log_normal(rng, n, *ANSWER), strict=True)
    return list(pairs), f"log-normal with GSM8K's means and standard deviations, {WORDS_TO_TOKENS} x words"


def _log_normal(rng: np.random.Generator, n: int, mean: float, sd: float) -> list[int]:
    variance = math.log1p((sd / mean) ** 2)
    return [max(2, round(float(x))) for x in rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), n)]


def examples(work: Workload) -> tuple[list[list[Row]], str]:
    """The rows of each step, and where their lengths come from."""
    n = work.steps * work.examples
    if work.kind == "text":
        sizes, source = [(0, min(LONGEST, s)) for s in _log_normal(np.random.default_rng([work.seed, 1]), n, *DOCUMENT)], _documents()
    else:
        sizes, source = lengths(n, work.seed)
    if work.prompt_times:
        sizes, source = [(round(work.prompt_times * a), a) for _, a in sizes], f"answers of {source}, prompts {work.prompt_times:g} times as long"
    draw = _Ids(work)
    rows = [_row(work, draw, q, a) for q, a in sizes]
    return [rows[i : i + work.examples] for i in range(0, n, work.examples)], source


def _documents() -> str:
    return f"documents, log-normal with mean {DOCUMENT[0]:g} and standard deviation {DOCUMENT[1]:g}, at most {LONGEST}"


def _row(work: Workload, draw: _Ids, question: int, answer: int) -> Row:
    if work.kind == "dpo":
        return {"prompt": draw(question), "chosen": draw(answer), "rejected": draw(max(2, round(answer * draw.rng.uniform(0.7, 1.3))))}
    if work.kind == "classify":
        return {"ids": draw(question), "label": int(draw.rng.integers(work.labels))}
    return {"ids": draw(question + answer), "answer": question}


class _Ids:
    """Token ids: uniform, or as frequent as words of a language (Zipf), which a model learns in a few steps."""

    def __init__(self, work: Workload) -> None:
        self.rng, self.n = np.random.default_rng([work.seed, 2]), work.vocabulary - RESERVED
        self.cumulative = None
        if work.natural:
            rate = 1.0 / np.arange(1, self.n + 1)
            self.cumulative = np.cumsum(rate) / rate.sum()
            self.names = np.random.default_rng(0).permutation(self.n)  # of the language, not of the seed

    def __call__(self, count: int) -> list[int]:
        if self.cumulative is None:
            return self.rng.integers(RESERVED, self.n + RESERVED, count).tolist()
        return (RESERVED + self.names[np.searchsorted(self.cumulative, self.rng.random(count))]).tolist()


def sequences(rows: list[Row]) -> list[tuple[list[int], int]]:
    """(ids, where the answer begins) of all that these rows make a peer read: a pair is two sequences, each with its prompt."""
    out = []
    for r in rows:
        if "prompt" in r:
            out += [(r["prompt"] + r[answer], len(r["prompt"])) for answer in ("chosen", "rejected")]
        else:
            out.append((r["ids"], r.get("answer", 0)))
    return out


def counts(steps: list[list[Row]]) -> list[tuple[int, int]]:
    """(tokens, labelled tokens) of each step; of a classifier, (tokens, labels). An answer's first token is predicted from the prompt's last, the first
    token of all from nothing."""
    out = []
    for rows in steps:
        all_of = sequences(rows)
        labelled = len(rows) if "label" in rows[0] else sum(len(ids) - max(1, answer) for ids, answer in all_of)
        out.append((sum(len(ids) for ids, _ in all_of), labelled))
    return out


def into_bins(rows: list[Row], bins: int) -> list[list[Row]]:
    """The rows of a step in so many bins of about equal length: the longest first, each where there is least."""
    out: list[list[Row]] = [[] for _ in range(min(bins, len(rows)))]
    for row in sorted(rows, key=lambda r: -len(r["ids"])):
        min(out, key=lambda b: sum(len(r["ids"]) for r in b)).append(row)
    return out
