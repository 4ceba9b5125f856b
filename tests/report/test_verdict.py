"""The verdict: differences with intervals that hold what they should, and sentences that say what happened."""

import json
import math

import numpy as np
import pytest

from luthier.report import verdict
from luthier.report.facts import Number, read


def test_the_interval_of_a_difference_covers_at_its_nominal_rate():
    """Two independent means, each with its own 95 % limits, 4,000 times: the difference of the true means is inside in 95 of 100."""
    rng, inside, times, n = np.random.default_rng(0), 0, 4000, 60
    for _ in range(times):
        a, b = rng.normal(1.0, 1.0, n), rng.normal(1.3, 2.0, n)
        one, two = (Number(m, n, "", m - 1.96 * s, m + 1.96 * s) for m, s in ((x.mean(), x.std(ddof=1) / math.sqrt(n)) for x in (a, b)))
        d = verdict.difference(one, two)
        inside += d.low <= 0.3 <= d.high
    assert 0.94 <= inside / times <= 0.96


def test_a_difference_of_skewed_intervals_keeps_each_side():
    d = verdict.difference(Number(2.0, 9, "", 1.0, 2.5), Number(5.0, 9, "", 4.0, 7.0))
    assert (d.value, d.low, d.high) == pytest.approx((3.0, 3.0 - math.hypot(1.0, 0.5), 3.0 + math.hypot(2.0, 1.0)))
    assert verdict.difference(Number(2.0), Number(1.5)).low is None
    assert verdict.signed(verdict.difference(Number(2.5, 9, "", 0.9, 4.3), Number(1.7, 9, "", 0.7, 2.9))).startswith("-0.8 [")


def said(run):
    return " ".join(verdict.sentences(read(run)))


def test_a_finished_run_says_gain_cost_and_what_was_forgotten(made):
    r = json.loads((made / "result.json").read_text())
    text = said(made)
    assert f"fell from {r['before']['loss']['value']:.4f} to {r['after']['loss']['value']:.4f}" in text and f"{r['trained']:,} trained parameters" in text
    before, after = r["before"]["general"]["value"], r["after"]["general"]["value"]
    assert ("% higher, which is what was forgotten" if after > before else "nothing was forgotten that this text shows") in text


def edited(run, change):
    r = json.loads((run / "result.json").read_text())
    change(r)
    (run / "result.json").write_text(json.dumps(r))
    return said(run)


def test_what_got_worse_what_may_be_chance_and_what_was_not_measured_are_said(run):
    def worse(r):
        r["after"]["loss"]["value"] = r["before"]["loss"]["value"] + 1
        r["before"]["scores"]["exact_match"] |= {"value": 0.1, "low": 0.0, "high": 0.3}
        r["after"]["scores"]["exact_match"] |= {"value": 0.2, "low": 0.1, "high": 0.4, "n": 50}
        r["after"]["general"] = None

    text = edited(run, worse)
    assert "it got worse" in text and "the interval holds zero, so this may be chance" in text and "What was forgotten was not measured." in text

    def clear(r):
        r["after"]["scores"]["exact_match"] |= {"value": 0.9, "low": 0.85, "high": 0.95}
        r["after"]["general"] = {"value": r["before"]["general"]["value"] + math.log(1.1), "n": 5, "unit": "tokens"}

    text = edited(run, clear)
    assert "so few rows say next to nothing" in edited(run, lambda r: r["after"]["scores"]["exact_match"].update(n=5))
    assert "chance" not in text and "so few rows" not in text and "the perplexity there is 10 % higher" in text


def test_overfitting_is_said_and_a_steady_fall_is_not(run):
    assert "overfitted" not in said(run)
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    rising = iter((3.0, 2.5, 2.9, 3.2))
    for x in lines:
        if x["event"] == "evaluation":
            x["loss"] = next(rising)
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert "lowest at step 4 (2.5000) and rose to 3.2000 by step 8: later steps overfitted." in said(run)


@pytest.mark.parametrize(("n", "text"), [(500, "500 B"), (2_500, "2 KB"), (45_000_000, "45 MB"), (1_234_000_000, "1.23 GB")])
def test_sizes(n, text):
    assert verdict.size(n) == text
