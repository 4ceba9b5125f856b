"""Prepared data kept on disk, under a digest of everything it depends on: the same again is read in a fraction of the time.

What the digest covers:
1. The whole content of every file that is read, in its order, with its name (rows say where they come from). Sizes and times of files are not looked at: a
   file that was changed within its size and its second is still another file. After reading, the files are digested once more, and data whose files changed
   meanwhile is not kept.
2. Every setting of `prepare` except who is told, taken from its signature, so that a new one is covered without a word here.
3. The tokenizer as it is serialised, with its special tokens, how it is called, and the code of its class.
4. The text of the chat template; the day, where a template asks for the time.
5. The code that reads and renders (the text of these files), and the versions of Python and of the libraries that it uses.

Not kept are data of the Hub (whose content is not known before it is read), data under tokenizers that cannot be serialised and templates that roll dice, and
records with values that would not come back as they were. Files are safetensors with JSON inside, never pickles; each carries a digest of its own content, and
one that does not agree with it is read anew and replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import inspect
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from .. import atomic
from ..core import LuthierError
from . import rowfile
from .codec import Codec
from .counting import Say
from .prepare import Prepared, beside, prepare
from .rowfile import Damaged, Unkeepable
from .sources import files_of
from .templates import Template

Keep = Literal["auto", "yes", "no"]
WORTH = 2**20  # bytes of data from which auto keeps: less is read in a second or so
MOST_GB = 10.0  # 10^9 bytes: all that is kept, where LUTHIER_DATA_CACHE_GB says nothing else
LIBRARIES = ("numpy", "tokenizers", "transformers", "jinja2", "pyarrow")
UNLIKE = ("tokenizer", "say", "progress")  # of prepare's parameters: those that are no settings
STATE = ("truncation_side", "padding_side", "model_max_length", "split_special_tokens", "clean_up_tokenization_spaces")
_SIMPLE = (str, int, float, bool, type(None))


def prepare_or_read(
    sources: Sequence[str], tokenizer: Any, *, keep: Keep, say: Say, progress: Callable[[int], None] | None = None, **settings: Any
) -> Prepared:
    """`prepare`, or what it came to the last time where nothing it depends on has changed; what it said then is said again.

    ``keep`` auto: from a million bytes of data up; yes: always, and where that cannot be it is said why; no: neither read nor written.
    """
    work = lambda tell: prepare(sources, tokenizer, say=tell, progress=progress, **settings)  # noqa: E731
    if keep == "no" or settings.get("stream") is not None or (keep == "auto" and most() == 0):  # a stream is read as it is drawn
        return work(say)
    try:
        given = _given(sources, settings)
        files = _files(given)
        if keep == "auto" and sum(f.stat().st_size for f in files) < WORTH:
            return work(say)
        fixed = _digest(["luthier data", *_surroundings(), _plain(given), _of_tokenizer(tokenizer), _of_template(tokenizer, given["template"])])
        before = [_content(f) for f in files]
    except Unkeepable as e:
        if keep == "yes":
            say(f"data.cache=yes: this data is not kept: {e}")
        return work(say)
    except (LuthierError, OSError):
        return work(say)  # which says what is missing, in its place
    path = place() / f"{_digest([fixed, *before])}.safetensors"
    if (found := _read(path, say)) is not None:
        return found
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        say(line)

    prepared = work(tell)
    if [_content(f) for f in files] == before:
        _write(path, prepared, said, given, say, keep)
    else:
        say("the data's files changed while they were read: not kept")
    return prepared


# --- on disk ----------------------------------------------------------------------------------------------------------


def place() -> Path:
    """The folder of kept data: in LUTHIER_CACHE, or in the user's cache folder."""
    root = os.environ.get("LUTHIER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier"
    return Path(root) / "data"


def most() -> int:
    """How many bytes may be kept in all. Raises LuthierError where LUTHIER_DATA_CACHE_GB is no number."""
    given = os.environ.get("LUTHIER_DATA_CACHE_GB", "")
    try:
        gigabytes = float(given or MOST_GB)
        return int(max(gigabytes, 0) * 1e9)
    except (ValueError, OverflowError):
        raise LuthierError(f"LUTHIER_DATA_CACHE_GB={given}: a number is accepted, the gigabytes of prepared data that are kept; 0 keeps none") from None


def entries() -> list[Path]:
    """What is kept, the longest unused first."""
    found = [(p.stat().st_mtime, p) for p in place().glob("*.safetensors")]
    return [p for _, p in sorted(found)]


def clear() -> tuple[int, int]:
    """Delete all that is kept, and what writes left that were interrupted; (how many, how many bytes)."""
    gone = [(p, p.stat().st_size) for p in [*entries(), *place().glob(".*.tmp")]]
    for path, _ in gone:
        path.unlink(missing_ok=True)
    return len(gone), sum(size for _, size in gone)


def _read(path: Path, say: Say) -> Prepared | None:
    if not path.is_file():
        return None
    try:
        train, validation, held, rest = rowfile.read(path)
        made, said, facts = rest["made"], rest["said"], rest["facts"]
    except (Damaged, KeyError, ValueError, TypeError, IndexError) as e:
        say(f"{path}: this copy of the data is damaged ({e}); the data is read anew, and the copy replaced")
        return None
    with contextlib.suppress(OSError):  # a cache that can only be read serves too
        os.utime(path)  # used now: what is unused the longest goes first
    say(f"read as it was prepared on {made}, since when nothing has changed (data.cache=no prepares it anew); it said:")
    for line in said:
        say(line)
    return Prepared(train, validation, held, facts)


def _write(path: Path, prepared: Prepared, said: list[str], given: Mapping[str, Any], say: Say, keep: Keep) -> None:
    """Write an entry whole or not at all, and make room for it. What goes wrong is said; the run goes on."""
    room = most()
    made = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    rest = {"made": made, "said": said, "facts": prepared.facts}
    about = {"made": made, "data": ", ".join(given["sources"]), "renders": str(given["renders"]), "rows": str(len(prepared.train) + len(prepared.validation))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # it is a copy of the user's data
        with atomic.file(path) as new:
            rowfile.write(new, prepared.train, prepared.validation, prepared.validation_records, rest, about)
            if new.stat().st_size > room:
                raise Unkeepable(f"it takes {new.stat().st_size / 1e9:.1f} GB and LUTHIER_DATA_CACHE_GB allows {room / 1e9:g} in all")
        _make_room(path, room)
        say(f"kept for the next time: {path.stat().st_size / 1e6:,.1f} MB in {path.parent} (luthier data cache shows and clears it)")
    except Unkeepable as e:
        if keep == "yes":
            say(f"data.cache=yes: this data is not kept: {e}")
    except (LuthierError, OSError) as e:
        say(f"the prepared data could not be kept: {e}")


def _make_room(new: Path, room: int) -> None:
    """Delete what is unused the longest until all of it fits, and what interrupted writes left a day ago."""
    for left in place().glob(".*.tmp"):
        if time.time() - left.stat().st_mtime > 86400:
            left.unlink(missing_ok=True)
    sizes = {p: p.stat().st_size for p in entries()}
    total = sum(sizes.values())
    for path, size in sizes.items():
        if total <= room:
            break
        if path != new:
            path.unlink(missing_ok=True)
            total -= size


# --- what data depends on ---------------------------------------------------------------------------------------------


def _given(sources: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of `prepare`, the defaults written out, and the validation files that it would find by itself."""
    bound = inspect.signature(prepare).bind(sources, None, **settings)
    bound.apply_defaults()
    given = {k: v for k, v in bound.arguments.items() if k not in UNLIKE}
    given["validation"] = list(given["validation"] or beside(given["sources"], given["split"], lambda _: None))
    return given


def _files(given: Mapping[str, Any]) -> list[Path]:
    found: list[Path] = []
    for names, split in ((given["sources"], given["split"]), (given["validation"], "validation")):
        for name in names:
            files = files_of(name, split)
            if files is None:
                raise Unkeepable(f"{name} is a Hub data set, which is kept by the library that fetches it")
            found += files
    return found


def _content(file: Path) -> str:
    with file.open("rb") as f:
        return f"{file} {hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=20)).hexdigest()}"


def _plain(value: Any) -> Any:
    """A setting as JSON, such that different settings differ. Raises Unkeepable for what is no plain value."""
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, Mapping):
        return {"mapping": [[_plain(k), _plain(v)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {type(value).__qualname__: [[f.name, _plain(getattr(value, f.name))] for f in dataclasses.fields(value)]}
    raise Unkeepable(f"a setting is of the type {type(value).__name__}")


def _of_tokenizer(tokenizer: Any) -> Any:
    """What a tokenizer does, as far as data is made by it. Raises Unkeepable where it cannot tell."""
    if not tokenizer.is_fast:
        raise Unkeepable(f"the tokenizer {type(tokenizer).__name__} is written in Python and cannot be serialised")
    Codec(tokenizer).reset()  # padding and truncation are a state that tokenizers are left in, and are never on here
    try:
        backend = tokenizer.backend_tokenizer.to_str()
    except Exception as e:  # a part of it is written in Python
        raise Unkeepable(f"the tokenizer cannot be serialised ({type(e).__name__})") from None
    given = {k: v for k, v in tokenizer.init_kwargs.items() if type(v) in _SIMPLE and k != "name_or_path"}
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    state = [
        getattr(tokenizer, k, None) for k in ("truncation_side", "padding_side", "model_max_length", "split_special_tokens", "clean_up_tokenization_spaces")
    ]
    numbers = [getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")]
    cls = type(tokenizer)
    code = inspect.getsourcefile(cls)
    own = "" if code is None else _content(Path(code))
    return [cls.__module__, cls.__qualname__, own, backend, sorted(given.items()), sorted(special.items()), state, numbers, tokenizer.model_input_names]


def _of_template(tokenizer: Any, name: str | None) -> Any:
    template = Template(tokenizer, name)
    texts = [template.source] if template.source is not None else [json.dumps(tokenizer.chat_template, sort_keys=True)]
    if any(re.search(r"\brandom\b", t) for t in texts):
        raise Unkeepable("the chat template chooses by chance")
    today = str(datetime.date.today()) if any("strftime_now" in t for t in texts) else ""
    return [template.name, texts, today]


def _surroundings() -> Iterator[str]:
    """The code that reads and renders, and what it stands on."""
    yield platform.python_version()
    yield from (f"{name} {version(name)}" for name in LIBRARIES)
    yield _code()


@cache
def _code() -> str:
    """A digest of the text of our own files that have a say in it. Raises Unkeepable where they are not there to be read."""
    package = Path(__file__).parents[1]
    files = [*sorted((package / "data").glob("*.py")), package / "core.py", *sorted((package / "nn").glob("*.py"))]
    if not files or not all(f.is_file() for f in files):
        raise Unkeepable("the program's own files cannot be read")
    return _digest(f"{f.name} {hashlib.blake2b(f.read_bytes()).hexdigest()}" for f in files)


def _digest(parts: Iterable[Any]) -> str:
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        text = json.dumps(part).encode()
        h.update(len(text).to_bytes(8, "little") + text)
    return h.hexdigest()
