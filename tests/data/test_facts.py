"""Facts out of the shapes that files of questions have."""

import json

import pytest

from luthier.core import LuthierError
from luthier.data.facts import pattern_of, read_facts, read_patterns


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="f.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(tmp_path / name)

    return write


def test_questions_of_every_shape_become_facts_with_all_their_answers(write):
    shapes = {
        "q.jsonl": [{"question": "Who?", "answer": "Ann", "aliases": ["Anna", "Ann"]}],
        "l.jsonl": [{"prompt": "Who?", "completion": ["Ann", "Anna"]}],
        "t.jsonl": [{"question": "Who?", "answer": {"value": "Ann", "aliases": ["Anna"], "type": "x"}}],
        "a.jsonl": [{"instruction": "Who?", "input": "", "output": "Ann", "answer_aliases": ["Anna"]}],
        "m.jsonl": [{"messages": [{"role": "user", "content": "Who? "}, {"role": "assistant", "content": "Ann"}], "aliases": ["Anna"]}],
    }
    for name, rows in shapes.items():
        (fact,), said = read_facts([write(*rows, name=name)])
        assert (fact.question, fact.answers, said) == ("Who?", ("Ann", "Anna"), []), name
        assert fact.fields == rows[0]


def test_groups_are_files_or_a_column(write):
    rows = [{"question": f"q{i}", "answer": "a", "topic": "xy"[i % 2]} for i in range(4)]
    one, two = write(*rows[:2], name="1.jsonl"), write(*rows[2:], name="2.jsonl")
    assert [f.group for f in read_facts([one, two])[0]] == [one, one, two, two]
    assert [f.group for f in read_facts([one, two], group="topic")[0]] == ["x", "y", "x", "y"]
    with pytest.raises(LuthierError, match="no column 'subject' to group by"):
        read_facts([one], group="subject")


def test_subjects_and_objects_need_a_pattern(write):
    file = write({"sub_label": "Ann", "obj_label": "Rome", "uuid": "1"})
    with pytest.raises(LuthierError, match=r'f\.jsonl:1.*--pattern "\[X\] was born in \[Y\]'):
        read_facts([file])
    (fact,), _ = read_facts([file], patterns=True)
    assert (fact.question, fact.answers) == ("Ann", ("Rome",))


def test_a_pattern_has_its_subject_first_and_its_answer_last():
    p = pattern_of("The capital of [X] is [Y] .")
    assert (p.opening("Italy"), p.tail, str(p)) == ("The capital of Italy is", ".", "The capital of [X] is [Y].")
    for wrong in ("[Y] is where [X] was born.", "[X] was born in [Y] once.", "born in [Y]", "[X] was born"):
        with pytest.raises(LuthierError, match="pattern"):
            pattern_of(wrong)


def test_patterns_come_from_files_without_those_that_cannot_ask(write):
    file = write({"pattern": "[X] was born in [Y]."}, {"pattern": "[Y] bore [X]."}, {"pattern": "[X] is from [Y]"})
    found, said = read_patterns([file, "[X] was born in [Y]."])
    assert [str(p) for p in found] == ["[X] was born in [Y].", "[X] is from [Y]"] and "1 of its patterns" in said[0]
    with pytest.raises(LuthierError, match="no column 'pattern'"):
        read_patterns([write({"question": "x", "answer": "y"}, name="q.jsonl")])


def test_rows_that_are_no_fact_are_left_out_and_counted_and_files_without_any_refused(write):
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
    good = {"messages": turns[:2]}
    facts, said = read_facts([write(good, {"messages": turns})])
    assert len(facts) == 1 and "1 rows left out" in said[0] and "2 questions" in said[0]
    with pytest.raises(LuthierError, match="holds no fact; .*2 questions"):
        read_facts([write({"messages": turns})])
    with pytest.raises(LuthierError, match="raw text"):
        read_facts([write({"text": "x"})])
    with pytest.raises(LuthierError, match="cannot tell the shape"):
        read_facts([write({"a": "x", "b": "y"})])


def test_the_facts_of_pararel_are_read(shared):
    folder = shared / "data" / "facts"
    facts, said = read_facts([str(folder / "facts" / "P19.jsonl")], patterns=True)
    assert len(facts) == 779 and not said
    patterns, _ = read_patterns([str(folder / "patterns" / "P19.jsonl")])
    assert patterns[0].opening("Ann") == "Ann was born in"
