"""Faster equal forms of what `build.assemble` put together: each piece recognises what it knows, is tried against the plain form, and is left out where it
differs. Nothing here changes a result by more than the order of rounding; each piece has a switch in the section ``speed`` of a run.
"""

from __future__ import annotations

from typing import Any

from . import lora


def install(policy: Any, settings: Any) -> list[str]:
    """Put the faster forms that ``settings`` (run.Speed) allow into a policy whose deltas are attached, before it is moved to its place.

    Returns what to say of it. Calling it again with other settings replaces what was put before.
    """
    remove(policy)
    notes: list[str] = []
    if settings.lora == "auto":
        notes += lora.install(policy)
    return notes


def remove(policy: Any) -> None:
    """Back to the plain forms."""
    lora.remove(policy)
