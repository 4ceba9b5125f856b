"""From numbers to the table, the advice, the files and the plots: a made-up comparison whose every number is known."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

from luthier.comparing import advice, page, plots, scoring, table
from luthier.comparing.conduct import Found, Standing
from luthier.comparing.outcome import reached, table_of
from luthier.comparing.sweep import rows_of

N = 120
RECORDS = [{"prompt": f"p{i}", "refs": [f"{'red' if i % 2 else 'blue'} house number {i} near the river"]} for i in range(N)]
CURVES = {"full": [4.0, 2.0, 1.2, 1.0], "lora": [4.0, 2.2, 1.35, 1.15], "prefix": [4.0, 3.6, 3.3, 3.1]}


BESIDE, MERGED = {"prefill": 0.012, "token": 0.004}, {"prefill": 0.01, "token": 0.003}


def said(good: float) -> list[str]:
    """Answers of which a share is right."""
    return [r["refs"][0] if (i * 37 % N) < good * N else "a house" for i, r in enumerate(RECORDS)]


def a_run(name, good, general, trained, seed=0):
    curve = [{"step": i, "tokens": 1000 * i, "seconds": 2.0 * i, "loss": v} for i, v in enumerate(CURVES[name])]
    return {
        "answers": said(good), "losses": [[4.0 - 3 * good, 1.0]] * N, "general": {"value": general, "n": 100}, "trained": trained, "whole": 10_000,
        "steps": 30, "tokens": 30_000, "seconds": 60.0, "step": 2.0, "peak": 5 * 10**8, "bytes": trained * 4, "curve": curve,
        "folder": f"runs/{name}-{seed}",
        "latency": {"attached": None if name == "full" else BESIDE, "merged": None if name == "prefix" else MERGED},
    }  # fmt: skip


def found(**runs):
    """full is best and forgets most, lora about as good, prefix clearly worse, prompt refused."""
    rows = rows_of(None, ["data=a.jsonl", "methods=[prefix,lora,full,prompt]"]).rows
    standing = [Standing(r, "g") for r in rows]
    for s in standing:
        s.search, s.told = {"lr": 1e-3, "searched": s.row.name != "prefix"}, {"trained": 1}
    by = {s.row.name: s for s in standing}
    by["prefix"].runs = runs.get("prefix", [a_run("prefix", 0.3, 4.1, 100)])
    by["lora"].runs = runs.get("lora", [a_run("lora", 0.68, 4.2, 400)])
    by["full"].runs = runs.get("full", [a_run("full", 0.7, 4.9, 10_000)])
    by["prompt"].problem = "it does not fit"
    ground = {
        "records": RECORDS, "task": "exact_match", "problem": None, "general": {"value": 4.0, "n": 100}, "test_said": "two in three", "chosen_on": 50,
        "answers": {"base": said(0.0), "copy": said(0.2)}, "parameters": 10_000, "test_rows": N, "train_rows": 900,
        "device": "cpu", "threads": 1, "renders": "chat",
        "base": {"losses": [[4.0, 1.0]] * N, "general": {"value": 4.0, "n": 100}, "latency": {"attached": None, "merged": MERGED}}, "no_base": "",
    }  # fmt: skip
    return Found(standing, {"g": ground}, 1, 1, [], 100.0, 2.0, "tokens")


@pytest.fixture(scope="module")
def made():
    return table_of(found())


def entry(t, name):
    return next(e for e in t.entries if e.name == name)


def test_the_best_comes_first_then_baselines_then_what_was_refused(made):
    assert [e.name for e in made.entries] == ["full", "lora", "prefix", "the base, untouched", "copying the nearest training answer", "prompt"]
    assert made.best.name == "full" and made.measure == "exact_match"
    assert entry(made, "full").quality.value == pytest.approx(0.7)
    assert entry(made, "lora").forgotten == pytest.approx(0.2)


def test_differences_are_from_the_best_on_the_same_rows(made):
    assert entry(made, "full").less is None
    assert entry(made, "lora").less.value == pytest.approx(0.68 - 0.7, abs=0.01)
    assert [entry(made, n).clearly_worse for n in ("lora", "prefix", "copying the nearest training answer")] == [False, True, True]


def test_the_mark_of_no_clear_difference_stands_only_where_the_interval_holds_zero():
    t = table_of(found(full=[a_run("full", 0.1, 4.2, 10_000)], lora=[a_run("lora", 0.09, 4.2, 400)], prefix=[a_run("prefix", 0.02, 4.1, 100)]))
    says = {e.name: table.GOOD[1].cell(t, e) for e in t.entries}
    assert says["lora"].endswith("~") and says["full"] == "best"
    assert not says["copying the nearest training answer"].endswith("~")  # which is clearly better


def test_rows_on_the_front_are_marked(made):
    assert {e.name for e in made.rows if e.front} == {"full", "lora", "prefix"}
    beaten = table_of(found(prefix=[a_run("prefix", 0.3, 4.3, 500)]))
    assert {e.name for e in beaten.rows if e.front} == {"full", "lora"}


def test_the_target_is_most_of_the_way_and_read_off_the_curves(made):
    assert made.target == pytest.approx(4.0 - 0.95 * 3.0)
    assert entry(made, "full").target_tokens == pytest.approx(2000 + 1000 * (1.2 - 1.15) / 0.2)
    assert entry(made, "lora").target_seconds == pytest.approx(6.0)
    assert entry(made, "prefix").target_tokens is None
    assert reached([(0, 0, 1.0)], 2.0, lower=True) == (0, 0)
    assert reached([(0, 0, 1.0), (10, 5, 3.0)], 2.0, lower=False) == (5, 2.5)


def test_seeds_are_averaged_and_each_is_shown():
    t = table_of(found(lora=[a_run("lora", 0.6, 4.2, 400), a_run("lora", 0.7, 4.4, 400, 1)]))
    e = entry(t, "lora")
    assert e.quality.value == pytest.approx(0.65) and e.by_seed == pytest.approx([0.6, 0.7]) and e.general == pytest.approx(4.3) and e.seeds == 2
    assert "One seed each" not in " ".join(advice.sentences(t)[1])


def test_the_advice_cites_the_rows(made):
    says, caveats = advice.sentences(made)
    assert re.search(
        r"lora \(exact_match 0\.68\d \[0\.\d+, 0\.\d+\]\) is not clearly below the best, full \(exact_match 0\.700 \[.*\]\), with 4 % of its trained", says[0]
    )
    assert "lora forgets least among these: +0.20 nats a token of general text, full +0.90" in says[1]
    assert any("still falling" in c for c in caveats) and any("One seed each" in c for c in caveats)


def test_a_clear_winner_and_a_baseline_that_is_not_beaten_are_said():
    t = table_of(found(lora=[a_run("lora", 0.35, 4.2, 400)]))
    assert advice.sentences(t)[0][0].startswith("full (exact_match 0.700") and "clearly the best of the 3 rows" in advice.sentences(t)[0][0]
    assert "full pays for it with +0.90 nats a token of general text; the best that keeps more is lora (exact_match 0.3" in advice.sentences(t)[0][1]
    low = table_of(found(full=[a_run("full", 0.2, 4.2, 10_000)], lora=[a_run("lora", 0.1, 4.2, 400)], prefix=[a_run("prefix", 0.1, 4.2, 100)]))
    assert any(s.startswith("No row clearly beats copying the nearest training answer (exact_match 0.200") for s in advice.sentences(low)[0])


def test_every_rule_says_why_it_is_there():
    assert all(r.why and r.name for r in (*advice.RULES, *advice.CAVEATS))


def test_where_only_a_loss_is_measured_less_is_better():
    f = found()
    f.grounds["g"] |= {"task": None, "answers": {}}
    t = table_of(f)
    assert t.measure == scoring.LOSS and t.lower and [e.name for e in t.rows] == ["full", "lora", "prefix"]
    assert [e.name for e in t.baselines] == ["the base, untouched"]


def test_the_csv_holds_the_numbers_unrounded_and_empty_cells_for_what_is_not_there(made):
    rows = {r["row"]: r for r in csv.DictReader(io.StringIO(table.as_csv(made)))}
    assert float(rows["lora"]["exact_match"]) == entry(made, "lora").quality.value
    assert rows["full"]["prefill_seconds"] == "" and rows["prefix"]["merged_token_seconds"] == ""
    assert rows["prompt"]["kind"] == "refused" and rows["prompt"]["problem"] == "it does not fit" and rows["lora"]["front"] == "True"


def test_the_latex_has_a_cell_for_every_column_and_escapes_what_latex_reads(made):
    lines = table.as_latex(made).splitlines()
    cells = [line.count(" & ") for line in lines if line.endswith(r"\\")]
    assert len({*cells}) == 1 and len(cells) == 6
    assert r"\begin{tabular}{l" + "r" * cells[0] + "}" in lines
    assert r"exact\_match" in table.as_latex(made) and r"4 \%" in table.as_latex(made)
    assert table.tex("50% of a_b & c~d") == r"50\% of a\_b \& c$\sim$d"


@pytest.fixture(scope="module")
def written(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    page.write(made, folder)
    return folder


def test_the_page_is_one_file_that_fetches_nothing_and_shows_every_row(made, written):
    html = (written / "compare.html").read_text()
    assert not re.search(r'(src|href|srcset)="(?!data:)', html) and "<script" not in html and "@import" not in html
    for name in ("full", "lora", "prefix", "copying the nearest training answer", "it does not fit"):
        assert name in html
    told = json.loads((written / "compare.json").read_text())
    assert [r["name"] for r in told["rows"]] == [e.name for e in made.entries] and told["advice"]
    assert (written / "compare.csv").is_file() and (written / "compare.tex").is_file()


def test_plots_are_drawn_for_what_there_is_in_light_and_dark(made, written):
    pytest.importorskip("matplotlib")
    assert {p.name for p in written.glob("*.png")} == {"quality.png", "parameters.png", "forgetting.png", "curves.png"}
    assert (written / "compare.html").read_text().count('prefers-color-scheme: dark)" srcset="data:image/png') == 4


def test_without_matplotlib_the_page_says_so_and_everything_else_is_there(made, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "there", lambda: False)
    assert "matplotlib is not installed" in page.write(made, tmp_path).read_text()
    assert not list(tmp_path.glob("*.png")) and (tmp_path / "compare.csv").is_file()


def test_names_in_a_scatter_cover_neither_one_another_nor_a_point():
    pytest.importorskip("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 4.1))
    points = [(f"a method, rank {i}", x, y, "black") for i, (x, y) in enumerate([(1, 1), (1.02, 1.0), (1.05, 1.03), (0.98, 1.04), (3, 3), (3, 2.9)])]
    ax.scatter([p[1] for p in points], [p[2] for p in points])
    ax.margins(0.14)
    made = plots.name_points(figure, ax, points)
    figure.canvas.draw()
    boxes = [m.get_window_extent() if not m.arrow_patch else matplotlib.text.Text.get_window_extent(m) for m in made]
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert not a.overlaps(b)
        for _, x, y, _ in points:
            assert not a.contains(*ax.transData.transform((x, y)))
    plt.close(figure)


def test_rows_that_learned_from_less_than_others_are_not_said_to_have_had_as_much():
    t = table_of(found())
    assert t.about["equal"] == "tokens" and not t.notes
    fewer = [a_run("lora", 0.68, 4.2, 400) | {"tokens": 12_000}]
    t = table_of(found(lora=fewer))
    assert "12,000" in t.notes[0] and "30,000" in t.notes[0] and "slower" in t.notes[0]
    html = page._about(t)
    assert "unlike numbers of training tokens" in html and "same number" not in html
