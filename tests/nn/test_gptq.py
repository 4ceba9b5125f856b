"""The GPTQ solver against the paper's equations done slowly, and against rounding to nearest."""

import pytest
import torch

from luthier.nn import gptq
from luthier.nn.gptq import Grid


def slow(weight, hessian, grid, group, order=None, damp=0.01):
    """Optimal brain quantisation, one column after the other, with the whole inverse: equations 2 and 3 of the paper. Codes (out, in)."""
    w, h = weight.double().clone(), hessian.double().clone()
    n, size = w.shape[1], w.shape[1] if group == -1 else group
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = diagonal[diagonal != 0].mean()
    diagonal += damp * diagonal.mean()
    inverse = torch.linalg.inv(h)
    fitted = {} if order is None else {g: grid.fit(w[:, g * size : (g + 1) * size]) for g in range(n // size)}
    codes = torch.zeros_like(w)
    for i in range(n) if order is None else order.tolist():
        if order is None and i % size == 0:
            fitted[i // size] = grid.fit(w[:, i : i + size])
        scale, zero = fitted[i // size]
        codes[:, i] = (torch.round(w[:, i] / scale) + zero).clamp(0, 2**grid.bits - 1)
        error = (w[:, i] - scale * (codes[:, i] - zero)) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i : i + 1] * inverse[i] / inverse[i, i]  # the row and column of i leave the inverse
        inverse[i], inverse[:, i] = 0, 0
    return codes


def layer(n_in, n_out, rows=600, seed=0):
    """A random weight and inputs whose features go together."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n_in, generator=g) @ (torch.eye(n_in) + 0.3 * torch.randn(n_in, n_in, generator=g))
    return torch.randn(n_out, n_in, generator=g), x


def moments(x):
    out = gptq.Hessian(x.shape[1])
    out.add(x)
    return out.value()


@pytest.mark.parametrize(
    ("group", "n_in", "symmetric", "by_importance"),
    [
        *((group, 160, symmetric, by_importance) for group in (-1, 16, 20) for symmetric in (True, False) for by_importance in (False, True)),
        (128, 256, True, False),
        (256, 512, False, False),  # a group of two blocks
    ],
)
def test_codes_are_those_of_the_paper_column_by_column(group, n_in, symmetric, by_importance):
    weight, x = layer(n_in, 24)
    x[:, 5] = 0  # an input that is never anything else
    hessian, grid = moments(x).double(), Grid(4, symmetric)
    known = gptq.factor(hessian, by_importance=by_importance)
    assert (known.order is not None) == by_importance
    solved = gptq.solve(weight, known, grid, group)
    assert torch.equal(solved.codes.t().double(), slow(weight, hessian, grid, group, known.order))
    size = n_in if group == -1 else group
    scale, zero = (t.repeat_interleave(size, 0) for t in (solved.scales, solved.zeros))
    assert torch.equal(solved.values(), ((solved.codes.double() - zero) * scale).t())


def test_the_factor_is_that_of_the_damped_inverse():
    hessian = moments(layer(64, 1)[1]).double()
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    known = gptq.factor(hessian, damp=0.05)
    assert torch.allclose(known.upper.t() @ known.upper, torch.linalg.inv(damped), rtol=1e-9, atol=1e-12)
    assert torch.equal(known.upper, known.upper.triu())
    turned = gptq.factor(hessian, damp=0.05, by_importance=True)
    falling = hessian.diagonal()[turned.order]
    assert bool((falling[:-1] >= falling[1:]).all())


def test_moments_that_come_in_parts_are_those_of_all():
    _, x = layer(40, 1)
    parts = gptq.Hessian(40)
    for some in x.bfloat16().split(130):
        parts.add(some)
    whole = x.bfloat16().double()
    assert parts.count == 600 and torch.allclose(parts.value().double(), 2 / 600 * whole.t() @ whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "most"), [(2, 0.5), (3, 0.4), (4, 0.4)])
def test_what_a_layer_gives_is_kept_better_than_by_rounding(bits, most):
    """1024 inputs that go together: the error of the output is well below half of rounding's (seen: 0.40, 0.32, 0.31)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 1024, generator=g) * torch.logspace(0, -2, 1024) @ (torch.randn(1024, 1024, generator=g) / 32)
    x += 0.1 * torch.randn(2048, 1024, generator=g)
    weight, hessian, grid = 0.02 * torch.randn(256, 1024, generator=g), moments(x), Grid(bits)
    rounded = gptq.output_error(gptq.nearest(weight, grid, 128).values() - weight, hessian)
    found = [gptq.output_error(gptq.solve(weight, gptq.factor(hessian, by_importance=b), grid, 128).values() - weight, hessian) for b in (False, True)]
    assert found[0] < most * rounded and found[1] < found[0]
    assert gptq.output_error(weight, hessian) == pytest.approx(float((x.double() @ weight.double().t()).pow(2).sum()) * 2 / 2048, rel=1e-4)


def test_with_inputs_that_do_not_go_together_it_is_rounding():
    weight, _ = layer(64, 16)
    hessian = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1)
    for by_importance in (False, True):
        solved = gptq.solve(weight, gptq.factor(hessian, by_importance=by_importance), Grid(3), 32)
        assert torch.equal(solved.codes, gptq.nearest(weight, Grid(3), 32).codes)


def test_inputs_never_seen_keep_their_weights_rounded():
    weight, x = layer(64, 16)
    x[:, 32:] = 0
    solved = gptq.solve(weight, gptq.factor(moments(x)), Grid(4), 32)
    assert torch.equal(solved.codes[32:], gptq.nearest(weight, Grid(4), 32).codes[32:])
    nothing = gptq.solve(weight, gptq.factor(torch.zeros(64, 64)), Grid(4), 32)
    assert torch.equal(nothing.codes, gptq.nearest(weight, Grid(4), 32).codes)


def test_a_grid_holds_its_range_in_scales_that_files_and_bfloat16_hold():
    weight, _ = layer(32, 50)
    weight[0], weight[1] = 0, weight[1].abs()
    for bits in (2, 3, 4, 8):
        scale, zero = Grid(bits).fit(weight)
        assert torch.equal(scale.half().float(), scale) and torch.equal(scale.bfloat16().float(), scale)
        assert bool((zero == 2 ** (bits - 1)).all())
        assert torch.allclose(scale[2:], 2 * weight[2:].abs().amax(1) / (2**bits - 1), rtol=2**-8)
        scale, zero = Grid(bits, symmetric=False).fit(weight)
        assert zero[1] == 0 and Grid(bits, symmetric=False, lowest=1).fit(weight)[1][1] == 1
        assert torch.allclose(scale[2:] * (2**bits - 1), weight[2:].amax(1) - weight[2:].amin(1), rtol=2**-8)
    assert bool((gptq.nearest(weight, Grid(4), 16).values()[0] == 0).all())  # a row of nothing stays nothing


def test_a_search_narrows_the_range_where_that_errs_less():
    weight, _ = layer(128, 20)
    weight[0, 0] = 40  # one weight far from all others
    plain, narrowed = (gptq.nearest(weight, Grid(3, search=s), 128) for s in (False, True))
    error = lambda s: (s.values() - weight).abs().pow(2.4).sum(1)  # noqa: E731
    assert bool((error(narrowed) <= error(plain)).all()) and bool((error(narrowed) < error(plain)).any())


def test_damaged_inputs_are_one_sentence():
    weight, x = layer(32, 8)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="inputs seen in calibration hold numbers that are not finite"):
            gptq.factor(moments(torch.where(x == x[3, 3], bad, x)))
        with pytest.raises(ValueError, match="a weight is not finite"):
            gptq.solve(torch.where(weight == weight[1, 1], bad, weight), gptq.factor(moments(x)), Grid(4), 16)
    with pytest.raises(ValueError, match=r"not positive definite with a damping of 0\.01; use more damping"):
        gptq.factor(moments(x) - 5 * torch.eye(32))
    with pytest.raises(ValueError, match="beyond what float16 scales reach"):
        gptq.nearest(weight * 1e7, Grid(4), 16)
