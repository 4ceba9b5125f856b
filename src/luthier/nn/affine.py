"""Weights as small integers with a scale and a zero for each group of input channels: w = scale (q - zero), packed into 32-bit words.

The layout is the one GPTQ files have: for a weight (out, in) with groups of G inputs and b bits a code

    qweight (in b / 32, out) int32    the codes of a column's inputs, one behind the other from the lowest bit up
    qzeros (in / G, out b / 32) int32 the zeros of a row's outputs, likewise; "v1" files hold zero - 1 (modulo 2^b), "v2" files the zero
    scales (in / G, out) float16
    g_idx (in,) int32                 the group of each input

With 3 bits a code may lie in two words: 32 codes take three. AWQ's files (its "GEMM" layout) pack both along the outputs and in another order (`from_awq`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output, of eight neighbours, whose code lies at bits 4k: even ones in a word's lower half, odd ones in its upper
_BF16_128 = 0x4300  # bfloat16 128.0, whose mantissa counts in ones: its bits or'ed with q are those of 128 + q, for q < 128


def per_words(bits: int) -> tuple[int, int]:
    """(codes, words): the fewest codes that fill whole words."""
    shared = math.gcd(32, bits)
    return 32 // shared, bits // shared


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) integers of ``bits`` bits to (rows bits / 32, columns) int32 words, down each column."""
    count, words = per_words(bits)
    parts = codes.to(torch.int64).view(-1, count, codes.shape[1])
    out = torch.zeros(len(parts), words, codes.shape[1], dtype=torch.int64, device=codes.device)
    for j in range(count):
        word, at = divmod(j * bits, 32)
        out[:, word] |= parts[:, j] << at
        if at + bits > 32:
            out[:, word + 1] |= parts[:, j] >> (32 - at)
    return out.to(torch.int32).view(-1, codes.shape[1])  # what lies above 32 bits falls off


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: (words, columns) int32 to (words 32 / bits, columns) int32."""
    count, words = per_words(bits)
    mask = (1 << bits) - 1
    parts = packed.view(-1, words, packed.shape[1])
    out = torch.empty(len(parts), count, packed.shape[1], dtype=torch.int32, device=packed.device)
    for j in range(count):
        word, at = divmod(j * bits, 32)
        low = parts[:, word] >> at  # the sign is carried down; the mask takes it off
        if at + bits > 32:
            low = (low & ((1 << (32 - at)) - 1)) | (parts[:, word + 1] << (32 - at))
        torch.bitwise_and(low, mask, out=out[:, j])
    return out.view(-1, packed.shape[1])


def pack_zeros(zeros: Tensor, bits: int, *, minus_one: bool) -> Tensor:
    """(groups, out) zeros to ``qzeros``; ``minus_one``: as v1 files have them."""
    return pack((zeros.to(torch.int64) - int(minus_one)).remainder(1 << bits).t(), bits).t().contiguous()


def unpack_zeros(qzeros: Tensor, bits: int, *, minus_one: bool) -> Tensor:
    """``qzeros`` to (groups, out) int32."""
    return (unpack(qzeros.t().contiguous(), bits) + int(minus_one)).remainder(1 << bits).t().contiguous()


def from_awq(qweight: Tensor, qzeros: Tensor, bits: int = 4) -> tuple[Tensor, Tensor]:
    """AWQ's qweight (in, out / 8) and qzeros (groups, out / 8) to ``qweight`` and v2 ``qzeros`` of the layout above. Bit for bit; 4 bits only."""
    codes, zeros = (unpack(t.t().contiguous(), bits) for t in (qweight, qzeros))  # (out, ...), every eight in AWQ's order
    place = torch.tensor(AWQ_ORDER, device=qweight.device).argsort()
    usual = [t.view(-1, len(AWQ_ORDER), t.shape[1])[:, place].reshape(t.shape) for t in (codes, zeros)]
    return pack(usual[0].t().contiguous(), bits), pack_zeros(usual[1].t(), bits, minus_one=False)


def short(scales: Tensor) -> bool:
    """Whether every scale has at most 8 significant bits, so that bfloat16 holds it too."""
    return bool((scales.to(torch.bfloat16).float() == scales.float()).all())


def decode(qweight: Tensor, zeros: Tensor, scales: Tensor, bits: int, dtype: torch.dtype, *, groups: Tensor | None = None, exact: bool = True) -> Tensor:
    """(in, out): the weight's transpose, rounded once to ``dtype``. ``zeros`` (groups, out) as `unpack_zeros` gives them.

    ``groups`` (in,): the group of each input, where they are not in order; ``exact=False``: scales are known to be `short`, which saves work in bfloat16.
    """
    if dtype == torch.bfloat16 and bits in (2, 4) and (not exact or scales.dtype == torch.float16):
        return _decode_bf16(qweight, zeros, scales, bits, groups, exact)
    n_in, n_out = qweight.shape[0] * 32 // bits, qweight.shape[1]
    values = unpack(qweight, bits).float()
    if groups is None:
        values = values.view(len(scales), -1, n_out).sub_(zeros[:, None]).mul_(scales.float()[:, None])
    else:
        values.sub_(zeros[groups]).mul_(scales.float()[groups])
    return values.view(n_in, n_out).to(dtype)


def _decode_bf16(qweight: Tensor, zeros: Tensor, scales: Tensor, bits: int, groups: Tensor | None, exact: bool) -> Tensor:
    """In bfloat16 throughout, a part that fits the cache at a time, and still rounded once.

    q - zero is a small integer and exact. A float16 scale is high + low, with high its rounding to bfloat16 and low of at most 3 bits, so low (q - zero) is
    exact too, and the sum of both products is rounded once, inside addcmul.
    """
    words, n_out = qweight.shape
    count, mask = 32 // bits, (1 << bits) - 1
    high = scales.to(torch.bfloat16)
    low = (scales.float() - high.float()).to(torch.bfloat16) if exact else None
    offset = (zeros + 128).to(torch.bfloat16)
    in_order = groups is None and words % len(scales) == 0  # a word's inputs are of one group
    if groups is None and not in_order:
        groups = torch.arange(words * count, device=qweight.device) // (words * count // len(scales))
    shape = (len(scales), -1, n_out) if in_order else (words, 1, n_out)
    made = torch.empty(*shape[:1], words // shape[0], count, n_out, dtype=torch.bfloat16, device=qweight.device)
    halves = qweight.view(torch.int16).view(words, n_out, 2)
    codes, spare = torch.empty(words, n_out, dtype=torch.int16, device=qweight.device), None
    values = codes.view(torch.bfloat16).view(shape)
    for j in range(count):
        side, k = divmod(j, count // 2)
        if k == 0:
            half = halves[..., side].contiguous()
        torch.bitwise_right_shift(half, bits * k, out=codes)
        codes.bitwise_and_(mask).bitwise_or_(_BF16_128)
        rows = slice(None) if in_order or groups is None else groups.view(words, count)[:, j]
        values.sub_(offset[rows][:, None])
        if low is None:
            torch.mul(values, high[rows][:, None], out=made[:, :, j])
        else:
            spare = torch.mul(values, low[rows][:, None], out=spare)
            torch.addcmul(spare, values, high[rows][:, None], out=made[:, :, j])
    return made.view(-1, n_out)
