"""Attention over packed examples by hand, against softmax attention under a mask of the whole stream, in float64."""

import pytest
import torch
from torch import nn

import tiny
from luthier.core import Segments
from luthier.methods.lora import Method as Lora
from luthier.methods.prefix import Method as Prefix
from luthier.modelling import attention
from luthier.modelling.site import Frame, using
from luthier.speed import byhand, compiled, selftest
from luthier.speed.byhand import ByHand, Packed, _size, layout
from speed_forms import OFF, apart, batch_for, distances, gradients, only, policy_on

pytestmark = pytest.mark.skipif(compiled.kernels() is None, reason="no row kernels on this machine (no C++ compiler)")
ON = only(kernels="auto")


def served(monkeypatch):
    """Shapes of q that were attended by hand, those of the comparison at load left out."""
    seen, own = [], Packed.forward
    monkeypatch.setattr(Packed, "forward", staticmethod(lambda ctx, q, *rest: (seen.append(tuple(q.shape)), own(ctx, q, *rest))[1]))
    byhand.equals(torch.float32, False)
    seen.clear()
    return seen


def stream(lengths, parents=None, gap=0):
    """Examples one after another, with room of no example between them."""
    length = torch.tensor(lengths)
    start = (length + gap).cumsum(0) - (length + gap)
    return Segments(torch.zeros_like(length), start, length, parent=None if parents is None else torch.tensor(parents)), int((length + gap).sum())


def visible(segments, T, prefix, causal, window):
    """(T, prefix + T): what each position may see, said one pair at a time."""
    own = segments.example((1, T))[0].tolist()
    at = segments.positions((1, T))[0].tolist()
    parent = [-1] * len(segments) if segments.parent is None else segments.parent.tolist()
    out = torch.zeros(T, prefix + T, dtype=torch.bool)
    for i in range(T):
        if own[i] < 0:
            continue
        out[i, :prefix] = True
        for j in range(T):
            same = own[j] == own[i] and (at[j] <= at[i] or not causal)
            near = window is None or abs(at[i] - at[j]) < window
            out[i, prefix + j] = (same or (own[j] >= 0 and own[j] == parent[own[i]])) and near
    return out


