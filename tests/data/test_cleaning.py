"""--fix: what is written is clean of what was fixed, what was left out is on record, and the two add up."""

import json

import pytest

from luthier.core import LuthierError
from luthier.data.cleaning import clean, fixable, targets
from luthier.data.steps import File
from tests.data.quality.conftest import check, good, write

__all__ = ["check", "write"]  # fixtures


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def faulty():
    rows = [good(i) for i in range(40)]
    rows[5] = "{not json"
    rows[10] = {"prompt": "Why?", "completion": ""}
    rows[15] = good(3)
    rows[20] = {"prompt": "Where is the cafÃ©?", "completion": "Behind the church\x07, I think.", "id": 7}
    rows[25] = {"prompt": "Why is it so?", "completion": "Because of this.<|eot_id|>"}
    rows[30] = good(500)
    return rows


def test_what_is_written_is_clean_and_its_record_adds_up(check, tmp_path):
    found = check(faulty(), held={"test": [good(500), good(600)]})
    fixes = fixable(found.report.findings, [])
    [done] = clean(found.inspection, found.report, fixes, tmp_path / "clean.jsonl")
    written, record = read(done.out), read(done.record)
    assert done.out == tmp_path / "clean.jsonl" and done.record == tmp_path / "clean.removed.jsonl"
    removed = [r for r in record if r["action"] == "removed"]
    assert [(int(r["where"].rpartition(":")[2]), r["finding"]) for r in removed] == [
        (6, "malformed"), (11, "empty"), (16, "exact_duplicates"), (31, "leak_test"),
    ]  # fmt: skip
    assert removed[2]["like"].endswith("train.jsonl:4") and removed[3]["like"].endswith("test.jsonl:1")
    changed = {int(r["where"].rpartition(":")[2]): set(r["finding"].split(", ")) for r in record if r["action"] == "changed"}
    assert changed == {21: {"mojibake", "control_characters"}, 26: {"foreign_ends"}}
    assert len(written) == done.written == 40 - len(removed) and sum(done.removed.values()) == len(removed)
    assert written[:3] == [good(0), good(1), good(2)]
    assert {"prompt": "Where is the café?", "completion": "Behind the church, I think.", "id": 7} in written
    again = check(written, held={"test": [good(500), good(600)]}, name="again.jsonl")
    assert again.findings == {}


def test_what_is_kept_stays(check, tmp_path):
    found = check(faulty())
    [done] = clean(found.inspection, found.report, fixable(found.report.findings, ["exact_duplicates", "mojibake"]), tmp_path / "kept.jsonl")
    written = read(done.out)
    assert written.count(good(3)) == 2 and any("cafÃ©" in r["prompt"] for r in written)
    with pytest.raises(LuthierError, match="--keep exact: nothing of this name was found; found were: .*exact_duplicates"):
        fixable(found.report.findings, ["exact"])


def test_a_record_with_several_answers_stays_as_long_as_one_of_them_does(check, tmp_path):
    rows = [{"mr": g["prompt"], "refs": [g["completion"]]} for g in map(good, range(20))]
    rows[7]["refs"] = [rows[7]["refs"][0], rows[7]["refs"][0]]
    rows[9] = rows[2]
    found = check(rows)
    assert found.lines("exact_duplicates") == [8, 10]
    [done] = clean(found.inspection, found.report, fixable(found.report.findings, []), tmp_path / "out.jsonl")
    assert read(done.out) == rows[:9] + rows[10:]


def test_nothing_is_written_over_what_is_read_and_several_files_go_into_a_folder(tmp_path, write):
    one, two = (File(str(write([good(0)], name)), "train", "") for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(LuthierError, match="is what is read"):
        targets([one], tmp_path / "a.jsonl")
    with pytest.raises(LuthierError, match=r"written as JSON lines; name a file that ends with \.jsonl"):
        targets([one], tmp_path / "a.csv")
    assert targets([one, two], tmp_path / "out")[two.name] == (tmp_path / "out/b.jsonl", tmp_path / "out/b.removed.jsonl")


def test_a_write_that_fails_leaves_nothing(check, tmp_path):
    found = check([good(0), good(0)])

    def stop(n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clean(found.inspection, found.report, found.report.findings, tmp_path / "out.jsonl", stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.jsonl"]
