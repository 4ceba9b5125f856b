"""The probe against a model whose chance of answering each question is known."""

import hashlib
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny
from luthier.core import LuthierError, Rollout
from luthier.data.facts import Fact, pattern_of
from luthier.forgetting import knowledge
from luthier.forgetting.knowledge import Asking, Probe, Report
from luthier.policy import Policy


class Stub:
    """Answers question i greedily with chance ``greedy[i]`` a prompt, and each sample with chance ``sampled[i]``. Counts what it is asked."""

    def __init__(self, greedy, sampled, hash="", wordy=False):
        self.greedy, self.sampled, self.wordy = greedy, sampled, wordy
        self.base = SimpleNamespace(tokenizer=tiny.tokenizer(), hash=hash, tokens=(), anatomy=SimpleNamespace(kind="decoder", family="stub"))
        self.lm, self.heads, self.deltas, self.active, self.limit = torch.nn.Linear(1, 1), {}, {}, None, 2000
        self.asked: list[str] = []

    def generate(self, source, *, samples=1, temperature=0.0, max_new, stop, numbers, seed):
        tokenizer, ids = self.base.tokenizer, []
        for prompt, number in zip(source, numbers, strict=True):
            text = tokenizer.decode(prompt)
            self.asked.append(text)
            i = int(re.findall(r"number (\d+)", text)[-1])
            for s in range(samples):
                draw = random.Random(f"{number}:{seed}:{temperature}:{s}").random()
                chance = self.sampled[i] if temperature else self.greedy[i]
                said = f"answer {i}" if draw < chance else f"wrong {s}"
                ids.append(tokenizer(f" {said}" + (".\nand so on" if self.wordy else "."))["input_ids"][:max_new])
        return Rollout(ids, [[] for _ in ids], ["stop"] * len(ids), [])


def facts(n, **more):
    return [Fact(f"number {i}", (f"answer {i}",), where=f"f:{i}", **more) for i in range(n)]


def test_what_is_counted_is_what_the_model_does():
    rng = np.random.default_rng(0)
    greedy, sampled = rng.uniform(0, 1, 60), rng.uniform(0, 1, 60)
    probed, said = Probe(Stub(greedy, sampled), facts(60), Asking(prompts=20, samples=30, max_new=12)).run()
    assert not said and [p.fact.question for p in probed] == [f"number {i}" for i in range(60)]
    g, s = (np.array([sum(x) for x in xs]) for xs in ([p.greedy for p in probed], [p.right for p in probed]))
    assert np.abs((g - 20 * greedy) / np.sqrt(20 * greedy * (1 - greedy))).max() < 4
    assert np.abs((s - 600 * sampled) / np.sqrt(600 * sampled * (1 - sampled))).max() < 4
    assert {p.samples for p in probed} == {30} and all(len(p.greedy) == len(p.right) == 20 for p in probed)


def test_each_category_is_found_and_written_with_its_counts():
    greedy, sampled = [1, 0.5, 0, 0], [1, 0.5, 0.2, 0]
    probed, _ = Probe(Stub(greedy, sampled), facts(4), Asking(shots=3)).run()
    assert [p.category for p in probed] == ["HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown"]
    columns = [p.columns() for p in probed]
    assert columns[0] == {"knowledge": "HighlyKnown", "greedy_right": 10, "greedy_asked": 10, "sampled_right": 160, "sampled_asked": 160}
    assert columns[3]["greedy_right"] == columns[3]["sampled_right"] == 0 and 0 < columns[2]["sampled_right"] < 80
    report = Report.of(probed)
    assert [s.rows for s in report.shares] == [1, 1, 1, 1] and report["Unknown"].low < 0.25 < report["Unknown"].high


