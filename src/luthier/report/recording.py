"""What a run writes so that it can be told of later: facts.json when it begins, failed.json where it ends in an error.

The rest of what the report shows is in run.yaml, metrics.jsonl, samples.jsonl, environment.json and result.json already.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, atomic, counts
from ..core import Row, examples_of
from ..data.preview import pieces
from ..errors import Interrupted
from ..policy import Policy
from ..settings.config import plain, spelled
from ..settings.plugins import kind_of
from ..settings.run import Run
from .facts import FACTS, FAILED

EXAMPLES = 3  # rows that are shown with their trained tokens
ANSWERS = 4  # at most so many answers of a judged row
NAMES = ("name", "out")  # settings that are told elsewhere


def begin(folder: Path, asked: Run, run: Run, policy: Policy, train: list[Row], data: Mapping[str, Any], **more: Any) -> None:
    """Write facts.json. ``asked``: the run before its defaults were resolved; ``more``: other facts, JSON only.

    A run that goes on keeps what was asked at first.
    """
    base = policy.base
    trained, whole = counts.total(policy)
    earlier = _read(folder / FACTS)
    told = {
        "luthier": __version__,
        "began": earlier.get("began") or datetime.now().isoformat(timespec="seconds"),
        "process": {"id": os.getpid(), "host": platform.node()},
        "asked": earlier.get("asked") if earlier.get("asked") is not None else dict(changed(asked)),
        "base": {
            "source": base.source,
            "revision": base.revision,
            "hash": base.hash,
            "family": base.anatomy.family,
            "kind": base.anatomy.kind,
            "parameters": whole,
            "positions": base.max_positions,
        },
        "trained": trained,
        "whole": whole,
        "modules": [asdict(c) for c in counts.table(policy)],
        "examples": [shown(train[i * len(train) // EXAMPLES], base.tokenizer, data) for i in range(min(EXAMPLES, len(train)))],
        **more,
    }
    atomic.as_json(folder / FACTS, told)
    (folder / FAILED).unlink(missing_ok=True)


def fail(folder: Path, error: BaseException) -> None:
    """Say in a run's folder that it goes on no more and, unless the user stopped it, with which sentence it ended: failed.json."""
    with suppress(OSError, ValueError):  # what went wrong first is what is told
        if told := _read(folder / FACTS):
            atomic.as_json(folder / FACTS, told | {"process": None})
        if not isinstance(error, Interrupted | KeyboardInterrupt):
            atomic.as_json(folder / FAILED, {"error": str(error) or type(error).__name__, "at": datetime.now().isoformat(timespec="seconds")})


def changed(settings: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every setting that is not its default. A plug-in of another kind than the default is compared with the defaults of its own kind."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        key = f"{path}{spelled(f.name)}"
        if key in NAMES:
            continue
        if dataclasses.is_dataclass(value):
            if isinstance(default, str) and kind_of(value) != default:
                yield f"{key}.kind", kind_of(value)
            yield from changed(value, f"{key}.")
        elif value != default and f.init:
            yield key, plain(settings)[spelled(f.name)]


def shown(row: Row, tokenizer: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the report shows it: {"where", "parts": [{"said", "text": [[text, trained or null where tokens are left out], ...]}]}."""
    parts = []
    for i, example in enumerate(examples_of(row)[:ANSWERS]):
        source = example.extras.get("source")
        if isinstance(source, np.ndarray):
            parts.append({"said": f"what the encoder reads: {len(source):,} tokens", "text": pieces(Row(source, np.zeros(len(source), dtype=bool)), tokenizer)})
        said = f"{len(example):,} tokens, {int(example.train.sum()):,} trained"
        if ranks := row.extras.get("ranks"):
            said = f"answer {i + 1}, judged {ranks[i] + 1} of {max(ranks) + 1}: {said}"
        if "label" in row.extras:  # no token is a target
            said = f"{len(example):,} tokens, label {_label(row.extras['label'], data)}"
            example = Row(example.ids, np.zeros(len(example), dtype=bool))
        parts.append({"said": said, "text": pieces(example, tokenizer)})
    return {"where": row.where, "parts": parts}


def _label(label: Any, data: Mapping[str, Any]) -> str:
    names = data.get("labels")
    if data.get("problem") == "regression" or not names:
        return str(label)
    if isinstance(label, int | np.integer):
        return str(names[int(label)])
    return ", ".join(str(n) for n, is_one in zip(names, label, strict=False) if is_one) or "none"


def _read(path: Path) -> dict[str, Any]:
    """A JSON file that may be missing or damaged, as a mapping."""
    with suppress(OSError, ValueError):
        told = json.loads(path.read_text(encoding="utf-8"))
        return told if isinstance(told, dict) else {}
    return {}
