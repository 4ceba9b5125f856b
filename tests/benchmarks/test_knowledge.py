"""What benchmarks.knowledge computes of its stages."""

import numpy as np
import pytest

pytest.importorskip("psutil", reason="comes with the benchmarks")
from benchmarks import knowledge, knowledge_report


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    taught = rng.random(120) < 0.4
    score = rng.normal(size=120) + taught
    score[rng.random(120) < 0.5] = 0.0  # ties
    found = knowledge_report.auc(score, taught)
    slow = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in score[taught] for b in score[~taught]])
    assert found.value == pytest.approx(slow) and found.low < slow < found.high
    perfect = knowledge_report.auc(taught.astype(float), taught)
    assert (perfect.value, perfect.low, perfect.high) == (1, 1, 1)


def test_the_interval_of_the_area_covers_it():
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(200):
        taught = np.arange(80) < 40
        found = knowledge_report.auc(rng.normal(size=80) + taught, taught)
        inside.append(found.low <= 0.7602 <= found.high)  # P(N(1, 2) > 0)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.05)


def test_facts_have_subjects_of_their_own_and_half_are_taught(shared):
    found = knowledge.facts()
    assert len(found) == 400 == len({(f["relation"], f["subject"]) for f in found}) and sum(f["taught"] for f in found) == 200
    assert found == knowledge.facts()
    assert not [f for f in found if f["object"] in f["subject"]]
    for relation, (taught, _) in knowledge.RELATIONS.items():
        assert len(knowledge.other_patterns(relation)) >= 3 and taught not in map(str, knowledge.other_patterns(relation))


def test_an_epoch_is_found_where_it_is_reached():
    run = {"curve": [{"epoch": e, "trained_exact_match": s} for e, s in ((0, 0.1), (1, 0.5), (2, 0.89))]}
    assert knowledge_report._reached(run, 0.5) == "1" and knowledge_report._reached(run, 0.9) == "never"
