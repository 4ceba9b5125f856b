"""What enters the lowest block that trains, kept from the first epoch on: equal losses, less work, and nowhere that it would be wrong."""

from __future__ import annotations

import pytest
import torch

import tiny
from luthier.core import LuthierError, next_token_batch
from luthier.methods.lora import Method as Lora
from luthier.methods.partial import Method as Partial
from luthier.methods.prefix import Method as Prefix
from luthier.modelling import trunkcache
from luthier.modelling.site import restoring
from luthier.objectives.sft import Objective as Sft
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.train import train

TOP = {"llama": r"model\.layers\.1\..*(q|down)_proj", "mistral_window": r"model\.layers\.1\..*v_proj", "gemma2": r"model\.layers\.1\..*(q|up)_proj",
       "gpt2": r"transformer\.h\.1\.mlp\.c_fc"}  # fmt: skip
ROWS = tiny.rows(8, seed=1)


def policy_of(family="llama", method=None):
    base, method = tiny.base(family), method or Lora(targets=(TOP[family],))
    torch.manual_seed(0)
    delta = method.attach(base, "default")
    if method.edits == "outputs":
        tiny.randomise(delta.params)
    return Policy(base, delta, method=method)


def cache_of(policy, folder, rows=ROWS, how="on", passes=3.0, ceiling=1e9, objective=None, said=None):
    policy.trunk_cache = trunkcache.of(
        policy, objective or Sft(), rows, how=how, ceiling=ceiling, passes=passes, folder=folder, say=[].append if said is None else said.append
    )
    return policy.trunk_cache


class Feed:
    """The same two packed batches, epoch after epoch."""

    def __init__(self, rows, packed):
        self.rows, self.packed = rows, packed

    def __next__(self):
        return [next_token_batch(self.rows[i : i + 4], pad=0, packed=self.packed) for i in (0, 4)]


def losses(policy, packed=True, epochs=3):
    optimizer = Optimizer(policy.trained(), lr=1e-2)
    return [(s.loss, s.grad_norm) for s in train(policy, Sft(), Feed(ROWS, packed), optimizer, lr=lambda _: 1e-2, steps=epochs, place=Place(on="cpu"))]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", list(TOP))
def test_losses_and_gradients_are_the_same_bits_and_the_blocks_below_run_once(family, packed, tmp_path):
    plain = losses(policy_of(family), packed)
    policy = policy_of(family)
    cache = cache_of(policy, tmp_path)
    assert cache.first == 1 and not list(tmp_path.iterdir())  # the file has no name any more
    runs = []
    lowest = next(m for n, m in policy.lm.named_modules() if n.endswith((".0.mlp.down_proj", ".0.mlp.c_proj")))
    lowest.register_forward_hook(lambda *_: runs.append(1))
    assert losses(policy, packed) == plain
    assert len(runs) == 2 and cache.reused == 2 * sum(len(r) for r in ROWS)


@pytest.mark.parametrize("method", [Partial(last_blocks=1), Partial(matching=(r"model\.norm\.weight",))])
def test_trained_weights_of_the_top_and_of_the_last_norm_alone(method, tmp_path):
    plain = losses(policy_of(method=method))
    policy = policy_of(method=method)
    assert cache_of(policy, tmp_path).first == (1 if method.last_blocks else 2)
    assert losses(policy) == plain


def test_recomputed_blocks_are_given_the_same_states(tmp_path):
    plain = losses(policy_of())
    policy = policy_of()
    policy.lm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    cache = cache_of(policy, tmp_path)
    assert losses(policy) == plain and cache.reused


def test_prompts_that_are_shared_are_kept_for_every_example(tmp_path):
    from prompted import answers

    batch = next_token_batch(answers((20, (5, 12)), (7, (6,)), (19, (1, 4, 2))), pad=0, packed=True)
    policy, found = policy_of("mistral_window"), {}
    cache = cache_of(policy, tmp_path)
    for share in ("on", "on", "off"):  # written from the shorter stream, read into it and into the whole one
        policy.share_prompts = share
        for p in policy.trained().values():
            p.grad = None
        loss = Sft().loss(policy, batch).sums["tokens"]
        loss.backward()
        found.setdefault(share, []).append((loss.item(), torch.cat([p.grad.flatten() for p in policy.trained().values()])))
    assert cache.reused == 2 * batch.tokens
    assert found["on"][0][0] == found["on"][1][0] and torch.equal(found["on"][0][1], found["on"][1][1])
    policy.trunk_cache = None
    loss = Sft().loss(policy, batch).sums["tokens"]
    for one in (found["on"][1], found["off"][0]):
        assert one[0] == pytest.approx(loss.item(), rel=1e-5)


