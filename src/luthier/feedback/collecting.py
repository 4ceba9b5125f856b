"""Questions with the answers that are to be judged: those that a model samples, or those that the data has. Sampled ahead, while others are judged."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..core import LuthierError
from ..data.collected import Collected
from ..data.formats import SUFFIXES, suffix_of
from ..data.questions import Question, asked, read_questions
from ..data.render import render_prompt, stop_ids
from ..measuring.measure import can_write
from ..opening import load
from ..policy import Policy

T = TypeVar("T")
ROUNDS = 3  # so often answers are sampled where all of them are the same
ANEW = 1_000_000_007  # added to the seed of another round


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a model answers."""

    answers: int = 4
    temperature: float = 0.8
    top_p: float = 0.95
    max_new: int = 256
    seed: int = 0
    template: str | None = None

    def said(self) -> dict[str, float | int]:
        """What is kept of it beside the judgements."""
        return {"temperature": self.temperature, "top_p": self.top_p, "max_new": self.max_new, "seed": self.seed}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked, and of whom. ``model``: what answers; None: the answers are in the data."""

    model: str | None
    questions: list[Question]
    notes: list[str]

    @property
    def by_place(self) -> bool:
        """All questions have as many answers, unjudged, from the data: then their places mean something, such as which model wrote them."""
        return self.model is None and len({len(q.answers) for q in self.questions}) == 1 and not any(q.better for q in self.questions)


def asked_of(what: str, source: str | None, prompts: Sequence[str], *, columns: Sequence[str], limit: int | None) -> Asked:
    """Read the command line of a verb that takes MODEL PROMPTS, MODEL --prompt TEXT, or a file of answers alone. Raises LuthierError for anything else.

    ``columns``: as "ours=yours".
    """
    for setting in columns:
        if not all(setting.partition("=")):
            raise LuthierError(f"--column {setting}: say OURS=YOURS, for example --column prompt=question")
    if source is not None and prompts:
        raise LuthierError(f"prompts come from {source} or from --prompt; leave one of the two out")
    is_data = suffix_of(Path(what)) in SUFFIXES and not Path(what).is_dir()
    if source is None and not prompts and not is_data:
        raise LuthierError(f'{what} is asked nothing: name a file of prompts behind it, or say --prompt "..."; a file of answers stands alone')
    if is_data and (source is not None or prompts):
        raise LuthierError(f"{what} is data, and here the model that answers comes first: MODEL PROMPTS")
    if prompts:
        return Asked(what, [asked(p) for p in dict.fromkeys(prompts)], [])
    questions, notes = read_questions(source or what, columns=dict(c.split("=", 1) for c in columns))
    if source is None and not any(len(q.answers) > 1 for q in questions):
        raise LuthierError(f"{what}: has no two answers to any question, so a model has to give them; name it first: MODEL {what}")
    return Asked(None if source is None else what, questions[:limit], notes)


def left_to_do(asked: Asked, file: Collected) -> tuple[list[tuple[int, Question]], list[str]]:
    """The questions that a file does not hold yet, with their numbers, and sentences about what there is to do."""
    todo = [(n, q) for n, q in enumerate(asked.questions) if q not in file]
    there = len(asked.questions) - len(todo)
    said = f"{some(len(todo), 'prompt')} to judge" + (f"; {there:,} more in {file.path} already" if there else "")
    return todo, [*asked.notes, said if todo else f"{file.path}: {some(there, 'prompt')}, all judged already"]


def some(n: int, what: str) -> str:
    """ "1 prompt", "1,200 prompts"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def opened(what: str, base: str | None, precision: str) -> Policy:
    """The model that answers. Raises LuthierError for one that cannot write."""
    policy = load(what, model=base, precision=precision)
    can_write(policy)
    return policy


def in_turn(policy: Policy | None, numbered: Sequence[tuple[int, Question]], how: Sampling, at_once: int, check: Callable[[], None]) -> Iterator[Answered]:
    """Questions with answers, ``at_once`` of them sampled together; without a policy those of the data."""
    for start in range(0, len(numbered), at_once):
        check()
        some = numbered[start : start + at_once]
        if policy is None:
            yield from (given(question) for _, question in some)
        else:
            yield from sampled(policy, [q for _, q in some], [n for n, _ in some], how, check)