def test_no_prompt_shows_the_fact_that_it_asks_and_all_show_as_many_others_of_its_group():
    stub = Stub([1] * 30, [1] * 30)
    some = [Fact(f.question, f.answers, group="ab"[i % 2], where=f.where) for i, f in enumerate(facts(30))]
    Probe(stub, some, Asking(form="qa", prompts=7, samples=1)).run()
    assert len(stub.asked) == 2 * 7 * 30
    distinct = set(stub.asked)
    assert len(distinct) == 7 * 30  # the greedy and the sampled answers have the same prompts, and no two are alike
    for text in distinct:
        shown = re.findall(r"Q: number (\d+)\nA:( answer \1)?", text)
        assert [bool(a) for _, a in shown] == [True] * 4 + [False]
        numbers = [int(i) for i, _ in shown]
        assert len(set(numbers)) == 5 and len({i % 2 for i in numbers}) == 1


def test_exemplars_may_come_from_another_file():
    stub = Stub([1] * 50, [1] * 50)
    others = [Fact(f"number {i}", (f"answer {i}",), group="elsewhere") for i in range(40, 50)]
    Probe(stub, facts(3), Asking(form="qa", prompts=2, samples=1), exemplars=others).run()
    assert all({int(i) >= 40 for i in re.findall(r"number (\d+)", t)[:-1]} == {True} for t in stub.asked)


def test_a_chat_shows_exemplars_as_turns_and_a_system_prompt_stays():
    stub = Stub([1] * 4, [1] * 4)
    Probe(stub, facts(4, system="Be short."), Asking(prompts=1, shots=1, samples=1)).run()
    assert re.fullmatch(r"<system>Be short.<end><user>number \d<end><assistant>answer \d<end><user>number \d<end><assistant>", stub.asked[0])


def test_statements_are_continued_and_right_where_the_line_begins_with_the_answer_and_its_punctuation():
    patterns = [pattern_of("number [X] is [Y]."), pattern_of("of number [X] it is said: [Y] !")]
    some = [Fact(str(i), (f"answer {i}", "x. y"), where=str(i)) for i in range(6)]
    stub = Stub([1] * 6, [1] * 6, wordy=True)
    probe = Probe(stub, some, Asking(prompts=4, shots=2, samples=2, max_new=30), patterns=patterns)
    assert probe.form == "text" and sorted(p.category for p in probe.run()[0]) == ["HighlyKnown"] * 6
    assert re.fullmatch(r"(of number (\d) it is said: answer \2!\n){2}of number \d it is said:", stub.asked[1])
    fact = some[0]
    right = ["answer 0.", "Answer  0", "answer 0. He went on", "answer 0\nand so on", "x. y", "x. y. And"]
    assert [probe.is_right(fact, a) for a in right] == [True] * 6
    wrong = ["answer 01.", "the answer 0", "answer 0 or 1", "x", "", "wrong\nanswer 0."]
    assert [probe.is_right(fact, a) for a in wrong] == [False] * 6
    assert probe.is_right(fact, "answer 0! Ha", 1) and not probe.is_right(fact, "answer 0! Ha", 0)


def test_rows_with_one_question_are_asked_once_and_judged_by_their_own_answers():
    stub = Stub([1] * 6, [1] * 6)
    twice = [*facts(6), Fact("number 2", ("another",), where="f:6")]
    probed, _ = Probe(stub, twice, Asking(prompts=2, samples=1)).run()
    assert [p.category for p in probed] == ["HighlyKnown"] * 6 + ["Unknown"] and len(stub.asked) == 2 * 2 * 6
    assert probed[6].said == "answer 2."


