"""An objective with the terms that keep a model from forgetting, against slow versions of them."""

import numpy as np
import pytest
import torch

import tiny
from luthier.core import IGNORE, Batch, Segments
from luthier.forgetting.keeping import Kept, from_before
from luthier.methods.full import Method as Full
from luthier.methods.lora import Method as Lora
from luthier.methods.partial import Method as Partial
from luthier.objectives.classify import Objective as Classify
from luthier.objectives.dpo import Objective as Dpo
from luthier.objectives.masked_text import Objective as Masked
from luthier.objectives.sft import Objective as Sft
from luthier.objectives.text import Objective as Text
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.train import train
from luthier.voices import keep_reference


def policy_of(method, family="llama", heads=None, moved=True):
    base = tiny.base(family)
    delta = method.attach(base, "default")
    policy = Policy(base, delta, method=method, heads=heads(base) if heads else None)
    keep_reference(policy, method)
    if moved:
        torch.manual_seed(1)
        with torch.no_grad():
            for p in delta.params.values():
                p.add_((1.0 if family == "granite" else 0.1) * torch.randn_like(p))  # whose logits are divided by 8
    return policy


def logits(model, family, batch):
    if family in tiny.SEQ2SEQ:
        return model(input_ids=batch.source.ids, attention_mask=mask(batch.source), decoder_input_ids=batch.ids).logits
    return model(input_ids=batch.ids, attention_mask=mask(batch)).logits


def mask(stream):
    return (stream.segments.example(stream.shape) >= 0).long()


METHODS = {"lora": Lora(), "lora on the head": Lora(targets=("query", "head")), "partial": Partial(last_blocks=1), "full": Full()}
FAMILIES = [("llama", m) for m in METHODS] + [
    ("llama_tied", "full"),
    ("gemma2", "lora"),
    ("granite", "lora"),
    ("t5", "lora"),
    ("bert", "lora"),
    ("gpt2", "full"),
]


@pytest.mark.parametrize("family,method", FAMILIES)
def test_the_divergence_is_that_of_the_models_own_logits_and_so_is_its_gradient(family, method):
    policy = policy_of(METHODS[method], family)
    if family == "bert":
        rows = tiny.rows(3)
        ids = Text().collate(rows, pad=0, packed=False)
        batch = Batch(ids=ids.ids, segments=ids.segments, targets=torch.where(mask(ids).bool(), ids.ids, IGNORE), units={"tokens": 1})
    else:
        batch = Sft().collate(tiny.rows_for(family, 3), pad=0, packed=False)
    scored = batch.targets != IGNORE
    model = tiny.model(family).eval()
    with torch.no_grad():
        before = logits(model, family, batch)[scored].log_softmax(-1)
    hidden = policy.hidden(batch)
    now = policy.base.anatomy.head(policy.lm, hidden)[scored].log_softmax(-1)
    slow = (before.exp() * (before - now)).sum(-1)
    got = from_before(policy, batch, hidden)
    assert float(slow.detach().mean()) > 1e-4
    torch.testing.assert_close(got, slow, atol=2e-5, rtol=1e-3)
    params = list(policy.trained().values())
    theirs = torch.autograd.grad(slow.sum(), params, retain_graph=True, allow_unused=True)
    ours = torch.autograd.grad(got.sum(), params, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-2)


def test_before_training_the_divergence_is_nothing():
    policy = policy_of(Lora(), moved=False)
    batch = Sft().collate(tiny.rows(3), pad=0, packed=True)
    assert float(from_before(policy, batch, policy.hidden(batch)).abs().max()) < 1e-6


class Steps:
    """A feed of the same batches."""

    def __init__(self, batches):
        self.batches = batches

    def __next__(self):
        return self.batches


def gradients(policy, objective, batches):
    """What one step of the loop leaves for the optimizer."""
    optimizer = Optimizer(policy.trained(), lr=0.0)
    seen = {}
    optimizer.step = lambda: seen.update({k: v.clone() for g in optimizer.groups for k, v in [(id(g), g.grad)]})
    step = next(train(policy, objective, Steps(batches), optimizer, lr=lambda _: 0.0, steps=1, clip=0.0, place=Place(on="cpu")))
    return step, torch.cat(list(seen.values()))


def batch_of(rows, unit=None, kl=False, collate=None):
    out = (collate or Sft().collate)(rows, pad=0, packed=True)
    if unit:
        out.units = {unit: out.units["tokens"]}
    if kl:
        out.units["kl"] = int((out.targets != IGNORE).sum())
    return out


