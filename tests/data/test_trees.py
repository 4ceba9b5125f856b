"""Conversation trees in the layout that OpenAssistant publishes: rankings and paths out of them, and tables of messages put together again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from luthier.core import LuthierError, examples_of
from luthier.data.convert import convert
from luthier.data.formats import Bad, Record, read_file
from luthier.data.preferences import convert_preferences, detect_preferences
from luthier.data.prepare import prepare
from luthier.data.prompted import convert_prompts, detect_prompts
from luthier.data.shapes import Shape
from luthier.data.trees import in_languages, is_message, is_tree, paths, rankings, whole_trees

LABELS = {"spam": {"value": 0.0, "count": 3}, "quality": {"value": 0.416, "count": 3}}


def message(name: str, role: str, text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A message with all the fields that the export writes."""
    return {
        "message_id": name, "user_id": "8e95461f", "created_date": "2023-02-05T14:23:50.983374+00:00", "text": text, "role": role, "lang": "en",
        "review_count": 3, "review_result": True, "deleted": False, "synthetic": False, "labels": LABELS, **more, "replies": list(replies),
    }  # fmt: skip


def tree(prompt: dict[str, Any], state: str = "ready_for_export") -> dict[str, Any]:
    return {"message_tree_id": prompt["message_id"], "tree_state": state, "prompt": prompt}


def cheese() -> dict[str, Any]:
    """Two answers to the first question, and three to a further question on the better of them."""
    further = message(
        "q2", "prompter", "Which one?",
        message("a4", "assistant", "Any.", rank=2), message("a5", "assistant", "The round one.", rank=0), message("a6", "assistant", "The old one.", rank=1),
        rank=0,
    )  # fmt: skip
    thanks = message("q3", "prompter", "Thank you.", message("a7", "assistant", "You are welcome."), rank=1)
    unanswered = message("q4", "prompter", "And now?")
    return tree(
        message(
            "q1",
            "prompter",
            "Is there cheese?",
            message("a1", "assistant", "No idea.", message("q5", "prompter", "Why not?", message("a8", "assistant", "I do not shop.")), rank=1),
            message("a2", "assistant", "Yes, three kinds.", further, thanks, unanswered, rank=0),
        )
    )


def table(*trees: dict[str, Any]) -> list[dict[str, Any]]:
    """The same as a table of messages, as the flat export and the Hub data set have it."""
    out = []

    def walk(m: dict[str, Any], parent: str | None, of: dict[str, Any]) -> None:
        flat = {k: v for k, v in m.items() if k not in ("replies", "labels")} | {"parent_id": parent, "rank": m.get("rank")}
        out.append(
            flat | {"message_tree_id": of["message_tree_id"], "tree_state": of["tree_state"], "labels": {"name": ["spam"], "value": [0.0], "count": [3]}}
        )
        for reply in m["replies"]:
            walk(reply, m["message_id"], of)

    for one in trees:
        walk(one["prompt"], None, one)
    return out


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def said(record: Record) -> list[str]:
    return [m["content"] for m in record.fields["prompt"]]


# --- rankings --------------------------------------------------------------------------------------------------------


def test_every_question_with_several_ranked_answers_is_a_ranking_best_first() -> None:
    bad = Bad("fatal")
    found = rankings(Record(cheese(), "f:1"), bad)
    assert [(said(r), r.fields["ranked"]) for r in found] == [
        (["Is there cheese?"], ["Yes, three kinds.", "No idea."]),
        (["Is there cheese?", "Yes, three kinds.", "Which one?"], ["The round one.", "The old one.", "Any."]),
    ]
    assert [m["role"] for m in found[1].fields["prompt"]] == ["user", "assistant", "user"]
    assert found[1].where == "f:1, message q2" and found[1].fields["message_tree_id"] == "q1" and found[1].fields["lang"] == "en"
    assert bad.left_out == {}


def test_equal_ranks_are_a_tie_and_answers_without_a_rank_are_left_out() -> None:
    answers = [message(f"a{i}", "assistant", f"answer {i}", **({} if r is None else {"rank": r})) for i, r in enumerate([1, 0, 1, None])]
    bad = Bad("fatal")
    (found,) = rankings(Record(tree(message("q", "prompter", "q?", *answers)), "f:1"), bad)
    assert found.fields["ranked"] == ["answer 1", ["answer 0", "answer 2"]] and list(bad.left_out.values()) == [1]


