"""From sources to the rows that are trained and the rows that are held out, with every loss on the way counted and said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Literal, cast

from ..core import LuthierError, Renders, Row
from . import labels as labelling
from . import patterns, rankings
from .answers import Renderer
from .convert import convert
from .counting import Say, count, refuse_nothing, say_counts
from .divide import Group, Held, Item, choose, hold_out, key, records
from .encode import render_labelled, render_masked
from .formats import Bad, Record, read_file
from .labels import Labelled, Problem, convert_labelled, detect_labelled
from .preferences import Judged, convert_preferences, detect_preferences
from .prompted import Prompted, convert_prompts, detect_prompts, render_prompts
from .render import render_chats, render_chats_as_text, render_texts
from .rows import Counts, Dropped, Form, OverLength
from .seq2seq import render_answers
from .shapes import LOOK_AT, Chat, Document, Shape, detect
from .sources import files_of, read, splits_of
from .trees import in_languages

DECODER = Form()
PREFERENCES = ("ranked", "pairs", "judged")


@dataclass
class Prepared:
    """The data of a run."""

    train: list[Row]
    validation: list[Row]
    validation_records: list[Held]
    facts: dict[str, Any] = field(default_factory=dict)
    stream: Stream | None = None  # what is trained, where it is read as it is drawn; ``train`` is then empty
    sources: dict[str, Prepared] = field(default_factory=dict)  # of a mixture: each source by itself; the lists above hold all of them


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """The choices that reading and rendering share."""

    renderer: Renderer
    renders: Renders
    form: Form
    shape: str
    columns: Mapping[str, str]
    split: str
    languages: Sequence[str]
    max_tokens: int
    over_length: OverLength
    say: Say
    progress: Callable[[int], None] | None
    beginning: int
    patterns: Sequence[patterns.Pair] = ()
    stream: bool = False


def prepare(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    renders: Renders,
    max_tokens: int,
    form: Form = DECODER,
    template: str | None = None,
    shape: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    languages: Sequence[str] = (),
    limit: int | None = None,
    over_length: OverLength = "truncate",
    train_on: Literal["all", "last"] = "all",
    on_bad_row: Literal["stop", "skip"] = "stop",
    validation: Sequence[str] = (),
    validation_share: float = 0.05,
    validation_rows: int = 500,
    problem: Problem = "auto",
    labels: Sequence[str] = (),
    seed: int = 0,
    say: Say = print,
    beginning: int = 16,
    progress: Callable[[int], None] | None = None,
    templates: Sequence[tuple[str, str]] = (),
    stream: int | None = None,
) -> Prepared:
    """Read, convert, render and divide. ``say`` gets one line for each thing the user should know; ``progress`` the records rendered.

    ``form``: what kind of model the rows are for. ``problem`` and ``labels``: for labelled texts, where they are known already. ``beginning``: where the
    model is to go on from raw text, so many tokens of it are the prompt. ``templates``: patterns of prompts and completions; a record gives one row for each,
    which stay together. ``stream``: hold so many records at a time; the first of them are read here, for what is held out, found and said.
    """
    if not sources:
        raise LuthierError("no training data: set data.train to a file, a folder or a Hub data set id.")
    if renders in ("chat", *PREFERENCES) and over_length == "split":
        raise LuthierError("data.over_length=split is for raw text: half a conversation teaches nothing. Use truncate (cuts the prompt) or drop.")
    how = _Reading(
        renderer=Renderer(tokenizer, template, train_on), renders=renders, form=form, shape=shape, columns=columns or {}, split=split,
        languages=languages, max_tokens=max_tokens,
        over_length=over_length, say=say, progress=progress, beginning=beginning,
        patterns=[(patterns.Pattern(a), patterns.Pattern(b)) for a, b in templates],
        stream=stream is not None,
    )  # fmt: skip
    bad, counts = Bad(on_bad_row), Counts()
    facts: dict[str, Any] = {"sources": list(sources), "renders": renders, "template": None, "max_tokens": max_tokens, "over_length": over_length}
    head = limit if stream is None else min(stream, limit or stream)
    if stream is not None:
        if renders in PREFERENCES or renders == "prompts":
            raise LuthierError("stream: answers that are compared are read whole, before the first step; leave stream out for this source")
        say(f"a stream; of its first {head:,} records:")
    groups = _groups(_open(sources, how, bad, facts), how, bad, counts, facts, head)
    if not groups:
        refuse_nothing(max_tokens, bad, counts, facts)
    fitted = _number_labels(groups, facts, problem, labels) if renders == "label" else None
    validation = validation or beside(sources, split, say)
    if validation:
        v_bad, v_counts = Bad(on_bad_row), Counts()
        v_facts: dict[str, Any] = {}
        say("validation data:")
        held = _groups(_open(validation, how, v_bad, v_facts, split="validation"), how, v_bad, v_counts, v_facts, None)
        if fitted is not None:
            _renumber(held, fitted, "the labels of the training data")
        held = choose(held, sum(len(g.rows) for g in held.values()), validation_rows, seed)
        both = sum(key in groups for key in held)
        facts["validation"] = {"from": list(validation), "bad_rows": v_bad.count, "prompts_also_trained": both}
        if both:
            say(f"{both} of {len(held)} validation prompts are also in the training data: their loss says less than it seems")
    else:
        held = hold_out(groups, validation_share, validation_rows, seed)
        facts["validation"] = {"from": "training rows", "share": validation_share}
    train = [row for g in groups.values() for row in g.rows]
    held_rows = [row for g in held.values() for row in g.rows][:validation_rows]
    if fitted is not None:
        given = [item.label for g in groups.values() for item in g.items if isinstance(item, Labelled) and item.label is not None]
        facts |= labelling.counted(given, fitted)
    if renders in PREFERENCES:
        facts |= rankings.counted(train, renders)
    count(facts, train, held_rows, bad, counts)
    say_counts(facts, say)
    if renders == "judged":
        train, held_rows = (rankings.with_others(rows, max_tokens=max_tokens, seed=seed) for rows in (train, held_rows))
    if stream is not None:
        facts["mean_tokens"] = facts["tokens"] / len(train)
        return Prepared([], held_rows, records(held), facts, Stream(sources, replace(how, say=lambda _: None), bad, frozenset(held), fitted, limit))
    return Prepared(train, held_rows, records(held), facts)


class Stream:
    """Sources that are read as they are drawn from. What is held out is left out of them wherever it comes again."""

    def __init__(self, sources: Sequence[str], how: _Reading, bad: Bad, held: frozenset[str], fitted: labelling.Labels | None, limit: int | None):
        self.sources, self.how, self.bad, self.held, self.fitted, self.limit = list(sources), how, bad, held, fitted, limit

    def items(self) -> Iterator[Item]:
        """Its records from the first one on, in the order of the files."""
        return islice(_open(self.sources, self.how, self.bad, {}), self.limit)

    def rows(self, items: Sequence[Item]) -> list[Row]:
        """Some of them rendered; what is held out, and what is too long, gives none."""
        groups = {k: g for k, g in _groups(iter(items), self.how, self.bad, Counts(), {}, None).items() if k not in self.held}
        if self.fitted is not None:
            _renumber(groups, self.fitted, "the labels of the first records of this stream")
        return [row for g in groups.values() for row in g.rows]


# --- labels ---------------------------------------------------------------------------------------------------------


def _number_labels(groups: Mapping[str, Group], facts: dict[str, Any], problem: Problem, names: Sequence[str]) -> labelling.Labels:
    """Find out what the labels are, and replace them by their numbers in all rows."""
    given = [item.label for g in groups.values() for item in g.items if isinstance(item, Labelled) and item.label is not None]
    fitted = labelling.fit(given, problem=problem, names=names)
    _renumber(groups, fitted, "objective.labels" if names else "the labels")
    return fitted


def _renumber(groups: Mapping[str, Group], fitted: labelling.Labels, of: str) -> None:
    rows = labelling.numbered((row for g in groups.values() for row in g.rows), fitted, of)
    for g in groups.values():
        g.rows = list(islice(rows, len(g.rows)))
    next(rows, None)  # its end is where it says what did not fit


# --- reading --------------------------------------------------------------------------------------------------------


def _open(sources: Sequence[str], how: _Reading, bad: Bad, facts: dict[str, Any], split: str | None = None) -> Iterator[Item]:
    """Records of all sources in normal form; each file's shape is detected by itself and said."""
    shapes: dict[str, str] = facts.setdefault("shapes", {})
    for source in sources:
        files = files_of(source, split or how.split)
        opened = [(source, read(source, bad=bad, split=how.split, stream=how.stream))] if files is None else [(str(f), read_file(f, bad=bad)) for f in files]
        for name, there in opened:
            there = in_languages(there, how.languages, bad, facts.setdefault("languages", {}))
            first = list(islice(there, LOOK_AT))
            if not first:
                raise LuthierError(f"{name}: no row in it.")
            if how.patterns:
                patterns.check(how.patterns, first, name)
                shapes[name] = f"{len(how.patterns)} templates"
                how.say(f"{name}: {shapes[name]}")
                for record in chain(first, there):
                    yield from patterns.convert_patterned(record, how.patterns, bad)
                continue
            shape = _shape(first, name, how)
            shapes[name] = str(shape)
            how.say(f"{name}: {shape}")
            into = _into(how.renders)
            for record in chain(first, there):
                yield from into(record, shape, bad)


