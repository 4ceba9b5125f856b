"""The retention suite: what ships, what of it a base knows, what an evaluation costs, and that every kind of model and objective is measured or left alone."""

import json
import random

import numpy as np
import pytest

import small
import tiny
from luthier import build, load
from luthier.core import LuthierError
from luthier.data.codec import Codec
from luthier.forgetting.retention import ASSETS, LEAST, Fact, Suite, is_right, read_facts
from luthier.measuring.measure import Measures, Scorer
from luthier.reading import form_of, read_data
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.settings.config import load_run

QUIET = Reporter(quiet=True)
TASK = '''
from dataclasses import dataclass
@dataclass(frozen=True, kw_only=True)
class Task:
    """How long an answer is."""
    def rows(self, split):
        return [{"prompt": f"say {i}", "refs": ["yes"]} for i in range(9)]
    def score(self, row, answer):
        return {"length": float(len(answer))}
'''


@pytest.fixture(scope="module")
def fiddle():
    return load("fiddle", precision="float32")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.folder(folder / "llama")
    small.bert(folder / "bert")
    small.t5(folder / "t5")
    rng = random.Random(0)
    said = lambda: " ".join(rng.choices(["red", "green", "blue"], k=3))  # noqa: E731
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}", "completion": said()}) + "\n" for i in range(30)))
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}", "chosen": said(), "rejected": "no"}) + "\n" for i in range(30)))
    (folder / "labels.csv").write_text("text,label\n" + "".join(f"this is number {i},{'ab'[i % 2]}\n" for i in range(30)))
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(f"A story, number {i}, of nothing at all, told slowly." for i in range(30)))
    (folder / "mine.py").write_text(TASK)
    return folder


def settings(home, out, *more, model="llama", data="data.jsonl"):
    common = [f"model={home / model}", f"data.train={home / data}", f"out={out}", "precision=float32", "name=r", "evaluate.samples=0", "optim.steps=2"]
    return load_run(None, [*common, "optim.batch_tokens=300", *more])


def suite_of(run):
    policy, objective = build.assemble(build.resolve(run)[0])
    base = policy.base
    prepared = read_data(run, base.tokenizer, positions=policy.limit, say=lambda _: None, form=form_of(base))
    return Suite.of(Scorer(policy, objective, prepared, run, packed=base.packs), lambda _: None)


def test_what_ships_is_small_and_said_to_be_ours():
    instructions = [json.loads(x) for x in (ASSETS / "instructions.jsonl").read_text().splitlines()]
    sampled = [json.loads(x) for x in (ASSETS / "sampled.jsonl").read_text().splitlines()]
    assert 40 <= len(instructions) <= 60 and len({r["prompt"] for r in instructions}) == len(instructions)
    assert all(r["completion"].strip() and len(r["completion"]) < 250 for r in instructions)
    assert len(sampled) == 32 and len(read_facts()) == len({f.prompt for f in read_facts()}) == 297
    assert sum(p.stat().st_size for p in ASSETS.iterdir()) < 60_000


def test_the_facts_that_are_marked_are_those_that_fiddle_knows(fiddle):
    facts = read_facts()
    assert [f.fiddle for f in facts] == is_right(fiddle, facts) and sum(f.fiddle for f in facts) == 67


def test_a_fact_is_known_where_greedy_decoding_writes_its_end(fiddle):
    """One forward of all says what generating each says."""
    facts = [*read_facts()[::7], Fact("The king", " and the queen"), Fact("Once upon a", " time, there"), Fact("", "a")]
    codec = Codec(fiddle.base.tokenizer)
    slow = []
    for f in facts[:-1]:
        start, end = (ids.tolist() for ids in codec.encode([f.prompt, f.answer]))
        slow.append(fiddle.generate([start], max_new=len(end)).ids[0] == end)
    assert is_right(fiddle, facts) == [*slow, False] and 5 < sum(slow) < len(slow)


def test_sampled_text_is_cheap_for_fiddle_and_instructions_are_not(fiddle, home):
    """It wrote the one itself."""
    run = load_run(None, ["model=fiddle", f"data.train={home / 'data.jsonl'}", "precision=float32", "optim.steps=100", "evaluate.every_steps=10"])
    suite, m = suite_of(run), Measures()
    suite.measure(m)
    assert m.suite["sampled"].value < m.suite["instructions"].value < 4.5
    assert m.suite["facts"].value == 1.0 and m.suite["facts"].n == 67 and m.suite["moved"].value == 0.0
    assert m.suite["sampled"].n > 1500 and suite.tokens < 0.04 * 3 * 8192 * 10


