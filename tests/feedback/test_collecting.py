"""Questions with answers to judge: sampled by a model, or given by the data, and made ahead of whoever judges."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import small
import tiny
from luthier.core import LuthierError, Rollout
from luthier.data.collected import Collected, ranking_line
from luthier.data.questions import Question, asked
from luthier.feedback import collecting
from luthier.feedback.collecting import Ahead, Sampling, asked_of, given, in_turn, left_to_do, opened, sampled

HOW = Sampling(answers=3, max_new=6, temperature=1.0, top_p=1.0)
QUESTIONS = [asked("word 1"), asked("a longer word 2"), asked("word 3")]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("collecting")
    tiny.folder(folder / "base")
    return opened(str(folder / "base"), None, "float32")


# --- sampling --------------------------------------------------------------------------------------------------------


def test_a_question_gets_so_many_different_answers_the_same_for_the_same_seed(policy: Any) -> None:
    (found,) = sampled(policy, QUESTIONS[:1], [0], HOW)
    assert len(set(found.answers)) == len(found.answers) == 3 and not found.why and all(a.strip() for a in found.answers)
    assert sampled(policy, QUESTIONS[:1], [0], HOW) == [found]
    assert sampled(policy, QUESTIONS[:1], [1], HOW) != [found] != sampled(policy, QUESTIONS[:1], [0], Sampling(**{**vars(HOW), "seed": 1}))


def test_answers_do_not_depend_on_what_is_sampled_beside_them(policy: Any) -> None:
    together = sampled(policy, QUESTIONS, [4, 5, 9], HOW)
    assert together == [sampled(policy, [q], [n], HOW)[0] for q, n in zip(QUESTIONS, [4, 5, 9], strict=True)]
    assert list(in_turn(policy, list(zip([4, 5, 9], QUESTIONS, strict=True)), HOW, 2, lambda: None)) == together


def test_the_same_answers_are_merged_and_others_sampled_a_few_times(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    word = policy.base.tokenizer("x y z")["input_ids"]
    same, other, nothing = word[:1], word[-1:], []
    replies, seeds = iter([same] * 3 + [nothing, same, other]), []

    def fake(prompts: Any, *, samples: int, seed: int, **_: Any) -> Rollout:
        seeds.append(seed)
        return Rollout([next(replies) for _ in prompts for _ in range(samples)], [], [])

    monkeypatch.setattr(policy, "generate", fake)
    (found,) = sampled(policy, QUESTIONS[:1], [0], HOW)
    assert found.answers == ["x", "z"] and len(set(seeds)) == 2
    replies = itertools.cycle([same, nothing])
    (found,) = sampled(policy, QUESTIONS[:1], [0], HOW)
    assert found.answers == ["x"] and "raise --temperature" in found.why and len(seeds) == 2 + collecting.ROUNDS
    replies = itertools.cycle([nothing])
    assert "with nothing" in sampled(policy, QUESTIONS[:1], [0], HOW)[0].why


def test_a_prompt_that_fills_the_model_is_said(policy: Any) -> None:
    (found,) = sampled(policy, [asked("word " * 500)], [0], HOW)
    assert found.answers == [] and f"no room for an answer in the {policy.limit:,} positions" in found.why
    both = sampled(policy, [asked("word " * 500), QUESTIONS[0]], [0, 1], HOW)
    assert both[0].why and both[1] == sampled(policy, QUESTIONS[:1], [1], HOW)[0]


def test_a_conversation_that_the_template_refuses_is_said_and_the_others_are_answered(policy: Any, tmp_path: Path) -> None:
    refusing = "{% for m in messages %}{% if 'secret' in m.content %}{{ raise_exception('no secrets') }}{% endif %}<user>{{ m.content }}<end>{% endfor %}"
    (tmp_path / "t.jinja").write_text(refusing)
    both = sampled(policy, [asked("a secret"), QUESTIONS[0]], [0, 1], Sampling(**{**vars(HOW), "template": str(tmp_path / "t.jinja")}))
    assert "the chat template refuses this conversation: no secrets" in both[0].why and len(both[1].answers) == 3


def test_a_model_that_writes_nothing_is_refused(tmp_path: Path) -> None:
    small.bert(tmp_path / "bert")
    with pytest.raises(LuthierError, match="an encoder: it reads text and writes none"):
        opened(str(tmp_path / "bert"), None, "float32")


def test_answers_of_the_data_need_to_be_two_different_ones() -> None:
    assert given(Question([], ("a", "b", "a", " "))).answers == ["a", "b"]
    for answers in ((), ("a",), ("a", "a"), ("a", "")):
        assert "two different ones are needed" in given(Question([], answers)).why


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_a_model_with_prompts_a_model_with_a_prompt_or_answers_alone(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "answers": ["a", "b"]}\n{"prompt": "p", "answers": ["c", "d"]}\n')
    prompts, answers = str(tmp_path / "p.txt"), str(tmp_path / "a.jsonl")
    found = asked_of("fiddle", prompts, [], columns=[], limit=2)
    assert found.model == "fiddle" and [q.prompt for q in found.questions] == ["one", "two"] and not found.by_place
    found = asked_of("fiddle", None, ["x", "y", "x"], columns=[], limit=None)
    assert found.model == "fiddle" and [q.prompt for q in found.questions] == ["x", "y"]
    found = asked_of(answers, None, [], columns=[], limit=None)
    assert found.model is None and [q.answers for q in found.questions] == [("a", "b"), ("c", "d")] and found.by_place
    assert asked_of("fiddle", answers, [], columns=[], limit=None).model == "fiddle"  # its answers are not asked for
    for arguments, reason in (
        (("fiddle", None, []), "fiddle is asked nothing"),
        (("fiddle", prompts, ["x"]), "leave one of the two out"),
        ((prompts, None, []), "has no two answers to any question.*MODEL"),
        ((prompts, answers, []), "the model that answers comes first"),
        (("no.jsonl", None, []), "no.jsonl: no such file"),
    ):
        with pytest.raises(LuthierError, match=reason):
            asked_of(*arguments, columns=[], limit=None)  # type: ignore[arg-type]
    with pytest.raises(LuthierError, match="--column prompt: say OURS=YOURS"):
        asked_of("fiddle", prompts, [], columns=["prompt"], limit=None)


def test_answers_that_the_data_judges_have_no_places(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}))
    assert not asked_of(str(tmp_path / "a.jsonl"), None, [], columns=[], limit=None).by_place


def test_what_is_judged_already_is_left_out_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    found = asked_of("fiddle", None, ["x", "y", "z"], columns=[], limit=None)
    file = Collected(tmp_path / "o.jsonl", "ranked")
    assert left_to_do(found, file)[1] == ["3 prompts to judge"]
    file.add(found.questions[1], [ranking_line(found.questions[1], [["a"], ["b"]], {})])
    todo, notes = left_to_do(found, file)
    assert [(n, q.prompt) for n, q in todo] == [(0, "x"), (2, "z")] and notes == [f"2 prompts to judge; 1 more in {file.path} already"]


# --- ahead -----------------------------------------------------------------------------------------------------------


def test_items_are_made_before_they_are_asked_for_but_not_too_many() -> None:
    made = []

    def make(_: Any) -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    with Ahead(make, most=2) as items:
        deadline = time.monotonic() + 5
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.02)
        assert len(made) == 3  # two wait, the third is in hand
        assert list(items) == list(range(20))


def test_an_error_is_raised_where_the_item_is_asked_for() -> None:
    def make(_: Any) -> Iterator[int]:
        yield 1
        raise LuthierError("no more")

    with Ahead(make) as items:
        stream = iter(items)
        assert next(stream) == 1
        with pytest.raises(LuthierError, match="no more"):
            next(stream)


def test_closing_stops_a_model_in_the_middle_of_its_answer(policy: Any) -> None:
    started = threading.Event()

    def make(check: Any) -> Iterator[Any]:
        def watched() -> None:
            started.set()
            time.sleep(0.05)
            check()

        yield from sampled(policy, QUESTIONS, [0, 1, 2], Sampling(answers=8, max_new=40), watched)

    items = Ahead(make)
    assert started.wait(10)
    began = time.monotonic()
    items.close()
    assert time.monotonic() - began < 1 and not items._thread.is_alive()
