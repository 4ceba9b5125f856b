"""What examples begin with, computed once: hidden states, losses and gradients are those of every example computed whole."""

import importlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import ranked
import tiny
from luthier import build
from luthier.core import Alike, Batch, Row, alike, example_logps, lay_out, next_token_batch
from luthier.modelling import sharing
from luthier.modelling.site import current, restoring
from luthier.objectives.sft import Objective as Sft
from luthier.policy import Policy
from luthier.settings.plugins import kinds
from prompted import answers

METHODS = [k for k in kinds("methods") if k != "crafted_prompt"]  # which trains nothing


# A pair, one that shares nothing, a group of five with answers of one token, a prompt of one token.
ROWS = [(9, (5, 12)), (7, (6,)), (20, (1, 4, 1, 9, 3)), (1, (4, 5))]


def moved(kind: str, base, name: str = "default", seed: int = 1) -> Policy:
    """A policy whose delta does something."""
    method = importlib.import_module(f"luthier.methods.{kind}").Method()
    delta = method.attach(base, name)
    if method.edits != "weights":
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in delta.params.values():
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return Policy(base, delta, method=method, name=name)


def computed(policy: Policy, batch: Batch, share: str) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Hidden states of the examples, gradients of a loss that reads all of them, and how many positions the model saw."""
    policy.share_prompts = share
    seen: list[int] = []
    hook = policy.lm.base_model.register_forward_pre_hook(
        lambda m, a, k: seen.append((k["input_ids"] if k.get("input_ids") is not None else k["inputs_embeds"]).shape[1]), with_kwargs=True
    )
    trained = list(policy.trained().values())
    for p in trained:
        p.grad = None
    policy.train()
    hidden = policy.hidden(batch)
    hook.remove()
    there = batch.segments.example(batch.shape) >= 0
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    ((hidden * upstream)[there].sum() - example_logps(policy, batch)[0].sum()).backward()
    return hidden.detach()[there], [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained], seen[0]


def same(policy: Policy, batch: Batch, tolerance: float = 2e-5) -> None:
    whole, grads, wide = computed(policy, batch, "off")
    shared, others, short = computed(policy, batch, "on")
    assert short < wide  # it was shared
    torch.testing.assert_close(shared, whole, atol=tolerance, rtol=tolerance)
    largest = max(float(g.abs().max()) for g in grads)
    for g, o in zip(grads, others, strict=True):
        torch.testing.assert_close(o, g, atol=tolerance * largest, rtol=1e-4)


def batch_of(rows: list[Row]) -> Batch:
    return next_token_batch(rows, pad=0, packed=True)


# --- what is alike ----------------------------------------------------------------------------------------------------


def test_neighbours_are_cut_where_that_saves_most():
    """Against every way of cutting a row into neighbours."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        rows = [Row(rng.integers(0, 2, rng.integers(1, 9)).astype(np.int32), np.zeros(0, dtype=bool)) for _ in range(rng.integers(1, 7))]

        def begin(some: list[Row]) -> int:
            shortest, n = min(len(r) for r in some) - 1, 0
            while n < shortest and len({int(r.ids[n]) for r in some}) == 1:
                n += 1
            return n

        best = 0
        for cuts in itertools.product([False, True], repeat=len(rows) - 1):
            groups, now = [], [rows[0]]
            for cut, row in zip(cuts, rows[1:], strict=True):
                if cut:
                    groups.append(now)
                    now = []
                now.append(row)
            best = max(best, sum((len(g) - 1) * begin(g) for g in [*groups, now]))
        found = alike(rows)
        for g in found:
            assert begin(rows[g.first : g.first + g.examples]) == g.tokens > 0
        assert sum((g.examples - 1) * g.tokens for g in found) == best


def test_an_example_that_another_begins_with_keeps_a_token_of_its_own():
    rows = [tiny.row([5, 6, 7]), tiny.row([5, 6, 7]), tiny.row([5, 6, 7, 8])]
    assert alike(rows) == (Alike(0, 3, 2),)


def test_what_stands_alone_keeps_its_place_and_padded_rows_say_nothing():
    rows = answers(*ROWS)
    _, _, packed = lay_out(rows, 0, packed=True)
    assert packed.alike == (Alike(0, 2, 9), Alike(3, 5, 20), Alike(8, 2, 1))
    assert lay_out(rows, 0, packed=False)[2].alike == ()


