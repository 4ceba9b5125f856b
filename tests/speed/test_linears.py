"""The products themselves, in float64, against the equation as autograd differentiates it."""

import pytest
import torch
from torch import nn

from luthier.speed.linears import Frozen, products
from tiny import ByRow


def linear(n, k=7, bias=True):
    module = nn.Linear(k, n, bias=bias, dtype=torch.float64)
    return module.requires_grad_(False)


def term(n, r, k=7, scale=0.7):
    return (torch.randn(r, k, dtype=torch.float64, requires_grad=True), torch.randn(n, r, dtype=torch.float64, requires_grad=True), scale)


def plain(x, modules, terms):
    return [m(x) if t is None else m(x) + t[2] * (x @ t[0].T) @ t[1].T for m, t in zip(modules, terms, strict=True)]


@pytest.mark.parametrize("asked", [(0, 1, 2, 3), (1, 3), (2,)])
def test_outputs_and_gradients_are_those_of_the_equation_whichever_outputs_are_used(asked):
    torch.manual_seed(0)
    modules = [linear(5), linear(4, bias=False), linear(6), linear(5)]
    terms = [term(5, 3), term(4, 2, scale=2.5), None, term(5, 1)]
    params = [f for t in terms if t is not None for f in t[:2]]
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    up = [torch.randn(2, 3, n, dtype=torch.float64) for n in (5, 4, 6, 5)]
    found = []
    for outs in (plain(x, modules, terms), products(x, [Frozen(m) for m in modules], terms)):
        found.append((outs, torch.autograd.grad([outs[i] for i in asked], [x, *params], [up[i] for i in asked], allow_unused=True)))
    (y0, g0), (y1, g1) = found
    for a, b in zip([*y0, *g0], [*y1, *g1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_only_what_asks_for_a_gradient_gets_one():
    module, (a, b, s) = linear(5), term(5, 2)
    x = torch.randn(3, 7, dtype=torch.float64)
    y = products(x, [Frozen(module)], [(a, b.detach(), s)])[0]
    y.sum().backward()
    assert a.grad is not None and b.grad is None
    with torch.no_grad():
        assert not products(x, [Frozen(module)], [(a, b, s)])[0].requires_grad


def test_what_is_kept_is_x_the_narrow_product_and_the_factors():
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        products(x, [Frozen(linear(5)), Frozen(linear(4))], [term(5, 3), term(4, 2)])
    assert sorted(kept.values()) == sorted([50 * 7, 50 * 5, 7 * 5, 5 * 3, 4 * 2])


def test_which_linears_are_known():
    class Own(nn.Linear):
        pass

    codes = ByRow(7, 5)
    codes.write(torch.randn(5, 7))
    assert Frozen.reads(linear(5)) and Frozen.reads(codes)
    assert not Frozen.reads(Own(7, 5)) and not Frozen.reads(nn.LayerNorm(7))
    base = linear(5)
    assert Frozen(base).usable(torch.float64) and not Frozen(base).usable(torch.bfloat16)
    base.bias.requires_grad_(True)
    assert not Frozen(base).usable(torch.float64)
    other = linear(5)
    other.__dict__["forward"] = other.forward  # decoding lays weights out for itself
    assert not Frozen(other).usable(torch.float64)
