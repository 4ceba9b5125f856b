"""Log-probabilities against the plain computation."""

import pytest
import torch

from luthier.nn import logprob
from luthier.nn.logprob import linear_logp


def plain(h, w, b, token, scale, cap):
    """All logits at once, in double precision."""
    z = (h @ w.t() + (0 if b is None else b)) * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    return z.log_softmax(-1).gather(1, token[:, None]).squeeze(1)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", ["hidden", "all, kept", "all, recomputed"])
def test_chunked_logp_and_its_gradients_equal_the_plain_ones(monkeypatch, cap, bias, trained):
    monkeypatch.setattr(logprob, "CHUNK_BYTES", 1)
    monkeypatch.setattr(logprob, "CHUNK_ROWS", 37)  # 300 rows in uneven chunks
    monkeypatch.setattr(logprob, "KEEP_BYTES", 1 << 30 if trained == "all, kept" else 0)
    torch.manual_seed(0)
    exact = [torch.randn(300, 16), torch.randn(50, 16), torch.randn(50) if bias else None]
    upstream, token = torch.randn(300), torch.randint(0, 50, (300,))
    ours = [None if t is None else t.clone().requires_grad_(i == 0 or trained != "hidden") for i, t in enumerate(exact)]
    theirs = [None if t is None else t.double().requires_grad_() for t in exact]
    out = linear_logp(*ours, token, scale=0.7, cap=cap)
    expected = plain(*theirs, token, 0.7, cap)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        if mine is not None and mine.requires_grad:
            torch.testing.assert_close(mine.grad.double(), reference.grad, atol=2e-5, rtol=1e-4)


def test_bf16_logp_is_as_close_to_fp32_as_rounded_logits_allow():
    torch.manual_seed(0)
    h, w, token = torch.randn(512, 64), torch.randn(2000, 64) * 0.2, torch.randint(0, 2000, (512,))
    exact = plain(h.bfloat16().double(), w.bfloat16().double(), None, token, 1.0, None)
    out = linear_logp(h.bfloat16(), w.bfloat16(), None, token)
    assert out.dtype == torch.float32
    assert abs(float(out.sum() / exact.sum()) - 1) < 1e-3  # a bf16 accumulator would be off by whole per cents


def test_no_scored_position_still_gives_a_gradient_of_zero():
    h = torch.zeros(0, 8, requires_grad=True)
    out = linear_logp(h, torch.randn(5, 8), None, torch.zeros(0, dtype=torch.long))
    out.sum().backward()
    assert out.shape == (0,) and h.grad is not None