def test_the_shorter_stream_holds_every_token_once_and_leads_back_to_all():
    batch = batch_of(answers(*ROWS))
    shorter = sharing.shorten(batch, None, "on")
    assert shorter is not None
    n = batch.tokens
    assert torch.equal(shorter.stream.ids[0, shorter.back[:n]], batch.ids[0, :n])
    assert torch.equal(shorter.stream.segments.positions(shorter.stream.shape)[0, shorter.back[:n]], batch.segments.positions(batch.shape)[0, :n])
    assert shorter.stream.tokens == n - 9 - 4 * 20 - 1 and shorter.stream.segments.parent.tolist() == [-1, 0, 0, -1, -1, 4, 4, 4, 4, 4, -1, 10, 10]


def test_auto_shares_what_pays_and_off_nothing():
    long, short, little = answers((40, (5, 6))), answers((9, (5, 60))), answers((20, (5, 6)), (60, (600,)))
    for rows, how, expected in ((long, "auto", True), (long, "off", False), (short, "auto", False), (short, "on", True), (little, "auto", False)):
        assert (sharing.shorten(batch_of(rows), None, how) is not None) is expected


def test_examples_of_different_deltas_share_nothing():
    batch = batch_of(answers((9, (5, 12)), (9, (3, 4))))
    shorter = sharing.shorten(batch, ("a", None, "b", "b"), "on")
    assert shorter is not None and shorter.stream.segments.parent.tolist() == [-1, -1, -1, 2, 2]
    assert shorter.route(("a", None, "b", "b")) == ("a", None, "b", "b", "b")


# --- the same mathematics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_every_family_gives_the_hidden_states_and_gradients_of_whole_examples(family):
    base = tiny.base(family)
    assert base.shares == base.packs
    if base.shares:
        same(moved("lora", base), batch_of(answers(*ROWS)))


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma2"])
@pytest.mark.parametrize("kind", METHODS)
def test_every_method_gives_the_hidden_states_and_gradients_of_whole_examples(kind, family):
    same(moved(kind, tiny.base(family)), batch_of(answers((9, (5, 12)), (7, (6,)), (12, (1, 4, 2)))))