def test_the_reference_and_other_text_are_not_confused_with_what_is_kept(tmp_path):
    policy, other = policy_of(), next_token_batch(tiny.rows(4, seed=9), pad=0, packed=True)
    batch = next_token_batch(ROWS[:4], pad=0, packed=True)
    with torch.no_grad():
        policy.eval()
        real = lambda b, **route: policy.hidden(b, **route)[b.segments.example(b.shape) >= 0]  # noqa: E731
        expected = [real(batch), real(other), real(batch, route=None)]
        cache_of(policy, tmp_path)
        policy.hidden(batch)
        for e, h in zip(expected, (real(batch), real(other), real(batch, route=None)), strict=True):
            assert torch.equal(e, h)


def test_no_more_is_kept_than_there_is_room_for(tmp_path):
    policy = policy_of()
    cache = cache_of(policy, tmp_path, rows=ROWS[:1])
    plain = losses(policy_of())
    assert losses(policy) == plain and cache.used <= cache.capacity == 64


def test_blocks_below_the_lowest_trained_one_keep_nothing_for_the_backward():
    """With no cache: what autograd saves while block 0 runs, where only block 1 trains."""
    policy, batch = policy_of(), next_token_batch(ROWS[:4], pad=0, packed=True)
    inside, saved = [], {0: 0, 1: 0}
    for i, block in enumerate(policy.lm.model.layers):
        block.register_forward_pre_hook(lambda *_, i=i: inside.append(i))
        block.register_forward_hook(lambda *_: inside.clear())

    def pack(x):
        if inside:
            saved[inside[-1]] += x.numel()
        return x

    policy.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy.hidden(batch).sum().backward()
    assert saved[0] == 0 and saved[1] > 0


@pytest.mark.parametrize(
    ("method", "why"),
    [(Lora(), "lowest block"), (Partial(embeddings=True), "embeddings train"), (Prefix(length=3, init="random"), "prefixes"), (Partial(norms=True), "lowest")],
)
def test_what_changes_from_step_to_step_is_not_kept(method, why, tmp_path):
    policy = policy_of(method=method)
    with pytest.raises(LuthierError, match=why):
        cache_of(policy, tmp_path)
    assert cache_of(policy, tmp_path, how="auto") is None and cache_of(policy, tmp_path, how="off") is None


def test_dropout_below_changing_text_and_too_little_disk_are_refused(tmp_path):
    policy = policy_of("gpt2")
    with pytest.raises(LuthierError, match=r"trunk_cache_gb=1e-06"):
        cache_of(policy, tmp_path, ceiling=1e3)
    with pytest.raises(LuthierError, match="every pass"):
        cache_of(policy, tmp_path, objective=type("O", (), {"renders": "masked"})())
    policy.lm.transformer.h[0].mlp.dropout.p = 0.1
    with pytest.raises(LuthierError, match="dropout"):
        cache_of(policy, tmp_path)


def test_auto_keeps_what_pays_and_says_so(tmp_path):
    policy, said = policy_of(), []
    assert cache_of(policy, tmp_path, how="auto", passes=1.0) is None
    assert cache_of(policy, tmp_path, how="auto", passes=3.0, said=said) is not None
    assert "of 2 blocks only the last 1 train" in said[0] and "1.3 times less" in said[0]  # 3 (2 + 1) / (3 + 2 x 2)


def test_a_model_that_is_not_given_back_the_same_bits_keeps_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(trunkcache.TrunkCache, "_read", lambda self, batch, *_: torch.zeros(*batch.shape, self.width))
    with pytest.raises(LuthierError, match="other hidden states"):
        cache_of(policy_of(), tmp_path)
