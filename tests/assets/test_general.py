"""The general text that ships, on which forgetting is measured."""

from pathlib import Path

import luthier

TEXT = (Path(luthier.__file__).parent / "assets" / "general" / "general.txt").read_text(encoding="utf-8")


def test_it_is_ten_to_twenty_kilobytes_of_separate_documents():
    assert 10_000 < len(TEXT.encode()) < 20_000
    documents = TEXT.split("\n<|endoftext|>\n")
    assert len(documents) >= 20 and all(400 < len(d) < 1500 for d in documents)


def test_it_is_varied():
    words = TEXT.lower().split()
    assert len(set(words)) / len(words) > 0.3
