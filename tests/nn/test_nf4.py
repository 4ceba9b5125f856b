"""NF4 against slow versions of the paper's definitions. Against bitsandbytes: tests/reference/test_bitsandbytes.py."""

from statistics import NormalDist

import pytest
import torch

from luthier.nn import nf4

COUNTS = [1, 2, 63, 64, 65, 128, 700, 64 * 256, 64 * 300 + 5]


def weight(count, seed=0, dtype=torch.float32):
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def slow_scales(packed):
    """The scale of each block, as the paper says it: c1 in 8 bits, times c2, plus the mean."""
    if packed.nested_absmax is None:
        return packed.absmax.tolist()
    levels = nf4.dynamic_map().tolist()
    nested, offset = packed.nested_absmax.tolist(), packed.nested_offset.item()
    return [levels[c] * nested[i // 256] + offset for i, c in enumerate(packed.absmax.tolist())]


def test_the_levels_are_quantiles_of_the_normal_distribution():
    """Appendix E: quantiles from an outermost probability to 1/2, eight above zero and seven below, zero itself, scaled to [-1, 1]."""
    outermost = 0.9677083
    quantiles = lambda n: [NormalDist().inv_cdf(outermost + (0.5 - outermost) * i / n) for i in range(n)]  # noqa: E731
    above, below = quantiles(8), quantiles(7)
    levels = sorted([*(v / above[0] for v in above), 0.0, *(-v / below[0] for v in below)])
    torch.testing.assert_close(torch.tensor(nf4.LEVELS), torch.tensor(levels), atol=2e-7, rtol=0)


def test_the_8_bit_levels_are_256_and_denser_towards_zero_by_decades():
    levels = nf4.dynamic_map()
    assert len(levels) == 256 and bool((levels[1:] > levels[:-1]).all())
    assert levels[127] == 0 and levels[-1] == 1
    for e in range(7):
        inside = ((levels > 10.0 ** (e - 7)) & (levels < 10.0 ** (e - 6))).sum()
        assert int(inside) == 2**e, f"{inside} levels between 1e{e - 7} and 1e{e - 6}"
    torch.testing.assert_close(levels[:127], -levels[128:255].flip(0))


@pytest.mark.parametrize("count", COUNTS)
def test_each_weight_gets_the_level_that_is_nearest(count):
    w = weight(count)
    packed = nf4.encode(w, double=False)
    nibbles = [half for byte in packed.codes.tolist() for half in (byte >> 4, byte & 15)]  # the first in the high half
    for start in range(0, count, 64):
        block = w[start : start + 64].double()
        largest = block.abs().max()
        assert packed.absmax[start // 64] == largest
        distance = (block[:, None] / largest - torch.tensor(nf4.LEVELS, dtype=torch.float64)).abs()
        chosen = distance.gather(1, torch.tensor(nibbles[start : start + len(block)])[:, None]).squeeze(1)
        assert float((chosen - distance.amin(1)).max()) < 1e-7  # a tie may go either way in float32


def test_the_table_that_encoding_starts_from_cannot_miss():
    """A cell holds one midpoint at most, and none lies so near an edge that rounding could put a weight into the wrong cell."""
    levels = torch.tensor(nf4.LEVELS, dtype=torch.float64)
    midpoints = (levels[1:] + levels[:-1]) / 2
    cells = (midpoints + 1) * nf4.CELLS
    assert len(cells.floor().unique()) == len(midpoints)
    assert float((cells - cells.round()).abs().min()) > 1e-3


def test_weights_beside_each_midpoint_go_to_their_sides():
    levels = torch.tensor(nf4.LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    for shift, side in ((-1e-6, 0), (1e-6, 1)):
        w = torch.cat([midpoints + shift, torch.tensor([1.0])])  # 16 weights: one block whose scale is 1
        found = nf4.encode(w, double=False).codes
        nibbles = torch.stack([found >> 4, found & 15], 1).flatten()
        assert nibbles[:15].tolist() == [i + side for i in range(15)]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("count", COUNTS)
def test_a_value_is_level_times_scale_rounded_once(count, double):
    packed = nf4.encode(weight(count), double=double)
    scales = torch.tensor(slow_scales(packed), dtype=torch.float64).float()
    torch.testing.assert_close(nf4.scales(packed), scales, rtol=1e-6, atol=1e-9)
    nibbles = torch.stack([packed.codes >> 4, packed.codes & 15], 1).flatten()[:count].tolist()
    exact = torch.tensor([nf4.LEVELS[c] for c in nibbles]) * nf4.scales(packed).repeat_interleave(64)[:count]
    for dtype in nf4.DTYPES:
        assert torch.equal(nf4.decode(packed, count, dtype), exact.to(dtype))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("count", [64 * 40 + 5, 64 * 32, 6])
def test_working_in_chunks_changes_nothing(monkeypatch, count, double):
    w = weight(count)
    whole = nf4.encode(w, double=double)
    values = nf4.decode(whole, count, torch.bfloat16)
    monkeypatch.setitem(nf4.CHUNK, "cpu", 512)
    parts = nf4.encode(w, double=double)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True) if a is not None)
    assert torch.equal(nf4.decode(whole, count, torch.bfloat16), values)


def test_double_quantisation_moves_a_scale_by_less_than_a_hundredth_of_their_spread():
    w = weight(64 * 1000) * torch.linspace(0.5, 2, 1000).repeat_interleave(64)
    exact, coded = nf4.encode(w, double=False).absmax, nf4.scales(nf4.encode(w, double=True))
    spread = (exact - exact.mean()).abs().max()
    assert 0 < float((exact - coded).abs().max()) < 0.01 * spread


def test_normal_weights_lose_less_than_in_16_even_levels():
    """What NF4 is for (section 3, and table 2 of the paper: NF4 before Int4 and FP4)."""
    w = weight(64 * 2000)
    blocks = w.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    even = ((blocks / scale).round() * scale - blocks).square().mean().sqrt()
    normal = (nf4.decode(nf4.encode(w, double=True), len(w), torch.float32) - w).square().mean().sqrt()
    assert float(normal) < 0.93 * float(even)
    assert 0.085 < float(normal) / 0.05 < 0.10  # nine hundredths of the standard deviation


def test_what_it_takes_a_weight_is_what_the_paper_counts():
    """8/64 + 32/(64 x 256) = 0.127 bits of constants with double quantisation, 32/64 = 0.5 without (section 3)."""
    count = 4096 * 4096
    assert nf4.bits_per_weight(count, double=True) == pytest.approx(4.127, abs=5e-4)
    assert nf4.bits_per_weight(count, double=False) == pytest.approx(4.5, abs=1e-5)
    assert 16 / nf4.bits_per_weight(count, double=True) >= 3.8
    assert nf4.bits_per_weight(count, double=True) / 8 == pytest.approx(0.516, abs=5e-4)
    packed = nf4.encode(weight(64 * 1024), double=True)
    assert nf4.bits_per_weight(64 * 1024, double=True) == 8 * sum(t.nbytes for t in packed if t is not None) / (64 * 1024)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("count", COUNTS)
def test_meta_weights_have_codes_of_the_same_shapes(count, double):
    real, meta = nf4.encode(weight(count), double=double), nf4.encode(weight(count).to("meta"), double=double)
    for a, b in zip(real, meta, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (b.device.type == "meta" and a.shape == b.shape and a.dtype == b.dtype)
    assert nf4.decode(meta, count, torch.bfloat16).shape == (count,)


@pytest.mark.parametrize("flushed", [False, True])  # a run flushes denormal numbers, and 1e-38 is one
def test_zeros_stay_zero_and_weights_of_one_size_keep_it(flushed):
    torch.set_flush_denormal(flushed)
    w = torch.cat([torch.zeros(64), torch.full((64,), -3.0), torch.full((64,), 3.0), torch.zeros(7)])
    for double in (False, True):
        values = nf4.decode(nf4.encode(w, double=double), len(w), torch.float32)
        torch.testing.assert_close(values, w, atol=0.03 * double, rtol=0)
    same = torch.full((128,), 2.0)  # scales all alike: nothing is left of them less their mean
    assert torch.equal(nf4.decode(nf4.encode(same, double=True), 128, torch.float32), same)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [3, 130])
def test_weights_that_are_not_finite_are_refused(bad, at):
    w = weight(140)
    w[at] = bad
    with pytest.raises(ValueError, match="not finite"):
        nf4.encode(w, double=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_encodes_and_decodes_to_the_same():
    w = weight(64 * 300 + 6)
    here, there = nf4.encode(w, double=False), nf4.encode(w.cuda(), double=False)
    assert torch.equal(here.codes, there.codes.cpu()) and torch.equal(here.absmax, there.absmax.cpu())
    for dtype in nf4.DTYPES:
        assert torch.equal(nf4.decode(here, len(w), dtype), nf4.decode(there, len(w), dtype).cpu())
