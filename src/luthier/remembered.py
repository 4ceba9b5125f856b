"""What a saved head says of two fixed conversations, kept beside it and asked again whenever it is opened.

Weights, head, base and template can each be right and still not belong together: a head from another run, a base that was trained on, a template that was
changed. Then a reward model or a classifier answers, and means nothing. So its answers to a pair that is the same everywhere are saved with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .core import LuthierError
from .data.labels import Labelled
from .data.preferences import Judged
from .data.shapes import Chat
from .measuring.measure import predict_texts, rewards
from .saving.adapter import OURS
from .settings.plugins import kind_of

KEY = "remembered"  # in luthier.json
ASKED = "How was the weather yesterday?"
ANSWERS = ("It rained in the morning, and the sun came out after noon.", "Weather the was. No no no.")
SAME, OTHER = 0.02, 0.2  # of a score's size (at least 1), by which it may move: in the precision it was saved in, and in another one


def told(policy: Any, template: str | None) -> dict[str, Any] | None:
    """What to keep of a policy with a head: its scores (or the logits' probabilities) of the pair; None where it has no such head, or cannot read the pair."""
    if not policy.heads:
        return None
    with suppress(LuthierError):  # a template that wants more than a question and an answer
        return {"precision": kind_of(policy.base.precision), "template": template, "says": _says(policy, template)}
    return None


def recall(policy: Any, folder: Path) -> None:
    """Ask again. Raises LuthierError where the answers are not those that were saved; nothing is asked of files that remember nothing."""
    kept = _kept(folder)
    if kept is None or not policy.heads:
        return
    now, before = _says(policy, kept["template"]), kept["says"]
    room = SAME if kind_of(policy.base.precision) == kept["precision"] else OTHER
    if len(now) != len(before) or any(abs(a - b) > room * max(1.0, abs(b)) for a, b in zip(now, before, strict=True)):
        raise LuthierError(
            f"{folder}: this head does not answer as it did when it was saved: of two fixed texts it said {_numbers(before)}, and says {_numbers(now)} now; "
            "its base, its delta, its head or its chat template is another one. Copy the whole folder again, and name the base it was trained on (--model)"
        )


def _says(policy: Any, template: str | None) -> list[float]:
    if getattr(policy.objective, "renders", "") == "ranked":
        asked = {"role": "user", "content": ASKED}
        pair = Judged(tuple(Chat([asked, {"role": "assistant", "content": a}]) for a in ANSWERS), 1, (0, 1), where="the pair that is remembered")
        return rewards(policy, [pair], template=template)[0]
    found = predict_texts(policy, [Labelled((a,), None) for a in ANSWERS])
    return [float(v) for said in found for v in _floats(said)]


def _floats(said: Mapping[str, Any]) -> list[float]:
    """The numbers of a prediction: probabilities by label, or the value of a regression."""
    if isinstance(found := said.get("probabilities"), Mapping):
        return list(found.values())
    return [said["label"]] if isinstance(said["label"], int | float) else []


def _kept(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] | None = json.loads((folder / OURS).read_text()).get(KEY)
    except (OSError, ValueError):  # another program's folder; what is damaged is said elsewhere
        return None
    return found


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{v:.4g}" for v in values)
