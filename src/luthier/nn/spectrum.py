"""How the energy of a matrix, the sum of its squared singular values, spreads over its ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 1536  # shorter sides up to this are decomposed exactly: n^3 operations, seconds
FIRST = 64  # columns that a randomised decomposition begins with


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values, the largest first, and what all of them, known or not, come to."""

    energies: Tensor  # (known,) float64
    total: float

    def rank(self, share: float) -> int:
        """The least rank that holds this share of the energy; 0 of a matrix of zeros."""
        if self.total <= 0:
            return 0
        return min(len(self.energies), int((self.energies.cumsum(0) < share * self.total * (1 - 1e-9)).sum()) + 1)

    def held(self, rank: int) -> float:
        """The energy of the best approximation of a rank (Eckart and Young, 1936); where fewer values are known, what these hold."""
        return float(self.energies[:rank].sum())

    @property
    def stable_rank(self) -> float:
        """The whole energy over that of the largest singular value: 1 of a matrix of rank one, at most the rank."""
        return self.total / float(self.energies[0]) if self.total > 0 else 0.0


def spectrum(matrix_MN: Tensor, share: float = 0.9, *, exact: int = EXACT) -> Spectrum:
    """The spectrum of a matrix: all of it where the shorter side is at most ``exact``, else as many values as hold ``share`` of the energy.

    The large ones by the randomised range finder with two power iterations (Halko, Martinsson and Tropp, 2011, SIAM Review 53, algorithms 4.4 and 5.1), the
    number of columns doubled until enough is held; beyond a quarter of the side, exactly. What it finds is never more than the true values.
    """
    a = matrix_MN.double()
    a = a if a.shape[0] <= a.shape[1] else a.t()
    total = float(a.square().sum())
    short, k = a.shape[0], FIRST
    g = torch.Generator().manual_seed(0)
    while short > exact and 4 * k <= short:
        q_Mk = torch.linalg.qr(a @ torch.randn(a.shape[1], k, generator=g, dtype=a.dtype).to(a.device))[0]
        for _ in range(2):
            q_Mk = torch.linalg.qr(a @ torch.linalg.qr(a.t() @ q_Mk)[0])[0]
        found = _energies(q_Mk.t() @ a)
        if float(found.sum()) >= share * total:
            return Spectrum(found, total)
        k *= 2
    return Spectrum(_energies(a), total)


def product_spectrum(b_MR: Tensor, a_RN: Tensor) -> Spectrum:
    """The spectrum of b a, without the product: two QR decompositions and a small matrix."""
    core_RR = torch.linalg.qr(b_MR.double())[1] @ torch.linalg.qr(a_RN.double().t())[1].t()
    found = torch.linalg.svdvals(core_RR).square()
    return Spectrum(found, float(found.sum()))


def _energies(wide_MN: Tensor) -> Tensor:
    """Squared singular values, the largest first, from the smaller Gram matrix: energies need half the digits that small singular values would."""
    return torch.linalg.eigvalsh(wide_MN @ wide_MN.t()).flip(0).clamp(min=0)


def rounding_energy(stored: Tensor) -> float:
    """The expected energy of having rounded a tensor to its dtype: a twelfth of a unit in the last place squared, an entry; 0 of float32 and wider."""
    if torch.finfo(stored.dtype).bits >= 32:
        return 0.0
    exponent = torch.frexp(stored.float())[1].double() - 1
    ulp = torch.where(stored == 0, 0.0, torch.exp2(exponent) * torch.finfo(stored.dtype).eps)
    return float(ulp.square().sum()) / 12