def test_what_was_deleted_or_refused_goes_with_all_that_follows_it() -> None:
    root = cheese()
    first, second = root["prompt"]["replies"]
    second["replies"][0]["replies"][1]["deleted"] = True  # the round one
    first["review_result"] = False  # the other answer to the first question, and what follows it
    second["replies"][0]["replies"][0]["review_result"] = None  # nobody looked at it: it stays
    bad = Bad("fatal")
    (found,) = rankings(Record(root, "f:1"), bad)
    assert found.fields["ranked"] == ["The old one.", "Any."]
    assert bad.left_out == {
        "messages of trees that were deleted, with what follows them": 1,
        "messages of trees that reviewers refused, with what follows them": 1,
    }
    root["prompt"]["deleted"] = True
    assert rankings(Record(root, "f:1"), Bad("fatal")) == []


@pytest.mark.parametrize(
    ("state", "n"), [("ready_for_export", 2), (None, 2), ("aborted_low_grade", 0), ("halted_by_moderator", 0), ("prompt_lottery_waiting", 0)]
)
def test_only_finished_trees_are_read(state: Any, n: int) -> None:
    bad = Bad("fatal")
    assert len(rankings(Record(cheese() | {"tree_state": state}, "f:1"), bad)) == n
    assert sum(bad.left_out.values()) == (not n)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"role": "robot"}, "message 'a1' of the tree has the role 'robot'; prompter and assistant are accepted"),
        ({"role": "prompter"}, "is of the prompter and follows one of the prompter"),
        ({"text": " "}, "has no text"),
        ({"rank": "first"}, "has the rank 'first'"),
    ],
)
def test_a_message_that_cannot_be_read_is_a_bad_row_and_the_others_stay(change: dict[str, Any], reason: str) -> None:
    root = cheese()
    root["prompt"]["replies"][0] |= change
    with pytest.raises(LuthierError, match=f"f:1: .*{reason}"):
        rankings(Record(root, "f:1"), Bad("stop"))
    bad = Bad("skip")
    assert [r.fields["ranked"][0] for r in rankings(Record(root, "f:1"), bad)] == ["The round one."] and bad.count == 1


def test_rankings_of_trees_are_judged_answers_for_every_objective_that_compares() -> None:
    record = Record(cheese(), "f:1")
    shape = detect_preferences([record], renders="pairs")
    assert str(shape) == "tree (prompt)"
    items = convert_preferences(record, shape, Bad("fatal"), renders="pairs")
    assert [(i.answers()[0], i.ranks, i.prompt) for i in items] == [("Yes, three kinds.", (0, 1), 1), ("The round one.", (0, 1, 2), 3)]
    assert items[1].chats[0].untrained == {1}  # what was said before the question is given
    bad = Bad("fatal")
    judged = convert_preferences(record, shape, bad, renders="judged")
    assert [(i.answers()[0], i.good) for i in judged] == [("Yes, three kinds.", True), ("No idea.", False), ("The round one.", True), ("Any.", False)]
    assert list(bad.left_out.values()) == [1]  # the old one is neither


# --- paths -----------------------------------------------------------------------------------------------------------


def test_paths_follow_the_best_answers_and_learn_each_of_them_once() -> None:
    bad = Bad("fatal")
    found = paths(Record(cheese(), "f:1"), bad)
    talks = [[(m["content"], m.get("weight", 1)) for m in r.fields["messages"]] for r in found]
    assert talks == [
        [("Is there cheese?", 1), ("Yes, three kinds.", 1), ("Which one?", 1), ("The round one.", 1)],
        [("Is there cheese?", 0), ("Yes, three kinds.", 0), ("Thank you.", 1), ("You are welcome.", 1)],
    ]
    chats = [c for r in found for c in convert(r, Shape("messages", {"messages": "messages"}), Bad("fatal"))]
    assert [c.untrained for c in chats] == [frozenset(), frozenset({0, 1})] and bad.left_out == {}  # type: ignore[union-attr]


