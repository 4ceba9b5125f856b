"""All faster forms of a GPU together, in whole models: `pytest -m gpu tests/speed`."""

import pytest
import torch

import tiny
from luthier import speed
from luthier.methods.lora import Method as Lora
from luthier.methods.prefix import Method as Prefix
from luthier.policy import Policy, real
from luthier.settings.run import Speed
from luthier.speed import jitted
from luthier.speed.norms import Normed
from luthier.speed.varlen import Varlen
from speed_forms import OFF, apart, batch_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"


def policy_on(family, method, dtype):
    """A method on a tiny base on the GPU, its parameters random."""
    base = tiny.base(family)
    base.model.to(DEVICE, dtype)
    policy = Policy(base, method.attach(base, "default"), method=method, name="default")
    tiny.randomise(policy.delta.params)
    return policy.to(DEVICE)


def gradients(policy, settings, batch):
    """(loss, gradients by name, what was put) under these settings."""
    notes = speed.install(policy, settings)
    policy.train()
    there = batch.to(DEVICE)
    hidden = policy.hidden(there)[real(batch).to(DEVICE)]
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    token = torch.arange(len(hidden), device=DEVICE) % tiny.V
    loss = (hidden.float() - weight).square().mean() - policy.score(hidden, token)["logp"].mean()
    loss.backward()
    found = {n: p.grad.cpu() for n, p in policy.trained().items()}
    for p in policy.trained().values():
        p.grad = None
    return float(loss.detach()), found, notes


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral_window", "gpt2", "bert"])
@pytest.mark.parametrize("method", [Lora(targets=("all",)), Prefix(length=3)])
def test_in_float32_a_step_equals_the_plain_form(family, method):
    policy = policy_on(family, method, torch.float32)
    batch = batch_for(policy)
    loss, plain, _ = gradients(policy, OFF, batch)
    other, faster, _ = gradients(policy, Speed(), batch)
    assert other == pytest.approx(loss, rel=1e-5) and apart(plain, faster) < 1e-4
    if jitted.kernels() is not None and family in ("llama", "qwen3", "gemma2"):
        assert any(isinstance(m.__dict__.get("forward"), Normed) for m in policy.lm.modules())


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_window", "bert"])
@pytest.mark.parametrize("method", [Lora(targets=("all",)), Prefix(length=3)])
def test_in_16_bits_it_is_no_further_from_float32_than_the_plain_form(family, method):
    far = [0.0, 0.0]
    for seed in range(4):
        exact = policy_on(family, method, torch.float32)
        _, wanted, _ = gradients(exact, OFF, batch_for(exact, seed=seed))
        policy = policy_on(family, method, torch.bfloat16)
        for i, settings in enumerate((OFF, Speed())):
            far[i] += apart(wanted, gradients(policy, settings, batch_for(policy, seed=seed))[1])
    assert far[1] < 1.2 * far[0] < 1.0
    assert isinstance(policy.by_hand, Varlen)


def test_the_row_kernels_are_there():
    assert jitted.kernels() is not None, "the log of luthier.speed says why"
