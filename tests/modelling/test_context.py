"""A sequence over several ranks equals the same on one: losses, all gradients, what a head reads; and what a rank keeps falls."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

import forked
import tiny
from luthier import build
from luthier.core import Incompatible, LuthierError, Row, join
from luthier.modelling import context
from luthier.modelling.site import restoring
from luthier.planning import fitting
from luthier.settings.run import Run

LONG = {"max_position_embeddings": 256, "sliding_window": 24}
ONE, SEVERAL, SHORT = (96,), (70, 9, 40, 61), (5, 7)

# name, family, method, objective, lengths, packed, recomputed
CASES = [
    ("one long sequence", "llama", "full", "text", ONE, False, "none"),
    ("one long sequence, recomputed", "llama", "full", "text", ONE, False, "blocks"),
    ("rows of several lengths", "llama", "lora", "sft", SEVERAL, False, "none"),
    ("packed", "llama", "full", "text", SEVERAL, True, "none"),
    ("packed, recomputed", "qwen3", "lora", "sft", SEVERAL, True, "blocks"),
    ("of four ranks two have whole examples and are needed by the others", "llama", "full", "text", (32, 32, 56), True, "none"),
    ("so short that a rank has padding only", "llama", "lora", "sft", SHORT, True, "none"),
    ("a prefix, and a rank that has padding only", "llama", "prefix", "sft", SHORT, True, "none"),
    ("a prefix", "llama", "prefix", "sft", SEVERAL, True, "none"),
    ("a prefix, recomputed, one sequence", "gpt2", "prefix", "sft", ONE, False, "blocks"),
    ("a sliding window", "mistral_window", "full", "text", SEVERAL, True, "none"),
    ("a sliding window in every other layer, recomputed", "gemma3", "lora", "text", ONE, False, "blocks"),
    ("a sliding window and a prefix", "mistral_window", "p_tuning_v2", "sft", ONE, False, "none"),
    ("a soft cap", "gemma2", "lora", "text", SEVERAL, True, "none"),
    ("an encoder", "bert", "lora", "masked_text", SEVERAL, True, "none"),
    ("an encoder with windows", "modernbert", "full", "masked_text", ONE, False, "none"),
    ("pairs", "llama", "lora", "dpo", SEVERAL, True, "none"),
    ("pairs and their tokens", "llama", "lora", "orpo", SEVERAL, True, "none"),
    ("answers judged one by one, with others beside them", "llama", "lora", "kto", SEVERAL, True, "none"),
    ("rankings, read at the last token", "llama", "lora", "reward", SEVERAL, True, "none"),
    ("labels, read at the first token", "bert", "lora", "classify", SEVERAL, False, "none"),
]


def base_of(family):
    kind = tiny.MODELS[family]
    torch.manual_seed(0)
    config = kind().config
    for name, value in LONG.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    if family == "gpt2":
        config.n_positions = 256
    torch.manual_seed(0)
    return build.adopt(type(kind())(config), source=f"tiny-{family}")


def rows_of(objective, lengths, base):
    rng = np.random.default_rng(1)
    made = [Row(rng.integers(3, tiny.V, n).astype(np.int32), np.arange(n) >= 3, f"made:{i}") for i, n in enumerate(lengths)]
    if objective == "masked_text":
        from luthier.nn.corruption import Hiding

        hiding = Hiding(usual=np.arange(3, tiny.V), mask=2, sentinels=())
        return [dataclasses.replace(r, extras={"hiding": hiding}) for r in made]
    if objective == "classify":
        return [dataclasses.replace(r, extras={"label": i % 2}) for i, r in enumerate(made)]
    if objective in ("dpo", "orpo", "reward", "kto"):
        cached = {"reference": np.array([-20.0, -30.0])} if objective in ("dpo", "kto") else {}
        return [join([a, b], ranks=(0, 1), margin=0.0, good=True, **cached) for a, b in zip(made[::2], made[1::2], strict=True)]
    return made


def made(family, method, objective, recompute):
    asked = {"kind": "classify", "problem": "single", "labels": ("a", "b")} if objective == "classify" else objective
    base = base_of(family)
    policy, goal = build.assemble(Run(method=method, objective=asked, precision="float32", place={"kind": "one", "on": "cpu"}), base)
    if recompute == "blocks":
        base.model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    if method != "full":
        tiny.randomise(policy.trained(), std=0.2)
    return policy, goal


def learned(policy, goal, batch):
    """The loss, and every gradient."""
    policy.train()
    for p in policy.trained().values():
        p.grad = None
    if goal.couples:
        goal.couple(policy, [batch])
    loss = goal.loss(policy, batch)
    whole = sum(w * loss.sums[k] / batch.units[k] for k, w in goal.terms.items())
    whole.backward()
    return float(whole.detach()), {k: p.grad for k, p in policy.trained().items()}


def compare(rank, size, cases):
    """Of each case the largest differences, of the loss and of the gradients relative to the largest; on one rank there is one process's word for it."""
    group = context.Group(rank, size, dist.group.WORLD)
    out = {}
    for name, family, method, objective, lengths, packed, recompute in cases:
        policy, goal = made(family, method, objective, recompute)
        rows = rows_of(objective, lengths, policy.base)
        loss, grads = learned(policy, goal, goal.collate(rows, pad=0, packed=packed))
        grads = {k: g.clone() for k, g in grads.items() if g is not None}
        ours, mine = learned(policy, goal, context.sharing(goal, group).collate(rows, pad=0, packed=packed))
        apart = 0.0
        largest = max(float(g.abs().max()) for g in grads.values())
        for k, whole in grads.items():  # a rank that scores nothing has no gradient of the head
            g = torch.zeros_like(whole) if mine[k] is None else mine[k]
            dist.all_reduce(g)
            apart = max(apart, float((g / size - whole).abs().max()) / largest)
        assert all(mine[k] is None for k in mine.keys() - grads.keys())
        out[name] = (abs(ours - loss) / abs(loss), apart)
    return out


