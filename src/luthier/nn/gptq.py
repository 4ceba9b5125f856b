"""GPTQ: round a linear's weight column by column, each column's error made good by the columns that are still to come.

Frantar, Ashkboos, Hoefler & Alistarh, 2022, arXiv 2210.17323. For a weight W (out, in), inputs X (in, N) and a grid, it looks for codes whose values Q make
||W X - Q X||^2 small. With H = 2 X X^T + damping (section 3) and U the upper Cholesky factor of its inverse, H^-1 = U^T U, column i is rounded and

    e = (w_i - quant(w_i)) / U_ii,    w_j <- w_j - e U_ij  for j > i              algorithm 1

The updates beyond a block of columns are made once a block, as one product (step 2, "lazy batch-updates"; step 3, "Cholesky reformulation").

How it differs from the paper and its authors' code:
1. U comes from one Cholesky factor of H, its rows and columns reversed, and one triangular inverse; not from a factor of the inverse. It is the same matrix,
   with fewer roundings.
2. An input that was never anything but 0 keeps its weights, rounded to nearest; the authors' code sets them to 0.
3. ``by_importance`` (the code's "act-order") takes the columns in falling order of H_ii. The groups then stay those of neighbouring inputs, and their grids are
   fitted to the weights before anything is rounded ("static groups"), so files need no reordering of inputs and decode as fast as others. In the given order,
   grids are fitted when their group is reached, as the paper does it.
4. A block of columns always ends with a group, so a grid is fitted to weights that hold every update so far.
5. Scales are rounded to 8 significant bits before any code is chosen: float16 files and bfloat16 arithmetic then hold the same number.
6. A symmetric grid is symmetric about zero for weights of one sign too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # columns between two updates of all the rest
_LEAST, _MOST = 2.0**-24, 65504.0  # of the scales float16 holds
_SEARCH = [1 - i / 40 for i in range(32)]  # how far a range is narrowed
_NORM = 2.4  # the power of an error in that search, as in the authors' code


@dataclass(frozen=True)
class Grid:
    """The values that codes of a group may stand for: scale (code - zero), code in 0 ... 2^bits - 1."""

    bits: int = 4
    symmetric: bool = True  # zero = 2^(bits - 1): about as many values below 0 as above
    lowest: int = 0  # the least zero: 1 for files that hold zero - 1
    search: bool = False  # narrow the range where that makes the rounding error smaller: few large weights are then cut off

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero), (rows,) each, for the rows of a weight (rows, G)."""
        low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
        scale, zero = self._of_range(low, high)
        if not self.search:
            return scale, zero
        least = torch.full_like(low, float("inf"))
        for part in _SEARCH:
            s, z = self._of_range(low * part, high * part)
            error = (self.value(self.code(weight, s[:, None], z[:, None]), s[:, None], z[:, None]) - weight).abs_().pow_(_NORM).sum(1)
            better = error < least
            least, scale, zero = torch.where(better, error, least), torch.where(better, s, scale), torch.where(better, z, zero)
        return scale, zero

    def code(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, in the dtype of the weight."""
        return (torch.round(weight / scale) + zero).clamp_(0, self.top)

    def value(self, code: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """What codes stand for."""
        return (code - zero) * scale

    def _of_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / self.top).to(torch.bfloat16).to(torch.float16).to(low.dtype)
        if not bool((scale <= _MOST).all()):  # nan too
            raise ValueError("a weight is not finite, or beyond what float16 scales reach")
        scale = torch.where(high > low, scale.clamp(min=_LEAST), 1.0)
        zero = torch.full_like(scale, (self.top + 1) // 2) if self.symmetric else torch.round(-low / scale).clamp(self.lowest, self.top)
        return scale, zero


@dataclass(frozen=True)
class Solved:
    """A weight in codes."""

    codes: Tensor  # (in, out) uint8
    scales: Tensor  # (groups, out), numbers that float16 and bfloat16 hold
    zeros: Tensor  # (groups, out), whole numbers

    def values(self) -> Tensor:
        """The weight (out, in) that the codes stand for."""
        groups = self.codes.view(len(self.scales), -1, self.codes.shape[1])
        return ((groups - self.zeros[:, None]) * self.scales[:, None]).flatten(0, 1).t()


class Hessian:
    """2 X X^T over the inputs of one linear, summed as they come, and divided by their number: that changes no code, and keeps the numbers small."""

    def __init__(self, n_in: int, device: torch.device | str = "cpu"):
        self.sum = torch.zeros(n_in, n_in, device=device)
        self.count = 0

    def add(self, x_NI: Tensor) -> None:
        """Inputs, one a row."""
        x = x_NI.float()
        self.sum.addmm_(x.t(), x)
        self.count += len(x)

    def value(self) -> Tensor:
        """(in, in)."""
        return self.sum * (2 / max(1, self.count))


@dataclass(frozen=True)
class Factor:
    """What a solution needs of H: U, and the order of the columns it is for."""

    upper: Tensor  # (in, in)
    order: Tensor | None  # (in,); None: as they stand


def factor(hessian: Tensor, *, damp: float = 0.01, by_importance: bool = False) -> Factor:
    """U of (H + damp mean(H_ii) I)^-1 = U^T U. Raises ValueError for an H that is not finite or, damped, not positive definite."""
    h = hessian.clone()
    diagonal = h.diagonal()
    if not bool(torch.isfinite(h).all()):
        raise ValueError("the inputs seen in calibration hold numbers that are not finite (nan or inf)")
    dead = diagonal == 0
    diagonal[dead] = diagonal[~dead].mean() if not bool(dead.all()) else 1.0
    diagonal += damp * diagonal.mean()
    order = diagonal.argsort(descending=True, stable=True) if by_importance else None
    if order is not None:
        h = h[order][:, order]
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if bool(failed) or not bool(torch.isfinite(lower).all()):
        raise ValueError(f"the second moments of the inputs are not positive definite with a damping of {damp:g}; use more damping, or more calibration rows")
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return Factor(torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), order)  # H = R R^T with R upper, so H^-1 = R^-T R^-1


def solve(weight: Tensor, known: Factor, grid: Grid, group: int) -> Solved:
    """Codes for a weight (out, in), which is not changed. ``group``: inputs with one scale; -1: all of them. Computes in the dtype of the factor.

    Raises ValueError for a weight that is not finite.
    """
    upper, order = known.upper, known.order
    n_out, n_in = weight.shape
    size = n_in if group == -1 else group
    w_IO = weight.t().to(upper.dtype, copy=True, memory_format=torch.contiguous_format)  # a column of the paper's W is a row here, and lies together
    scales, zeros = (torch.empty(n_in // size, n_out, dtype=w_IO.dtype, device=w_IO.device) for _ in range(2))
    group_of = torch.arange(n_in, device=w_IO.device) // size
    if order is not None:
        for g, rows in enumerate(w_IO.split(size)):
            scales[g], zeros[g] = grid.fit(rows.t())
        w_IO, group_of = w_IO[order], group_of[order]
    codes_IO = torch.empty_like(w_IO)
    block = BLOCK if size % BLOCK == 0 or group == -1 or order is not None else size * max(1, BLOCK // size)
    which, scaling = group_of.tolist(), upper.diagonal().tolist()
    for start in range(0, n_in, block):
        end = min(start + block, n_in)
        errors = torch.empty(end - start, n_out, dtype=w_IO.dtype, device=w_IO.device)
        for i in range(start, end):
            g = which[i]
            if order is None and i % size == 0:
                scales[g], zeros[g] = grid.fit(w_IO[i : i + size].t())
            codes_IO[i] = grid.code(w_IO[i], scales[g], zeros[g])
            errors[i - start] = (w_IO[i] - grid.value(codes_IO[i], scales[g], zeros[g])) / scaling[i]
            w_IO[i:end].addr_(upper[i, i:end], errors[i - start], alpha=-1)
        w_IO[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    if not bool(torch.isfinite(codes_IO).all()):
        raise ValueError("what was added to the weight to make errors good is not finite; use more damping")
    if order is not None:
        codes_IO = codes_IO[order.argsort()]
    return Solved(codes_IO.to(torch.uint8), scales, zeros)


def nearest(weight: Tensor, grid: Grid, group: int) -> Solved:
    """Every weight (out, in) rounded to the nearest value of its group's grid: what GPTQ is measured against."""
    n_out, n_in = weight.shape
    parts = weight.reshape(-1, n_in if group == -1 else group)
    scale, zero = grid.fit(parts)
    codes = grid.code(parts, scale[:, None], zero[:, None]).view(n_out, n_in)
    return Solved(codes.to(torch.uint8).t().contiguous(), *(t.view(n_out, -1).t().contiguous() for t in (scale, zero)))


def output_error(change: Tensor, hessian: Tensor) -> float:
    """||D X||^2 for a change D (out, in) of a weight, by H's scale."""
    change = change.to(hessian.dtype)
    return float(((change @ hessian) * change).sum())
