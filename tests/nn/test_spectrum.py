"""Spectra against numpy's singular values, on planted low-rank matrices and on noise; the randomised ones never say more than there is."""

import numpy as np
import pytest
import torch

from luthier.nn.spectrum import product_spectrum, rounding_energy, spectrum


def planted(m, n, values, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(k, len(values))))[0] for k in (m, n))
    return u @ np.diag(values) @ v.T + noise * rng.normal(size=(m, n))


def rank_of(matrix, share):
    e = np.linalg.svd(matrix, compute_uv=False) ** 2
    return int(np.searchsorted(np.cumsum(e) / e.sum(), share - 1e-12) + 1)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (25, 25)])
@pytest.mark.parametrize("noise", [0.0, 0.01, 1.0])
def test_the_exact_spectrum_is_numpys(shape, noise):
    matrix = planted(*shape, [5, 3, 2, 1], noise)
    found = spectrum(torch.from_numpy(matrix))
    assert np.sqrt(found.energies.numpy()) == pytest.approx(np.linalg.svd(matrix, compute_uv=False), abs=1e-6)
    for share in (0.5, 0.9, 0.99):
        assert found.rank(share) == rank_of(matrix, share)
    assert found.stable_rank == pytest.approx((np.linalg.norm(matrix) / np.linalg.norm(matrix, 2)) ** 2)
    assert found.held(2) == pytest.approx((np.linalg.svd(matrix, compute_uv=False)[:2] ** 2).sum())


def test_a_planted_rank_is_found_by_its_energy():
    # energies 16, 4, 1, 1: the first holds 16 of 22, two 20, three 21
    found = spectrum(torch.from_numpy(planted(60, 50, [4, 2, 1, 1])))
    assert [found.rank(s) for s in (0.7, 16 / 22, 0.9, 0.95, 0.96)] == [1, 1, 2, 3, 4]
    assert spectrum(torch.zeros(5, 4)).rank(0.9) == 0 and spectrum(torch.zeros(5, 4)).stable_rank == 0


@pytest.mark.parametrize("shape", [(600, 520), (520, 600)])
def test_the_randomised_spectrum_agrees_with_numpy_and_is_never_above_it(shape):
    """More planted values than the first try has columns: it goes on to more."""
    matrix = planted(*shape, np.linspace(8, 4, 80), 0.02)
    true = np.linalg.svd(matrix, compute_uv=False) ** 2
    found = spectrum(torch.from_numpy(matrix), 0.9, exact=100)
    e = found.energies.numpy()
    assert len(e) == 128 and found.total == pytest.approx(true.sum())
    assert (e <= true[: len(e)] * (1 + 1e-9)).all() and e[:70] == pytest.approx(true[:70], rel=1e-3)
    assert found.rank(0.9) == rank_of(matrix, 0.9)


def test_noise_of_full_rank_falls_back_to_the_exact_way():
    matrix = np.random.default_rng(0).normal(size=(300, 280))
    found = spectrum(torch.from_numpy(matrix), exact=100)
    assert len(found.energies) == 280 and found.rank(0.9) == rank_of(matrix, 0.9) > 100


def test_a_product_is_decomposed_without_being_made():
    g = torch.Generator().manual_seed(0)
    b, a = torch.randn(50, 6, generator=g) * torch.tensor([4.0, 2, 1, 0.1, 0.1, 0.0]), torch.randn(6, 40, generator=g)
    found = product_spectrum(b, a)
    true = np.linalg.svd((b.double() @ a.double()).numpy(), compute_uv=False) ** 2
    assert found.energies.numpy() == pytest.approx(true[:6], abs=1e-6) and found.rank(0.9) == rank_of((b @ a).numpy(), 0.9)


def test_the_energy_of_rounding_is_what_rounding_does():
    w = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        rounded = w.to(dtype)
        assert rounding_energy(rounded) == pytest.approx(float((rounded.double() - w.double()).square().sum()), rel=0.05)
    assert rounding_energy(w) == 0.0 and rounding_energy(torch.zeros(3, 3, dtype=torch.bfloat16)) == 0.0
