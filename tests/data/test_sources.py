"""Files, folders and Hub ids as records; every kind of damage is reported with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from luthier.core import LuthierError
from luthier.data import formats
from luthier.data.formats import Bad, Record
from luthier.data.sources import read, splits_of

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "é"}]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def all_of(path: Path | str, policy: str = "stop") -> tuple[list[Record], Bad]:
    bad = Bad(policy)  # type: ignore[arg-type]
    return list(read(str(path), bad=bad)), bad


JSONL = "\n".join(json.dumps(r) for r in ROWS) + "\n"
FILES = {
    "lines.jsonl": JSONL,
    "array.json": json.dumps(ROWS, indent=1),
    "array_in_one_line.json": json.dumps(ROWS),
    "lines_under_another_name.json": JSONL,
    "object_of_rows.json": json.dumps({"first": ROWS[0], "second": ROWS[1]}),
    "object_with_a_list.json": json.dumps({"version": 1, "data": ROWS}),
    "table.csv": "prompt,completion\na,b\nc,é\n",
    "table.tsv": "prompt\tcompletion\na\tb\nc\té\n",
    "bom.jsonl": b"\xef\xbb\xbf" + JSONL.encode(),
    "crlf.jsonl": JSONL.replace("\n", "\r\n"),
    "bom_and_crlf.csv": b"\xef\xbb\xbfprompt,completion\r\na,b\r\nc,\xc3\xa9\r\n",
    "blank_lines.jsonl": "\n" + JSONL.replace("\n", "\n\n"),
    "no_newline_at_the_end.jsonl": JSONL.strip(),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_come_out_of_every_format(name: str, tmp_path: Path) -> None:
    found, bad = all_of(write(tmp_path, name, FILES[name]))
    assert [r.fields for r in found] == ROWS
    assert bad.count == 0


def test_parquet_and_both_arrow_formats_give_the_same_rows(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as out:
        out.write_table(table)
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as out:
        out.write_table(table)
    for name in ("t.parquet", "stream.arrow", "file.arrow"):
        found, _ = all_of(tmp_path / name)
        assert [r.fields for r in found] == ROWS
        assert found[1].where.endswith(f"{name}:row 2")


def test_every_row_knows_its_line(tmp_path: Path) -> None:
    lines = lambda name: [r.where.rsplit(":", 1)[1] for r in all_of(write(tmp_path, name, FILES[name]))[0]]  # noqa: E731
    assert lines("lines.jsonl") == ["1", "2"]
    assert lines("blank_lines.jsonl") == ["2", "4"]
    assert lines("array.json") == ["2", "6"]
    assert lines("table.csv") == ["2", "3"]
    many = write(tmp_path, "quoted.csv", 'a,b\n"one\ntwo",x\ny,z\n')
    assert [(r.where[-2:], r.fields) for r in all_of(many)[0]] == [(":2", {"a": "one\ntwo", "b": "x"}), (":4", {"a": "y", "b": "z"})]


def test_a_text_file_is_divided_at_separator_lines_only(tmp_path: Path) -> None:
    found, _ = all_of(write(tmp_path, "books.txt", "One <|endoftext|> inside.\r\n\r\nMore.\n<|endoftext|>\n\nTwo.\n<|endoftext|>\n"))
    assert [r.fields["text"] for r in found] == ["One <|endoftext|> inside.\n\nMore.", "Two."]
    assert [r.where.rsplit(":", 1)[1] for r in found] == ["1", "5"]
    whole, _ = all_of(write(tmp_path, "note.md", "# A\n\nb\n"))
    assert [r.fields["text"] for r in whole] == ["# A\n\nb"]


def test_a_tsv_may_hold_unbalanced_quotes_without_swallowing_rows(tmp_path: Path) -> None:
    found, _ = all_of(write(tmp_path, "q.tsv", 'text\tlabel\n"so it begins\t1\nb\t0\n"a ""quoted"" one"\t1\n'))
    assert [r.fields["text"] for r in found] == ['"so it begins', "b", 'a "quoted" one']


# --- damage ---------------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "a", "completion": "b"}\n'
DAMAGE = {  # name: (content, parts of the message)
    "cut.jsonl": (GOOD + '{"prompt": "a", "comp', [":2: the JSON ends in the middle of a row", "cut off"]),
    "latin.jsonl": (GOOD.encode() + b'{"prompt": "caf\xe9"}\n', [":2: not UTF-8: byte 16 of the line is 0xe9", "iconv"]),
    "single_quotes.jsonl": (GOOD + "{'prompt': 'a'}\n", [":2: not JSON", "column 2"]),
    "list_row.jsonl": (GOOD + '["a", "b"]\n', [":2: the row is a list", "an object like"]),
    "string_row.jsonl": (GOOD + '"a"\n', [":2: the row is a string"]),
    "null_row.jsonl": (GOOD + "null\n", [":2: the row is null"]),
    "empty_row.jsonl": (GOOD + "{}\n", [":2: the row is an empty object"]),
    "two_in_a_line.jsonl": (GOOD + GOOD.strip() + GOOD, [":2: not JSON: extra data at column 35"]),
    "deep.jsonl": (GOOD + '{"a":' * 100_000 + "1\n", [":2: the JSON is nested too deeply"]),
    "ragged.csv": ("a,b\n1,2\n1,2,3\n", [":3: 3 fields where the header names 2 (a, b)"]),
    "short.csv": ("a,b\n1\n", [":2: 1 fields where the header names 2"]),
    "open_quote.csv": ('a,b\n1,2\n"3,4\n5,6\n', [":3: not CSV: unexpected end of data"]),
    "stray_quote.csv": ('a,b\n"1"x,2\n', [":2: not CSV", "twice"]),
    "ragged.tsv": ("a\tb\n1\n", [":2: 1 fields where the header names 2"]),
    "latin.csv": (b"a,b\n1,2\ncaf\xe9,2\n", [":3: not UTF-8: byte 4"]),
    "number_row.json": ('[{"a": 1},\n 7]', [":2: the row is a number"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_row_stops_with_its_place_the_cause_and_what_to_do(name: str, tmp_path: Path) -> None:
    content, parts = DAMAGE[name]
    with pytest.raises(LuthierError) as caught:
        all_of(write(tmp_path, name, content))
    for part in [*parts, "data.on_bad_row=skip"]:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", [n for n in DAMAGE if n not in ("short.csv", "open_quote.csv", "stray_quote.csv", "ragged.tsv")])
def test_a_damaged_row_can_be_skipped_and_is_counted(name: str, tmp_path: Path) -> None:
    found, bad = all_of(write(tmp_path, name, DAMAGE[name][0]), "skip")
    assert len(found) == 1 and bad.count == 1
    assert str(tmp_path / name) in bad.rows[0][0]


FATAL = {
    "empty.jsonl": ("", ["the file is empty (0 bytes)"]),
    "blank.jsonl": ("\n\n", ["nothing to read: no row in it"]),
    "utf16.jsonl": (GOOD.encode("utf-16"), ["this is UTF-16", "iconv"]),
    "cut.json": ('[{"a": 1},\n {"a": ', [":2: the file ends in the middle of a row"]),
    "no_bracket.json": ('[{"a": 1},\n {"a": 2}\n', ["found the end of the file", "cut off"]),
    "no_comma.json": ('[{"a": 1}\n {"a": 2}]', [":2: expected , or ]"]),
    "after.json": ('[{"a": 1}]\n[]', ["more text after the end of the array"]),
    "latin.json": (b'[{"a": "caf\xe9"}]', [":1: not UTF-8"]),
    "broken.json": ('{"a": }', [":1: not JSON"]),
    "unnamed.csv": ("a,,b\n1,2,3\n", [":1: column 2 has no name"]),
    "twice.csv": ("a,a\n1,2\n", ["two columns are called 'a'"]),
    "fake.parquet": ("hello", ["not a readable Parquet file"]),
    "fake.arrow": ("hello", ["not a readable Arrow file"]),
    "what.xlsx": ("hello", ["cannot tell what kind of file this is", ".jsonl"]),
}


@pytest.mark.parametrize("name", FATAL)
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_file_that_cannot_be_read_on_is_refused_whatever_the_policy(name: str, policy: str, tmp_path: Path) -> None:
    content, parts = FATAL[name]
    with pytest.raises(LuthierError) as caught:
        all_of(write(tmp_path, name, content), policy)
    for part in [name, *parts]:
        assert part in str(caught.value)


def test_a_file_of_bad_rows_only_is_refused_even_when_they_are_skipped(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="all 2 rows are malformed"):
        all_of(write(tmp_path, "a.jsonl", "1\n2\n"), "skip")


def test_a_huge_line_is_a_bad_row_and_not_a_full_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LONGEST_LINE", 1000)
    path = write(tmp_path, "a.jsonl", json.dumps({"text": "x" * 5000}) + "\n" + GOOD)
    found, bad = all_of(path, "skip")
    assert [r.where for r in found] == [f"{path}:2"] and "longer than" in bad.rows[0][1]


# --- places ---------------------------------------------------------------------------------------------------------


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", JSONL)
    with pytest.raises(LuthierError, match=r"no such file.*Did you mean .*train\.jsonl\?"):
        all_of(tmp_path / "trian.jsonl")
    with pytest.raises(LuthierError, match="does not exist either"):
        all_of(tmp_path / "nowhere" / "train.jsonl")


def test_a_folder_is_read_sorted_and_recursively_without_its_descriptions(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", '{"n": 2}')
    write(tmp_path, "a/z.jsonl", '{"n": 1}')
    write(tmp_path, ".hidden/c.jsonl", '{"n": 0}')
    write(tmp_path, "dataset_info.json", '{"n": 0}')
    write(tmp_path, "README.md", "About")
    assert [r.fields["n"] for r in all_of(tmp_path)[0]] == [1, 2]


def test_a_folder_never_trains_on_its_test_file(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", '{"n": 1}')
    write(tmp_path, "valid.jsonl", '{"n": 2}')
    write(tmp_path, "test-00000-of-00001.jsonl", '{"n": 3}')
    assert {k: [p.name for p in v] for k, v in splits_of(tmp_path).items()} == {
        "test": ["test-00000-of-00001.jsonl"],
        "train": ["train.jsonl"],
        "validation": ["valid.jsonl"],
    }
    assert [r.fields["n"] for r in all_of(tmp_path)[0]] == [1]
    assert [r.fields["n"] for r in read(str(tmp_path), bad=Bad(), split="validation")] == [2]
    with pytest.raises(LuthierError, match="no file for the split 'other'"):
        list(read(str(tmp_path), bad=Bad(), split="other"))


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="no data file in this folder"):
        all_of(tmp_path)


def test_a_hub_id_is_loaded_with_its_split_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict]:
        asked.append((name, config, split))
        return ROWS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = list(read("org/name:main", bad=Bad(), split="test"))
    assert asked == [("org/name", "main", "test")]
    assert [r.fields for r in found] == ROWS and found[1].where == "org/name:main[test]:1"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach 'org/name' on the Hub\nsecond line"), "the Hub cannot be reached"),
        (ValueError('Unknown split "train". Should be one of ["test"].'), "no split 'train'"),
        (ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"), "name one as org/name:CONFIG"),
        (RuntimeError("Dataset 'org/name' is a gated dataset on the Hub."), "asks for consent"),
    ],
)
def test_what_goes_wrong_on_the_hub_is_one_sentence(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(LuthierError) as caught:
        list(read("org/name", bad=Bad()))
    assert said in str(caught.value) and "\n" not in str(caught.value)
