"""The peers, a file for each kind of trainer: settings as they come, settings to try for the tuned column, and the run itself.

What the columns share, because the workload says so: rows of a step and their order, number of steps, learning rate (constant), AdamW without weight
decay. Nothing is logged, saved or drawn meanwhile. "equal": False in a setting: shown, never chosen, because the work is not the same.
"""

from __future__ import annotations

from types import ModuleType

from ..workload import Workload


def of(work: Workload) -> ModuleType:
    """The module of the peer that a workload is compared with."""
    from . import classify, dpo, sft

    return {"dpo": dpo, "classify": classify}.get(work.kind, sft)