def slow(q, k, v, seen, scale):
    """(1, T, H, d) in float64, no position of no example."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhij,bjhd->bihd", p, v)


CASES = {
    "few short ones": {"lengths": [5, 40, 33, 1], "gap": 2},
    "longer than a piece": {"lengths": [300, 7, 129], "gap": 3},
    "longer than several": {"lengths": [700, 20, 513]},
    "both ways": {"lengths": [5, 340, 33], "causal": False, "gap": 1},
    "a window": {"lengths": [40, 350], "window": 9},
    "a window both ways": {"lengths": [40, 350], "window": 9, "causal": False},
    "going on from another": {"lengths": [37, 20, 340, 9, 3], "parents": [-1, 0, 0, -1, 3], "gap": 1},
    "going on, in a window": {"lengths": [37, 20, 60], "parents": [-1, 0, 0], "window": 11},
    "a prefix": {"lengths": [5, 300, 31], "prefix": 4, "gap": 1},
    "a prefix, both ways": {"lengths": [5, 300, 31], "prefix": 4, "causal": False},
    "a prefix, going on from another": {"lengths": [20, 5, 290], "parents": [-1, 0, 0], "prefix": 40},
}


BOTH = [
    pytest.param(torch.float32, False, 9, id="by products"),
    pytest.param(torch.bfloat16, False, 32, id="by products in 16 bits"),
    pytest.param(torch.bfloat16, True, 32, id="in one pass"),
    pytest.param(torch.bfloat16, True, 96, id="in one pass, wide heads"),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 3)])
@pytest.mark.parametrize(("dtype", "whole", "d"), BOTH)
def test_outputs_and_gradients_equal_attention_under_a_mask_of_the_whole_stream(case, heads, key_heads, dtype, whole, d, monkeypatch):
    if whole and not compiled.kernels().whole:
        pytest.skip("this processor has no products of bfloat16")
    passes, run = [], compiled.Kernels.__call__
    monkeypatch.setattr(compiled.Kernels, "__call__", lambda self, name, *a: (passes.append(name), run(self, name, *a))[1])
    asked = {"causal": True, "window": None, "prefix": 0, "parents": None, "gap": 0} | CASES[case]
    torch.manual_seed(0)
    segments, T = stream(asked["lengths"], asked["parents"], asked["gap"])
    P = asked["prefix"]
    q, k, v = (torch.randn(1, T, h, d).to(dtype).requires_grad_() for h in (heads, key_heads, key_heads))
    before = [torch.randn(P, key_heads, d).to(dtype).requires_grad_() for _ in range(2)]
    up = torch.randn(1, T, heads, d).to(dtype)
    module = nn.Module()
    module.is_causal = asked["causal"]
    own, attended = ByHand(compiled.kernels(), whole), []

    def by_hand(*given):
        attended.append(own(*given))
        return attended[-1]

    with using(Frame("a", segments, prefixes={"a": {module: tuple(before)}} if P else {}, by_hand=by_hand)):
        got = attention.attend(module, *(x.transpose(1, 2) for x in (q, k, v)), None, scaling=0.3, sliding_window=asked["window"])[0]
    assert attended[0] is not None
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, *before)]
    long = [torch.cat([b[None], x], 1) for b, x in zip(exact[3:], exact[1:3], strict=True)]
    wanted = slow(exact[0], *long, visible(segments, T, P, asked["causal"], asked["window"]), 0.3)
    assert not got[0, segments.example((1, T))[0] < 0].any()
    which = slice(None) if P else slice(3)
    mine = torch.autograd.grad(got, [q, k, v, *before][which], up)
    theirs = torch.autograd.grad(wanted, exact[which], up.double())
    assert ("attention_back" in passes) == whole
    for a, b in zip((got, *mine), (wanted, *theirs), strict=True):
        assert a.dtype == dtype and float((a.double() - b).norm() / b.norm()) < (1e-6 if dtype == torch.float32 else 8e-3)
        if dtype == torch.float32:
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_probabilities_that_are_made_again_give_the_gradients_of_those_that_are_kept(monkeypatch):
    segments, T = stream([300, 50])
    torch.manual_seed(0)
    q, k, v = (torch.randn(T, 2, 8, requires_grad=True) for _ in range(3))
    found, kept = [], []
    for most in (0, 10_000):
        monkeypatch.setattr(byhand, "KEPT", most)
        where, sizes = layout(segments, (1, T), 2, 2, 0, True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t):
            y = Packed.apply(q, k, v, where, byhand._How(True, 0, 0.3, 0.0), compiled.kernels())
        found.append([y, *torch.autograd.grad(y, [q, k, v], torch.ones_like(y))])
        kept.append(sum(sizes))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert kept[0] == 3 * T * 16 < kept[1]


def test_what_is_later_is_only_computed_within_a_piece():
    where = layout(stream([1500])[0], (1, 1500), 1, 1, 0, True)
    scores = sum(p.count * p.n * p.m for p in where.pieces)
    assert 0.5 * 1500 * 1500 < scores < 0.62 * 1500 * 1500 and max(p.m for p in where.pieces) <= 1536


@pytest.mark.parametrize("n", [1, 31, 32, 33, 127, 128, 129, 200, 1000])
def test_sizes_are_few_and_hold_what_they_are_for(n):
    assert n <= _size(n) < 2 * n + byhand.STEP
    assert len({_size(i) for i in range(1, byhand.QUERIES + 1)}) <= 4


def test_dropout_drops_its_share_and_the_backward_is_that_of_what_was_dropped():
    segments, T = stream([64])
    q, k = (torch.zeros(T, 1, 64) for _ in range(2))
    v = torch.eye(64).view(64, 1, 64).requires_grad_()
    torch.manual_seed(0)
    where, how = layout(segments, (1, T), 1, 1, 0, False), byhand._How(False, 0, 1.0, 0.25)
    p = Packed.apply(q, k, v, where, how, compiled.kernels())[:, 0]  # (query, key): values are the unit vectors
    assert {round(x, 6) for x in p.unique().tolist()} == {0.0, round(1 / 64 / 0.75, 6)}
    assert (p == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    up = torch.randn(64, 64)
    torch.testing.assert_close(torch.autograd.grad(p, v, up)[0][:, 0], p.detach().t() @ up)
    q.requires_grad_()
    k = torch.randn(T, 1, 64)
    torch.manual_seed(0)
    kept = (p.detach() != 0).float() / 0.75
    y = Packed.apply(q, k, v.detach(), where, how, compiled.kernels())
    again = ((q[:, 0] @ k[:, 0].t()).softmax(-1) * kept)[:, None]
    torch.testing.assert_close(y, again, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(y, q, up[:, None]), torch.autograd.grad(again, q, up[:, None]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "qwen2", "mistral_window", "phi", "cohere"])
def test_loss_and_gradients_of_every_family_that_attends_in_common_equal_the_plain_form(family, monkeypatch):
    policy = policy_on(tiny.base(family), Lora(targets=("query",)))
    loss, plain, _ = gradients(policy, OFF)
    seen = served(monkeypatch)
    other, faster, _ = gradients(policy, ON)
    assert len([s for s in seen if s[0] != selftest.TOKENS - selftest.PREFIX]) >= 2
    assert other == pytest.approx(loss, rel=1e-6) and apart(plain, faster) < 1e-5


def test_prefixes_and_rows_of_one_example_are_attended_by_hand_too(monkeypatch):
    seen = served(monkeypatch)
    policy = policy_on(tiny.base(), Prefix(length=3))
    plain, faster = (gradients(policy, s)[1] for s in (OFF, ON))
    assert seen and apart(plain, faster) < 1e-5
    seen.clear()
    policy = policy_on(tiny.base(), Lora(targets=("value",)))
    policy.base.packs = False
    plain, faster = (gradients(policy, s)[1] for s in (OFF, ON))
    assert seen and apart(plain, faster) < 1e-5


def test_a_soft_cap_and_evaluation_go_through_the_common_attention(monkeypatch):
    policy = policy_on(tiny.base("gemma2"), Lora(targets=("value",)))
    seen = served(monkeypatch)
    gradients(policy, ON)
    assert not [s for s in seen if s[0] != selftest.TOKENS - selftest.PREFIX]
    policy = policy_on(tiny.base(), Lora(targets=("value",)))
    gradients(policy, ON)
    seen.clear()
    with torch.no_grad():
        policy.hidden(batch_for(policy))
    assert not seen


def test_in_16_bits_it_is_no_further_from_float32_than_the_plain_form():
    plain, faster = distances(Lora(targets=("attention",)), OFF, ON)  # heads of 8: by products
    assert faster != plain and faster < 1.1 * plain < 0.1


def test_a_kernel_that_gives_other_numbers_is_found_at_load(monkeypatch, caplog):
    policy = policy_on(tiny.base(), Lora(targets=("value",)))
    monkeypatch.setattr(byhand, "equals", lambda dtype, whole: False)
    with caplog.at_level("WARNING", "luthier.speed"):
        assert byhand.install(policy, compiled.kernels()) is None
    assert "not used" in caplog.text


def test_the_comparison_at_load_sees_a_wrong_sum(monkeypatch):
    own = compiled.Kernels.__call__

    def wrong(self, name, dtype, *args):
        own(self, name, dtype, *args)
        if name == "spread":
            args[4].view(-1)[3] += 1.0

    byhand.equals.cache_clear()
    try:
        monkeypatch.setattr(compiled.Kernels, "__call__", wrong)
        assert not byhand.equals(torch.float32, False)
    finally:
        byhand.equals.cache_clear()


@pytest.mark.skipif(compiled.kernels() is None or not compiled.kernels().whole, reason="this processor has no products of bfloat16")
def test_in_one_pass_the_result_is_the_same_bits_on_any_number_of_threads_and_keeps_only_q_k_and_v():
    segments, T = stream([300, 40, 7, 90], [-1, 0, -1, 0])
    torch.manual_seed(0)
    q, k, v = (torch.randn(T, h, 32).bfloat16().requires_grad_() for h in (4, 2, 2))
    found, threads = [], torch.get_num_threads()
    for n in (1, 3):
        torch.set_num_threads(n)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.data_ptr()), t)[1], lambda t: t):
            y = byhand.Whole.apply(q, k, v, byhand.table(segments, (1, T), 0, True), byhand._How(True, 0, 0.2, 0.0), compiled.kernels())
        found.append([y, *torch.autograd.grad(y, [q, k, v], torch.ones_like(y))])
        assert sorted(kept) == sorted(x.data_ptr() for x in (q, k, v))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_pieces_that_share_keys_are_of_one_family():
    segments, T = stream([300, 40, 7, 90], [-1, 0, -1, 0])
    where = byhand.table(segments, (1, T), 0, True)
    assert (where.count, where.together) == (5, 2) and where.families.numbers.tolist() == [0, 4, 5]
    assert byhand.table(segments, (1, T), 3, True).together == 1  # a prefix is everyone's
