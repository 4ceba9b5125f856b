"""Work that is done while the next of it is prepared: in order, one ahead, and its errors are not lost."""

import threading

import pytest

from luthier.data.codec import one_ahead


def test_items_come_in_order_with_what_was_made_and_done_of_each():
    out = list(one_ahead(range(5), lambda i: i + 10, lambda made: made * 2))
    assert out == [(i, i + 10, 2 * (i + 10)) for i in range(5)] and list(one_ahead([], str, str)) == []


def test_the_next_is_made_while_the_work_is_under_way_and_no_further_one():
    made, go = [], threading.Event()

    def make(i):
        made.append(i)
        if i == 1:
            go.set()  # the work on 0 waits for this: made before it ends, or this test would hang
        return i

    steps = one_ahead(range(9), make, lambda i: go.wait(10) and i)
    assert next(steps) == (0, 0, 0) and made == [0, 1]


def test_an_error_of_the_work_and_of_an_item_reach_the_reader():
    with pytest.raises(ZeroDivisionError):
        list(one_ahead([1, 0, 2], lambda i: i, lambda i: 1 / i))
    done = []
    with pytest.raises(ValueError):
        for item, _, _ in one_ahead((int(x) for x in ("1", "2", "x")), lambda i: i, lambda i: i):
            done.append(item)
    assert done == [1]
