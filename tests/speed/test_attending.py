"""Self-attention over packed examples by hand, with rotary positions by the row kernel."""

import pytest
import torch

import tiny
from luthier import attention, speed
from luthier.core import Segments
from luthier.methods.lora import Method as Lora
from luthier.methods.prefix import Method as Prefix
from luthier.speed import compiled
from luthier.speed.attending import Attending, Packed, layout
from speed_forms import OFF, apart, batch_for, distances, gradients, only, policy_on

pytestmark = pytest.mark.skipif(compiled.kernels() is None, reason="no row kernels on this machine (no C++ compiler)")
ON = only(kernels="auto")


def packed(monkeypatch):
    """Shapes that were attended by hand."""
    seen, own = [], Packed.forward
    monkeypatch.setattr(Packed, "forward", staticmethod(lambda ctx, q, *rest: (seen.append(tuple(q.shape)), own(ctx, q, *rest))[1]))
    return seen


def attended(policy):
    return [m for m in policy.lm.modules() if isinstance(m.__dict__.get("forward"), Attending)]


@pytest.mark.parametrize(
    ("family", "by_hand"), [("llama", 2), ("qwen2", 2), ("qwen3", 2), ("granite", 2), ("qwen3_moe", 2), ("mistral_window", 0), ("gemma2", 0), ("gemma3", 0)]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_equal_the_plain_form(family, by_hand, recompute, monkeypatch):
    policy = policy_on(tiny.base(family), Lora(targets=("attention",)), recompute=recompute)
    batches = [batch_for(policy, seed=s) for s in (1, 2)]
    loss, plain, _ = gradients(policy, OFF, *batches)
    seen = packed(monkeypatch)
    other, faster, _ = gradients(policy, ON, *batches)
    assert len(attended(policy)) == 2
    # a window shorter than the examples and a soft cap are not the plain triangle: those go through attention.attend
    assert len([s for s in seen if s[1] != 24]) == len(batches) * by_hand * (1 + recompute)  # 24: the comparison at load
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


def test_prefixes_and_rows_of_one_example_go_through_the_common_attention(monkeypatch):
    seen = packed(monkeypatch)
    policy = policy_on(tiny.base(), Prefix(length=3))
    plain, faster = (gradients(policy, s)[1] for s in (OFF, ON))
    assert attended(policy) and apart(plain, faster) < 1e-5
    policy = policy_on(tiny.base(), Lora(targets=("value",)))
    policy.base.packs = False
    plain, faster = (gradients(policy, s)[1] for s in (OFF, ON))
    assert attended(policy) and apart(plain, faster) < 1e-5
    assert {s[1] for s in seen} == {24}  # those of the comparison at load


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 3), (4, 1)])
def test_by_hand_equals_softmax_attention_of_each_segment_and_padding_gets_no_gradient(heads, key_heads):
    torch.manual_seed(0)
    lengths, T, d = [5, 40, 33, 1], 83, 8
    starts = [0, 5, 45, 78]
    segments = Segments(torch.zeros(4, dtype=torch.long), torch.tensor(starts), torch.tensor(lengths))
    q, k, v = (torch.randn(1, T, h, d, requires_grad=True) for h in (heads, key_heads, key_heads))
    up = torch.randn(1, T, heads, d)
    real = segments.example((1, T))[0] >= 0
    where = layout(segments, (1, T), heads, key_heads, torch.device("cpu"))
    got = Packed.apply(q, k, v, where, 0.3, compiled.kernels())
    wanted = torch.zeros_like(got)
    for s, n in zip(starts, lengths, strict=True):
        one = [x[:, s : s + n].transpose(1, 2) for x in (q, k, v)]
        wanted[:, s : s + n] = attention.sdpa(*one, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert not got[0, ~real].any()
    mine, theirs = (torch.autograd.grad(y, [q, k, v], up * real[None, :, None, None]) for y in (got, wanted))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not a[0, ~real].any()


def test_a_segment_longer_than_plain_products_are_good_for_is_left_to_the_common_attention():
    n = attention.SHORT + 1
    segments = Segments(torch.zeros(2, dtype=torch.long), torch.tensor([0, n]), torch.tensor([n, 4]))
    assert layout(segments, (1, n + 4), 4, 2, torch.device("cpu")) is None
    shorter = Segments(segments.row, torch.tensor([0, n - 1]), torch.tensor([n - 1, 4]))
    assert layout(shorter, (1, n + 3), 4, 2, torch.device("cpu")) is not None


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
