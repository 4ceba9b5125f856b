"""The faster forms beside what else changes a stream: shared beginnings."""

import numpy as np
import pytest
import torch

import tiny
from luthier import speed
from luthier.core import Row, next_token_batch
from luthier.methods.lora import Method as Lora
from luthier.settings.run import Speed
from speed_forms import policy_on


def answers() -> list[Row]:
    """Three answers to one prompt, and an example that shares nothing."""
    rng = np.random.default_rng(0)
    prompt, other = rng.integers(3, tiny.V, 15), rng.integers(3, tiny.V, 9)
    rows = [np.concatenate([prompt, [i + 3], rng.integers(3, tiny.V, n)]).astype(np.int32) for i, n in enumerate((4, 9, 2))]
    return [Row(r, np.arange(len(r)) >= 15, "made") for r in rows] + [Row(other.astype(np.int32), np.arange(9) >= 3, "made")]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_with_the_faster_forms_shared_beginnings_give_what_whole_examples_give_without_them(family):
    policy = policy_on(tiny.base(family), Lora(targets=("all",)))
    batch = next_token_batch(answers(), pad=0, packed=True)
    real = batch.segments.example(batch.shape) >= 0
    upstream = torch.randn(*batch.shape, policy.base.width, generator=torch.Generator().manual_seed(1))[real]
    found = []
    for settings, share in ((Speed.plain(), "off"), (Speed(), "on"), (Speed(), "off")):
        speed.install(policy, settings)
        policy.share_prompts = share
        policy.train()
        hidden = policy.hidden(batch)[real]
        (hidden * upstream).sum().backward()
        found.append((hidden.detach(), {n: p.grad.clone() for n, p in policy.trained().items()}))
        for p in policy.trained().values():
            p.grad = None
    for hidden, grads in found[1:]:
        torch.testing.assert_close(hidden, found[0][0], atol=2e-5, rtol=2e-5)
        for n, g in grads.items():
            torch.testing.assert_close(g, found[0][1][n], atol=2e-4, rtol=2e-4)