def test_a_short_run_measures_less_and_always_the_same_rows(home, tmp_path):
    one, two = (suite_of(settings(home, tmp_path, "evaluate.every_steps=1", f"seed={s}")) for s in (0, 1))
    ids = lambda s: [r.ids.tolist() for p in s.parts.values() for g in p.groups for r in g]  # noqa: E731
    assert one.most == LEAST and ids(one) == ids(two)
    for part in one.parts.values():
        rows = [r for g in part.groups for r in g]
        assert len(rows) == 1 or sum(map(len, rows)) <= LEAST


def test_instructions_are_answers_under_the_template_for_conversations_and_plain_text_for_text(home, tmp_path):
    chats, text = suite_of(settings(home, tmp_path)), suite_of(settings(home, tmp_path, "objective=text", data="text.txt"))
    tokenizer = chats.policy.base.tokenizer
    shown = [tokenizer.decode(s.parts["instructions"].groups[0][0].ids) for s in (chats, text)]
    assert "<assistant>" in shown[0] and shown[0].endswith("<end>") and "<assistant>" not in shown[1] and "\n" in shown[1]
    row = text.parts["instructions"].groups[0][0]
    assert 0 < np.flatnonzero(row.train)[0] == tokenizer.decode(row.ids).index("\n") + 1, "only the answer is scored"


RUNS = [
    ("llama", "data.jsonl", ["method=full"]),
    ("llama", "data.jsonl", ["method=prefix"]),
    ("llama", "text.txt", ["objective=text"]),
    ("llama", "pairs.jsonl", ["objective=dpo"]),
    ("llama", "pairs.jsonl", ["objective=kto"]),
    ("llama", "pairs.jsonl", ["objective=reward"]),
    ("llama", "labels.csv", ["objective=classify"]),
    ("llama", "data.jsonl", ["objective={kind: grpo, rewards: {exact_match: 1.0}, prompts: 2, samples: 2, max_new: 4}"]),
    ("llama", "data.jsonl", ["method={kind: crafted_prompt, max_tokens: 60, tries: 1, shots: [0, 1]}"]),
    ("bert", "labels.csv", ["objective=classify"]),
    ("bert", "text.txt", ["objective=masked_text"]),
    ("t5", "data.jsonl", []),
    ("t5", "text.txt", ["objective=masked_text", "method=full"]),
]


@pytest.mark.parametrize("model,data,more", RUNS, ids=str)
def test_every_kind_of_run_is_measured(home, tmp_path, model, data, more):
    result = execute(settings(home, tmp_path, *more, model=model, data=data), reporter=QUIET)
    assert set(result.after.suite) == {"instructions", "sampled", "moved"} == set(result.before.suite)
    assert all(np.isfinite(m.value) and m.n > 0 for m in result.after.suite.values())
    told = json.loads((result.folder / "result.json").read_text())
    assert Measures.from_dict(told["after"]).suite == result.after.suite and told["alarms"] == []
    assert "KL from before" in (result.folder / "report.html").read_text()


def test_a_task_that_is_to_be_retained_is_scored_at_every_evaluation(home, tmp_path, capsys):
    more = [f"evaluate.retain={home / 'mine.py'}", "evaluate.retain_rows=5", "evaluate.forgetting=false", "evaluate.every_steps=1"]
    result = execute(settings(home, tmp_path, *more), reporter=(reporter := Reporter()))
    reporter.result(result)
    assert result.after.retained["mine/length"].n == 5 and not result.after.suite
    lines = [json.loads(x) for x in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["event"] for x in lines if "retained/mine/length" in x] == ["before", "evaluation", "evaluation", "after"]
    assert "retained mine/length" in capsys.readouterr().out and "retained/mine/length" in (result.folder / "report.html").read_text()


def test_nothing_is_measured_where_nothing_is_asked(home, tmp_path):
    assert suite_of(settings(home, tmp_path, "evaluate.forgetting=false")) is None
    with pytest.raises(LuthierError, match="writes no text"):
        execute(settings(home, tmp_path, f"evaluate.retain={home / 'mine.py'}", "objective=classify", data="labels.csv"), reporter=QUIET)
