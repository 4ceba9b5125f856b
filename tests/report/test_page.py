"""The page of a real run: it is whole HTML that fetches nothing, holds the run's numbers, and shows text as text."""

import json
import re
from html.parser import HTMLParser

import pytest

from luthier.report import chart, curves, page, sections
from luthier.report.facts import Number, read
from luthier.report.hashes import sha256

NASTY = "<script>alert('x')</script> & <b>"  # as in conftest.py
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags in balance, attributes that load something, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.tags, self.said, self.attributes = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)

    @property
    def text(self):
        return "".join(self.said)


def points(figure):
    return [tuple(map(float, p.split(","))) for line in re.findall(r'points="([^"]+)"', figure) for p in line.split()]


def test_the_page_is_whole_and_fetches_and_runs_nothing(made):
    text = (made / "report.html").read_text()
    p = Page(text)
    assert not p.open and p.tags.count("svg") >= 7 and p.tags.count("section") >= 10
    assert p.loads == ["data:,"] and not re.search(r"https?:|//[a-z]|url\(|@import", text.replace("</", ""))
    assert "script" not in p.tags and not [a for a in p.attributes if a[1].startswith("on")]


def test_it_holds_the_runs_numbers(made):
    p, result = Page((made / "report.html").read_text()), json.loads((made / "result.json").read_text())
    for when in ("before", "after"):
        for m in (result[when]["loss"], result[when]["general"]):
            assert f"{m['value']:.4f}" in p.text and f"{m['n']:,} tokens" in p.text
        s = result[when]["scores"]["exact_match"]
        assert f"{s['value']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" in p.text
    d = result["after"]["loss"]["value"] - result["before"]["loss"]["value"]
    assert f"{d:.4f} better" in p.text and f"{result['trained']:,} of {result['total']:,} parameters were trained" in p.text
    assert sha256(made / "adapter" / "adapter_model.safetensors") in p.text
    assert "optim.batch_tokens" in p.text and "600" in p.text and "out" not in json.loads((made / "facts.json").read_text())["asked"]


def test_text_that_looks_like_html_is_shown_as_text(run):
    sample = {"step": 0, "prompt": NASTY, "answer": NASTY, "stopped": "stop", "reference": NASTY}
    (run / "samples.jsonl").write_text("".join(json.dumps(sample | {"step": s}) + "\n" for s in (0, 8)))
    (run / "environment.json").write_text(json.dumps({"device": NASTY, "data": {"shapes": {NASTY: NASTY}, "bad_examples": [NASTY]}}))
    page.write(run)
    p = Page((run / "report.html").read_text())
    assert not p.open and "script" not in p.tags and "b" not in p.tags
    assert p.text.count(NASTY) >= 5 + 3 + 3  # samples, data and device, examples


def test_trained_tokens_are_marked_and_no_others(made):
    from tiny import tokenizer

    text = (made / "report.html").read_text()
    rows = json.loads((made / "facts.json").read_text())["examples"]
    assert len(rows) == 3
    for row in rows:
        pieces = row["parts"][0]["text"]
        assert [t for _, t in pieces] == [False, True] and pieces[1][0].endswith("<end>")
        assert f"<mark>{chart.escape(pieces[1][0])}</mark>" in text
        assert pieces[0][0].startswith("<user>") and tokenizer().convert_tokens_to_ids("<end>") is not None


def test_points_of_the_charts_are_the_metrics_values_in_pixels(made):
    lines = [json.loads(x) for x in (made / "metrics.jsonl").read_text().splitlines()]
    facts = read(made)
    loss, gap, general, parts, moved, known, lr, *_ = curves.over_steps(facts)
    train = [(x["step"], x["loss"]) for x in lines if x["event"] == "train"]
    held = [(x["step"], x["loss"]) for x in lines if x["event"] in ("before", "evaluation")]
    assert len(train) == 8 and [s for s, _ in held] == [0, 2, 4, 6, 8]
    everything = [v for _, v in (*train, *held)]
    low, high = min(everything), max(everything)
    low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
    place = lambda s, v: (52 + s / 8 * (360 - 14 - 52), 190 + (v - low) / (high - low) * (12 - 190))  # noqa: E731
    assert points(loss) == [pytest.approx(place(*p), abs=0.006) for p in (*train, *held)]
    dots = re.findall(r'class="dot s2" cx="([\d.]+)" cy="([\d.]+)"', loss)
    assert [tuple(map(float, d)) for d in dots] == [pytest.approx(place(*p), abs=0.006) for p in held]
    assert len(points(gap)) == 4 and len(points(general)) == len(points(moved)) == 5 and len(points(parts)) == 10 and len(points(lr)) == 8
    assert known == "", "a base of random weights knows no fact"
    mean = (train[2][1] + train[3][1]) / 2
    assert f"{chart.short(held[2][1] - mean)} at 4" in gap


