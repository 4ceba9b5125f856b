"""Rows that are too long, and what is trained of the rest."""

from __future__ import annotations

from collections.abc import Iterator

from ...core import examples_of
from . import Again, Check, Finding, Hits, Seen, Setting, share

LITTLE = 0.05  # share of trained tokens below which most of the work teaches nothing
LEARNED = ("chat", "text")  # renders whose loss is over the trained tokens


class Lengths(Check):
    """What data.over_length does to rows that are longer than data.max_tokens."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.lost, self.shortened, self.dropped, self.silent = Hits(), Hits(), Hits(), Hits()
        self.tokens = self.trained = 0
        self.longest = 0

    def row(self, row: Seen) -> None:
        if row.split != "train":
            return
        n, trained = sum(map(len, row.rows)), sum(int(r.train[1:].sum()) for r in row.rows)
        self.tokens, self.trained, self.longest = self.tokens + n, self.trained + trained, max(self.longest, n)
        if self.setting.renders in LEARNED and not trained:
            self.silent.add(row.index, "one token, and none to predict")
        elif row.cut is not None and self.setting.over_length == "drop":
            self.dropped.add(row.index, f"{n:,} tokens")
        elif row.cut is not None and row.cut.lost:
            self.lost.add(row.index, f"{n:,} tokens; nothing that is learned is left of them")
        elif row.cut is not None and row.cut.response:
            self.shortened.add(row.index, f"{n:,} tokens; the end of the response is cut off")

    def findings(self, again: Again) -> Iterator[Finding]:
        limit = self.setting.max_tokens
        room = self.setting.positions - limit
        fits = min(self.longest, self.setting.positions)
        longer = (
            f"data.max_tokens={fits} {'keeps all of them whole' if fits == self.longest else 'keeps more'}" if room > 0 else "a model that sees more tokens"
        )
        if self.lost:
            yield Finding(
                name="response_lost",
                severity="error",
                title="Rows whose response is lost",
                said=f"they are longer than {limit:,} tokens, and what is cut off is all that they would teach",
                fix=f"{longer}; or --fix leaves them out",
                hits=self.lost,
                removes=self.lost,
            )
        if self.silent:
            yield Finding(
                name="nothing_trained",
                severity="error",
                title="Rows with nothing to learn",
                said="they are a single token, and the first token of a row is read, never predicted",
                fix="--fix leaves them out",
                hits=self.silent,
                removes=self.silent,
            )
        if self.shortened:
            yield Finding(
                name="response_cut",
                severity="warning",
                title="Responses that lose their end",
                said=f"the response alone all but fills {limit:,} tokens: what is left teaches to write on and never to stop",
                fix=f"{longer}; or leave long rows out: data.over_length=drop",
                hits=self.shortened,
            )
        if self.dropped:
            yield Finding(
                name="dropped_long",
                severity="warning" if len(self.dropped) > 0.05 * max(1, self.setting.expected) else "note",
                title="Rows that are dropped for their length",
                said=f"data.over_length=drop leaves out what is longer than {limit:,} tokens",
                fix=f"{longer}; or data.over_length=truncate",
                hits=self.dropped,
            )
        if self.setting.renders in LEARNED and self.tokens and self.trained < LITTLE * self.tokens:
            yield Finding(
                name="little_trained",
                severity="warning",
                title="Few tokens are trained",
                said=f"{share(self.trained, self.tokens)} of the tokens are learned from; the rest is read at the same cost",
                fix="shorter prompts, or objective: text where the prompts are worth learning too",
                hits=Hits(),
                count=self.trained,
                unit=f"of {self.tokens:,} tokens",
            )


class Endings(Check):
    """Whether the model is shown how to stop: the token that ends a turn stands, and is learned, at the end of every row."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.endless = Hits()

    def row(self, row: Seen) -> None:
        if row.split != "train" or self.setting.renders not in ("chat", "text", "pairs", "judged") or not row.rows:
            return
        ends = self.setting.renderer.codec.ends
        for one in (e for r in row.rows for e in examples_of(r)):
            if len(one) and not (bool(one.train[-1]) and int(one.ids[-1]) in ends):
                self.endless.add(row.index)
                return

    def findings(self, again: Again) -> Iterator[Finding]:
        if self.endless:
            yield Finding(
                name="missing_end",
                severity="error",
                title="Rows without an end",
                said="neither the template nor the tokenizer puts a token behind them that ends the answer: the model never learns to stop",
                fix="set model.template to one that ends turns (chatml, ...), or give the tokenizer an end-of-sequence token (eos_token)",
                hits=self.endless,
            )
