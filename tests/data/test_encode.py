"""Rows whose tokens will be hidden, and how two texts are shortened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import small
from luthier.core import LuthierError
from luthier.data.encode import shorter
from luthier.data.prepare import Prepared, prepare
from luthier.data.rows import Form


def run(path: Path, tokenizer, form: Form, **how) -> Prepared:
    return prepare([str(path)], tokenizer, **{"renders": "masked", "form": form, "max_tokens": 16, "validation_share": 0, "say": lambda _: None, **how})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(f"{small.TEXT}\n<|endoftext|>\nwhat a fine story\n")
    return path


def test_an_encoders_pieces_stand_between_its_special_tokens(text: Path) -> None:
    tokenizer = small.wordpiece()
    p = run(text, tokenizer, Form(kind="encoder"))
    whole = tokenizer(small.TEXT, add_special_tokens=False)["input_ids"]
    pieces = [r.ids.tolist() for r in p.train]
    assert all(x[0] == 2 and x[-1] == 3 and len(x) <= 16 for x in pieces)
    assert [t for x in pieces[:-1] for t in x[1:-1]] == whole  # nothing is lost, nothing comes twice
    assert pieces[-1][1:-1] == tokenizer("what a fine story", add_special_tokens=False)["input_ids"]
    for r in p.train:
        assert (r.train == ~np.isin(r.ids, [0, 1, 2, 3, 4])).all()
    assert p.facts["split"] == 1 and len({id(r.extras["hiding"]) for r in p.train}) == 1


def test_an_encoder_decoders_pieces_leave_room_for_the_end(text: Path) -> None:
    tokenizer = small.with_sentinels()
    p = run(text, tokenizer, Form(kind="encoder_decoder"))
    assert max(len(r) for r in p.train) == 15 and all(r.train.all() for r in p.train)
    assert np.concatenate([r.ids for r in p.train[:-1]]).tolist()[: len(p.train[0])] == tokenizer(small.TEXT, add_special_tokens=False)["input_ids"][:15]


def test_a_long_document_can_be_dropped(text: Path) -> None:
    p = run(text, small.wordpiece(), Form(kind="encoder"), over_length="drop")
    assert len(p.train) == 1 and p.facts["dropped_long"] == 1


def test_conversations_are_read_as_what_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "what a film", "completion": "it is slow"}\n{"prompt": "the end", "completion": "they laughed"}\n')
    tokenizer = small.wordpiece()
    p = run(tmp_path / "a.jsonl", tokenizer, Form(kind="encoder"))
    assert tokenizer.decode(p.train[0].ids[1:-1]) == "what a film it is slow"


def test_a_tokenizer_without_the_tokens_is_refused(text: Path) -> None:
    with pytest.raises(LuthierError, match=r"no mask token \(\[MASK\], <mask>\)"):
        run(text, small.with_sentinels(), Form(kind="encoder"))
    with pytest.raises(LuthierError, match="no sentinel tokens"):
        run(text, small.wordpiece(), Form(kind="encoder_decoder"))


@pytest.mark.parametrize("room", range(2, 30))
def test_two_texts_share_the_room_as_if_tokens_were_taken_from_the_longest(room: int) -> None:
    for a in range(1, 20):
        for b in range(1, 20):
            left = [a, b]
            while sum(left) > room:  # one by one, from the longest; from the first where they are equal
                left[0 if left[0] > left[1] or (left[0] == left[1] and room % 2 == 0) else 1] -= 1
            got = shorter([a, b], room)
            assert sum(got) == min(a + b, room) and sorted(got) == sorted(left)
    assert shorter([50], room) == [room]