def test_target_against_retention_joins_the_evaluations_in_order(made):
    lines = [json.loads(x) for x in (made / "metrics.jsonl").read_text().splitlines()]
    met = [x for x in lines if x["event"] in ("before", "evaluation")]
    place = lambda x: (x["general_loss"] - met[0]["general_loss"], met[0]["loss"] - x["loss"])  # noqa: E731
    across, up = chart.scales([chart.Series("", [place(x) for x in lines if x["event"] in ("before", "evaluation", "after")])])
    figure = curves.retention(read(made))
    assert points(figure) == [pytest.approx((across(x), up(y)), abs=0.006) for x, y in map(place, met)]
    assert place(met[0]) == (0, 0) and place(met[-1])[1] > 0, "what was gained points up"
    assert f"step 4: held-out loss {met[2]['loss']:.4f}" in figure and f"KL from before {met[2]['general_kl']:.3f}" in figure and "what was kept" in figure


def test_a_report_is_written_from_whatever_is_there(run):
    for name in ("metrics.jsonl", "samples.jsonl", "environment.json", "facts.json"):
        (run / name).unlink()
        p = Page(page.html(read(run)))
        assert not p.open
    assert "metrics.jsonl is missing" in p.text and "The held-out loss per token fell from" in p.text
    (run / "result.json").write_text('{"steps": ')
    p = Page(page.html(read(run)))
    assert not p.open and "result.json is damaged" in p.text and "interrupted" in p.text


def test_rollouts_have_their_own_curves(run):
    with (run / "metrics.jsonl").open("a") as f:
        for i in range(1, 5):
            facts = {"rollout": i, "reward": 0.1 * i, "kl": 0.01 * i, "entropy": 2.0, "answer_tokens": 7.0, "watch_length": 3.0}
            f.write(json.dumps({"event": "rollout", "step": i, **facts}) + "\n")
    figures = [f for f in curves.over_rollouts(read(run)) if f]
    assert [re.search("<figcaption>([^,<]+)", f)[1] for f in figures] == [
        "Reward of the answers",
        "KL to the reference",
        "Entropy",
        "Tokens an answer",
        "Watched scores",
    ]
    assert len(points(figures[0])) == 4 and points(figures[0])[0][1] > points(figures[0])[3][1]  # a rising reward goes up


def test_of_a_labelled_text_no_token_is_marked_as_trained(made):
    import numpy as np

    from luthier.core import Row
    from luthier.report.recording import shown
    from tiny import tokenizer

    row = Row(np.arange(5, 9, dtype=np.int32), np.ones(4, dtype=bool), "films:1", {"label": 1})
    told = shown(row, tokenizer(), {"problem": "single", "labels": ["bad", "good"]})
    assert [t for _, t in told["parts"][0]["text"]] == [False] and told["parts"][0]["said"] == "4 tokens, label good"
    several = Row(row.ids, row.train, "films:2", {"label": [1, 0, 1]})
    assert shown(several, tokenizer(), {"problem": "several", "labels": ["a", "b", "c"]})["parts"][0]["said"].endswith("label a, c")


@pytest.mark.parametrize(
    "name, a, b, said",
    [
        ("loss on general text", 4.0, 5.0, "worse"),
        ("known facts kept", 1.0, 0.5, "worse"),
        ("retained/bleu", 2.0, 3.0, "better"),
        ("KL from before", 0.2, 0.1, "better"),
    ],
)
def test_what_the_base_could_do_is_marked_better_or_worse_whichever_way_it_counts(name, a, b, said):
    cell = sections._row(name, Number(a, n=10), Number(b, n=10))[3]
    assert f'class="{said}"' in cell
    assert "class" not in sections._row("bleu", Number(a, n=10), Number(b, n=10))[3]