def _into(renders: Renders) -> Callable[[Record, Shape, Bad], Sequence[Item]]:
    """What makes items of a record, for what is learned of them."""
    if renders in PREFERENCES:
        return partial(convert_preferences, renders=renders)
    if renders == "prompts":
        return convert_prompts
    return convert_labelled if renders == "label" else convert


def _shape(first: Sequence[Record], name: str, how: _Reading) -> Shape:
    if how.renders == "label":
        if how.shape not in ("auto", "label"):
            raise LuthierError(f"data.shape={how.shape}: objective classify reads labelled texts; leave the shape out, or set data.shape=label.")
        return detect_labelled(first, columns=how.columns)
    if how.renders == "prompts":
        return detect_prompts(first, shape=how.shape, columns=how.columns)
    if how.renders in PREFERENCES:
        if how.shape != "auto":
            raise LuthierError(
                f"data.shape={how.shape}: this objective reads judged answers, whose shape is found by itself; leave it out, or set data.columns."
            )
        return detect_preferences(first, renders=how.renders, columns=how.columns)
    if how.shape == "label":
        raise LuthierError("data.shape=label: labelled texts are for objective: classify; set it, or leave the shape out.")
    shape = detect(first, shape=how.shape, columns=how.columns)
    _fits(shape, name, how, first)
    return shape


