"""Facts stated correctly in restaurant descriptions (E2E, Novikova et al., 2017): a task, and so a metric and a reward.

    luthier eval runs/NAME --data e2e/test_multiref.jsonl --task ./recipes/rlhf/facts.py
    objective.rewards={./recipes/rlhf/facts.py: 1.0}

Only what restaurants are described with word for word is checked: name, kind, food, area and the place nearby.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CHECKED = ("name", "eatType", "food", "area", "near")
OTHERS = {  # values that may be stated wrongly
    "eatType": ("coffee shop", "pub", "restaurant"),
    "food": ("japanese", "italian", "fast food", "french", "indian", "english", "chinese"),
    "area": ("riverside", "city centre"),
}


def slots(mr: str) -> dict[str, str]:
    """What a meaning representation says: name[The Eagle], food[Japanese] -> {"name": "The Eagle", "food": "Japanese"}."""
    return {k.strip(): v for k, v in re.findall(r"([\w ]+)\[([^\]]*)\]", mr)}


def judge(mr: str, answer: str) -> tuple[int, int, int]:
    """(facts to state, facts stated, facts stated wrongly). A restaurant may always be called one."""
    said, text = slots(mr), re.sub(r"\s+", " ", answer.lower())
    wanted = {k: said[k].lower() for k in CHECKED if k in said}
    stated = sum(v in text for v in wanted.values())
    wrong = 0
    for k, values in OTHERS.items():
        rest = text
        for v in said.values():  # a restaurant near "Burger King" or called "The Golden Curry" names no food
            rest = rest.replace(v.lower(), " ")
        wrong += sum(v in rest for v in values if v != wanted.get(k) and v != "restaurant")
    return len(wanted), stated, wrong


class Task:
    """facts: the share of facts that are stated, less one share for each stated wrongly. all_right: 1 where all are stated and none wrongly."""

    lower_is_better = frozenset({"wrong"})

    def rows(self, split: str) -> list[dict[str, Any]]:
        """None of its own: it scores the run's data."""
        return []

    def score(self, row: Mapping[str, Any], answer: str) -> dict[str, float]:
        """Of one answer to a row that holds the meaning representation, as its column mr or as its question."""
        prompt = row["prompt"]
        n, stated, wrong = judge(row.get("mr") or (prompt if isinstance(prompt, str) else prompt[-1]["content"]), answer)
        return {"facts": (stated - wrong) / n, "all_right": float(stated == n and not wrong), "wrong": float(wrong)}