def test_a_question_whose_best_answer_nobody_knows_ends_the_path_before_it() -> None:
    root = cheese()
    further = root["prompt"]["replies"][1]["replies"]
    for answer in further[0]["replies"]:
        del answer["rank"]
    bad = Bad("fatal")
    (found,) = paths(Record(root, "f:1"), bad)
    assert found.fields["messages"][-1]["content"] == "You are welcome." and list(bad.left_out.values()) == [1]
    del further[1]
    (found,) = paths(Record(root, "f:1"), Bad("fatal"))
    assert [m["content"] for m in found.fields["messages"]] == ["Is there cheese?", "Yes, three kinds."]


# --- tables ----------------------------------------------------------------------------------------------------------


def other() -> dict[str, Any]:
    return tree(
        message("p1", "prompter", "Noch da?", message("p2", "assistant", "Ja.", rank=0, lang="de"), message("p3", "assistant", "Nein.", rank=1), lang="de")
    )


def test_a_table_of_messages_is_read_as_the_trees_it_was_made_from(tmp_path: Path) -> None:
    rows = table(cheese(), other())
    rows.reverse()  # no order is needed but that of the first messages
    records = list(read_file(write(tmp_path / "messages.jsonl", rows), bad=Bad("fatal")))
    assert [r.fields["message_tree_id"] for r in records] == ["p1", "q1"] and all(is_tree(r.fields) for r in records)
    flat = {str(r.fields["prompt"]): r.fields["ranked"] for one in records for r in rankings(one, Bad("fatal"))}
    nested = {str(r.fields["prompt"]): r.fields["ranked"] for one in (cheese(), other()) for r in rankings(Record(one, "f:1"), Bad("fatal"))}
    assert flat == nested and len(flat) == 3


def test_the_smallest_messages_of_the_format_will_do(tmp_path: Path) -> None:
    rows = [
        {"message_id": "1", "text": "Why?", "role": "prompter", "lang": "en"},
        {"message_id": "2", "parent_id": "1", "text": "So.", "role": "assistant", "lang": "en", "rank": 1},
        {"message_id": "3", "parent_id": "1", "text": "Because.", "role": "assistant", "lang": "en", "rank": 0},
    ]
    (record,) = read_file(write(tmp_path / "m.jsonl", rows), bad=Bad("fatal"))
    (found,) = rankings(record, Bad("fatal"))
    assert found.fields["ranked"] == ["Because.", "So."]


def test_messages_without_their_beginning_or_there_twice_are_counted() -> None:
    rows = table(cheese())
    lost = [r for r in rows if r["message_id"] != "q2"]
    bad = Bad("skip")
    (record,) = whole_trees([Record(r, f"f:{i}") for i, r in enumerate([*lost, rows[1], {"message_id": "x", "text": "?"}], 1)], bad)
    assert len(rankings(record, Bad("fatal"))) == 1
    assert bad.left_out == {"messages whose conversation does not begin in the file": 3} and bad.count == 2
    assert "'a1' is there already, at f:2" in bad.rows[0][1] and "not a message like the rows before it" in bad.rows[1][1]


def test_other_records_pass_as_they_are() -> None:
    rows = [Record({"prompt": "a", "completion": "b"}, "f:1"), Record(table(cheese())[0], "f:2")]
    assert list(whole_trees(rows, Bad("fatal"))) == rows and list(whole_trees([], Bad("fatal"))) == []
    assert not is_message({"message_id": 1, "text": "a", "role": "user"}) and not is_tree({"prompt": {"text": "a"}}) and not is_tree({"prompt": "a"})


def test_a_packed_file_is_read_and_one_that_was_cut_off_is_said(tmp_path: Path) -> None:
    rows = "".join(json.dumps(cheese()) + "\n" for _ in range(50)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows))
    records = list(read_file(tmp_path / "a.jsonl.gz", bad=Bad("fatal")))
    assert len(records) == 50 and records[7].fields == cheese() and records[7].where.endswith("a.jsonl.gz:8")
    for broken in (gzip.compress(rows)[:-40], rows, gzip.compress(rows)[:200] + b"x" * 300):
        (tmp_path / "a.jsonl.gz").write_bytes(broken)
        with pytest.raises(LuthierError, match="a.jsonl.gz: cannot be unpacked.*gunzip a.jsonl.gz"):
            list(read_file(tmp_path / "a.jsonl.gz", bad=Bad("fatal")))


