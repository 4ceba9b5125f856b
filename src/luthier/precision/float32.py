"""32-bit floats: exact, and slow where the machine has 16-bit matrix units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Weights and activations in float32."""

    packed: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.float32
