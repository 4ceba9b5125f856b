"""luthier data check, as it is typed."""

import json
import re
from html.parser import HTMLParser

import pytest

from luthier.cli import main
from tests.data.quality.conftest import good, write

__all__ = ["write"]


@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = main(["data", "check", *(str(a) for a in arguments)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


class Page(HTMLParser):
    """What is open and what is asked of elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.outside, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "img", "link", "input"):
            self.open.append(tag)
        self.outside += [v for k, v in attributes if k in ("src", "href") and not v.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_exit_codes_say_clean_warnings_and_errors(run, write):
    rows = [good(i) for i in range(30)]
    code, out, _ = run(write(rows))
    assert code == 0 and "clean: nothing was found" in out and "30 rows to train with objective sft" in out
    code, out, _ = run(write([*rows, good(4)]))
    assert code == 3 and "exact_duplicates" in out and re.search(r"train\.jsonl:31 and .*train\.jsonl:5", out)
    code, out, _ = run(write([*rows, {"prompt": "Why?", "completion": ""}]))
    assert code == 4 and "train.jsonl:31: column 'completion' is empty" in out
    code, _, err = run(write(rows), "--keep", "empty")
    assert code == 2 and "give --fix OUT too" in err
    code, _, err = run(write(rows), "--agianst", "x")
    assert code == 2 and "did you mean --against" in err


def test_json_page_and_cleaned_file_agree(run, write, tmp_path):
    rows = [*map(good, range(30)), good(4), {"prompt": "<b>Why?</b>", "completion": ""}]
    page, out = tmp_path / "report.html", tmp_path / "clean.jsonl"
    code, said, _ = run(write(rows), "--json", "--html", page, "--fix", out)
    data = json.loads(said)
    assert code == 4 and data["verdict"] == "errors" and data["counts"] == {"error": 1, "warning": 1, "note": 0}
    assert {f["name"]: f["count"] for f in data["findings"]} == {"empty": 1, "exact_duplicates": 1}
    assert data["fixed"] == [
        {
            "file": str(tmp_path / "train.jsonl"), "out": str(out), "record": str(tmp_path / "clean.removed.jsonl"), "written": 30,
            "removed": {"exact_duplicates": 1, "empty": 1}, "changed": {},
        }
    ]  # fmt: skip
    assert sum(b["rows"] for b in data["histogram"]) == data["rows"] == 31 and len(out.read_text().splitlines()) == 30
    parsed = Page()
    parsed.feed(page.read_text(encoding="utf-8"))
    assert not parsed.open and not parsed.outside
    text = " ".join(parsed.text)
    assert "Empty rows" in text and "Rows that are there more than once" in text and "prefers-color-scheme: dark" in text
    assert run(out)[0] == 0


def test_what_rows_are_for_is_told_from_their_columns(run, write):
    g = [good(i) for i in range(20)]
    kinds = {
        "sft": g,
        "text": [{"text": x["completion"]} for x in g],
        "classify": [{"sentence": x["prompt"], "label": i % 2} for i, x in enumerate(g)],
        "dpo": [{"prompt": x["prompt"], "chosen": x["completion"], "rejected": good(i + 200)["completion"]} for i, x in enumerate(g)],
        "kto": [{"prompt": x["prompt"], "completion": x["completion"], "label": i % 2 == 0} for i, x in enumerate(g)],
    }
    for objective, rows in kinds.items():
        code, out, _ = run(write(rows, f"{objective}.jsonl"))
        assert code == 0 and f"20 rows to train with objective {objective}" in out
    code, _, err = run(write(g, "a.jsonl"), write(kinds["dpo"], "b.jsonl"))
    assert code == 2 and "these files are for different objectives" in err


def test_names_and_folders_tell_which_files_are_held_out(run, write, tmp_path):
    train, test = write([good(i) for i in range(20)]), write([good(3)], "test.jsonl")
    for what in ((train, test), (train, "--test", test), (tmp_path,)):
        code, out, _ = run(*what)
        assert code == 4 and "leak_test" in out
    assert run(test)[0] == 0  # alone it is what is looked at


def test_real_data_has_no_false_errors_and_a_benchmark_in_the_training_data_is_found(run, shared):
    for file in ("instructions/dolly_3k.json", "gsm8k/test.jsonl", "instructions/identity.json", "instructions/glaive_toolcall_en_demo.json"):
        code, out, _ = run(shared / "data" / file, "--json")
        assert code in (0, 3) and json.loads(out)["counts"]["error"] == 0, file
    code, out, _ = run(shared / "data/preferences/gsm8k_pairs.jsonl", "--against", shared / "data/gsm8k/test.jsonl", "--json", "data.limit=60")
    [leak] = [f for f in json.loads(out)["findings"] if f["severity"] == "error"]
    assert code == 4 and leak["name"] == "leak_against" and leak["count"] > 15 and "are found in 60 training rows" in leak["said"]