@dataclass(frozen=True, slots=True)
class Answered:
    """A question and its answers, all different and none of them empty. ``why``: in words, where there are fewer than two."""

    question: Question
    answers: list[str]
    why: str = ""


def given(question: Question) -> Answered:
    """A question with the answers that its data has."""
    answers = [a for a in dict.fromkeys(question.answers) if a.strip()]
    few = f"{len(question.answers)} of its answers {'are' if len(question.answers) != 1 else 'is'} here, and two different ones are needed"
    return Answered(question, answers, "" if len(answers) > 1 else few)


def sampled(policy: Policy, questions: Sequence[Question], numbers: Sequence[int], how: Sampling, stop: Callable[[], None] | None = None) -> list[Answered]:
    """Each question with what the policy answers to it; the same answers are merged, and empty ones left out.

    ``numbers``: of the questions; from these and the seed come the random numbers, so that an answer does not depend on what is sampled beside it. ``stop``
    is called at every token, and may raise to give up. Where all answers to a question are the same, more are sampled, a few times.
    """
    tokenizer, kind = policy.base.tokenizer, policy.base.anatomy.kind
    found: list[dict[str, None]] = [{} for _ in questions]
    ids, why = zip(*(_rendered(policy, q, how.template) for q in questions), strict=True) if questions else ((), ())
    watched: dict[str, Any] = {} if stop is None else {"on_token": lambda _: stop()}
    sampling: dict[str, Any] = {"samples": how.answers, "temperature": how.temperature, "top_p": how.top_p, "max_new": how.max_new, **watched}
    for attempt in range(ROUNDS):
        short = [i for i in range(len(questions)) if len(found[i]) < 2 and not why[i]]
        if not short:
            break
        stops = stop_ids(tokenizer, how.template, kind=kind)
        rollout = policy.generate([ids[i] for i in short], numbers=[numbers[i] for i in short], stop=stops, seed=how.seed + attempt * ANEW, **sampling)
        for i, new in zip((i for i in short for _ in range(how.answers)), rollout.ids, strict=True):
            if answer := tokenizer.decode(new, skip_special_tokens=True).strip():
                found[i][answer] = None
    return [_answered(q, list(f)[: how.answers], w) for q, f, w in zip(questions, found, why, strict=True)]


def _rendered(policy: Policy, question: Question, template: str | None) -> tuple[list[int], str]:
    """The ids of a prompt, and why it cannot be answered."""
    try:
        ids = render_prompt(question.messages, policy.base.tokenizer, template, tools=question.tools, kind=policy.base.anatomy.kind)
    except LuthierError as e:
        return [], str(e)
    return ids, f"it leaves no room for an answer in the {policy.limit:,} positions of the model" if len(ids) >= policy.limit else ""


def _answered(question: Question, answers: list[str], why: str) -> Answered:
    if len(answers) > 1 or why:
        return Answered(question, answers, why)
    return Answered(question, answers, "all answers to it are the same; raise --temperature" if answers else "the model answers it with nothing")


# --- ahead of the judge ----------------------------------------------------------------------------------------------


class GivenUp(Exception):
    """Nobody waits for the items any more."""


class Ahead(Generic[T]):
    """The items of an iterator, made in a thread of its own, a few before they are asked for.

    ``make`` gets a function that raises GivenUp once nobody waits any more, to be called often. Close it, or use it with ``with``.
    """

    def __init__(self, make: Callable[[Callable[[], None]], Iterator[T]], *, most: int = 2):
        self._made: queue.Queue[tuple[str, object]] = queue.Queue(most)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[Callable[[], None]], Iterator[T]]) -> None:
        try:
            try:
                for item in make(self._check):
                    self._put("item", item)
                self._put("end", None)
            except GivenUp:
                raise
            except BaseException as e:  # it belongs to whoever asks for the next item
                self._put("error", e)
        except GivenUp:
            pass

    def _check(self) -> None:
        if self._closing.is_set():
            raise GivenUp

    def _put(self, what: str, item: object) -> None:
        while True:
            self._check()
            try:
                return self._made.put((what, item), timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[T]:
        while True:
            what, item = self._made.get()
            if what == "end":
                return
            if what == "error":
                assert isinstance(item, BaseException)
                raise item
            yield item  # type: ignore[misc]

    def close(self) -> None:
        """Stop making items."""
        self._closing.set()
        self._thread.join()

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
