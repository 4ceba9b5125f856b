"""The divergence of next-token distributions against a slow version that holds all logits."""

import pytest
import torch

from luthier.nn.kl import hidden_kl

N, D, V = 300, 8, 50  # more rows than one chunk's multiple


def made(trained, bias):
    g = torch.Generator().manual_seed(0)
    h, r = (torch.randn(N, D, generator=g, dtype=torch.float32) for _ in range(2))
    w, w0 = (torch.randn(V, D, generator=g) for _ in range(2))
    b = torch.randn(V, generator=g) if bias else None
    return h.requires_grad_(), r, w.requires_grad_(trained), w0, b


def slow(h, r, w, w0, b, scale, cap):
    shaped = lambda x: x * scale if cap is None else cap * torch.tanh(x * scale / cap)  # noqa: E731
    p = torch.softmax(shaped(h @ w.T + (0 if b is None else b)).double(), -1)
    q = torch.softmax(shaped(r @ w0.T).double(), -1)
    return torch.stack([sum(q[n, v] * torch.log(q[n, v] / p[n, v]) for v in range(V)) for n in range(N)])


@pytest.mark.parametrize("scale,cap", [(1.0, None), (0.5, 3.0)])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_are_those_of_the_whole_distribution(scale, cap, trained, bias):
    h, r, w, w0, b = made(trained, bias)
    weights = torch.linspace(-1, 2, N)
    head = lambda x: torch.nn.functional.linear(x, w, b)  # noqa: E731
    known = {} if trained else {"weight": w, "bias": b}
    got = hidden_kl(h, r, head, lambda x: x @ w0.T, vocabulary=V, scale=scale, cap=cap, **known)
    wanted = slow(h, r, w, w0, b, scale, cap)
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)
    inputs = [h, w] if trained else [h]
    ours = torch.autograd.grad((got * weights).sum(), inputs)
    theirs = torch.autograd.grad((wanted * weights).sum(), inputs)
    for a, x in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, x, atol=1e-4, rtol=1e-4)


def test_it_is_zero_for_the_same_distribution_and_keeps_the_graph_alive_without_rows():
    h, _, w, _, _ = made(False, False)
    assert float(hidden_kl(h, h.detach(), lambda x: x @ w.T, lambda x: x @ w.T, vocabulary=V, weight=w).detach().abs().max()) < 1e-6
    empty = hidden_kl(h[:0], h[:0].detach(), lambda x: x @ w.T, lambda x: x @ w.T, vocabulary=V, weight=w)
    assert empty.shape == (0,) and empty.requires_grad