# --- languages -------------------------------------------------------------------------------------------------------


def test_languages_are_chosen_and_the_others_counted() -> None:
    records = [Record(cheese(), "f:1"), Record(other(), "f:2"), Record({"prompt": "olá", "completion": "olá", "lang": "pt-BR"}, "f:3")]
    bad = Bad("fatal")
    assert list(in_languages(records, ["de", "PT"], bad)) == records[1:] and bad.left_out == {"records in other languages (en 1)": 1}
    found: dict[str, int] = {}
    assert list(in_languages([*records, Record({"prompt": "a"}, "f:4")], [], Bad("fatal"), found))[:3] == records and found == {"en": 1, "de": 1, "pt-BR": 1}
    with pytest.raises(LuthierError, match="no record is in the language fr; found: en 1, de 1, pt-BR 1"):
        list(in_languages(records, ["fr"], Bad("fatal")))


# --- as the data of a run --------------------------------------------------------------------------------------------


def prepared(path: Path, tokenizer: Any, renders: Any, lines: list[str] | None = None, **how: Any) -> Any:
    say = (lambda _: None) if lines is None else lines.append
    return prepare([str(path)], tokenizer, renders=renders, max_tokens=256, validation_share=0.0, say=say, **how)


def texts(data: Any, tokenizer: Any) -> list[list[str]]:
    """The trained texts of every example of every row."""
    return [[tokenizer.decode(e.ids[e.train], skip_special_tokens=True).strip() for e in examples_of(row)] for row in data.train]


@pytest.mark.parametrize("layout", ["trees.jsonl", "trees.jsonl.gz", "messages.jsonl", "messages.jsonl.gz", "messages.parquet"])
def test_every_layout_trains_every_objective_that_learns_from_answers(tmp_path: Path, layout: str, chatml: Any) -> None:
    rows = [cheese(), other()] if layout.startswith("trees") else table(cheese(), other())
    path = tmp_path / layout
    if layout.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        (gzip.open if layout.endswith(".gz") else open)(path, "wb").write("".join(json.dumps(r) + "\n" for r in rows).encode())
    compared = texts(prepared(path, chatml, "pairs"), chatml)
    assert compared == [["Yes, three kinds.", "No idea."], ["The round one.", "The old one.", "Any."], ["Ja.", "Nein."]]
    assert [r.extras["ranks"] for r in prepared(path, chatml, "ranked").train] == [(0, 1), (0, 1, 2), (0, 1)]
    assert [r.extras["good"] for r in prepared(path, chatml, "judged").train] == [True, False] * 3
    learned = [t for (t,) in texts(prepared(path, chatml, "chat"), chatml)]
    assert learned == ["Yes, three kinds.The round one.", "You are welcome.", "Ja."]


def test_languages_and_what_is_left_out_are_said(tmp_path: Path, chatml: Any) -> None:
    given_up = cheese() | {"tree_state": "aborted_low_grade"}
    path, lines = write(tmp_path / "a.jsonl", [cheese(), other(), given_up]), list[str]()
    data = prepared(path, chatml, "pairs", lines, languages=["de"])
    assert texts(data, chatml) == [["Ja.", "Nein."]] and data.facts["left_out"] == {"records in other languages (en 2)": 2}
    assert "left out: records in other languages (en 2): 2" in lines and "languages: en 2, de 1; data.languages=[...] reads some of them only" in lines
    data = prepared(path, chatml, "judged", lines)
    assert "left out: conversation trees that were not finished or were given up: 1" in lines and len(data.train) == 6
    with pytest.raises(LuthierError, match="no trained token is left.*left out: conversation trees that were not finished or were given up: 1"):
        prepared(write(tmp_path / "b.jsonl", [given_up]), chatml, "ranked")


def test_the_questions_of_trees_are_prompts(tmp_path: Path, chatml: Any) -> None:
    """For objectives that learn from what the model itself writes."""
    (record,) = read_file(write(tmp_path / "a.jsonl", [cheese()]), bad=Bad("fatal"))
    found = convert_prompts(record, detect_prompts([record], shape="auto", columns={}), Bad("fatal"))
    assert [(p.messages[-1]["content"], p.references) for p in found] == [("Is there cheese?", ("Yes, three kinds.",)), ("Which one?", ("The round one.",))]
