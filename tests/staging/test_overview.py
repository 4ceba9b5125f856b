"""The report over all stages: what it shows of each, and what was forgotten from the first to the last."""

import io
from dataclasses import asdict

from rich.console import Console

from luthier.measuring.evaluate import Score
from luthier.staging import overview
from luthier.staging.ledger import Ledger, Record
from luthier.staging.stages import load_stages

TREE = {
    "name": "s",
    "stages": {
        "reading": {"objective": "text", "method": "full", "data": "a.txt"},
        "judge": {"model": "stage:reading", "objective": "reward", "data": "p.jsonl"},
        "sft": {"model": "stage:reading", "data": "b.jsonl"},
        "dpo": {"model": "stage:reading", "method": {"kind": "lora", "from": "stage:sft"}, "objective": "dpo", "data": "p.jsonl"},
    },
}


def result(before, after, *, n=100, loss=(3.0, 2.0), unit="tokens", **more):
    general = [{"value": v, "n": n, "unit": "tokens"} for v in (before, after)]
    losses = [{"value": v, "n": 9, "unit": unit} for v in loss]
    both = {w: {"loss": a, "general": g, "scores": {}} for w, a, g in zip(("before", "after"), losses, general, strict=True)}
    numbers = {"steps": 7, "best_step": 6, "tokens": 1234567, "trained": 896, "total": 32224, "peak_bytes": 1.5e9, "seconds": 75.0}
    return numbers | {"peak_is_its_own": True, "stopped": ""} | both | more


def made(results, tmp_path, tree=TREE):
    """Stages, of which those with a result are done."""
    stages = load_stages(tree)
    ledger = Ledger(tmp_path)
    for stage in stages.stages:
        kinds = {"objective": "text", "method": "lora", "artefact": f"{stage.folder}/adapter"}
        there = results.get(stage.name)
        ledger.records[stage.name] = Record(stage.name, stage.folder, **kinds, state="done" if there else "waiting", result=there or {})
    return stages, ledger


GOOD = {"reading": result(4.0, 4.2), "judge": result(4.2, 9.0), "sft": result(4.2, 4.25), "dpo": result(4.25, 4.5, loss=(0.6931, 0.5), unit="rankings")}


def test_forgetting_adds_up_along_the_stages_that_the_last_came_through(tmp_path):
    stages, ledger = made(GOOD, tmp_path)
    assert [r.name for r in overview.lineage(stages, ledger)] == ["reading", "sft", "dpo"]  # the judge's weights went nowhere
    assert overview.forgetting(stages, ledger) == "general text over reading > sft > dpo: 4.0000 -> 4.5000 (+0.5000 in all)"


def test_losses_on_other_pieces_of_text_are_not_subtracted_from_one_another(tmp_path):
    stages, ledger = made(GOOD | {"dpo": result(5.0, 5.25, n=90)}, tmp_path)
    said = overview.forgetting(stages, ledger)
    assert said.startswith("general text over reading > sft > dpo: +0.5000 (+0.2000 +0.0500 +0.2500; not measured on the same pieces")
    other = TREE | {"stages": TREE["stages"] | {"sft": TREE["stages"]["sft"] | {"data": {"train": "b.jsonl", "general": "g.txt"}}}}
    assert "not measured on the same pieces" in overview.forgetting(*made(GOOD, tmp_path, other))


def test_where_one_stage_did_not_measure_general_text_nothing_is_said(tmp_path):
    blind = result(4.2, 4.25)
    blind["before"] = blind["after"] = {"loss": None, "general": None, "scores": {}}
    assert overview.forgetting(*made(GOOD | {"sft": blind}, tmp_path)) == ""
    assert overview.forgetting(*made({}, tmp_path)) == ""


def test_every_stage_has_its_line_finished_or_not(tmp_path):
    stages, ledger = made({k: v for k, v in GOOD.items() if k != "dpo"}, tmp_path)
    ledger.records["dpo"].state = "running"
    lines = list(overview.gained(stages, ledger))
    assert lines[0] == ("1 reading", "text", "lora", "3.0000", "2.0000", "4.0000", "4.2000") and lines[3][3] == "interrupted"
    assert next(iter(overview.cost(stages, ledger))) == ("1 reading", "896", "1,234,567", "1:15", "1.50 GB", "1-reading/adapter")
    ledger.records["sft"].result["peak_is_its_own"] = False
    assert list(overview.cost(stages, ledger))[2][4] == "up to 1.50 GB"


def test_an_objective_without_a_held_out_loss_shows_its_first_score(tmp_path):
    ppo = result(4.2, 4.3)
    for when, v in (("before", -0.25), ("after", 0.5)):
        ppo[when] |= {"loss": None, "scores": {"reward": asdict(Score(v, v, v, 9))}}
    stages, ledger = made({"reading": ppo}, tmp_path)
    assert next(iter(overview.gained(stages, ledger)))[3:5] == ("reward -0.250", "0.500")


def test_the_report_fits_a_terminal_and_is_markdown_in_a_file(tmp_path):
    stages, ledger = made(GOOD | {"dpo": GOOD["dpo"] | {"stopped": "no better validation loss in 2 evaluations"}}, tmp_path)
    out = io.StringIO()
    overview.show(stages, ledger, Console(file=out, width=80, force_terminal=True, color_system=None))
    lines = out.getvalue().splitlines()
    assert any("4 dpo" in line and "0.6931" in line and "0.5000" in line for line in lines) and any("3-sft/adapter" in line for line in lines)
    assert max(len(line) for line in lines if "│" in line) <= 80 and "…" not in out.getvalue()
    text = overview.markdown(stages, ledger)
    assert "| 4 dpo | text | lora | 0.6931 | 0.5000 | 4.2500 | 4.5000 |" in text and "per ranking" in text
    assert "Stage dpo stopped early: no better validation loss in 2 evaluations" in text
    assert text.count("\n## ") == 4


def test_each_stage_that_has_a_report_is_linked(tmp_path):
    stages, ledger = made(GOOD, tmp_path)
    (tmp_path / "3-sft").mkdir()
    (tmp_path / "3-sft" / "report.html").touch()
    assert overview.markdown(stages, ledger).count("report.html](") == 1 and "](3-sft/report.html)" in overview.markdown(stages, ledger)
