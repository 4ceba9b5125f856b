"""Preference records of the field's shapes to one normal form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.core import LuthierError
from luthier.data.formats import Bad, Record
from luthier.data.preferences import convert_preferences, detect_preferences, turns
from luthier.data.sources import read


def convert(fields: dict[str, Any], renders: str = "pairs", **how: Any) -> list[Any]:
    record = Record(fields, "f:1")
    return convert_preferences(record, detect_preferences([record], renders=renders, **how), Bad("fatal"), renders=renders)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, YES, NO = message("user", "Is it cheap?"), message("assistant", "Yes, very."), message("assistant", "Go away.")
EARLIER = [message("user", "Hello"), message("assistant", "Hello!")]
HH = "\n\nHuman: Is it cheap?\n\nAssistant:"
LF = {"from": "human", "value": "Is it cheap?"}
PAIRS: dict[str, dict[str, Any]] = {
    "standard": {"prompt": "Is it cheap?", "chosen": "Yes, very.", "rejected": "Go away."},
    "conversational": {"prompt": [ASKED], "chosen": [YES], "rejected": [NO]},
    "implicit prompt": {"chosen": [ASKED, YES], "rejected": [ASKED, NO]},
    "prompt and whole conversations": {"prompt": "Is it cheap?", "chosen": [ASKED, YES], "rejected": [ASKED, NO]},
    "texts of turns": {"chosen": HH + " Yes, very.", "rejected": HH + " Go away."},
    "a prompt of turns": {"prompt": HH, "chosen": "Yes, very.", "rejected": "Go away."},
    "sharegpt": {"conversations": [LF], "chosen": {"from": "gpt", "value": "Yes, very."}, "rejected": {"from": "gpt", "value": "Go away."}},
    "instruction": {"instruction": "Is it", "input": "cheap?", "chosen": "Yes, very.", "rejected": "Go away."},
    "messages and a worse answer": {"messages": [ASKED, YES], "rejected_response": "Go away."},
    "ranked": {"prompt": "Is it cheap?", "ranked": ["Yes, very.", "Go away."]},
    "question": {"question": "Is it cheap?", "chosen": "Yes, very.", "rejected": "Go away.", "id": 7},
}


@pytest.mark.parametrize("shape", PAIRS)
def test_every_spelling_of_a_pair_is_the_same_pair(shape: str) -> None:
    (item,) = convert(PAIRS[shape])
    asked = {**ASKED, "content": "Is it\ncheap?"} if shape == "instruction" else ASKED
    assert [c.messages for c in item.chats] == [[asked, YES], [asked, NO]]
    assert item.prompt == 1 and item.ranks == (0, 1) and item.answers() == ["Yes, very.", "Go away."] and item.extras == PAIRS[shape]


def test_only_what_follows_the_prompt_is_learned() -> None:
    (item,) = convert({"chosen": [*EARLIER, ASKED, YES], "rejected": [*EARLIER, ASKED, NO]})
    assert item.prompt == 3 and all(c.untrained == {1} for c in item.chats)
    (item,) = convert({"system": "Be brief.", "prompt": [*EARLIER, ASKED], "chosen": "Yes, very.", "rejected": "Go away."})
    assert item.prompt == 4 and item.chats[0].messages[0] == message("system", "Be brief.") and item.chats[0].untrained == {2}


def test_texts_that_begin_alike_have_their_beginning_as_prompt() -> None:
    (item,) = convert({"chosen": "The town is nice. Yes, very.", "rejected": "The town is nasty."})
    assert [c.messages for c in item.chats] == [
        [message("user", "The town is"), message("assistant", "nice. Yes, very.")],
        [message("user", "The town is"), message("assistant", "nasty.")],
    ]


def test_rankings_are_best_first_and_a_list_inside_is_a_tie() -> None:
    (item,) = convert({"prompt": "q", "ranked": ["a", ["b", "c"], "d"]}, "ranked")
    assert item.ranks == (0, 1, 1, 2) and item.answers() == ["a", "b", "c", "d"]
    (item,) = convert({"prompt": "q", "ranked": [[YES], [NO]]}, "ranked")
    assert item.ranks == (0, 1) and item.answers() == ["Yes, very.", "Go away."]


def test_margins_and_ties_of_pairs() -> None:
    (item,) = convert({**PAIRS["standard"], "margin": 2, "tie": False}, "ranked")
    assert item.margin == 2.0 and item.ranks == (0, 1)
    (item,) = convert({**PAIRS["standard"], "even": 1}, "ranked", columns={"tie": "even"})
    assert item.ranks == (0, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Is it cheap?", "completion": "Yes, very.", "label": True},
        {"prompt": [ASKED], "completion": [YES], "label": 1},
        {"messages": [ASKED, YES], "kto_tag": True},
        {"messages": [ASKED, YES], "label": True},
        {"question": "Is it cheap?", "response": "Yes, very.", "label": True},
    ],
)
def test_every_spelling_of_a_judged_answer_is_the_same(fields: dict[str, Any]) -> None:
    (item,) = convert(fields, "judged")
    assert [c.messages for c in item.chats] == [[ASKED, YES]] and item.good is True and item.ranks == () and item.prompt == 1
    flag = next(k for k in ("label", "kto_tag") if k in fields)
    assert convert({**fields, flag: False}, "judged")[0].good is False


def test_a_pair_is_a_good_and_a_bad_answer() -> None:
    good, bad = convert(PAIRS["standard"], "judged")
    assert (good.good, good.answers(), bad.good, bad.answers()) == (True, ["Yes, very."], False, ["Go away."])


def test_the_ends_of_a_ranking_are_good_and_bad_and_what_lies_between_is_left_out_and_counted() -> None:
    record, bad = Record({"prompt": "q", "ranked": [["a", "b"], "c", "d", ["e", "f"]]}, "f:1"), Bad("fatal")
    found = convert_preferences(record, detect_preferences([record], renders="judged"), bad, renders="judged")
    assert [(i.answers(), i.good, i.ranks) for i in found] == [([a], a in "ab", ()) for a in "abef"]
    assert len(bad.left_out) == 1 and sum(bad.left_out.values()) == 2


def test_a_tie_says_of_no_answer_whether_it_is_good() -> None:
    for fields in ({**PAIRS["standard"], "tie": True}, {"prompt": "q", "ranked": [["a", "b"]]}):
        record, bad = Record(fields, "f:1"), Bad("fatal")
        assert convert_preferences(record, detect_preferences([record], renders="judged"), bad, renders="judged") == []
        assert list(bad.left_out) == ["records whose answers are all tied: which of them are good is not said"]


def test_answers_to_be_scored_need_no_judgement() -> None:
    (item,) = convert({"prompt": "q", "completion": "a"}, "ranked", judged=False)
    assert item.ranks == () and item.good is None and item.answers() == ["a"]


def test_turns_of_one_speaker_are_joined_and_empty_ones_left_out() -> None:
    text = "\n\nHuman: Hello\n\nHuman: Is it cheap?\n\nAssistant: \n\nAssistant: Human: no\n\nAssistant:"
    assert turns(text) == [message("user", "Hello\n\nIs it cheap?"), message("assistant", "Human: no")]
    assert turns("Human beings: a history") is None and turns("Assistant: hello") is None and turns("A text.\n\nHuman: hello") is None


def test_an_answer_that_quotes_turns_stays_an_answer() -> None:
    (item,) = convert({"prompt": HH, "chosen": "Human: yes", "rejected": "Human: no"})
    assert item.answers() == ["Human: yes", "Human: no"] and item.prompt == 1


@pytest.mark.parametrize(
    ("fields", "renders", "said"),
    [
        ({"prompt": "q", "completion": "a"}, "pairs", "no judged answers are found.*chosen and rejected; or ranked.*Columns found: prompt, completion"),
        ({"prompt": "q", "completion": "a", "label": True}, "pairs", "single answers.*'label'.*objective: kto"),
        ({"prompt": "q", "completion": "a", "label": "good"}, "judged", "prompt, completion and label; or chosen and rejected"),
        ({"chosen": "one", "rejected": "two"}, "pairs", "f:1: there is no prompt, and the answers do not begin alike"),
        ({"chosen": [ASKED, YES], "rejected": [message("user", "Hm?"), NO]}, "pairs", "do not begin alike"),
        ({"chosen": [ASKED, YES, ASKED, YES], "rejected": [ASKED, YES, message("user", "Hm?"), NO]}, "pairs", "a message of the user, not an answer"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "pairs", "column 'chosen': message 2.*is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "pairs", "column 'rejected'.*null"),
        ({"prompt": "q", "ranked": "a"}, "ranked", "column 'ranked' is no list"),
        ({"prompt": "q", "ranked": ["a"]}, "ranked", "'ranked' has one answer"),
        ({**PAIRS["standard"], "margin": -1}, "ranked", "column 'margin' is -1"),
        ({**PAIRS["standard"], "tie": "maybe"}, "ranked", "column 'tie' is 'maybe'"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(fields: dict[str, Any], renders: str, said: str) -> None:
    with pytest.raises(LuthierError, match=said):
        convert(fields, renders)


def test_columns_can_be_named() -> None:
    (item,) = convert({"q": "Is it cheap?", "better": "Yes, very.", "worse": "Go away."}, columns={"prompt": "q", "chosen": "better", "rejected": "worse"})
    assert item.answers() == ["Yes, very.", "Go away."]
    with pytest.raises(LuthierError, match="no column 'chosn'.*Did you mean 'chosen'"):
        convert(PAIRS["standard"], columns={"chosen": "chosn"})
    with pytest.raises(LuthierError, match="no part 'better'"):
        convert(PAIRS["standard"], columns={"better": "chosen"})


@pytest.mark.parametrize(("file", "renders", "shape", "n"), [
    ("hh_harmless_test_pairs.jsonl", "pairs", "pairs", 2303), ("gsm8k_pairs.jsonl", "ranked", "pairs", 3275),
    ("dpo_en_demo.json", "pairs", "pairs", 300), ("kto_en_demo.json", "judged", "judged", 300), ("dpo_en_demo.json", "judged", "pairs", 600),
])  # fmt: skip
def test_real_preferences_are_read(file: str, renders: str, shape: str, n: int, shared: Path) -> None:
    bad = Bad("skip")
    records = list(read(str(shared / "data" / "preferences" / file), bad=bad))
    found = detect_preferences(records[:100], renders=renders)
    items = [item for r in records for item in convert_preferences(r, found, bad, renders=renders)]
    assert found.name == shape and len(items) == n and bad.count == len(records) - n // (2 if n > len(records) else 1)
    assert all(c.messages[item.prompt - 1]["role"] == "user" for item in items for c in item.chats)
    json.dumps([item.answers() for item in items])
