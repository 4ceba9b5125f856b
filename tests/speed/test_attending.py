"""Self-attention over packed examples by hand, with rotary positions by the row kernel."""

import pytest
import torch

import tiny
from luthier import speed
from luthier.methods.lora import Method as Lora
from luthier.modelling import attention
from luthier.speed import compiled
from luthier.speed.attending import Attending
from speed_forms import OFF, apart, batch_for, distances, gradients, only, policy_on

pytestmark = pytest.mark.skipif(compiled.kernels() is None, reason="no row kernels on this machine (no C++ compiler)")
ON = only(kernels="auto")


def attended(policy):
    return [m for m in policy.lm.modules() if isinstance(m.__dict__.get("forward"), Attending)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "granite", "qwen3_moe", "mistral_window", "gemma2", "gemma3"])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_equal_the_plain_form(family, recompute):
    policy = policy_on(tiny.base(family), Lora(targets=("attention",)), recompute=recompute)
    batches = [batch_for(policy, seed=s) for s in (1, 2)]
    loss, plain, _ = gradients(policy, OFF, *batches)
    other, faster, _ = gradients(policy, ON, *batches)
    assert len(attended(policy)) == 2
    assert other == pytest.approx(loss, rel=1e-6)
    assert apart(plain, faster) < 1e-5


@pytest.mark.parametrize("family", ["cohere", "gpt2", "bert", "t5", "phi"])
def test_an_attention_that_is_built_otherwise_keeps_its_own_forward(family):
    policy = policy_on(tiny.base(family), Lora(targets=("query",)))
    speed.install(policy, ON)
    assert not attended(policy)


def test_in_16_bits_it_is_no_further_from_float32_than_the_plain_form():
    plain, faster = distances(Lora(targets=("attention",)), OFF, ON)
    assert faster != plain and faster < 1.1 * plain < 0.1


def test_a_window_that_only_the_configuration_names_is_kept():
    """Mistral's forward reads it there; an attention that looked for it at the module would see every token."""
    policy = policy_on(tiny.base("mistral_window"), Lora(targets=("value",)))
    speed.install(policy, ON)
    assert [m.__dict__["forward"].how.window for m in attended(policy)] == [4, 4]


def test_keys_and_values_that_are_recorded_are_those_of_the_module_itself():
    policy = policy_on(tiny.base(), Lora(targets=("query",)))
    ids, positions = torch.arange(5, 11), torch.arange(6)
    plain = attention.keys_and_values(policy.lm, ids, positions)
    speed.install(policy, ON)
    found = attention.keys_and_values(policy.lm, ids, positions)
    assert len(found) == 2
    for module, kv in plain.items():
        for a, b in zip(kv, found[module], strict=True):
            torch.testing.assert_close(a, b)
