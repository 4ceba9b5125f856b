"""The file that judgements are written to: its lines are what the readers of preferences take, and it can be gone on with and taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.core import LuthierError
from luthier.data.collected import Collected, Unread, pair_line, ranking_line, typed_ranking
from luthier.data.formats import Bad
from luthier.data.preferences import convert_preferences, detect_preferences
from luthier.data.questions import Question, asked
from luthier.data.sources import read

BY = {"by": "person", "time": "2026-01-01T00:00:00+00:00"}
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why? \u2028 é"}]


def judged(path: Path, renders: str = "ranked") -> list[Any]:
    records = list(read(str(path), bad=Bad("fatal")))
    shape = detect_preferences(records, renders=renders)
    return [j for r in records for j in convert_preferences(r, shape, Bad("fatal"), renders=renders)]


def test_rankings_with_ties_are_read_as_they_were_judged(tmp_path: Path) -> None:
    file = Collected(tmp_path / "a.jsonl", "ranked")
    file.add(asked("q"), [ranking_line(asked("q"), [["b", "c"], ["a"]], BY)])
    file.add(asked(TALK), [ranking_line(asked(TALK), [["a"], ["b"]], BY)])
    file.add(asked("p"), [ranking_line(asked("p"), [["a", "b"]], BY)])
    found = judged(file.path)
    assert [(j.answers(), j.ranks, j.prompt) for j in found] == [(["b", "c", "a"], (0, 0, 1), 1), (["a", "b"], (0, 1), 2), (["a", "b"], (0, 0), 1)]
    assert found[1].chats[0].messages[:2] == TALK and found[0].extras["collected"] == BY


def test_pairs_are_read_as_they_were_judged(tmp_path: Path) -> None:
    file = Collected(tmp_path / "a.jsonl", "chosen")
    file.add(asked("q"), [pair_line(asked("q"), "good", "bad", BY), pair_line(asked("q"), "one", "other", BY, tied=True)])
    assert [(j.answers(), j.ranks) for j in judged(file.path, "pairs")] == [(["good", "bad"], (0, 1)), (["one", "other"], (0, 0))]


def test_tools_stay_with_their_question(tmp_path: Path) -> None:
    question = Question(TALK, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    Collected(tmp_path / "a.jsonl", "ranked").add(question, [ranking_line(question, [["a"], ["b"]], BY)])
    assert judged(tmp_path / "a.jsonl")[0].chats[0].tools == question.tools and question in Collected(tmp_path / "a.jsonl", "ranked")


def test_the_file_knows_what_it_holds_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = Collected(path, "ranked")
    first.add(asked("q"), [ranking_line(asked("q"), [["a"], ["b"]], BY)])
    with path.open("ab") as f:
        f.write(b'{"prompt": "half a li')  # the machine stopped here
    again = Collected(path, "ranked")
    assert asked("q") in again and asked("half a li") not in again and again.found == 1
    again.add(asked(TALK), [ranking_line(asked(TALK), [["a"], ["b"]], BY)])
    assert [json.loads(x)["prompt"] for x in path.read_text(encoding="utf-8").split("\n") if x] == ["q", TALK]
    assert asked(TALK) in Collected(path, "ranked")


def test_what_was_added_can_be_taken_back_line_by_line(tmp_path: Path) -> None:
    file = Collected(tmp_path / "a.jsonl", "chosen")
    before = []
    for name in ("q", "p", "é"):
        before.append(file.path.read_bytes() if file.path.exists() else b"")
        file.add(asked(name), [pair_line(asked(name), "a", "b", BY), pair_line(asked(name), "a", "c", BY)])
    for name, content in zip(("é", "p", "q"), reversed(before), strict=True):
        assert asked(name) in file
        file.undo()
        assert asked(name) not in file and file.path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        ('{"prompt": "q"}\n', "ranked", "a.jsonl:1: is no line of judged answers"),
        ('{"prompt": "q", "ranked": ["a", "b"]}\nnonsense\n', "ranked", "a.jsonl:2: is no line of judged answers"),
        ('{"prompt": "q", "ranked": ["a", "b"]}\n', "chosen", "holds rankings, and pairs would be added.*leave --pairs out"),
        ('{"prompt": "q", "chosen": "a", "rejected": "b"}\n', "ranked", "holds pairs, and rankings would be added.*add --pairs"),
    ],
)
def test_a_file_of_something_else_is_not_touched(tmp_path: Path, content: str, kind: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(LuthierError, match=reason):
        Collected(tmp_path / "a.jsonl", kind)
    assert (tmp_path / "a.jsonl").read_text() == content


def test_where_nothing_can_be_written_is_said_before_anybody_judges(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no" / "a.jsonl", "there is no folder"), (tmp_path, "is a folder; name a file")):
        with pytest.raises(LuthierError, match=reason):
            Collected(path, "ranked")
    (tmp_path / "in.jsonl").write_text("")
    with pytest.raises(LuthierError, match="is where the prompts come from"):
        Collected(tmp_path / "in.jsonl", "ranked", source=str(tmp_path / "in.jsonl"))


@pytest.mark.parametrize(
    ("typed", "places"),
    [
        ("2 1 3 4", [[1], [0], [2], [3]]),
        ("2=1 3", [[1, 0], [2], [3]]),
        ("2 = 1, 3", [[1, 0], [2], [3]]),
        ("4 > 3 > 2 > 1", [[3], [2], [1], [0]]),
        ("2 3", [[1], [2], [0, 3]]),
        ("3", [[2], [0, 1, 3]]),
        ("1=2=3=4", [[0, 1, 2, 3]]),
        (" 1 ", [[0], [1, 2, 3]]),
    ],
)
def test_rankings_are_typed_best_first_and_what_is_not_named_comes_last(typed: str, places: list[list[int]]) -> None:
    assert typed_ranking(typed, 4) == places


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("", "nothing was typed"),
        ("5", "there is no answer 5: there are 1 to 4"),
        ("0", "there is no answer 0"),
        ("2134", "did you mean 2 1 3 4"),
        ("1 1", "answer 1 is named twice"),
        ("1 2=1", "answer 1 is named twice"),
        ("best", "'best' is no number of an answer"),
        ("1=", "'=' is no number of an answer"),
        ("-1", "'-1' is no number"),
    ],
)
def test_what_is_no_ranking_is_said(typed: str, reason: str) -> None:
    with pytest.raises(Unread, match=reason):
        typed_ranking(typed, 4)
