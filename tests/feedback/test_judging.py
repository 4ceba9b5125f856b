"""A model as the judge: what it is asked, how its verdicts are read, what two orders come to, and what is counted."""

from __future__ import annotations

import re
import threading
import time
from fractions import Fraction
from itertools import combinations, permutations
from typing import Any

import pytest

from luthier.data.questions import Question, asked
from luthier.errors import LuthierError
from luthier.feedback.endpoint import Endpoint
from luthier.feedback.judging import PRINCIPLE, Judge, Judgement, Outcome, Share, Tally, judge_all, request, verdict_of
from stub_judge import parts, serving

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Why?"},
]


def by(better: Any) -> Any:
    """A judge that calls better what a function of two answers says: "first", "second" or "tie"."""
    word = {"first": "A", "second": "B", "tie": "tie"}

    def answer(payload: dict[str, Any]) -> str:
        _, a, b = parts(payload)
        return f"Verdict: {word.get(better(a, b), better(a, b))}"

    return answer


def longer(a: str, b: str) -> str:
    return "tie" if len(a) == len(b) else "first" if len(a) > len(b) else "second"


def judgement(outcomes: dict[tuple[int, int], Outcome], answers: str = "abcd", question: Question | None = None) -> Judgement:
    return Judgement(question or asked("q"), list(answers), outcomes, {})


WON, LOST, EVEN = Outcome("first", "first"), Outcome("second", "second"), Outcome("tie", "tie")
SPLIT, HALF, UNREAD = Outcome("first", "second"), Outcome("first", "tie"), Outcome("first", None, "hm")


# --- asking and reading ----------------------------------------------------------------------------------------------


def test_the_judge_is_shown_the_conversation_the_answers_and_the_principle() -> None:
    text = request(TALK, "Because.\nSo.", "No.", "Choose the kinder one.", reasons=False)
    assert "System: Be brief.\n\nUser: Hello\n\nAssistant: Hi\n\nUser: Why?" in text and "Choose the kinder one." in text
    assert parts({"messages": [{"content": text}]})[1:] == ("Because.\nSo.", "No.") and "reasons" not in text
    assert "reasons" in request(TALK, "a", "b", PRINCIPLE, reasons=True)


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("Verdict: A", "first"), ("verdict: b", "second"), ("**Verdict:** B.", "second"), ("Verdict: tie", "tie"), ("My verdict is: A", "first"),
        ("Verdict: [[B]]", "second"), ("Verdict: Answer A", "first"), ("Verdict: neither", "tie"), ("Verdict - (A)", "first"),
        ("A says more. At first I thought Verdict: A.\nBut it is wrong.\nVerdict: B", "second"),
        ("<think>Verdict: A? No.</think>\nVerdict: B", "second"), ("<think>Is the verdict: A?", None), ("<thinking>hm</thinking>A", "first"),
        ("A", "first"), ("B.", "second"), ("[[A]]", "first"), ("[[C]]", "tie"), ("Answer B", "second"),
        ("Answer A is better.", "first"), ("tie", "tie"), ("(B)", "second"),
        ("", None), ("I cannot decide.", None), ("A and B are both fine", None), ("A good answer is B", None), ("Verdict:", None), ("Because", None),
        ("Verdict: Absolutely", None),
    ],
)  # fmt: skip
def test_verdicts_are_read_as_judges_write_them_and_nothing_else_is(said: str, verdict: Any) -> None:
    assert verdict_of(said) == verdict


@pytest.mark.parametrize(
    ("better", "outcome"),
    [
        (longer, Outcome("second", "second")),
        (lambda a, b: longer(b, a), Outcome("first", "first")),
        (lambda a, b: "first", Outcome("first", "second")),  # whatever stands first
        (lambda a, b: "second", Outcome("second", "first")),
        (lambda a, b: "tie", Outcome("tie", "tie")),
    ],
)
def test_both_orders_are_asked_and_told_as_one(better: Any, outcome: Outcome) -> None:
    with serving(by(better)) as stub:
        assert Judge(endpoint=Endpoint(stub.url, "m")).compare(asked("q"), "short", "longer", PRINCIPLE) == outcome
        assert [parts(p)[1:] for *_, p in stub.asked] == [("short", "longer"), ("longer", "short")]


