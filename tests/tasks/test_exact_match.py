"""Exact match: what counts as equal, and what does not."""

import pytest

from luthier.core import LuthierError
from luthier.tasks.exact_match import Task


@pytest.mark.parametrize("answer", ["Paris", " paris.\n", "PARIS"])
def test_spaces_case_and_a_final_stop_do_not_count(answer):
    assert Task().score({"refs": ["London", "Paris"]}, answer) == {"exact_match": 1.0}


def test_case_counts_when_asked():
    assert Task(lowercase=False).score({"refs": ["Paris"]}, "paris") == {"exact_match": 0.0}


def test_only_what_follows_the_mark_is_compared():
    task, row = Task(after="####"), {"completion": "Two and two. #### 1,234"}
    assert task.score(row, "Quite another way. #### 1234")["exact_match"] == 1
    assert task.score(row, "#### 1234 and then #### 5")["exact_match"] == 0


def test_an_answer_without_the_mark_is_wrong_even_if_it_holds_the_number():
    assert Task(after="####").score({"completion": "#### 72"}, "72")["exact_match"] == 0


def test_a_row_without_references_is_refused():
    with pytest.raises(LuthierError, match="completion"):
        Task().score({"prompt": "x"}, "y")
