"""Rows of several tasks in one batch: the losses are those of each task alone, none drowns another, and each keeps its own head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ranked
import tiny
from luthier import build
from luthier.core import Incompatible, LuthierError
from luthier.objectives.multitask import Objective
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.saving import adapter
from luthier.settings.plugins import plugin
from luthier.settings.run import Run
from luthier.train import train
from tests import matrix

FAMILIES = ["llama", "gpt2", "gemma3", "bert", "roberta", "t5", "bart"]


def rows_of(family):
    return matrix.rows_for("multitask", family)


def run_of(family, weights=None, **parts):
    parts = parts or matrix.settings_for("multitask", family)["parts"]
    objective = {"kind": "multitask", "parts": parts, "weights": weights or {}}
    return Run(
        method="lora", objective=objective, precision="float32", place={"kind": "one", "on": "cpu"}, data={"mix": {"sources": dict.fromkeys(parts, "f.jsonl")}}
    )


def made(family, **how):
    policy, goal = build.assemble(run_of(family, **how), tiny.base(family))
    tiny.randomise({k: p for k, p in policy.trained().items() if "lora" in k.lower() or k.endswith((":a", ":b"))})
    return policy, goal


def gradients(policy, goal, batches, units):
    policy.train()
    for p in policy.trained().values():
        p.grad = None
    for batch in batches:
        loss = goal.loss(policy, batch)
        torch.stack([goal.terms[k] * s / units[k] for k, s in loss.sums.items() if units[k]]).sum().backward()
    return {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in policy.trained().items()}


def counts(goal, batches):
    return {k: sum(b.units.get(k, 0) for b in batches) for k in goal.terms}


def close(a, b, tolerance=2e-5):
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=tolerance * max(1.0, float(b[k].abs().max())), rtol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_has_the_losses_of_its_parts_alone(family, packed):
    policy, goal = made(family)
    rows = rows_of(family)
    packed = packed and policy.base.packs
    order = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()]
    whole = goal.collate(order, pad=0, packed=packed)
    with torch.no_grad():
        mixed = goal.loss(policy, whole)
        for name in goal.parts:
            part = goal.part(name)
            batch = part.collate([r for r in order if r.task == name], pad=0, packed=packed)
            alone = part.loss(policy, batch)
            for k, s in alone.sums.items():
                assert float(mixed.sums[f"{name}.{k}"]) == pytest.approx(float(s), rel=1e-5), (name, k)
                assert whole.units[f"{name}.{k}"] == batch.units[k] > 0
            for k, (amount, n) in alone.metrics.items():
                assert float(mixed.metrics[f"{name}.{k}"][0]) == pytest.approx(float(amount), rel=1e-4, abs=1e-5)
                assert float(mixed.metrics[f"{name}.{k}"][1]) == float(n)
    assert set(mixed.sums) == set(goal.terms)
    assert sorted(whole.where) == sorted(w for n in goal.parts for w in goal.part(n).collate([r for r in order if r.task == n], pad=0, packed=packed).where)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_accumulated_one_row_at_a_time_equals_one_batch(family):
    policy, goal = made(family)
    rows = rows_of(family)
    whole = [goal.collate(rows, pad=0, packed=False)]
    single = [goal.collate([r], pad=0, packed=False) for r in rows]
    assert counts(goal, whole) == counts(goal, single)
    close(gradients(policy, goal, single, counts(goal, single)), gradients(policy, goal, whole, counts(goal, whole)))


def test_two_hundred_tokens_of_text_do_not_drown_one_label():
    """The pull of one label on its head and on the delta is the same beside one text and beside many."""
    policy, goal = made("llama", text="text", mood=matrix.settings_for("classify", "llama"))
    label = replace(matrix.rows_for("classify", "llama")[0], task="mood")
    texts = [replace(r, task="text") for r in tiny.rows(12, shortest=18, longest=30)]
    assert sum(len(t) for t in texts) > 200
    alone_goal, label_only = goal.part("mood"), goal.collate([label], pad=0, packed=False)
    alone = gradients(policy, goal, [label_only], counts(goal, [label_only]))
    text_only = goal.collate(texts, pad=0, packed=True)
    from_text = gradients(policy, goal, [text_only], counts(goal, [text_only]))
    both = goal.collate([*texts[:6], label, *texts[6:]], pad=0, packed=True)
    together = gradients(policy, goal, [both], counts(goal, [both]))
    close(together, {k: alone[k] + from_text[k] for k in alone})
    head = [k for k in together if k.startswith("heads.")]
    assert head and all(float(together[k].abs().max()) > 0 for k in head)
    with torch.no_grad():
        loss = alone_goal.loss(policy, alone_goal.collate([label], pad=0, packed=False)).sums["examples"]
    step = next(_train(policy, goal, [both]))
    assert step.terms["mood.examples"] == pytest.approx(float(loss), rel=1e-4) and step.units["text.tokens"] > 200
    assert step.loss == pytest.approx(step.terms["mood.examples"] + step.terms["text.tokens"])


def _train(policy, goal, batches):
    class Same:
        def __next__(self):
            return batches

    optimizer = Optimizer(policy.trained(), lr=1e-3)
    return train(policy, goal, Same(), optimizer, lr=lambda _: 1e-3, steps=1, place=Place(on="cpu"))  # type: ignore[arg-type]


def test_a_weight_scales_what_its_part_pulls():
    labels = matrix.settings_for("classify", "llama")
    plain, goal = made("llama", own="sft", mood=labels)
    heavy = Objective(parts=goal.parts, weights={"mood": 3.0})
    batch = goal.collate([r for r in rows_of("llama") if r.task in goal.parts], pad=0, packed=True)
    one, three = (gradients(plain, g, [batch], counts(g, [batch])) for g in (goal, heavy))
    for k in one:
        if k.startswith("heads."):
            torch.testing.assert_close(three[k], 3 * one[k])
    assert heavy.terms == {"own.tokens": 1.0, "mood.examples": 3.0}


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_preferences_among_others_read_their_own_reference(reference):
    """Pairs are compared with the base, which the common forward was not read by."""
    policy, goal = made("llama", own="sft", best={"kind": "dpo", "reference": reference})
    pairs = [replace(r, task="best") for r in ranked.rows("llama", "pairs", reference=reference == "cached")]
    rows = [*(r for r in rows_of("llama") if r.task == "own"), *pairs]
    dpo = plugin("objectives", "dpo")(reference=reference)
    with torch.no_grad():
        mixed = goal.loss(policy, goal.collate(rows, pad=0, packed=True)).sums["best.rankings"]
        alone = dpo.loss(policy, dpo.collate(pairs, pad=0, packed=True)).sums["rankings"]
    assert float(mixed) == pytest.approx(float(alone), rel=1e-5)
    assert goal.needs == {"reference"}


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_heads_are_kept_apart_and_come_back_with_the_delta(family, tmp_path):
    two = {"mood": matrix.settings_for("classify", family), "topic": {"kind": "classify", "problem": "single", "labels": ["a", "b"]}}
    policy, goal = made(family, own=matrix.parts_for(family)["own"], **two)
    assert {name.split("/")[0]: head.out.out_features for name, head in policy.heads.items()} == {"mood": 3, "topic": 2}
    tiny.randomise({k: p for k, p in policy.trained().items() if k.startswith("heads.")}, seed=3)
    adapter.save(policy, tmp_path / "adapter", objective=goal)
    back = adapter.load(tiny.base(family), tmp_path / "adapter")
    assert back.objective == goal
    some = [replace(r, task="mood") for r in matrix.rows_for("classify", family)]
    part = goal.part("mood")
    said = [part.predict(p.eval(), part.collate(some, pad=0, packed=False)) for p in (policy, back)]
    assert said[0] == said[1] and {s["label"] for s in said[0]} <= set(matrix.LABELS)
    other = back.objective.part("topic")
    assert set(other.predict(back, other.collate(some, pad=0, packed=False))[0]["probabilities"]) == {"a", "b"}


def test_weights_that_only_the_language_head_uses_train_where_a_part_reads_it(tmp_path):
    run = replace(run_of("gpt2", own="sft", mood=matrix.settings_for("classify", "gpt2")), method="full")
    policy, goal = build.assemble(run, tiny.base("gpt2"))
    only_labels = replace(run_of("gpt2", mood=matrix.settings_for("classify", "gpt2")), method="full")
    head = {id(p) for p in policy.lm.get_output_embeddings().parameters()}
    assert head <= {id(p) for p in policy.trained().values()} and goal.reads_head
    assert not build.assemble(only_labels, tiny.base("gpt2"))[1].reads_head


REFUSED = [
    ({"a": "ppo"}, "its own answers|own answers"),
    ({"a": "grpo"}, "own answers"),
    ({"a": "kto"}, "a whole step"),
    ({"a": Objective(parts={"b": "sft"})}, "mixture within a mixture"),
    ({"a.b": "sft"}, "letters, digits"),
]


@pytest.mark.parametrize(("parts", "said"), REFUSED, ids=str)
def test_what_cannot_be_mixed_is_refused_in_a_sentence(parts, said):
    with pytest.raises(LuthierError, match=said):
        Objective(parts=parts)


def test_a_part_that_does_not_serve_the_model_is_named():
    with pytest.raises(Incompatible, match=r"part own: objective sft: an encoder"):
        build.assemble(run_of("bert", own="sft"), tiny.base("bert"))


def test_a_row_of_no_part_is_refused():
    goal = Objective(parts={"own": "sft"})
    with pytest.raises(LuthierError, match="for the task 'other'"):
        goal.collate([replace(tiny.rows(1)[0], task="other")], pad=0, packed=False)


def test_parts_follow_from_what_the_sources_name():
    goal = Objective().joined({"e2e": "sft", "dolly": "sft", "mood": "classify", "topic": "classify"})
    assert list(goal.parts) == ["sft", "mood", "topic"]
    assert [goal.part_of(s, a) for s, a in {"e2e": "sft", "mood": "classify"}.items()] == ["sft", "mood"]
    assert isinstance(policy_of(goal), Policy)


def policy_of(goal):
    fitted = replace(goal, parts={n: replace(p, problem="single", labels=("a", "b")) if p.renders == "label" else p for n, p in goal.parts.items()})
    base = tiny.base("llama")
    return Policy(base, None, heads=fitted.heads(base))