def test_a_probe_that_was_killed_goes_on_and_comes_to_the_same(tmp_path, monkeypatch):
    greedy, sampled = [0.5] * 20, [0.3] * 20
    how = Asking(prompts=3, samples=4)
    whole = [p.columns() for p in Probe(Stub(greedy, sampled), facts(20), how).run()[0]]
    stub = Stub(greedy, sampled, hash="h")
    seen = []

    def tick(n):
        seen.append(n)
        if sum(seen) == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Probe(stub, facts(20), how, cache=tmp_path).run(tick)
    (file,) = tmp_path.iterdir()
    with file.open("a") as f:
        f.write('{"key": "half a li')  # killed while it wrote
    stub.asked.clear()
    probe = Probe(stub, facts(20), how, cache=tmp_path)
    assert probe.plan() == 4
    assert [p.columns() for p in probe.run()[0]] == whole and len(stub.asked) == 4 * 2 * 3
    again = Probe(stub, facts(20), how, cache=tmp_path)
    assert again.plan() == 0 and [p.columns() for p in again.run()[0]] == whole
    # another model, and other settings, have answers of their own
    assert Probe(Stub(greedy, sampled, hash="other"), facts(20), how, cache=tmp_path).plan() == 20
    for other in ({"seed": 1}, {"temperature": 0.7}, {"samples": 5}, {"max_new": 9}):
        assert Probe(stub, facts(20), Asking(**{"prompts": 3, "samples": 4, **other}), cache=tmp_path).plan() == 20
    alone = {"prompts": 1, "shots": 0, "samples": 2}  # without exemplars the seed changes no prompt, and still the samples
    Probe(stub, facts(20), Asking(**alone), cache=tmp_path).run()
    assert Probe(stub, facts(20), Asking(**alone, seed=1), cache=tmp_path).plan() == 20


def test_the_answers_of_a_delta_are_not_taken_for_those_of_its_base_or_of_another():
    from luthier.methods.lora import Method

    base = tiny.base("llama")
    base.hash = "h"
    policy = Policy(base, Method(rank=2).attach(base, "default"), method=Method(rank=2))
    tuned = knowledge.fingerprint(policy)
    policy.use(None)
    plain = knowledge.fingerprint(policy)
    policy.use("default")
    next(iter(policy.delta.params.values())).data.add_(1.0)
    assert len({plain, tuned, knowledge.fingerprint(policy)}) == 3


def test_what_cannot_be_asked_is_one_sentence():
    stub = Stub([1] * 9, [1] * 9)
    with pytest.raises(LuthierError, match="f:0: 4 exemplars are drawn from other facts of its group .*which has 4 in all"):
        Probe(stub, facts(4)).run()
    with pytest.raises(LuthierError, match="without exemplars all prompts are the same; say --prompts 1"):
        Probe(stub, facts(9), Asking(shots=0))
    with pytest.raises(LuthierError, match="a pattern is a statement"):
        Probe(stub, facts(9), Asking(form="qa"), patterns=[pattern_of("[X] is [Y]")])
    stub.limit = 30
    with pytest.raises(LuthierError, match="no question fits the 30 positions of the model; lower --shots"):
        Probe(stub, facts(9)).run()


def test_a_question_too_long_for_the_model_is_left_out_and_said():
    stub = Stub([1] * 9, [1] * 9)
    stub.limit = 300
    some = [*facts(8), Fact("x" * 400 + " number 8", ("answer 8",), where="f:8")]
    probed, said = Probe(stub, some, Asking(prompts=1, shots=1, samples=1), exemplars=facts(8)).run()
    assert len(probed) == 8 and "1 rows do not fit" in said[0] and "f:8" in said[0]


def test_a_real_model_is_asked_the_same_whatever_stands_beside_a_question(tmp_path):
    from luthier import opening

    tiny.folder(tmp_path / "base")
    policy = opening.load(tmp_path / "base", precision="float32")
    some = [Fact(f"word {i}", (hashlib.md5(str(i).encode()).hexdigest()[:3],), where=str(i)) for i in range(6)]
    how = Asking(prompts=2, shots=1, samples=3, temperature=1.0, max_new=4)
    one = Probe(policy, some, how, cache=tmp_path / "a")
    one.run()
    two = Probe(policy, some[3:], how, exemplars=some, cache=tmp_path / "b")
    two.run()
    read = lambda p: {r["key"]: r for r in map(json.loads, p.file.read_text().splitlines())}  # noqa: E731
    assert len(read(two)) == 3 and read(two).items() <= read(one).items()