def test_whole_examples_are_those_computed_one_by_one():
    """The slow independent version: each example alone, through transformers' own attention."""
    policy, rows = Policy(tiny.base("mistral_window")), answers(*ROWS)
    plain = tiny.model("mistral_window")
    policy.share_prompts = "on"
    with torch.no_grad():
        shared = policy.hidden(batch_of(rows))[0]
        alone = torch.cat([plain.model(input_ids=torch.tensor(r.ids[None]).long()).last_hidden_state[0] for r in rows])
    torch.testing.assert_close(shared[: len(alone)], alone, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("lengths", [((40, (33, 32, 1)), (64, (65,)), (31, (2, 64))), ((300, (260, 20)), (20, (290, 310)))])
def test_prompts_and_answers_of_any_length(lengths):
    """Bucket edges (32, 64, 256) on either side."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=1024
    )
    same(moved("lora", build.adopt(LlamaForCausalLM(config))), batch_of(answers(*lengths)), tolerance=5e-5)


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_recomputation_changes_no_gradient(kind):
    policy, batch = moved(kind, tiny.base("gemma2")), batch_of(answers(*ROWS[:2]))
    _, kept, _ = computed(policy, batch, "on")
    policy.lm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    _, again, _ = computed(policy, batch, "on")
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_batch_of_several_deltas_gives_each_example_its_own():
    base = tiny.base()
    policy = moved("lora", base, "a")
    for name, seed in (("b", 2), ("p", 3)):
        policy.add(name, moved("prefix" if name == "p" else "lora", base, name, seed).delta)
    batch = batch_of(answers((19, (5, 12)), (28, (5, 3)), (27, (6, 2)), (29, (4, 4))))
    batch.route = ("a", "a", "b", "a", "p", "p", None, None)
    same(policy, batch)


def test_a_model_that_the_probe_refused_keeps_the_plain_layout():
    policy, batch = Policy(tiny.base()), batch_of(answers(*ROWS))
    policy.base.shares = False
    policy.share_prompts = "on"
    frames = []
    policy.lm.model.layers[0].register_forward_pre_hook(lambda *_: frames.append(current()))
    policy.hidden(batch)
    assert frames[0].segments is batch.segments


def test_encoders_share_nothing():
    assert not any(tiny.base(f).shares for f in (*tiny.ENCODERS, "t5"))


def test_a_model_whose_answers_see_one_another_is_found():
    """The probe is seen to refuse: attention that forgets the parent gives other hidden states."""
    from luthier.modelling import attention, probe

    lm = tiny.model()
    base = build.adopt(lm)
    assert base.probes["shares"]
    kept = attention._of_parent
    attention._of_parent = lambda n, parent, how: torch.zeros_like(kept(n, parent, how))
    try:
        assert not probe.run(base)["shares"]
    finally:
        attention._of_parent = kept


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("groups", [1, 2])
def test_short_bf16_attention_over_a_parent_is_as_close_to_fp32_as_the_flash_kernel(window, groups):
    from luthier.modelling import attention

    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(3, h, 40, 16) for h in (4, 4 // groups, 4 // groups, 4))
    pk, pv = torch.randn(2, 3, 4 // groups, 64, 16)
    before = torch.tensor([64, 1, 33])

    def run(dtype, short):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, pk, pv)]
        attention.SHORT, keep = (256 if short else 0), attention.SHORT
        try:
            how = attention.How(dropout=0.0, scaling=None, window=window, softcap=None, causal=True)
            out = attention._rows(*leaves[:3], how, parent=(leaves[3], leaves[4], before))
        finally:
            attention.SHORT = keep
        out.backward(upstream.to(dtype))
        return [out.detach().float(), *(x.grad.float() for x in leaves)]

    exact, ours, flash = run(torch.float32, False), run(torch.bfloat16, True), run(torch.bfloat16, False)
    for e, o, f in zip(exact, ours, flash, strict=True):
        assert float((o - e).norm() / e.norm()) < 2.5 * max(float((f - e).norm() / e.norm()), 2e-3)


# --- objectives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dpo", "orpo", "reward", "kto"])
def test_objectives_have_the_loss_and_the_gradients_of_whole_examples(kind):
    base = tiny.base()
    objective = importlib.import_module(f"luthier.objectives.{kind}").Objective()
    torch.manual_seed(0)
    policy = moved("lora", base)
    policy.heads.update(objective.heads(base))
    rows = ranked.rows("llama", {"reward": "ranked", "kto": "judged"}.get(kind, "pairs"))
    found = []
    for how in ("off", "on"):
        policy.share_prompts = how
        for p in policy.trained().values():
            p.grad = None
        loss = objective.loss(policy, objective.collate(rows, pad=0, packed=True))
        sum(loss.sums.values()).backward()
        found.append((sum(float(s.detach()) for s in loss.sums.values()), torch.cat([p.grad.flatten() for p in policy.trained().values()])))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 1e-5


def test_a_mixture_of_tasks_in_one_stream_has_the_loss_and_the_gradients_of_whole_examples():
    from luthier.settings.run import Run

    base = tiny.base()
    objective = Run(objective={"kind": "multitask", "parts": {"best": "reward", "own": "sft"}}).objective
    torch.manual_seed(0)
    policy = moved("lora", base)
    policy.heads.update(objective.heads(base))
    rows = [*(replace(r, task="best") for r in ranked.rows("llama", "ranked")), *(replace(r, task="own") for r in answers((25, (5, 7, 3))))]
    batch = objective.collate(rows, pad=0, packed=True)
    assert [a.first for a in batch.segments.alike if a.tokens == 25] == [len(batch.segments) - 3]
    found = []
    for how in ("off", "on"):
        policy.share_prompts = how
        for p in policy.trained().values():
            p.grad = None
        sums = objective.loss(policy, batch).sums
        sum(sums.values()).backward()
        found.append(({k: v.item() for k, v in sums.items()}, torch.cat([p.grad.flatten() for p in policy.trained().values()])))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 1e-5


def test_the_last_prompt_position_learns_from_the_first_token_of_every_answer():
    policy, rows = moved("lora", tiny.base()), answers((39, (1, 1, 1)))
    batch = batch_of(rows)
    assert batch.units["tokens"] == 3
    same(policy, batch)
    policy.share_prompts = "on"
    one_by_one = [example_logps(policy, batch_of([r]))[0] for r in rows]
    torch.testing.assert_close(example_logps(policy, batch)[0], torch.cat(one_by_one), atol=1e-5, rtol=1e-5)
    assert Sft().loss(policy, batch).sums["tokens"].item() == pytest.approx(-sum(one_by_one).item(), rel=1e-5)


def test_examples_that_are_read_and_not_counted_lie_in_the_shorter_stream_too():
    """A rank with nothing to train runs the shortest row, whose tokens are nobody's."""
    batch = next_token_batch(answers(*ROWS), pad=0, packed=True)
    whole = sharing.shorten(batch, None, "on")
    uncounted = type("Idle", (Batch,), {"tokens": 0})(**vars(batch))
    idle = sharing.shorten(uncounted, None, "on")
    assert whole is not None and idle is not None and torch.equal(idle.take, whole.take) and torch.equal(idle.back, whole.back)
