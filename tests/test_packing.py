"""Packed, padded and accumulated batches are the same mathematics."""

import pytest
import torch

import tiny
from luthier import build
from luthier.core import Batch, lay_out
from luthier.methods.lora import Method as Lora
from luthier.modelling.site import restoring
from luthier.objectives.sft import Objective
from luthier.policy import Policy


def gradients(policy, rows, *, packed, micro):
    """(loss sum, all gradients flat) over micro-batches of ``micro`` rows."""
    objective, total = Objective(), 0.0
    for p in policy.trained().values():
        p.grad = None
    for i in range(0, len(rows), micro):
        loss = objective.loss(policy, objective.collate(rows[i : i + micro], pad=0, packed=packed)).sums["tokens"]
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in policy.trained().values()])


def lora_policy(family, **how):
    base = tiny.base(family)
    method = Lora(targets=("attention",), **how)
    delta = method.attach(base, "default")
    tiny.randomise(delta.params)
    return Policy(base, delta, method=method)


@pytest.mark.parametrize("family", tiny.DENSE)
def test_every_dense_family_is_found_to_pack(family):
    assert tiny.base(family).packs


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_packed_equals_padded_equals_accumulated(family):
    policy, rows = lora_policy(family), tiny.rows(6)
    loss, grad = gradients(policy, rows, packed=False, micro=6)
    ways = [(False, 1)] + [(True, 6), (True, 2)] * policy.base.packs
    for packed, micro in ways:
        other, other_grad = gradients(policy, rows, packed=packed, micro=micro)
        assert other == pytest.approx(loss, rel=1e-6)
        assert float((other_grad - grad).norm() / grad.norm()) < 2e-6


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_recomputation_changes_no_gradient(family):
    policy, rows = lora_policy(family), tiny.rows(4)
    packed = policy.base.packs
    loss, grad = gradients(policy, rows, packed=packed, micro=2)
    policy.lm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    policy.train()
    other, other_grad = gradients(policy, rows, packed=packed, micro=2)
    assert other == loss and torch.equal(grad, other_grad)


def test_a_leaking_family_is_found_and_refused_in_a_packed_row():
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    base = build.adopt(BloomForCausalLM(BloomConfig(vocab_size=tiny.V, hidden_size=32, n_layer=2, n_head=4)))
    assert not base.packs and base.probes["implementation"] != "luthier"
    batch = Objective().collate(tiny.rows(2), pad=0, packed=True)
    with pytest.raises(build.Incompatible, match=r"data\.pack=no"):
        Policy(base).hidden(batch)


@pytest.mark.parametrize("lengths", [(40, 3, 33, 32, 1, 64), (300, 260, 20)])
def test_segments_of_any_lengths_attend_only_to_themselves(lengths):
    """Against one forward per example, bucket edges (32, 64, 256) and long segments included."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=512)
    policy = Policy(build.adopt(LlamaForCausalLM(config)))
    rows = [r for n in lengths for r in tiny.rows(1, seed=n, shortest=n, longest=n + 1, prompt=0)]
    ids, targets, segments = lay_out(rows, 0, packed=True)
    with torch.no_grad():
        together = policy.hidden(Batch(ids=ids, segments=segments, targets=targets))[0, : sum(lengths)]
        alone = torch.cat([policy.lm.model(input_ids=torch.tensor(r.ids[None]).long()).last_hidden_state[0] for r in rows])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)


def test_targets_are_the_next_trained_token_of_the_same_example():
    rows = tiny.rows(3, prompt=2)
    for packed in (True, False):
        ids, targets, segments = lay_out(rows, 0, packed)
        for r, b, t in zip(rows, segments.row.tolist(), segments.start.tolist(), strict=True):
            for i in range(len(r)):
                expected = int(r.ids[i + 1]) if i + 1 < len(r) and r.train[i + 1] else -100
                assert int(targets[b, t + i]) == expected and int(ids[b, t + i]) == r.ids[i]


@pytest.mark.parametrize(("window", "groups"), [(None, 1), (None, 2), (7, 2)])
def test_short_bf16_attention_is_as_close_to_fp32_as_the_flash_kernel(window, groups):
    from luthier.modelling import attention

    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(3, h, 100, 16) for h in (4, 4 // groups, 4 // groups, 4))
    how = {"dropout": 0.0, "scaling": None, "window": window, "softcap": None}

    def run(dtype, short):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        attention.SHORT, keep = (256 if short else 0), attention.SHORT
        try:
            out = attention._rows(*leaves, attention.How(**how, causal=True))
        finally:
            attention.SHORT = keep
        out.backward(upstream.to(dtype))
        return [out.detach().float(), *(x.grad.float() for x in leaves)]

    exact, ours, flash = run(torch.float32, False), run(torch.bfloat16, True), run(torch.bfloat16, False)
    for e, o, f in zip(exact, ours, flash, strict=True):
        assert float((o - e).norm() / e.norm()) < 2.5 * max(float((f - e).norm() / e.norm()), 2e-3)