def _fits(shape: Shape, name: str, how: _Reading, first: Sequence[Record]) -> None:
    if shape.is_text and how.renders == "chat":
        raise LuthierError(
            f"{name}: this is raw text (columns {', '.join(first[0].fields)}), and the objective learns responses to prompts. "
            "Set objective: text to learn the text itself, or say which columns are which: data.columns={prompt: ..., completion: ...}."
        )


def beside(sources: Sequence[str], split: str, say: Say) -> list[str]:
    """The validation files of a folder that has them by name (valid.jsonl)."""
    found = []
    for source in sources:
        if split == "train" and Path(source).expanduser().is_dir():
            found += [str(p) for p in splits_of(Path(source).expanduser()).get("validation", []) if p.stat().st_size]
    if found:
        say(f"validation files found beside the training data: {', '.join(found)}")
    return found


def _groups(items: Iterator[Item], how: _Reading, bad: Bad, counts: Counts, facts: dict[str, Any], limit: int | None) -> dict[str, Group]:
    """Rendered rows by what must not be torn apart: the text of a document, the prompt of a chat."""
    groups: dict[str, Group] = {}
    seen, before = 0, ("", "")
    for item, rows in _rendered(islice(items, limit), how, bad, counts, facts):
        seen += 1
        if not how.patterns or item.where != before[0]:  # templates ask one record in other words
            before = item.where, key(item)
        rows = [r for r in rows if how.renders == "prompts" or (r.train if how.renders in ("label", "ranked") else r.train[1:]).any()]
        if not rows:
            continue
        group = groups.setdefault(before[1], Group())
        group.rows += rows
        group.items.append(Document("", item.where) if isinstance(item, Document) else item)  # a document's text is in its rows
    facts["records"] = seen
    return groups


