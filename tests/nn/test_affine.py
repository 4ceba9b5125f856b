"""Codes in 32-bit words, and what they stand for."""

import numpy as np
import pytest
import torch

from luthier.nn import affine

BITS = (2, 3, 4, 8)


def made(bits, n_in=64, n_out=96, groups=4, seed=0, short=False):
    """Random codes (in, out), zeros and scales (groups, out), and the group of each input."""
    g = torch.Generator().manual_seed(seed)
    codes, zeros = (torch.randint(0, 1 << bits, (n, n_out), generator=g) for n in (n_in, groups))
    scales = (torch.rand(groups, n_out, generator=g) * 0.01 + 1e-3).half()
    return codes, zeros, scales.bfloat16().half() if short else scales, torch.arange(n_in) // (n_in // groups)


def bit_by_bit(column, bits):
    """32-bit words of numbers written one behind the other, from the lowest bit up: one large number, cut into words."""
    whole = sum(int(q) << (bits * i) for i, q in enumerate(column))
    words = [(whole >> 32 * w) & 0xFFFFFFFF for w in range(len(column) * bits // 32)]
    return np.array(words, dtype=np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_one_behind_the_other_from_the_lowest_bit_up(bits):
    codes, zeros, _, _ = made(bits)
    packed = affine.pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (64 * bits // 32, 96)
    for o in range(96):
        assert (packed[:, o].numpy() == bit_by_bit(codes[:, o], bits)).all()
    assert torch.equal(affine.unpack(packed, bits), codes.int())
    qzeros = affine.pack_zeros(zeros, bits, minus_one=False)
    assert qzeros.shape == (4, 96 * bits // 32) and (qzeros[2].numpy() == bit_by_bit(zeros[2], bits)).all()


@pytest.mark.parametrize("bits", BITS)
def test_version_1_holds_a_zero_less_one_and_0_as_the_largest(bits):
    zeros = torch.arange(32).remainder(1 << bits)[None]
    stored = affine.pack_zeros(zeros, bits, minus_one=True)
    assert (stored[0].numpy() == bit_by_bit((zeros[0] - 1) % (1 << bits), bits)).all()
    assert torch.equal(affine.unpack_zeros(stored, bits, minus_one=True), zeros.int())
    assert torch.equal(affine.unpack_zeros(affine.pack_zeros(zeros, bits, minus_one=False), bits, minus_one=False), zeros.int())


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_values_are_rounded_once(bits, ordered, short):
    """Equal to the last bit to the product in fp64, rounded; with inputs in any order of groups."""
    codes, zeros, scales, groups = made(bits, short=short)
    if not ordered:
        groups = groups[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    slow = (codes - zeros[groups]).double() * scales.double()[groups]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = affine.decode(affine.pack(codes, bits), zeros.int(), scales, bits, dtype, groups=None if ordered else groups, exact=not short)
        assert got.dtype == dtype and torch.equal(got, slow.to(dtype)), dtype


def test_scales_of_any_float_type_and_groups_smaller_than_a_word_decode_too():
    codes, zeros, scales, groups = made(2, groups=8)  # eight inputs a group, sixteen codes a word
    for kept in (scales, scales.bfloat16(), scales.float() * 1.0001):
        slow = (codes - zeros[groups]).double() * kept.double()[groups]
        for dtype in (torch.float32, torch.bfloat16):
            got = affine.decode(affine.pack(codes, 2), zeros.int(), kept, 2, dtype, exact=not affine.short(kept))
            assert torch.equal(got, slow.to(dtype))


def test_short_scales_are_those_that_bfloat16_holds():
    assert affine.short(torch.tensor([1.0, 0.00390625, 255.0]).half()) and not affine.short(torch.tensor([1.0, 257.0]).half())


def test_awq_files_are_rewritten_bit_for_bit():
    """At bits 4k of a word stands the output 0, 2, 4, 6, 1, 3, 5, 7 of its eight, as published in AutoAWQ and read by vLLM's kernels."""
    codes, zeros, _, _ = made(4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def words(numbers):
        out = np.zeros((numbers.shape[0], numbers.shape[1] // 8), dtype=np.uint32)
        for c in range(out.shape[1]):
            for k, o in enumerate(order):
                out[:, c] |= numbers[:, 8 * c + o].numpy().astype(np.uint32) << np.uint32(4 * k)
        return torch.from_numpy(out.view(np.int32))

    qweight, qzeros = affine.from_awq(words(codes), words(zeros))
    assert torch.equal(qweight, affine.pack(codes, 4)) and torch.equal(qzeros, affine.pack_zeros(zeros, 4, minus_one=False))
