"""Advice: rules that say where they come from, added up; methods that cannot run or do not fit are passed over with the reason."""

import re

import pytest
import yaml

from configured import shape
from luthier.core import LuthierError
from luthier.planning import advising
from luthier.planning.advising import RULES, Candidate, Rule, Situation, choose, extras, fit, ranked, rules
from luthier.planning.fitting import Planner
from luthier.settings.plugins import kinds
from luthier.settings.run import Run

SMALL = Situation("sft", "decoder", 7_000_000, 5000)


def best(**more):
    return ranked(Situation(**({"objective": "sft", "kind": "decoder", "parameters": 7_000_000_000, "examples": 5000} | more)))[0].method


def test_every_rule_names_a_paper_or_a_page_of_this_program_and_only_methods_there_are():
    found = rules()
    assert len(found) >= 20
    assert all(re.search(r"arXiv \d{4}\.\d{5}|docs/results\.md", r.source) for r in found)
    assert {m for r in found for m in (*r.points, *r.set)} <= set(kinds("methods"))
    for need in advising.NEEDS:
        assert [r for r in found if need in r.when.get("need", ())], need  # none is asked for and counts for nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": {"lroa": 1}}, "names lroa"),
        ({"when": {"needs": ["no-latency"]}}, "names needs"),
        ({"when": {"need": ["speed"]}}, "names speed"),
        ({"source": ""}, "has no source"),
    ],
)
def test_a_rule_of_something_that_there_is_none_of_is_refused(change, message, tmp_path):
    rule = {"because": "it is so", "when": {"need": ["no-latency"]}, "points": {"lora": 1}, "source": "somebody, 2020"}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump([rule | change]))
    with pytest.raises(LuthierError, match=message):
        rules(tmp_path / "rules.yaml")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump([rule]))
    assert rules(tmp_path / "rules.yaml")[0].points == {"lora": 1}
    assert RULES.is_file()


def test_conditions_hold_together_and_what_is_not_known_holds_nothing():
    s = Situation("classify", "encoder", 100, 50, ("no-latency",))
    assert s.meets({}) and s.meets({"need": ["no-latency", "tiny-files"], "kind": ["encoder"], "examples_below": 51, "packed": False})
    for when in ({"need": ["tiny-files"]}, {"objective": ["sft"]}, {"kind": ["decoder"]}, {"examples_below": 50}, {"examples_above": 50}):
        assert not s.meets(when) and not s.meets({"parameters_above": 99} | when)
    assert s.meets({"parameters_below": 101}) and not s.meets({"parameters_below": 100}) and not s.meets({"packed": True})
    assert not Situation("sft", "decoder", 100, None).meets({"examples_below": 10**9})


def test_points_are_added_and_settings_come_with_the_rules_that_count():
    two = [
        Rule("a", "s", {"objective": ["sft"]}, {"lora": 2, "full": 3}, {"lora": {"rank": 4}}),
        Rule("b", "s", {"need": ["no-latency"]}, {"lora": 2}, {"lora": {"rank": 32}}),
        Rule("c", "s", {"need": ["new-facts"]}, {"full": 9}, {}, {"data.replay": {"share": 0.1}}),
    ]
    first, second = ranked(SMALL, two)[:2]
    assert (first.method, first.points, first.settings) == ("full", 3, {}) and (second.points, second.settings) == (2, {"rank": 4})
    needing = Situation("sft", "decoder", 7, 5, ("no-latency",))
    first = ranked(needing, two)[0]
    assert (first.method, first.points, first.settings) == ("lora", 4, {"rank": 32}) and [r.because for _, r in first.reasons] == ["a", "b"]
    assert extras(needing, two) == {} and extras(Situation("sft", "decoder", 7, 5, ("new-facts",)), two)["data.replay"][0] == {"share": 0.1}


def test_needs_lead_where_the_field_says_they_do():
    assert best() == "lora"
    assert best(needs=("many-tasks", "no-latency")) == "lora"
    assert best(needs=("tiny-files", "many-tasks"), examples=100) == "ia3"
    assert best(needs=("new-facts",), parameters=100_000_000) == "full"
    latency = [c.method for c in ranked(Situation("sft", "decoder", 7_000_000_000, 5000, ("no-latency",)))]
    assert latency.index("adapter") > latency.index("ia3") and latency.index("prefix") > latency.index("lora")
    assert ranked(Situation("sft", "decoder", 7_000_000_000, 5000, ("new-facts",), packed=True))[0].settings["rank"] == 64
    small = [c.method for c in ranked(Situation("sft", "decoder", 7_000_000, 5000))]
    assert small.index("prompt") == len(small) - 1 or small.index("p_tuning") == len(small) - 1


SIZES = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1408, "vocab_size": 32000}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = shape(tmp_path_factory.mktemp("advice") / "m", **SIZES)
    return Run(model={"id": folder}, objective="text", precision="bfloat16", data={"max_tokens": 256}, optim={"micro_tokens": 1024}, evaluate={"samples": 0})


def test_what_does_not_fit_is_passed_over_and_the_base_is_packed_only_where_it_must_be(run):
    planner = Planner()
    whole, lora, packed = Candidate("full", 5, []), Candidate("lora", 3, [], {"rank": 4}), Candidate("ia3", 2, [])
    roomy = choose([whole, lora, packed], run, planner, device="cuda", room=10**11)
    assert [c.method for c in roomy] == ["full", "lora", "ia3"] and not any(c.made or c.refused for c in roomy) and roomy[1].run.method.rank == 4
    needs = {c.method: c.prediction.total for c in roomy}
    again = [Candidate("full", 5, []), Candidate("lora", 3, []), Candidate("crafted_prompt", 9, [])]
    tight = choose(again, run, planner, device="cuda", room=int(0.97 * needs["lora"]))
    assert [c.method for c in tight] == ["lora"] and again[0].refused.startswith("needs ")
    least = Candidate("lora", 3, [])
    fit(least, run, planner, device="cuda", room=800_000_000)
    assert "precision=nf4" in least.made and least.run.precision.packed
    narrow, wide = (Candidate("lora", 3, [], {"rank": rank, "alpha": 2.0 * rank, "targets": ["all"]}) for rank in (16, 64))
    fit(narrow, run, planner, device="cuda", room=700_000_000)  # as small as it gets
    fit(wide, run, planner, device="cuda", room=narrow.prediction.total + 20_000_000)
    assert not wide.refused and wide.run.method.rank < 64 and wide.run.method.alpha == 2 * wide.run.method.rank
    assert any(m.startswith("method.rank=") for m in wide.made)
    assert choose([Candidate("lora", 3, []), Candidate("ia3", 0, [])], run, planner, device="cuda", room=1000) == []


def test_what_this_base_cannot_take_is_refused_with_the_reason(run):
    c = Candidate("adapter", 3, [], {"cross": True})
    fit(c, run, Planner(), device="cpu", room=10**12)
    assert "no cross-attention" in c.refused
