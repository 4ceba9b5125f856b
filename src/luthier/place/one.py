"""One device: CPU, CUDA or Apple's MPS, by the same code."""

from __future__ import annotations

from dataclasses import dataclass

from ..devices.device import OnDevice


@dataclass(frozen=True, kw_only=True)
class Place(OnDevice):
    """Everything on one device of this process."""
