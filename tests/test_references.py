"""Reference log-probabilities: what they are, that they are computed once, and what they depend on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import luthier.references as references
import ranked
import tiny
from luthier.core import Incompatible, Row, examples_of
from luthier.data.prepare import Prepared
from luthier.methods.full import Method as Full
from luthier.methods.lora import Method as Lora
from luthier.objectives.dpo import Objective as Dpo
from luthier.objectives.kto import Objective as Kto
from luthier.objectives.sft import Objective as Sft
from luthier.policy import Policy


def policy_of(method=None, moved=True, family="llama"):
    base, method = tiny.base(family), method or Lora()
    base.hash = "0123"
    delta = method.attach(base, "default")
    if moved and method.edits == "outputs":
        tiny.randomise(delta.params, std=0.2)
    return Policy(base, delta, method=method)


def prepared(renders="pairs", family="llama", seed=0):
    rows = ranked.rows(family, renders, reference=False, seed=seed)
    return Prepared(rows[:3], rows[3:], [])


def slow(model, row):
    out = []
    for e in examples_of(row):
        ids = torch.from_numpy(e.ids).long()[None]
        with torch.no_grad():
            if "source" in e.extras:
                logp = model(input_ids=torch.from_numpy(e.extras["source"]).long()[None], decoder_input_ids=ids).logits[0].log_softmax(-1)
            else:
                logp = model(input_ids=ids).logits[0].log_softmax(-1)
        out.append(sum(float(logp[t - 1, e.ids[t]]) for t in range(1, len(e)) if e.train[t]))
    return out


def bring(policy, goal, data, folder, **how):
    return references.bring(policy, goal, data, folder=folder, tokens=64, packed=policy.base.packs, **how)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("goal", [Dpo(), Kto()], ids=["dpo", "kto"])
def test_they_are_the_bases_own(goal, family, tmp_path):
    policy, data = policy_of(family=family), prepared(goal.renders, family)
    said = bring(policy, goal, data, tmp_path)
    plain = tiny.model(family).eval()
    for row in [*data.train, *data.validation]:
        np.testing.assert_allclose(row.extras["reference"], slow(plain, row), rtol=1e-4)
    assert policy.active == "default" and policy.training and "computed, kept in" in said


def test_they_are_computed_once_and_found_by_their_content(tmp_path, monkeypatch):
    first, again = prepared(), prepared()
    bring(policy_of(), Dpo(), first, tmp_path)
    asked = []
    made = references.logps
    monkeypatch.setattr(references, "logps", lambda policy, examples, **how: (asked.append(len(examples)), made(policy, examples, **how))[1])
    said = bring(policy_of(Full()), Dpo(beta=1.0), again, tmp_path)  # another method and another setting on the same base
    assert not asked and "9 known, 0 computed" in said
    for a, b in zip([*first.train, *first.validation], [*again.train, *again.validation], strict=True):
        assert np.array_equal(a.extras["reference"], b.extras["reference"])
    more = prepared()
    more.train += prepared(seed=1).train
    bring(policy_of(), Dpo(), more, tmp_path)
    assert asked == [7]  # only what is new
    other = policy_of()
    other.base.hash = "4567"
    bring(other, Dpo(), prepared(), tmp_path)
    assert asked == [7, 9]


def test_a_damaged_file_is_made_anew(tmp_path):
    bring(policy_of(), Dpo(), prepared(), tmp_path)
    (file,) = tmp_path.rglob("logps.safetensors")
    file.write_bytes(b"\x00" * 40)
    data = prepared()
    assert "0 known, 9 computed" in bring(policy_of(), Dpo(), data, tmp_path) and "reference" in data.train[0].extras
    assert "9 known" in bring(policy_of(), Dpo(), prepared(), tmp_path)


def test_a_digest_is_of_the_tokens_their_answer_and_their_source():
    row = Row(np.array([5, 6, 7], dtype=np.int32), np.array([False, True, True]))
    others = [
        Row(np.array([5, 6, 8], dtype=np.int32), row.train),
        Row(row.ids, np.array([False, False, True])),
        Row(row.ids, row.train, extras={"source": np.array([4], dtype=np.int32)}),
    ]
    assert len({references.digest(r) for r in [row, *others]}) == 4 and references.digest(row) == references.digest(Row(row.ids.copy(), row.train, "elsewhere"))


def test_a_run_that_starts_from_a_delta_has_it_as_its_reference(tmp_path):
    policy, data, plain = policy_of(), prepared(), prepared()
    bring(policy, Dpo(), plain, tmp_path)
    bring(policy, Dpo(), data, tmp_path, started=True)
    goal = Dpo()
    with torch.no_grad():
        loss = goal.loss(policy, goal.collate(data.train, pad=0, packed=True))
    assert float(loss.sums["rankings"]) / 3 == pytest.approx(np.log(2), abs=1e-5)
    assert not np.allclose(data.train[0].extras["reference"], plain.train[0].extras["reference"])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("method", "started", "why"), [(Full(), False, "the base's own weights"), (Lora(), True, "starts from a saved delta")])
def test_a_reference_that_will_be_gone_is_not_asked_live(method, started, why, tmp_path):
    with pytest.raises(Incompatible, match=f"{why}.*reference=cached"):
        bring(policy_of(method), Dpo(reference="live"), prepared(), tmp_path, started=started)


def test_nothing_is_done_where_nothing_is_needed(tmp_path):
    for goal in (Sft(), Dpo(reference="live")):
        data = prepared()
        assert bring(policy_of(), goal, data, tmp_path) == "" and "reference" not in data.train[0].extras
    nameless = policy_of()
    nameless.base.hash = ""
    bring(nameless, Dpo(), prepared(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_progress_is_told(tmp_path):
    seen = SimpleNamespace(last=None)
    bring(policy_of(), Dpo(), prepared(), tmp_path, tick=lambda done, of: setattr(seen, "last", (done, of)))
    assert seen.last == (9, 9)


def test_the_answers_to_a_prompt_share_it_and_get_the_same_log_probabilities():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(3):
        prompt = rng.integers(3, tiny.V, 30)
        rows += [ranked.answer("llama", prompt, rng.integers(3, tiny.V, n), "pairs") for n in (9, 4)]
    policy, found = policy_of(), {}
    for how in ("off", "on"):
        policy.share_prompts = how
        seen: list[int] = []
        hook = policy.lm.base_model.register_forward_pre_hook(lambda m, a, k, seen=seen: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
        found[how] = references.logps(policy, rows[::2] + rows[1::2], tokens=300, packed=True), sum(seen)  # in an order in which no pair is together
        hook.remove()
    np.testing.assert_allclose(found["on"][0], found["off"][0], rtol=1e-5)
    assert found["on"][1] < 0.8 * found["off"][1]
