"""The demo's data set and its scorer."""

import json
import re

import pytest

from luthier.core import LuthierError
from luthier.tasks import instruments
from luthier.tasks.instruments import FIRST, MAKER_LAST, OWNER_LAST, POOLS, Task, pairs, write


@pytest.fixture(scope="module")
def rows():
    return {split: Task().rows(split) for split in Task.sizes}


def test_there_are_at_least_2000_training_rows_and_no_prompt_twice(rows):
    assert len(rows["train"]) >= 2000
    prompts = [r["prompt"] for split in rows.values() for r in split]
    assert len(set(prompts)) == len(prompts)


def test_the_generator_is_a_function_of_its_seed(rows):
    assert Task().rows("test") == rows["test"]
    assert Task(seed=1).rows("test") != rows["test"]


def test_every_validation_and_test_row_holds_a_pair_of_values_no_other_split_has(rows):
    held = {split: [set(pairs(r["facts"])) for r in split_rows] for split, split_rows in rows.items()}
    everywhere = {split: set().union(*sets) for split, sets in held.items()}
    for split, others in {"validation": ("train", "test"), "test": ("train", "validation")}.items():
        known = set().union(*(everywhere[o] for o in others))
        assert all(sets - known for sets in held[split])


def test_every_reference_states_every_fact_and_invents_none(rows):
    task = Task()
    for split in rows.values():
        for row in split:
            for text in row["refs"]:
                assert task.score(row, text) == {"facts": 1.0, "all_facts": 1.0}, (row["prompt"], text)


def test_the_sentences_vary(rows):
    def frame(row):
        text = row["completion"]
        for value in sorted(row["facts"].values(), key=len, reverse=True):
            text = re.sub(rf"\b{re.escape(value)}\b", "_", text, flags=re.I)
        return text

    assert len({frame(r) for r in rows["train"]}) > 1000
    assert sum(len(r["refs"]) for r in rows["test"]) > 3 * len(rows["test"])


def test_no_value_belongs_to_two_slots():
    values = [v.lower() for pool in POOLS.values() for v in pool] + [n.lower() for n in FIRST + MAKER_LAST + OWNER_LAST]
    assert len(set(values)) == len(values)


ROW = {"prompt": "instrument: viola; maker: Anna Reed; year: 1894; wood: maple; fault: cracked bridge; price: 45"}
RIGHT = "The maple viola, built by Anna Reed in 1894, has a cracked bridge; the work will cost 45 pounds."


def test_a_right_answer_scores_one_in_any_wording():
    assert Task().score(ROW, RIGHT) == {"facts": 1.0, "all_facts": 1.0}
    assert Task().score(ROW, "45 pounds.\nA CRACKED BRIDGE. Maple. 1894: Anna Reed, viola. Anna made it.") == {"facts": 1.0, "all_facts": 1.0}


@pytest.mark.parametrize("gone", ["maple ", "Anna Reed ", "1894", "cracked ", "viola", "45 "])
def test_an_omitted_fact_costs_its_share(gone):
    score = Task().score(ROW, RIGHT.replace(gone, ""))
    assert score == {"facts": pytest.approx(5 / 6), "all_facts": 0.0}


@pytest.mark.parametrize(
    "right,wrong",
    [
        ("maple", "spruce"),
        ("Anna Reed", "Anna Hill"),
        ("Anna Reed", "Ruth Reed"),
        ("1894", "1849"),
        ("cracked bridge", "open seam"),
        ("viola", "violin"),
        ("45", "450"),
    ],
)
def test_a_wrong_value_in_place_of_the_right_one_costs_its_share(right, wrong):
    assert Task().score(ROW, RIGHT.replace(right, wrong)) == {"facts": pytest.approx(5 / 6), "all_facts": 0.0}


@pytest.mark.parametrize("more", ["It is made of spruce.", "Or a violin.", "Or 1895.", "Helen Hill made it.", "It has an open seam.", "It costs 50 pounds."])
def test_saying_the_right_value_and_another_one_of_the_slot_is_wrong(more):
    assert Task().score(ROW, f"{RIGHT} {more}") == {"facts": pytest.approx(5 / 6), "all_facts": 0.0}


@pytest.mark.parametrize("more", ["It comes from Bristol.", "It belongs to Tom King.", "It is strung with silk.", "It is ready on Friday."])
def test_a_fact_that_was_not_given_is_an_invention(more):
    assert Task().score(ROW, f"{RIGHT} {more}") == {"facts": 1.0, "all_facts": 0.0}


def test_a_value_inside_another_word_is_not_stated():
    assert Task().score({"prompt": "instrument: lute; wood: pear"}, "It appears to be an absolute lutenist's.")["facts"] == 0


def test_the_prompt_may_be_messages_and_must_hold_facts():
    messages = [{"role": "system", "content": "Write."}, {"role": "user", "content": ROW["prompt"]}]
    assert Task().score({"prompt": messages}, RIGHT)["all_facts"] == 1
    with pytest.raises(LuthierError, match="no facts"):
        Task().score({"prompt": "Tell me a story."}, "Once.")


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(LuthierError, match="train, validation, test"):
        Task().rows("dev")


def test_the_files_for_looking_at_hold_prompts_and_completions(tmp_path, rows):
    paths = write(tmp_path)
    assert [p.name for p in paths] == ["train.jsonl", "validation.jsonl", "test.jsonl"]
    read = [json.loads(line) for line in paths[2].read_text(encoding="utf-8").splitlines()]
    assert read == [{"prompt": r["prompt"], "completion": r["completion"]} for r in rows["test"]]
    assert instruments.parse(read[0]["prompt"]) == rows["test"][0]["facts"]