@pytest.fixture(scope="module")
def differences():
    return {size: forked.ranks(size, compare, CASES) for size in (2, 4)}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", [c[0] for c in CASES])
def test_a_stream_over_ranks_has_the_loss_and_the_gradients_of_one(case, size, differences):
    for found in differences[size]:
        loss, grads = found[case]
        assert loss < 1e-6 and grads < 1e-6, (loss, grads)


def refused(**settings):
    with pytest.raises(Incompatible, match=r"place\.context: .*place\.context=1") as e:
        context.check(Run(place={"kind": "fsdp", "on": "cpu", "context": 2}, precision="float32", **settings))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_what_cannot_be_split_is_refused_before_anything_is_loaded():
    assert "grpo" in refused(objective={"kind": "grpo", "rewards": {"bleu": 1.0}})
    assert "multitask" in refused(objective={"kind": "multitask", "parts": {"a": "sft", "b": "text"}})
    assert "prompt" in refused(method="prompt")
    context.check(Run(place={"kind": "fsdp", "on": "cpu", "context": 2}, precision="float32", method="prefix"))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_and_families_with_attention_of_their_own_are_refused(family):
    with pytest.raises(Incompatible, match=r"two streams.*place\.context=1"):
        context.check_base(tiny.base(family), "luthier")
    base = tiny.base("llama")
    context.check_base(base, "luthier")
    base.packs = False
    with pytest.raises(Incompatible, match=r"llama.*other ways.*place\.context=1"):
        context.check_base(base, "luthier")


def test_one_process_cannot_share_its_sequences():
    place = Run(place={"kind": "fsdp", "on": "cpu", "context": 2}, precision="float32").place
    with pytest.raises(LuthierError, match=r"place\.context: 2 ranks.*1 process was started; start a multiple of 2"):
        place.start()


def test_every_position_is_kept_by_one_rank_and_ranks_compute_as_many_scores():
    for size in (2, 3, 4):
        kept = [context.pieces_of(rank, size, 48 * size) for rank in range(size)]
        positions = [[t for a, b in pieces for t in range(a, b)] for pieces in kept]
        assert sorted(t for some in positions for t in some) == list(range(48 * size))
        assert len({len(p) for p in positions}) == 1
        assert len({sum(t + 1 for t in p) for p in positions}) == 1  # scores of a causal sequence


def test_the_memory_of_a_rank_falls_with_the_ranks_that_share_a_sequence():
    planner = fitting.Planner()
    run = Run(method="lora", precision="bfloat16", objective="text", data={"max_tokens": 1024}, optim={"micro_tokens": 1024})
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, random=True))
    working = {}
    for shared in (1, 2, 4):
        place = {"kind": "fsdp", "on": "cpu", "context": shared}
        working[shared] = planner.predict(dataclasses.replace(run, place=Run(place=place).place), "cpu").moments["training"].bytes
    assert working[2] < 0.7 * working[1] and working[4] < 0.6 * working[2], working
