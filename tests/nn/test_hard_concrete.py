"""Hard-concrete gates against samples, finite differences and the formulas written out slowly."""

import math

import pytest
import torch

from luthier.nn.hard_concrete import HardConcrete, gated, logistic_

SHAPES = [HardConcrete(), HardConcrete(-0.1, 1.1, 2 / 3), HardConcrete(-2.0, 1.3, 1.7)]


def slowly(shape, a, u):
    """Louizos et al. 2018, equations 10 and 11, for one number."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) / shape.temperature))
    return min(1.0, max(0.0, s * (shape.high - shape.low) + shape.low))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_gate_is_the_papers_formula(shape):
    g = torch.Generator().manual_seed(0)
    u, a = torch.rand(200, generator=g, dtype=torch.float64), torch.randn(200, generator=g, dtype=torch.float64) * 3
    z = shape.gate(a, u.logit())
    assert z.tolist() == pytest.approx([slowly(shape, x, y) for x, y in zip(a.tolist(), u.tolist(), strict=True)], abs=1e-9)
    assert bool((z == 0).any()) and bool((z == 1).any()) and bool(((z > 0) & (z < 1)).any())
    still = shape.gate(a, None)
    assert still.tolist() == pytest.approx([min(1.0, max(0.0, (shape.high - shape.low) / (1 + math.exp(-x)) + shape.low)) for x in a.tolist()], abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("a", [-3.0, -0.5, 0.0, 1.0, 2.5])
def test_the_expected_number_of_open_gates_is_what_samples_count(shape, a):
    n = 400_000
    noise = logistic_(torch.empty(n), torch.Generator().manual_seed(1))
    counted = float((shape.gate(torch.full((n,), a), noise) > 0).float().mean())
    said = float(shape.open(torch.tensor(a)))
    assert abs(counted - said) < 4 * math.sqrt(said * (1 - said) / n) + 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_two_gates_in_series_are_open_together_by_the_product(shape):
    """The structured penalty of Guo et al. 2021, section 3.2: a weight differs where its own gate and its tensor's are open."""
    tensors, each = 40_000, 20
    g = torch.Generator().manual_seed(2)
    a, group = torch.linspace(-2, 2, each), torch.tensor(0.3)
    own = shape.gate(a.expand(tensors, each), logistic_(torch.empty(tensors, each), g))
    shared = shape.gate(group.expand(tensors, 1), logistic_(torch.empty(tensors, 1), g))
    counts = ((own * shared) > 0).sum(1).double()
    said = float(shape.open(a).sum() * shape.open(group))
    assert abs(float(counts.mean()) - said) < 4 * float(counts.std()) / math.sqrt(tensors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampled", [True, False])
def test_the_slope_is_the_finite_difference(shape, sampled):
    g = torch.Generator().manual_seed(3)
    a = torch.randn(500, generator=g, dtype=torch.float64) * 2
    noise = torch.rand(500, generator=g, dtype=torch.float64).logit() if sampled else None
    h = 1e-6
    finite = (shape.gate(a + h, noise) - shape.gate(a - h, noise)) / (2 * h)
    z = shape.gate(a, noise)
    settled = (shape.gate(a + h, noise) > 0) == (shape.gate(a - h, noise) > 0)  # not across a corner
    settled &= (shape.gate(a + h, noise) < 1) == (shape.gate(a - h, noise) < 1)
    assert int(settled.sum()) > 450 and bool((z[settled] == 0).any()) and bool(((z > 0) & (z < 1))[settled].any())
    torch.testing.assert_close(shape.slope(a, noise)[settled], finite[settled], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("structured", [True, False])
def test_a_gated_weight_has_the_gradients_of_the_formula_written_out(structured, sampled):
    shape, g = HardConcrete(), torch.Generator().manual_seed(4)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = [draw(5, 7), draw(5, 7), draw(5, 7) * 2, *([draw(()).abs()] if structured else [])]
    inputs = [t.requires_grad_() for t in inputs]
    noise = draw(5, 7) if sampled else None
    up = draw(5, 7)

    def plainly(own, value, a, group=None):
        s = torch.sigmoid(a if noise is None else noise + a)
        z = (s * 3 - 1.5).clamp(0, 1)
        return own + z * value * (1 if group is None else group)

    ours = gated(*inputs[:3], inputs[3] if structured else None, noise, shape)
    torch.testing.assert_close(ours, plainly(*inputs))
    mine = torch.autograd.grad(ours, inputs, up)
    theirs = torch.autograd.grad(plainly(*inputs), inputs, up)
    assert bool((theirs[2] != 0).any()) and bool((theirs[2] == 0).any())
    for m, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(m, t)


def test_a_16_bit_weight_is_rounded_once():
    own, value = torch.randn(64).bfloat16(), torch.randn(64) * 1e-2
    out = gated(own, value, torch.full((64,), 9.0), None, None, HardConcrete())
    assert out.dtype == torch.bfloat16 and torch.equal(out, (own.float() + value).bfloat16())


def test_the_noise_is_logistic_and_a_function_of_the_generator():
    draw = lambda seed: logistic_(torch.empty(200_000), torch.Generator().manual_seed(seed))  # noqa: E731
    x = draw(5)
    assert torch.equal(x, draw(5)) and not torch.equal(x, draw(6))
    assert abs(float(x.mean())) < 0.02 and float(x.var()) == pytest.approx(math.pi**2 / 3, rel=0.02)
    assert float((x < 1.0).float().mean()) == pytest.approx(1 / (1 + math.exp(-1.0)), abs=5e-3)
