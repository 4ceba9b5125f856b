"""NormalFloat4: weights in codes of four bits, by blocks of 64, and their scales in codes of eight (QLoRA).

Dettmers et al., 2023, arXiv 2305.14314, section 3 and appendix E. A block is stored as its largest absolute value and, for each weight, the nearest of 16
levels, quantiles of the normal distribution that are scaled to [-1, 1].
Double quantisation stores these largest values (less their mean) in blocks of 256 as well, in an 8-bit code whose levels lie evenly in each decade
(Dettmers, 2016, arXiv 1511.04561): 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight instead of 4.5.

Codes, constants, their order in memory and the decoded values are those of bitsandbytes 0.50.2 on the CPU, bit for bit, for weights in float32, bfloat16 and
float16. A value is the float32 product of level and scale, rounded once to the dtype that is asked for. Where we differ:
1. Encoding is the same on every device. bitsandbytes finds 8-bit codes on CUDA by another search, so a scale may there be one level away.
2. Weights that are not finite are refused.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64  # weights that share a scale
NESTED_BLOCK = 256  # scales that share one
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights that are encoded, and of what is decoded
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
CELLS = 32  # of the table that encoding starts from, in each unit: no cell holds two midpoints of neighbouring levels
CHUNK = {"cpu": 1 << 19, "cuda": 1 << 24}  # weights encoded or decoded at a time: what is in memory beside codes and result


class Packed(NamedTuple):
    """A weight of n numbers in codes. Without double quantisation the scales are float32, and nothing is nested."""

    codes: Tensor  # (ceil(n / 2),) uint8: two weights a byte, the first in the high half
    absmax: Tensor  # (blocks,) float32, or uint8 codes
    nested_absmax: Tensor | None = None  # (ceil(blocks / 256),) float32
    nested_offset: Tensor | None = None  # () float32: the mean that was taken off the scales
    nested_map: Tensor | None = None  # (256,) float32: the levels of the scales, where they are not `dynamic_map`


def empty(count: int, *, double: bool, device: torch.device | str = "meta") -> Packed:
    """Codes of the right shapes for so many weights, not filled in."""
    blocks = -(-count // BLOCK)
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=device)
    if not double:
        return Packed(codes, torch.empty(blocks, device=device))
    nested = torch.empty(-(-blocks // NESTED_BLOCK), device=device)
    return Packed(codes, torch.empty(blocks, dtype=torch.uint8, device=device), nested, torch.empty((), device=device))


def bits_per_weight(count: int, *, double: bool) -> float:
    """Bits that a weight of ``count`` numbers takes for each, codes and constants."""
    return 8 * sum(t.nbytes for t in empty(count, double=double) if t is not None) / count


# --- encoding -------------------------------------------------------------------------------------------------------


def encode(weight: Tensor, *, double: bool) -> Packed:
    """The codes of a weight of any shape, read in its order. Raises ValueError where it is not finite. On the meta device: only shapes."""
    if weight.device.type == "meta":
        return empty(weight.numel(), double=double)
    flat, device = weight.detach().reshape(-1), weight.device
    packed = empty(flat.numel(), double=False, device=device)
    whole = flat.numel() // BLOCK * BLOCK
    step = CHUNK.get(device.type, CHUNK["cuda"])
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        blocks = flat[start:stop].float().view(-1, BLOCK)
        absmax = _finite(blocks.abs().amax(1))
        packed.absmax[start // BLOCK : stop // BLOCK] = absmax
        blocks = blocks * absmax.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()[:, None]
        packed.codes[start // 2 : stop // 2] = _two_a_byte(_nearest(blocks.view(-1)))
    if whole < flat.numel():  # the last block is divided by its scale, not multiplied by the reciprocal, as bitsandbytes does
        rest = flat[whole:].float()
        packed.absmax[-1] = _finite(rest.abs().amax()).clamp(min=1e-38)
        unit = rest / packed.absmax[-1].clamp(min=torch.finfo(torch.float32).tiny)  # 1e-38 is 0 where denormal numbers are flushed
        packed.codes[whole // 2 :] = _two_a_byte(_nearest(pad(unit, (0, len(rest) % 2))))
    return _doubled(packed) if double else packed


def _finite(absmax: Tensor) -> Tensor:
    if not bool(absmax.isfinite().all()):
        raise ValueError("it holds values that are not finite")
    return absmax


def _nearest(values: Tensor) -> Tensor:
    """(n,) uint8: the nearest level of each number in [-1, 1]; of two as near, the lower."""
    lowest, midpoints = _cells(values.device)
    code = lowest.index_select(0, ((values + 1) * CELLS).to(torch.int32))
    code += values > midpoints.index_select(0, code.to(torch.int32))
    return code


@cache
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each cell of [-1, 1] the level that is nearest at its left edge, and the midpoint between each level and the next."""
    levels = torch.tensor(LEVELS, device=device)
    midpoints = (levels[:-1] + levels[1:]) / 2
    edges = torch.arange(2 * CELLS + 1, device=device) / CELLS - 1
    return torch.bucketize(edges, midpoints).to(torch.uint8), pad(midpoints, (0, 1), value=2.0)


