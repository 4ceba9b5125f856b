"""luthier data cache, and a run that finds its data again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier import cli
from luthier.data import kept


def test_a_file_is_prepared_once_shown_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LUTHIER_DATA_CACHE_GB", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "pubs.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Which pub is number {i}?", "completion": f"The Vaults {i}."}) + "\n" for i in range(30)))
    ask = ["data", "preview", str(file), "data.cache=yes", "--rows", "1"]

    assert cli.main(["data", "cache"]) == 0
    assert "nothing is kept" in capsys.readouterr().out
    assert cli.main(ask) == 0
    first = capsys.readouterr().out
    assert cli.main(ask) == 0
    again = capsys.readouterr().out
    assert "kept for the next time" in first and "read as it was prepared on" in again
    assert first.splitlines()[-8:] == again.splitlines()[-8:]
    assert cli.main(["data", "cache"]) == 0
    shown = capsys.readouterr().out
    assert str(file) in shown and "chat" in shown and "30" in shown and "of at most 10 GB" in shown
    assert cli.main(["data", "cache", "--clear"]) == 0
    assert "1 files deleted" not in capsys.readouterr().out
    assert kept.entries() == []
