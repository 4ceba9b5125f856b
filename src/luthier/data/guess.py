"""What a file is for, told from its columns: for where nobody has said which objective it is meant for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..core import LuthierError
from .formats import Record
from .labels import LABELS, detect_labelled
from .preferences import LABELS as VERDICTS
from .preferences import REJECTED
from .shapes import detect
from .trees import is_tree

OBJECTIVES = {"text": "text", "chat": "sft", "label": "classify", "pairs": "dpo", "judged": "kto"}  # what is rendered: the usual objective for it


def renders_of(records: Sequence[Record], *, columns: Mapping[str, str] | None = None) -> str:
    """Which of OBJECTIVES' keys these records are. Raises LuthierError where no shape fits."""
    there = {name for r in records for name in r.fields}
    mapped = set(columns or ())
    if is_tree(records[0].fields):
        return "chat"
    if mapped & {"chosen", "rejected", "ranked"} or (not mapped and ("ranked" in there or there & set(REJECTED))):
        return "pairs"
    if not mapped and "text" not in there and any(isinstance(r.fields.get(name), bool) for r in records for name in VERDICTS):
        return "judged"
    if mapped & {"label", "pair"}:
        return "label"
    try:
        shape = detect(records, columns=columns)
    except LuthierError:
        try:
            detect_labelled(records, columns=columns)
        except LuthierError:
            pass
        else:
            return "label"
        raise
    return "chat" if not shape.is_text else "label" if not mapped and there & set(LABELS) else "text"