def _two_a_byte(codes: Tensor) -> Tensor:
    first, second = codes.view(-1, 2).unbind(1)
    return first << 4 | second


def _doubled(packed: Packed) -> Packed:
    """The scales in 8 bits. They are looked up at 65,536 places in [-1, 1], as bitsandbytes does on the CPU."""
    offset = packed.absmax.mean()
    scales = packed.absmax - offset
    blocks = pad(scales, (0, -len(scales) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    unit = (blocks * nested.reciprocal()[:, None]).clamp(-1, 1).nan_to_num(-1.0)  # all scales alike: 0 x inf
    place = ((unit + 1) * 0.5 * 65535 + 0.5).to(torch.int32)
    codes = _places(scales.device).index_select(0, place.view(-1))[: len(scales)]
    return Packed(packed.codes, codes, nested, offset)


@cache
def _places(device: torch.device) -> Tensor:
    levels = dynamic_map(device)
    places = torch.arange(65536, device=device) / 65535 * 2 - 1
    return torch.bucketize(places, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


@cache
def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """(256,) float32, sorted: 0, 1, and of each sign 2^e numbers evenly between 10^(e-7) and 10^(e-6), for e = 0 to 6."""
    levels = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (e - 6)
        levels += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)


# --- decoding -------------------------------------------------------------------------------------------------------


def scales(packed: Packed) -> Tensor:
    """(blocks,) float32: what the levels of each block are multiplied with."""
    if packed.nested_absmax is None or packed.nested_offset is None:
        return packed.absmax
    levels = packed.nested_map if packed.nested_map is not None else dynamic_map(packed.absmax.device)
    values = levels.index_select(0, packed.absmax.to(torch.int32))
    return values * packed.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(values)] + packed.nested_offset


def decode(packed: Packed, count: int, dtype: torch.dtype) -> Tensor:
    """(count,): the weights in order. A byte is looked up as a pair of float32, copied as one 64-bit number."""
    device = packed.codes.device
    out = torch.empty(count, dtype=dtype, device=device)
    scale, pairs = scales(packed), _pairs(device)
    step = CHUNK.get(device.type, CHUNK["cuda"])
    index = torch.empty(min(step // 2, len(packed.codes)), dtype=torch.int32, device=device)
    found = torch.empty(len(index), dtype=torch.int64, device=device)
    for start in range(0, count, step):
        codes = packed.codes[start // 2 : (start + step) // 2]
        n = len(codes)
        torch.index_select(pairs, 0, index[:n].copy_(codes), out=found[:n])
        values = found[:n].view(torch.float32)[: count - start]  # an odd count leaves half a byte
        whole = len(values) // BLOCK * BLOCK
        first = start // BLOCK
        blocks = values[:whole].view(-1, BLOCK).mul_(scale[first : first + whole // BLOCK, None])
        out[start : start + whole].view(-1, BLOCK).copy_(blocks)
        if whole < len(values):
            out[start + whole : count] = values[whole:] * scale[-1]
    return out


@cache
def _pairs(device: torch.device) -> Tensor:
    """(256,) int64: the two levels of each byte, as the bits of two float32."""
    levels = torch.tensor(LEVELS, device=device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1).view(torch.int64).flatten()
