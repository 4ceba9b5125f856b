"""Weights in 8-bit integers with one scale a row: the storage of LLM.int8() (Dettmers et al., 2022, arXiv 2208.07339, section 2).

A row is stored as its largest absolute value and round(127 w / largest). Where we differ from bitsandbytes, whose files these codes fit:
1. It rounds a weight to float16 first; we take it as it is. Weights in float16, and ordinary ones in bfloat16, get the same codes.
2. Activations are not quantised, and no column is treated apart: a product is that of the decoded weight.
3. Weights that are not finite are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights that are encoded, and of what is decoded
CHUNK = 1 << 19  # weights encoded or decoded at a time on a CPU: what is in memory beside codes and result


def bits_per_weight(out_features: int, in_features: int) -> float:
    """Bits that a weight (out, in) takes for each number, codes and scales."""
    return 8 + 32 * out_features / (out_features * in_features)


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (out, in) int8, largest (out,) float32). Raises ValueError where the weight is not finite. On the meta device: only shapes."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    largest = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    if weight.device.type == "meta":
        return codes, largest
    for rows in _chunks(weight):
        part = weight[rows].detach().float()
        largest[rows] = part.abs().amax(1)
        if not bool(largest[rows].isfinite().all()):
            raise ValueError("it holds values that are not finite")
        codes[rows] = (part * (127.0 / largest[rows].clamp(min=1e-36))[:, None]).round_().to(torch.int8)  # 0 / 0 is no integer
    return codes, largest


def decode(codes: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in): the float32 product of code and scale, rounded once, as bitsandbytes computes it when it trains on a CPU."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    scale = (largest * (1.0 / 127.0))[:, None]
    for rows in _chunks(codes):
        out[rows] = codes[rows].float().mul_(scale[rows])
    return out


def _chunks(weight: Tensor) -> list[slice]:
    """Slices of rows; all at once where launching a kernel costs more than memory."""
    out_features, in_features = weight.shape
    step = max(1, CHUNK // in_features) if weight.device.type == "cpu" else out_features
    return [slice(i, i + step) for i in range(0, out_features, step)]
