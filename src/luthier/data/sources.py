"""Where data is: files, folders of files and Hub data sets, opened as records."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..core import LuthierError
from .formats import SUFFIXES, Bad, Record, read_file, suffix_of
from .trees import whole_trees

_NOT_DATA = {"dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json", "readme.md", "license.txt", "license.md"}
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def read(source: str, *, bad: Bad, split: str = "train", stream: bool = False) -> Iterator[Record]:
    """The records of a file, of a folder of files, or of a split of a Hub data set. ``stream``: of the latter as they come, without a copy on this machine."""
    files = files_of(source, split)
    if files is None:
        yield from whole_trees(_hub(source, split, stream), bad)
        return
    for path in files:
        yield from read_file(path, bad=bad)


def files_of(source: str, split: str = "train") -> list[Path] | None:
    """The files a source stands for, sorted; None for a Hub data set id. Refuses what is missing, empty or of an unknown kind."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, split)
    if not path.exists():
        if _looks_like_hub_id(source):
            return None
        raise LuthierError(f"{source}: no such file or folder.{_nearest(path)}")
    if suffix_of(path) not in SUFFIXES:
        raise LuthierError(f"{source}: cannot tell what kind of file this is. Accepted: {' '.join(SUFFIXES)}. Rename it by what it holds.")
    if path.stat().st_size == 0:
        raise LuthierError(f"{source}: the file is empty (0 bytes). Check that it was written completely.")
    return [path]


def splits_of(folder: Path) -> dict[str, list[Path]]:
    """Data files below a folder by the split their names tell (train.jsonl, test-00000-of-00002.parquet, TREC.train.all); "": the others."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file() or suffix_of(path) not in SUFFIXES or path.name.lower() in _NOT_DATA:
            continue
        words = re.split(r"[-_.]", path.name.lower().removesuffix(".gz").rpartition(".")[0])
        found.setdefault(_SPLIT_NAMES.get(words[0]) or _SPLIT_NAMES.get(words[-1], ""), []).append(path)
    return found


def _folder(folder: Path, split: str) -> list[Path]:
    """Where file names tell splits, only the asked one is read: reading a folder must never train on its test file."""
    found = splits_of(folder)
    if not found:
        raise LuthierError(f"{folder}: no data file in this folder or below it. Accepted: {' '.join(SUFFIXES)}.")
    wanted = _SPLIT_NAMES.get(split, split)
    if set(found) == {""}:
        files = found[""]
    elif wanted in found:
        files = found[wanted]
    else:
        names = ", ".join(sorted(k or "other files" for k in found))
        raise LuthierError(f"{folder}: holds no file for the split {split!r}; found: {names}. Name the file itself, or set data.split.")
    files = [f for f in files if f.stat().st_size]
    if not files:
        raise LuthierError(f"{folder}: every data file for the split {split!r} is empty (0 bytes).")
    return files


def _looks_like_hub_id(source: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source)) and not source.startswith(".") and suffix_of(Path(source)) not in SUFFIXES


def _nearest(path: Path) -> str:
    """' Did you mean ...?' with the most similar name in the folder, or what that folder lacks."""
    folder = path.parent
    if not folder.is_dir():
        return f" The folder {folder} does not exist either."
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() or suffix_of(p) in SUFFIXES)
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {folder / near[0]}?"
    return f" In that folder: {', '.join(names[:8]) or 'no data file'}."


def _hub(source: str, split: str, stream: bool) -> Iterator[Record]:
    import datasets

    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split, **({"streaming": True} if stream else {}))
    except Exception as e:  # every layer below (files, network, scripts) has errors of its own
        raise LuthierError(f"{source}: {_hub_reason(name, split, e)}") from None
    for i, row in enumerate(rows):
        yield Record(dict(row), f"{source}[{split}]:{i}")


def _hub_reason(name: str, split: str, e: Exception) -> str:
    """One sentence for what went wrong; the libraries' own texts run over pages."""
    text = f"{type(e).__name__}: {e}"
    here = "No file or folder of this name is here, so it was taken for a Hub data set id"
    offline = os.environ.get("HF_HUB_OFFLINE") == "1" or os.environ.get("HF_DATASETS_OFFLINE") == "1"
    if "Unknown split" in text:
        return f"the data set has no split {split!r} ({str(e).splitlines()[0][:200]}). Set data.split."
    if "Config name is missing" in text or "BuilderConfig" in text:
        return f"the data set has several configurations; name one as {name}:CONFIG. ({' '.join(str(e).split())[:300]})"
    if "gated" in text.lower() or "401" in text or "403" in text:
        return "the data set is private or asks for consent on its page; accept its terms there and log in with `hf auth login`."
    if any(k in text for k in ("ConnectionError", "OfflineMode", "LocalEntryNotFound", "Couldn't reach", "ConnectError", "Max retries")) or offline:
        return f"{here}, and the Hub cannot be reached from this machine. Check the name, or give a file."
    if "DatasetNotFound" in text or "doesn't exist" in text:
        return f"{here}, and the Hub has none of that name. Check the name."
    return f"{here}, and loading it failed ({' '.join(text.split())[:300]})."