def test_every_term_is_divided_by_its_own_count_whatever_the_micro_batches():
    data, text = tiny.rows(6, seed=1), tiny.rows(5, seed=2, prompt=1)
    kept = Kept(Sft(), Text(), weight=0.25, kl=0.5)
    one, g_one = gradients(policy_of(Lora()), kept, [batch_of(data), batch_of(text, "replay", kl=True)])
    split = [batch_of(data[:2]), batch_of(data[2:]), *(batch_of([r], "replay", kl=True) for r in text)]
    many, g_many = gradients(policy_of(Lora()), kept, split)
    assert one.units == many.units and set(one.terms) == {"tokens", "replay", "kl"}
    torch.testing.assert_close(g_one, g_many, atol=1e-6, rtol=1e-4)
    assert one.loss == pytest.approx(one.terms["tokens"] + 0.25 * one.terms["replay"] + 0.5 * one.terms["kl"])
    assert kept.own_loss(one.terms) == one.terms["tokens"]
    alone, _ = gradients(policy_of(Lora()), Sft(), [batch_of(data)])
    assert alone.loss == pytest.approx(one.terms["tokens"], rel=1e-6), "replay must not weaken the objective"


def test_with_its_own_weight_a_replayed_token_counts_as_one_of_the_data():
    data, text = tiny.rows(6, seed=1, prompt=1), tiny.rows(5, seed=2, prompt=1)
    a, b = batch_of(data), batch_of(text, "replay")
    share = b.units["replay"] / (a.units["tokens"] + b.units["replay"])
    _, ours = gradients(policy_of(Lora()), Kept(Sft(), Text(), weight=share / (1 - share)), [a, b])
    _, together = gradients(policy_of(Lora()), Sft(), [batch_of([*data, *text])])
    torch.testing.assert_close(ours * (1 - share), together, atol=1e-6, rtol=1e-4)


def test_the_divergence_at_trained_tokens_costs_no_second_forward_of_them():
    policy = policy_of(Lora())
    calls = []
    honest = policy.hidden
    policy.hidden = lambda batch, **how: calls.append(torch.is_grad_enabled()) or honest(batch, **how)
    Kept(Sft(), kl=0.5).loss(policy, batch_of(tiny.rows(3), kl=True))
    assert calls == [True, False]


def test_classification_replays_text_beside_its_examples():
    goal = Classify(problem="single", labels=("a", "b"))
    policy = policy_of(Lora(), heads=goal.heads)
    rows = [type(r)(r.ids, np.ones(len(r), dtype=bool), r.where, {"label": i % 2}) for i, r in enumerate(tiny.rows(4))]
    step, _ = gradients(policy, Kept(goal, Text(), weight=0.1), [goal.collate(rows, pad=0, packed=True), batch_of(tiny.rows(3, seed=5), "replay")])
    assert step.units["examples"] == 4 and step.terms["replay"] > 1 and step.finite


def test_of_a_step_that_is_not_finite_the_examples_at_fault_are_named_whichever_term_they_have():
    """Terms of some micro-batches only were counted as if all had them, so that a replayed text was blamed on the data's first rows."""

    class Odd(Text):
        def loss(self, policy, batch):
            out = super().loss(policy, batch)
            return type(out)({"tokens": out.sums["tokens"] * (float("inf") if "made:2" in batch.where else 1.0)})

    text = [batch_of([r], "replay") for r in tiny.rows(3, seed=2)]
    data = batch_of([type(r)(r.ids, r.train, "data") for r in tiny.rows(2)])
    step, *_ = train(
        policy_of(Lora()),
        Kept(Sft(), Odd(), weight=0.1),
        Steps([data, *text]),
        Optimizer(policy_of(Lora()).trained(), lr=0.0),
        lr=lambda _: 0.0,
        steps=1,
        place=Place(on="cpu"),
    )
    assert not step.finite and step.where == ("made:2",)


def test_a_coupled_objective_is_shown_its_own_batches_only():
    shown = []

    class Coupled(Sft):
        couples = True

        def couple(self, policy, batches, mean=float):
            shown.append([b.units for b in batches])

    gradients(policy_of(Lora()), Kept(Coupled(), Text(), weight=0.1), [batch_of(tiny.rows(3)), batch_of(tiny.rows(2), "replay")])
    assert len(shown) == 1 and [set(u) for u in shown[0]] == [{"tokens"}]


def test_preferences_with_a_live_reference_are_held_where_they_are_trained():
    import ranked

    dpo = Dpo(reference="live")
    policy = policy_of(Lora())
    batch = dpo.collate(ranked.rows("llama", "pairs", reference=False)[:2], pad=0, packed=True)
    batch.units["kl"] = int((batch.targets != IGNORE).sum())
    out = Kept(dpo, kl=1.0).loss(policy, batch)
    assert float(out.sums["kl"].detach()) == pytest.approx(float(from_before(policy, batch, policy.hidden(batch)).sum()), rel=1e-5)
    assert out.sums["kl"].requires_grad


def test_an_encoder_replays_hidden_tokens():
    import small

    masked = Masked()
    policy = policy_of(Lora(), "bert")
    batch = masked.collate(small.hidden_rows(small.BY_MASK, visit=(0, 0)), pad=0, packed=False)
    batch.units = {"replay": batch.units["tokens"], "kl": batch.units["tokens"]}
    out = Kept(Sft(), masked, weight=0.1, kl=0.1).loss(policy, batch)
    assert set(out.sums) == {"replay", "kl"} and all(torch.isfinite(v) for v in out.sums.values())
    assert isinstance(batch.segments, Segments)