def _rendered(items: Iterator[Item], how: _Reading, bad: Bad, counts: Counts, facts: dict[str, Any]) -> Iterator[tuple[Item, list[Row]]]:
    """Documents and conversations may come in turns (several files): each kind is rendered by its own function, in order."""
    how_much: dict[str, Any] = {"max_tokens": how.max_tokens, "over_length": how.over_length, "counts": counts, "progress": how.progress}
    codec = how.renderer.codec
    if how.renders == "label":
        yield from render_labelled(cast(Iterator[Labelled], items), codec, how.form, **how_much)
        return
    if how.renders in PREFERENCES:
        _say_template(how, facts)
        made = rankings.render_preferences(cast(Iterator[Judged], items), how.renderer, how.form, renders=how.renders, **how_much)
        for item, row in made:
            yield item, _or_bad(row, bad)
        return
    if how.renders == "prompts":
        asked = render_prompts(
            cast(Iterator[Prompted], items), how.renderer, how.form, max_tokens=how.max_tokens, beginning=how.beginning, counts=counts, progress=how.progress
        )
        for prompt, one in asked:
            if prompt.messages:
                _say_template(how, facts)
            yield prompt, _or_bad(one, bad)
        return
    if how.renders == "masked":
        yield from render_masked(map(_as_text, cast(Iterator[Chat | Document], items)), codec, how.form, **how_much)
        return
    for kind, some in groupby(items, type):
        if kind is Document:
            if codec.eos is None:
                counts.note("the tokenizer has no end-of-sequence token: documents end without one")
            yield from render_texts(cast(Iterator[Document], some), codec, **how_much)
            continue
        _say_template(how, facts)
        for chat, rows in _chats(cast(Iterator[Chat], some), how, how_much):
            yield chat, _or_bad(rows, bad)


def _say_template(how: _Reading, facts: dict[str, Any]) -> None:
    template = how.renderer.template
    if facts.get("template") is None:
        facts["template"] = template.name
        how.say(template.note or f"chat template: {template.name}")


def _or_bad(made: Row | list[Row] | Dropped, bad: Bad) -> list[Row]:
    """The rows; none where the record was dropped, which is reported where the record or the template is at fault."""
    if isinstance(made, Dropped) and made.bad:
        bad.add(made.where, made.reason, "Set model.template to one that can render it (plain, chatml, ...)")
    return [] if isinstance(made, Dropped) else [made] if isinstance(made, Row) else made


def _chats(chats: Iterator[Chat], how: _Reading, how_much: dict[str, Any]) -> Iterator[tuple[Chat, Any]]:
    if how.renders == "text":
        return render_chats_as_text(chats, how.renderer, **how_much)
    if how.form.kind == "encoder_decoder":
        return render_answers(chats, how.renderer, how.form, **how_much)
    return render_chats(chats, how.renderer, **how_much)


def _as_text(item: Chat | Document) -> Document:
    """A conversation as what was said in it, line by line."""
    return item if isinstance(item, Document) else Document("\n".join(m["content"] for m in item.messages if m["content"]), item.where, item.extras)


# --- row by row -----------------------------------------------------------------------------------------------------


class Reader:
    """The same reading and rendering for what looks at every record and keeps none. The settings are those of ``prepare``."""

    def __init__(
        self, tokenizer: Any, *, renders: Renders, max_tokens: int, form: Form = DECODER, template: str | None = None, shape: str = "auto",
        columns: Mapping[str, str] | None = None, split: str = "train", languages: Sequence[str] = (), over_length: OverLength = "truncate",
        train_on: Literal["all", "last"] = "all",
    ) -> None:  # fmt: skip
        self.how = _Reading(
            renderer=Renderer(tokenizer, template, train_on), renders=renders, form=form, shape=shape, columns=columns or {}, split=split,
            languages=languages, max_tokens=max_tokens, over_length=over_length, say=lambda text: None, progress=None, beginning=16,
        )  # fmt: skip

    def like(self, **changes: Any) -> Reader:
        """The same with other settings."""
        other = copy(self)
        other.how = replace(self.how, **changes)
        return other

    def opened(self, name: str, records: Iterator[Record], bad: Bad) -> tuple[Shape, Iterator[tuple[Record, Sequence[Item]]]]:
        """The shape of these records, and each with its items; what cannot be used is told to ``bad`` and has none."""
        records = in_languages(records, self.how.languages, bad, {})
        first = list(islice(records, LOOK_AT))
        if not first:
            raise LuthierError(f"{name}: no row in it.")
        shape, into = _shape(first, name, self.how), _into(self.how.renders)
        return shape, ((record, into(record, shape, bad)) for record in chain(first, records))

    def rendered(self, items: Sequence[Item], bad: Bad, counts: Counts) -> Iterator[tuple[Item, list[Row]]]:
        """Each item with its rows, as they are trained."""
        return _rendered(iter(items), self.how, bad, counts, {})
