"""Settings of a mixture: data.mix. What they come to is in data/mixing.py; the rows are read in reading.py."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from ..errors import LuthierError
from .plugins import Range, within_ranges


@dataclass(frozen=True, kw_only=True)
class Template:
    """A pattern for a prompt and one for its completion; {column} stands for what the record has there, {{ and }} for braces."""

    prompt: str
    """What is asked, for example "Is this review good or bad? {review}"."""
    completion: str
    """What is to be answered, for example "{verdict}"."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of a mixture. What is left out is as in data."""

    shorthand: ClassVar[str] = "files"

    files: tuple[str, ...]
    """Files, folders or Hub data set ids, as in data.train."""
    weight: Annotated[float | None, Range(0, low_open=True)] = None
    """How often it is drawn beside the others, for rule: weights."""
    objective: str | None = None
    """Of objective multitask: the part that learns these rows, or a kind (sft, classify, ...) that makes one. Default: the part of the source's own name."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column mapping of these files, ours: yours."""
    shape: Literal["auto", "text", "prompt", "alpaca", "messages", "sharegpt", "label"] = "auto"
    """The shape of a record. auto: detected, and printed."""
    templates: tuple[Template, ...] = ()
    """Prompt templates: every record is rendered under each, and an epoch of the source takes one of them, the next epoch the next."""
    split: str | None = None
    """The split of a Hub data set. Default: data.split."""
    limit: Annotated[int | None, Range(1)] = None
    """Read at most so many records. Default: data.limit."""
    on_bad_row: Literal["stop", "skip"] | None = None
    """A malformed row stops the run, or is skipped and counted. Default: data.on_bad_row."""
    validation: tuple[str, ...] = ()
    """Held-out files. Default: a share of its rows (data.validation_share) is held out."""
    validation_rows: Annotated[int | None, Range(1)] = None
    """At most so many of its rows are evaluated during training. Default: data.validation_rows."""
    tasks: tuple[str, ...] | None = None
    """Tasks scored on its held-out rows (bleu, exact_match, ...). Default: evaluate.tasks."""
    stream: bool = False
    """Read and render rows as they are drawn, for what is too large to hold; they are shuffled within a buffer, and optim.steps must be given."""
    buffer: Annotated[int, Range(1)] = 10_000
    """Of a stream: so many records are held and shuffled at a time."""
    rows: Annotated[int | None, Range(1)] = None
    """Of a stream: how many rows it has, which the rules proportional and temperature need."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Several sources in one run, and how often each is drawn."""

    rule: Literal["proportional", "temperature", "equal", "weights"] = "proportional"
    """proportional: by rows, at most cap of them; temperature: that raised to 1/temperature; equal; weights: by each source's weight."""
    temperature: Annotated[float | None, Range(0, low_open=True)] = None
    """Of rule temperature: 1 is proportional, the larger, the more equal. Default: 2."""
    cap: Annotated[int | None, Range(1)] = None
    """A source counts as at most so many rows (T5's artificial data set size limit), for the rules proportional and temperature, and in an epoch."""
    sources: dict[str, Source]
    """Name -> source: files, or a mapping of files and what is particular to them."""

    def __post_init__(self) -> None:
        within_ranges(self)
        if not self.sources:
            raise LuthierError("sources: names none; give at least one, for example sources: {reviews: reviews.jsonl, news: news.jsonl}")
        for name, source in self.sources.items():
            _check(self, name, source)
        if self.temperature is not None and self.rule != "temperature":
            raise LuthierError(f"temperature: belongs to rule=temperature, and the rule is {self.rule}; leave one of the two out")
        if self.cap is not None and self.rule in ("equal", "weights"):
            raise LuthierError(f"cap: belongs to the rules proportional and temperature, and the rule is {self.rule}, which does not look at sizes")

    @property
    def files(self) -> tuple[str, ...]:
        """The files of all sources."""
        return tuple(f for s in self.sources.values() for f in s.files)

    @property
    def validation(self) -> tuple[str, ...]:
        """The held-out files of all sources."""
        return tuple(f for s in self.sources.values() for f in s.validation)


def _check(mix: Mix, name: str, source: Source) -> None:
    """Raise LuthierError for what says nothing or contradicts itself in one source."""
    if not re.fullmatch(r"[\w-]+", name):
        raise LuthierError(f"sources: {name!r}: a source's name takes letters, digits, _ and -")
    if not source.files:
        raise LuthierError(f"sources: {name} names no file")
    if mix.rule == "weights" and source.weight is None:
        raise LuthierError(f"sources: {name} has no weight, and rule=weights needs one of each")
    if mix.rule != "weights" and source.weight is not None:
        raise LuthierError(f"sources: {name} has a weight, which only rule=weights reads, and the rule is {mix.rule}; set data.mix.rule=weights")
    if source.templates and (source.columns or source.shape != "auto"):
        raise LuthierError(f"sources: {name} has templates, which name the columns themselves; leave columns and shape out")
    if source.rows is not None and not source.stream:
        raise LuthierError(f"sources: {name}: rows is how many a stream has; this source is read whole and counted, so leave it out")
    if source.stream and source.rows is None and mix.rule in ("proportional", "temperature"):
        raise LuthierError(
            f"sources: {name} is a stream, whose rows nobody has counted, and rule={mix.rule} needs their number: say how many (rows: ...), or set rule=weights"
        )
