"""Win rates: by scores, and by a judge behind an endpoint that is asked in both orders."""

import threading

import pytest

from luthier.core import LuthierError
from luthier.evaluating.winning import by_endpoint, by_scores, reward_model
from luthier.feedback.endpoint import Endpoint
from stub_judge import parts, serving


def test_the_higher_score_wins_and_a_tie_is_half_a_win():
    found = by_scores([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 1.0])
    assert found.counts == (2, 1, 1) and found.rate.value == 0.625 and not found.is_clear
    assert "tuned against base: 2 wins, 1 ties, 1 losses; win rate 0.625" in found.said("tuned", "base")
    assert by_scores([1.0] * 30, [0.0] * 30).is_clear


def judged(answer, first, second, **how):
    lock, done = threading.Lock(), []
    with serving(lambda payload: answer(*parts(payload)[1:])) as stub:
        found = by_endpoint(
            Endpoint(stub.url, "stub"), ["q"] * len(first), first, second, on_judged=lambda: (lock.acquire(), done.append(1), lock.release()), **how
        )
    assert len(done) == len(first)
    return found, [parts(p)[1:] for _, _, p in stub.asked if p]


def test_an_honest_judge_finds_the_better_model_in_either_place():
    found, asked = judged(lambda a, b: "Verdict: A" if "right" in a else "Verdict: B", ["right 1", "right 2", "wrong 3"], ["wrong 1", "wrong 2", "right 3"])
    assert found.worth == [1.0, 1.0, 0.0] and found.notes == []
    assert sorted(asked) == sorted(
        [("right 1", "wrong 1"), ("wrong 1", "right 1"), ("right 2", "wrong 2"), ("wrong 2", "right 2"), ("wrong 3", "right 3"), ("right 3", "wrong 3")]
    )


def test_a_judge_that_likes_the_first_place_gives_nothing_but_ties():
    found, _ = judged(lambda a, b: "Verdict: A", ["x", "y"], ["u", "v"])
    assert found.counts == (0, 2, 0) and "2 of 2 verdicts changed with the order" in found.notes[0]


def test_equal_and_empty_answers_need_no_judge():
    found, asked = judged(lambda a, b: "Verdict: B", ["same", "", "more", ""], ["same ", "more", " ", ""])
    assert found.worth == [0.5, 0.0, 1.0, 0.5] and asked == []


def test_what_cannot_be_read_is_not_counted_and_said():
    found, _ = judged(lambda a, b: "hm" if "odd" in a + b else "Verdict: tie", ["odd", "x"], ["y", "z"])
    assert found.worth == [None, 0.5] and found.rate.n == 1 and "1 pairs have no readable verdict" in found.notes[0]
    with pytest.raises(LuthierError, match="no verdict"):
        judged(lambda a, b: "hm", ["x"], ["y"])


def test_a_folder_that_is_no_reward_model_is_refused(tmp_path):
    with pytest.raises(LuthierError, match="there is no such folder"):
        reward_model(tmp_path / "none")
