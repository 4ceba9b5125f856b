"""Kept data: equal to what was prepared, and never of other inputs. Each thing that data depends on is changed in turn."""

from __future__ import annotations

import datetime
import decimal
import inspect
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from data.conftest import CHATML, byte_bpe
from luthier import atomic
from luthier.core import LuthierError, Row
from luthier.data import kept, prepare, rowfile
from luthier.data.prepare import Prepared
from luthier.data.rows import Form
from luthier.nn.corruption import Hiding

HIT = "read as it was prepared on"
ROWS = [{"prompt": f"Which pub is number {i}?", "completion": f"The Vaults {i}."} for i in range(40)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LUTHIER_DATA_CACHE_GB", raising=False)
    return tmp_path


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def ask(source: str, tokenizer: Any, *, keep: str = "yes", **how: Any) -> tuple[Prepared, list[str]]:
    said: list[str] = []
    got = kept.prepare_or_read([source], tokenizer, keep=keep, say=said.append, **{"renders": "chat", "max_tokens": 64, **how})  # type: ignore[arg-type]
    return got, said


def hit(said: list[str]) -> bool:
    return said[0].startswith(HIT)


def same(a: Any, b: Any) -> bool:
    """Equal in value and in type, to the last bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, Row | rowfile.Held | Hiding | Prepared):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b or (a != a and b != b))


# --- the same again ---------------------------------------------------------------------------------------------------

LABELLED = [{"text": f"It is number {i}, she said.", "label": ("good", "bad")[i % 2]} for i in range(40)]
TEXTS = [{"text": f"A long text about the river, part {i}. " * 20} for i in range(12)]
RANKED = [{"prompt": f"Which pub is number {i}?", "chosen": f"The Vaults {i}.", "rejected": "None."} for i in range(30)]
JUDGED = [{"prompt": f"Which pub is number {i}?", "completion": f"The Vaults {i}.", "label": bool(i % 2)} for i in range(30)]
KINDS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "chat": (ROWS, {}),
    "text": (TEXTS, {"over_length": "split"}),
    "label": (LABELLED, {}),
    "ranked": (RANKED, {}),
    "pairs": (RANKED, {}),
    "judged": (JUDGED, {}),
    "prompts": (ROWS, {}),
}


@pytest.mark.parametrize("renders", KINDS)
def test_what_is_read_again_is_what_was_prepared_and_all_that_was_said_is_said_again(folder: Path, renders: str, tokenizer: Any) -> None:
    rows, how = KINDS[renders]
    source = write(folder / "a.jsonl", rows)
    plain, plainly = ask(source, tokenizer, keep="no", renders=renders, **how)
    first, said = ask(source, tokenizer, renders=renders, **how)
    again, said_again = ask(source, tokenizer, renders=renders, **how)
    assert not hit(said) and hit(said_again)
    assert same(plain, first) and same(first, again)
    assert said_again[1:] == said[:-1] == plainly and said[-1].startswith("kept for the next time")
    assert all(r.ids.flags.writeable and r.train.flags.writeable for r in again.train)


def test_hidden_parts_share_one_vocabulary_as_before(folder: Path) -> None:
    made = byte_bpe()
    made.add_special_tokens({"mask_token": "<mask>"})
    source = write(folder / "a.jsonl", TEXTS)
    how = {"renders": "masked", "form": Form(kind="encoder")}
    first, _ = ask(source, made, **how)
    again, said = ask(source, made, **how)
    assert hit(said) and same(first, again)
    assert len({id(r.extras["hiding"]) for r in again.train}) == 1


def test_bad_rows_are_counted_and_told_again(folder: Path, tokenizer: Any) -> None:
    source = write(folder / "a.jsonl", [*ROWS, {"prompt": "x", "completion": ""}, {"prompt": 3}])
    first, said = ask(source, tokenizer, on_bad_row="skip")
    again, said_again = ask(source, tokenizer, on_bad_row="skip")
    assert hit(said_again) and again.facts["bad_rows"] == first.facts["bad_rows"] == 2
    line = next(s for s in said if "2 bad rows skipped" in s)
    assert line in said_again and "a.jsonl:41" in line


def test_an_error_is_not_kept(folder: Path, tokenizer: Any) -> None:
    source = write(folder / "a.jsonl", [*ROWS, {"prompt": "x", "completion": ""}])
    for _ in range(2):
        with pytest.raises(LuthierError, match="a.jsonl:41"):
            ask(source, tokenizer)
    assert kept.entries() == []
    with pytest.raises(LuthierError, match="no such file"):
        ask(str(folder / "nothing.jsonl"), tokenizer)


def test_values_that_json_would_change_come_back_as_they_were(folder: Path) -> None:
    odd = {
        "tuple": (1, ("a", None)), "nested": [{"k": 1.5, "@": {}}], "@array": 3, "bytes": b"\x00\xff", "day": datetime.date(2026, 11, 28),
        "time": datetime.datetime(2026, 11, 28, 1, 2, 3, 4), "price": decimal.Decimal("0.10"), "half": "\ud83d", "halves": "\ud83d\ude00", "none": None,
        "nan": float("nan"), "big": 10**30, "array": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 2), dtype=np.int64),
        "flags": np.array([True, False]), "numbers": {1: "a"}, "one": {"@tuple": [1]}, "true": True, "minus": -0.0,
    }  # fmt: skip
    row = Row(np.array([1, 2], dtype=np.int32), np.array([False, True]), "f:1", odd)
    rowfile.write(folder / "x.safetensors", [row], [], [], {"made": ("now",)}, {})
    train, validation, held, rest = rowfile.read(folder / "x.safetensors")
    assert same(train, [row]) and validation == [] and held == [] and rest == {"made": ("now",)}
    assert train[0].extras["halves"] == "\ud83d\ude00" and len(train[0].extras["halves"]) == 2


def test_a_value_that_would_not_come_back_is_said_and_not_kept(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(folder / "a.jsonl", ROWS)
    monkeypatch.setattr(kept, "prepare", lambda *a, **k: Prepared([Row(np.zeros(2, np.int32), np.ones(2, bool), "", {"x": {1, 2}})], [], [], {}))
    monkeypatch.setattr(kept, "_given", lambda s, h: {"sources": s, "split": "train", "validation": [], "template": None, "renders": "chat"})
    _, said = ask(source, tokenizer)
    assert "not kept: a record holds a value of the type set" in said[-1] and kept.entries() == []


# --- never of other inputs --------------------------------------------------------------------------------------------


def other_tokenizers() -> dict[str, Any]:
    out = {name: byte_bpe() for name in ("added token", "special token", "beginning", "template", "side", "vocabulary", "length", "normalizer")}
    out["added token"].add_tokens(["Vaults"])
    out["special token"].add_special_tokens({"sep_token": "<|im_end|>"})
    out["beginning"] = byte_bpe(bos=True)
    out["template"].chat_template = CHATML
    out["side"].truncation_side = "left"
    out["length"].model_max_length = 7
    from tokenizers import normalizers

    out["normalizer"].backend_tokenizer.normalizer = normalizers.Lowercase()
    out["vocabulary"] = byte_bpe(eos=None)
    return out


@pytest.mark.parametrize("what", other_tokenizers())
def test_another_tokenizer_is_a_miss(folder: Path, what: str) -> None:
    source = write(folder / "a.jsonl", ROWS)
    ask(source, byte_bpe())
    assert hit(ask(source, byte_bpe())[1]), "the same tokenizer made again is the same"
    got, said = ask(source, other_tokenizers()[what])
    assert not hit(said)
    assert same(got, ask(source, other_tokenizers()[what], keep="no")[0])


OTHERS: dict[str, Any] = {
    "renders": "text", "max_tokens": 32, "form": Form(kind="encoder_decoder", start=3), "template": "zephyr", "shape": "prompt",
    "columns": {"prompt": "completion", "completion": "prompt"}, "split": "test", "languages": ("en",), "limit": 20, "over_length": "drop",
    "train_on": "last", "on_bad_row": "skip", "validation": "ANOTHER FILE", "validation_share": 0.3, "validation_rows": 3, "problem": "single",
    "labels": ("a",), "seed": 1, "beginning": 3, "templates": [("{prompt}?", "{completion}")], "stream": 10,
}  # fmt: skip


def test_every_setting_of_prepare_is_known_here() -> None:
    """A new setting has to be added to OTHERS, so that it is tried below; one that names files, to `kept._files` as well."""
    there = set(inspect.signature(prepare.prepare).parameters) - {"sources", *kept.UNLIKE}
    assert there == OTHERS.keys()


@pytest.mark.parametrize("setting", OTHERS)
def test_another_value_of_any_setting_is_a_miss(folder: Path, setting: str, tokenizer: Any) -> None:
    source = write(folder / "a.jsonl", ROWS)
    value = [write(folder / "v.jsonl", ROWS[:5])] if setting == "validation" else OTHERS[setting]
    ask(source, tokenizer)
    assert hit(ask(source, tokenizer)[1])
    try:
        said = ask(source, tokenizer, **{setting: value})[1]
    except LuthierError:  # of languages: it was read, and there is no record in English
        assert setting == "languages"
    else:
        assert not hit(said)


def test_another_content_is_a_miss_even_of_the_same_size_and_time(folder: Path, tokenizer: Any) -> None:
    source = write(folder / "a.jsonl", ROWS)
    before = os.stat(source)
    ask(source, tokenizer)
    write(folder / "a.jsonl", [*ROWS[:-1], {**ROWS[-1], "completion": "The Vaults 93."}])
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(source)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    got, said = ask(source, tokenizer)
    assert not hit(said) and any(r.extras["completion"] == "The Vaults 93." for r in got.train + got.validation)


def test_files_that_come_and_go_in_a_folder_are_a_miss(folder: Path, tokenizer: Any) -> None:
    data = folder / "data"
    data.mkdir()
    write(data / "train.jsonl", ROWS)
    ask(str(data), tokenizer)
    assert hit(ask(str(data), tokenizer)[1])
    write(data / "valid.jsonl", ROWS[:4])  # which is found beside the training file by itself
    got, said = ask(str(data), tokenizer)
    assert not hit(said) and len(got.validation) == 4
    assert hit(ask(str(data), tokenizer)[1])
    write(data / "valid.jsonl", ROWS[4:10])
    assert not hit(ask(str(data), tokenizer)[1])


def test_the_order_of_the_sources_and_a_changed_validation_file_are_misses(folder: Path, tokenizer: Any) -> None:
    a, b, v = (write(folder / f"{n}.jsonl", rows) for n, rows in (("a", ROWS[:20]), ("b", ROWS[20:]), ("v", ROWS[:3])))
    hits = lambda sources, **how: bool(kept.prepare_or_read(sources, tokenizer, keep="yes", say=(said := []).append, **how)) and hit(said)  # noqa: E731
    how: dict[str, Any] = {"renders": "chat", "max_tokens": 64, "validation": [v]}
    assert [hits([a, b], **how), hits([a, b], **how), hits([b, a], **how), hits([a], **how)] == [False, True, False, False]
    write(folder / "v.jsonl", ROWS[3:6])
    assert not hits([a, b], **how)


def test_another_text_of_a_template_file_is_a_miss(folder: Path, tokenizer: Any) -> None:
    source, template = write(folder / "a.jsonl", ROWS), folder / "t.jinja"
    template.write_text(CHATML)
    ask(source, tokenizer, template=str(template))
    assert hit(ask(source, tokenizer, template=str(template))[1])
    template.write_text(CHATML.replace("assistant", "model"))
    assert not hit(ask(source, tokenizer, template=str(template))[1])


def test_a_template_that_asks_for_the_day_is_good_for_that_day(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, made = write(folder / "a.jsonl", ROWS), byte_bpe(template="{{ strftime_now('%Y') }}" + CHATML)
    ask(source, made)
    assert hit(ask(source, made)[1])

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2099, 1, 1)

    monkeypatch.setattr(kept.datetime, "date", Tomorrow)
    assert not hit(ask(source, made)[1])


def test_another_version_of_the_code_or_of_a_library_is_a_miss(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(folder / "a.jsonl", ROWS)
    ask(source, tokenizer)
    with monkeypatch.context() as m:
        m.setattr(kept, "_code", lambda: "another")
        assert not hit(ask(source, tokenizer)[1])
    monkeypatch.setattr(kept, "version", lambda name: "0.1")
    assert not hit(ask(source, tokenizer)[1])
    assert len(kept._code.__wrapped__()) == 32


def test_a_file_that_changes_while_it_is_read_is_not_kept(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(folder / "a.jsonl", ROWS)

    def slowly(*args: Any, **how: Any) -> Prepared:
        got = prepare.prepare(*args, **how)
        write(folder / "a.jsonl", ROWS[1:])
        return got

    slowly.__signature__ = inspect.signature(prepare.prepare)  # type: ignore[attr-defined]
    monkeypatch.setattr(kept, "prepare", slowly)
    _, said = ask(source, tokenizer)
    assert "changed while they were read" in said[-1] and kept.entries() == []


# --- what cannot be kept ----------------------------------------------------------------------------------------------


def test_what_cannot_be_told_apart_is_not_kept_and_yes_says_why(folder: Path, tokenizer: Any, slow: ByT5Tokenizer) -> None:
    source = write(folder / "a.jsonl", ROWS)
    assert "written in Python" in ask(source, slow, max_tokens=300)[1][0]
    dice = byte_bpe(template=CHATML + "{%- set x = [1, 2] | random %}")
    assert "chooses by chance" in ask(source, dice)[1][0]
    assert kept.entries() == []


def test_auto_leaves_small_data_alone_and_no_neither_reads_nor_writes(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(folder / "a.jsonl", ROWS)
    ask(source, tokenizer, keep="auto")
    ask(source, tokenizer, keep="no")
    assert kept.entries() == []
    ask(source, tokenizer)
    assert not hit(ask(source, tokenizer, keep="no")[1]) and not hit(ask(source, tokenizer, keep="auto")[1])
    monkeypatch.setattr(kept, "WORTH", 1000)
    assert hit(ask(source, tokenizer, keep="auto")[1])
    monkeypatch.setenv("LUTHIER_DATA_CACHE_GB", "0")
    assert not hit(ask(source, tokenizer, keep="auto")[1])


# --- files that are damaged, full disks, the bound --------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "cut in half":
        raw = raw[: len(raw) // 2]
    elif how == "empty":
        raw = bytearray()
    elif how == "no file of ours":
        raw = bytearray(b"nonsense " * 100)
    elif how == "header":
        at = raw.index(b'"made":"')
        raw[at + 9] ^= 1
    else:
        raw[{"last byte": len(raw) - 1, "middle": len(raw) * 3 // 4}[how]] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("how", ["cut in half", "empty", "no file of ours", "header", "last byte", "middle"])
def test_a_damaged_file_is_said_read_anew_and_replaced(folder: Path, how: str, tokenizer: Any) -> None:
    source = write(folder / "a.jsonl", ROWS)
    first, _ = ask(source, tokenizer)
    (path,) = kept.entries()
    damage(path, how)
    got, said = ask(source, tokenizer)
    assert "damaged" in said[0] and str(path) in said[0] and same(got, first)
    again, said = ask(source, tokenizer)
    assert hit(said) and same(again, first)


def test_a_write_that_is_interrupted_leaves_nothing(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(folder / "a.jsonl", ROWS)
    with monkeypatch.context() as m:
        m.setattr(rowfile, "save_file", lambda tensors, path, metadata: Path(path).write_bytes(b"half") and exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            ask(source, tokenizer)
    assert list(kept.place().iterdir()) == []
    with monkeypatch.context() as m:
        m.setattr(rowfile, "save_file", lambda *a, **k: exec("raise OSError(28, 'No space left on device')"))
        got, said = ask(source, tokenizer)  # the run goes on
    assert got.train and "could not be kept" in said[-1] and "No space left" in said[-1]
    assert list(kept.place().iterdir()) == []


def test_two_that_write_the_same_do_not_disturb_one_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "x"
    with atomic.file(path) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with atomic.file(path) as theirs:
            theirs.write_text("theirs")
        assert path.read_text() == "theirs"
    assert path.read_text() == "mine" and [p.name for p in folder.iterdir()] == ["x"]


def test_what_is_unused_the_longest_makes_room(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [write(folder / f"{i}.jsonl", ROWS) for i in range(3)]
    for i, source in enumerate(sources):
        ask(source, tokenizer)
        os.utime(max(kept.entries(), key=lambda p: p.stat().st_mtime), (i, i))
    size = sum(p.stat().st_size for p in kept.entries()) // 3
    assert hit(ask(sources[0], tokenizer)[1])  # used now, so 1 is the oldest
    monkeypatch.setenv("LUTHIER_DATA_CACHE_GB", str(3.5 * size / 1e9))
    ask(write(folder / "new.jsonl", ROWS), tokenizer)
    assert [hit(ask(s, tokenizer)[1]) for s in (sources[0], sources[2])] == [True, True]
    assert len(kept.entries()) == 3
    monkeypatch.setenv("LUTHIER_DATA_CACHE_GB", "0")
    assert "LUTHIER_DATA_CACHE_GB allows 0" in ask(sources[1], tokenizer)[1][-1]
    monkeypatch.setenv("LUTHIER_DATA_CACHE_GB", "lots")
    with pytest.raises(LuthierError, match="LUTHIER_DATA_CACHE_GB=lots"):
        kept.most()
    assert kept.clear()[0] == 3 and kept.entries() == []