def test_a_reply_without_a_verdict_and_a_refused_request_are_no_verdicts() -> None:
    said: list[Any] = ["Verdict: A", "I would rather not."]
    with serving(lambda _: said.pop(0)) as stub:
        judge = Judge(endpoint=Endpoint(stub.url, "m"))
        assert judge.compare(asked("q"), "a", "b", PRINCIPLE) == Outcome("first", None, "I would rather not.")
        said += [(400, {"error": {"message": "too long"}}), (200, {"choices": [{"message": {"content": "Well, so"}, "finish_reason": "length"}]})]
        outcome = judge.compare(asked("q"), "a", "b", PRINCIPLE)
        assert outcome == Outcome(None, None, "refused: 400: too long") and not outcome.is_read
        said += ["Verdict: A", (200, {"choices": [{"message": {"content": "Well, so"}, "finish_reason": "length"}]})]
        assert judge.compare(asked("q"), "a", "b", PRINCIPLE).unread == "cut off after 512 tokens: ...Well, so"


def test_a_judge_with_reasons_may_say_more() -> None:
    with serving(lambda _: "A is kind.\nVerdict: A") as stub:
        for how, tokens in (({}, 512), ({"reasons": True}, 2048), ({"max_tokens": 9}, 9)):
            Judge(endpoint=Endpoint(stub.url, "m"), **how).compare(asked("q"), "a", "b", PRINCIPLE)  # type: ignore[arg-type]
            assert stub.asked[-1][2]["max_tokens"] == tokens


def test_of_several_principles_one_is_drawn_for_each_comparison_and_serves_both_orders() -> None:
    rules = ["Choose the kinder.", "Choose the truer.", "Choose the shorter."]
    with serving(by(longer)) as stub:
        judge = Judge(endpoint=Endpoint(stub.url, "m"), principles=rules)
        found = list(judge_all(judge, [(asked(f"q{i}"), ["a", "bb", "ccc"]) for i in range(8)], parallel=1))
        drawn = [p for j in found for p in j.principles.values()]
        sent = [next(r for r in rules if r in parts(p)[0]) for *_, p in stub.asked]
    assert sent[::2] == sent[1::2] == drawn and set(drawn) == set(rules)
    assert drawn == [judge.principle_for(asked(f"q{i}"), *pair) for i in range(8) for pair in combinations(range(3), 2)]


# --- many answers ----------------------------------------------------------------------------------------------------


def test_a_judge_that_knows_an_order_gives_that_order() -> None:
    for order in list(permutations(["a", "bb", "ccc", "dddd"]))[::7]:
        with serving(by(longer)) as stub:
            (found,) = judge_all(Judge(endpoint=Endpoint(stub.url, "m")), [(asked("q"), order)])
        assert [[order[i] for i in place] for place in found.places(drop=False)] == [["dddd"], ["ccc"], ["bb"], ["a"]]
        assert len(stub.asked) == 12


def test_points_are_won_lost_shared_or_not_counted() -> None:
    found = judgement({(0, 1): WON, (0, 2): LOST, (1, 2): EVEN, (0, 3): SPLIT, (1, 3): HALF, (2, 3): UNREAD})
    half = Fraction(1, 2)
    assert found.points(drop=False) == {(0, 1): 1, (0, 2): 0, (1, 2): half, (0, 3): half, (1, 3): half}
    assert found.points(drop=True) == {(0, 1): 1, (0, 2): 0, (1, 2): half}
    # shares: 0: (1 + 0 + 1/2) / 3, 1: (0 + 1/2 + 1/2) / 3, 2: (1 + 1/2) / 2, 3: (1/2 + 1/2) / 2
    assert found.places(drop=False) == [[2], [0, 3], [1]]
    assert found.places(drop=True) == [[2], [0], [1]]  # the fourth was compared with nothing


def test_a_circle_of_verdicts_is_a_tie() -> None:
    assert judgement({(0, 1): WON, (1, 2): WON, (0, 2): LOST}, "abc").places(drop=True) == [[0, 1, 2]]
    assert judgement({(0, 1): UNREAD}, "ab").places(drop=False) == []


def test_judgements_come_in_order_and_so_many_are_asked_at_a_time() -> None:
    at_once, most, lock = 0, 0, threading.Lock()

    def slow(payload: dict[str, Any]) -> str:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02 if "q0" in parts(payload)[0] else 0.002)
        with lock:
            at_once -= 1
        return by(longer)(payload)

    with serving(slow) as stub:
        found = list(judge_all(Judge(endpoint=Endpoint(stub.url, "m")), [(asked(f"q{i}"), ["a", "bb", "ccc"]) for i in range(9)], parallel=3))
    assert [j.question.prompt for j in found] == [f"q{i}" for i in range(9)] and most == 3
    assert all(len(j.outcomes) == 3 and all(o.is_consistent for o in j.outcomes.values()) for j in found)


def test_one_judge_can_be_asked_again_after_it_is_done_and_even_when_the_server_is_busy() -> None:
    said: list[Any] = ["A", "B", (429, {"error": "busy"}, {"Retry-After": "0"}), "A", "B"]
    with serving(lambda _: said.pop(0)) as stub:
        judge = Judge(endpoint=Endpoint(stub.url, "m"))
        for _ in range(2):
            (found,) = judge_all(judge, [(asked("q"), ["a", "b"])])
            assert found.places(drop=False) == [[0], [1]]


