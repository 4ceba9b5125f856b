"""int8 by rows against a slow version. Against bitsandbytes: tests/reference/test_bitsandbytes.py."""

import pytest
import torch

from luthier.nn import int8


def weight(shape=(13, 70), seed=0, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


@pytest.mark.parametrize("dtype", int8.DTYPES)
def test_a_row_is_stored_as_its_largest_value_and_rounded_127ths(dtype):
    w = weight(dtype=dtype)
    codes, largest = int8.encode(w)
    for row, code, most in zip(w.double(), codes, largest, strict=True):
        assert most == row.abs().max() and int(code.abs().max()) == 127
        assert float((code.double() - 127 * row / row.abs().max()).abs().max()) <= 0.5 + 1e-5
    exact = codes.float() * (largest * (1 / 127))[:, None]
    for to in int8.DTYPES:
        assert torch.equal(int8.decode(codes, largest, to), exact.to(to))


def test_an_error_is_at_most_half_a_step():
    w = weight((40, 300))
    error = (int8.decode(*int8.encode(w), torch.float32) - w).abs()
    assert bool((error <= w.abs().amax(1, keepdim=True) / 254 * 1.0001).all())


def test_working_in_chunks_changes_nothing(monkeypatch):
    w = weight()
    codes, largest = int8.encode(w)
    values = int8.decode(codes, largest, torch.bfloat16)
    monkeypatch.setattr(int8, "CHUNK", 150)
    assert torch.equal(int8.encode(w)[0], codes) and torch.equal(int8.encode(w)[1], largest)
    assert torch.equal(int8.decode(codes, largest, torch.bfloat16), values)


def test_what_it_takes_a_weight():
    codes, largest = int8.encode(weight())
    assert int8.bits_per_weight(13, 70) == pytest.approx(8 * (codes.nbytes + largest.nbytes) / (13 * 70))
    assert 16 / int8.bits_per_weight(4096, 4096) == pytest.approx(2, abs=2e-3)


def test_meta_weights_have_codes_of_the_same_shapes():
    for real, meta in zip(int8.encode(weight()), int8.encode(weight().to("meta")), strict=True):
        assert meta.device.type == "meta" and real.shape == meta.shape and real.dtype == meta.dtype
    assert int8.decode(*int8.encode(weight().to("meta")), torch.bfloat16).shape == (13, 70)


def test_rows_of_zeros_stay_zero_and_weights_that_are_not_finite_are_refused():
    w = weight()
    w[4] = 0
    assert torch.equal(int8.decode(*int8.encode(w), torch.float32)[4], w[4])
    w[5, 6] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        int8.encode(w)