def test_questions_are_taken_as_they_are_needed() -> None:
    """What answers them may still be at work: the first judgement must not wait for the last answer."""
    taken = []

    def items() -> Any:
        for i in range(50):
            taken.append(i)
            yield asked(f"q{i}"), ["a", "bb"]

    with serving(by(longer)) as stub:
        next(stream := judge_all(Judge(endpoint=Endpoint(stub.url, "m")), items(), parallel=2))
        assert len(taken) < 10
        stream.close()  # type: ignore[attr-defined]


def test_what_stops_the_endpoint_stops_the_judging() -> None:
    def answer(payload: dict[str, Any]) -> Any:
        return (401, {"error": "the key has run out"}) if "q2" in parts(payload)[0] else by(longer)(payload)

    found = []
    with serving(answer) as stub, pytest.raises(LuthierError, match="the key has run out"):
        found += judge_all(Judge(endpoint=Endpoint(stub.url, "m")), [(asked(f"q{i}"), ["a", "bb"]) for i in range(9)], parallel=1)
    got = []
    with serving(answer) as stub, pytest.raises(LuthierError, match="the key has run out"):
        for j in judge_all(Judge(endpoint=Endpoint(stub.url, "m")), [(asked(f"q{i}"), ["a", "bb"]) for i in range(9)], parallel=1):
            got.append(j.question.prompt)
    assert got == ["q0", "q1"]


# --- counting --------------------------------------------------------------------------------------------------------


def test_what_is_counted_of_a_judge_is_what_a_slow_count_gives() -> None:
    question = Question(asked("q").messages, ("a", "b", "c", "d"), ((0, 1), (2, 0), (1, 2), (0, 3)))
    tally = Tally()
    tally.add(judgement({(0, 1): WON, (0, 2): WON, (1, 2): EVEN, (0, 3): SPLIT, (1, 3): HALF, (2, 3): UNREAD}, question=question), drop=False)
    assert (tally.pairs, tally.unread, tally.example) == (6, 1, "hm")
    assert tally.consistent.counted == [(3, 5)]
    # straight: first first tie first first first; swapped, where the second answer stood first: first first tie second tie -
    assert tally.shown_first.counted == [(5 + 1, 5 + 3)]
    assert tally.agrees.counted == [(1, 2)]  # a over b; c over a; b and c are tied, a and d undecided
    said = " ".join(tally.said(drop=False))
    assert "6 pairs" in said and "0.600 [" in said and "0.750 [" in said and "0.500 [" in said and "written as ties" in said and "win rate" not in said
    assert "dropped" in " ".join(tally.said(drop=True))


def test_agreement_looks_at_the_answers_and_not_at_their_places() -> None:
    question = Question(asked("q").messages, ("x", "a", "b"), ((1, 2), (0, 1)))  # the first answer of the data is not among those compared
    tally = Tally()
    tally.add(judgement({(0, 1): WON}, "ba", question), drop=False)
    assert tally.agrees.counted == [(0, 1)]


def test_win_rates_are_of_the_place_in_the_data() -> None:
    tally = Tally(by_place=True)
    for outcome in (WON, WON, LOST, EVEN, SPLIT, UNREAD):
        tally.add(judgement({(0, 1): outcome}, "ab"), drop=False)
    assert [sum(did for did, _ in tally.won[i].counted) for i in (0, 1)] == [3, 2] and len(tally.won[0].counted) == 5
    lines = [x for x in tally.said(drop=False) if "win rate" in x]
    assert re.match(r"win rate of answer 1: 0\.600 \[0\.\d{3}, [01]\.\d{3}\] n=5", lines[0]) and "answer 2: 0.400" in lines[1]


def test_intervals_are_wider_where_the_pairs_of_a_question_hang_together() -> None:
    apart, together = Share(), Share()
    for i in range(40):
        apart.add([float(i % 2)])
    for i in range(4):
        together.add([float(i % 2)] * 10)
    a, b = apart.score(), together.score()
    assert (a.value, a.n) == (b.value, b.n) == (0.5, 40) and b.high - b.low > 2 * (a.high - a.low)


@pytest.mark.parametrize("did", [0.0, 1.0])
def test_a_share_of_all_or_of_none_has_an_interval_that_few_questions_make_wide(did):
    share = Share()
    for _ in range(6):
        share.add([did, did])
    found = share.score()
    assert (found.value, found.n) == (did, 12)
    assert found.high - found.low == pytest.approx(0.39, abs=0.01)  # Wilson, six of six questions
