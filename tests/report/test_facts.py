"""How a run stands, read from its folder: finished, stopped by its user, failed, and what a run records of itself."""

import json

import pytest

from luthier.core import LuthierError
from luthier.errors import Interrupted
from luthier.report import facts, recording
from luthier.report.facts import read
from luthier.running.progress import Reporter
from luthier.running.starting import execute


class Ends(Reporter):
    """Ends a run at its second evaluation."""

    def __init__(self, error):
        super().__init__(quiet=True)
        self.error, self.seen = error, 0

    def evaluated(self, step, m, *, best):
        self.seen += 1
        if self.seen == 2:
            raise self.error


def test_a_run_that_is_stopped_and_one_that_fails_leave_a_report_that_says_so(asked, tmp_path):
    with pytest.raises(Interrupted):
        execute(asked(tmp_path), reporter=Ends(Interrupted("stopped")))
    stopped = read(tmp_path / "r")
    assert stopped.state == "interrupted at step 2" and not stopped.finished and stopped.planned == 8
    text = (tmp_path / "r" / "report.html").read_text()
    assert "interrupted after step 2 of 8" in text and "luthier train --resume" in text and "has left no adapter" in text
    before, after = stopped.measures()
    assert before[facts.HELD_OUT].n > 0 and after[facts.HELD_OUT].value < before[facts.HELD_OUT].value
    with pytest.raises(LuthierError):
        execute(asked(tmp_path), resume=tmp_path / "r", reporter=Ends(LuthierError("the disk <went>")))
    failed = read(tmp_path / "r")
    assert failed.state == "failed at step 6" and "The run failed after step 6 of 8: the disk &lt;went&gt;." in (tmp_path / "r" / "report.html").read_text()
    execute(asked(tmp_path), resume=tmp_path / "r", reporter=Reporter(quiet=True))
    done = read(tmp_path / "r")
    assert done.state == "finished" and done.steps == 8 and not done.problems and not (tmp_path / "r" / "failed.json").exists()
    assert done.told["asked"] == failed.told["asked"] and done.told["asked"]["optim.steps"] == 8


def test_a_report_that_cannot_be_written_costs_no_run(asked, tmp_path, monkeypatch, capsys):
    def broken(folder):
        raise RuntimeError("no ink")

    monkeypatch.setattr("luthier.report.page.write", broken)
    execute(asked(tmp_path, "optim.steps=2"))
    assert (tmp_path / "r" / "adapter" / "adapter_model.safetensors").is_file() and read(tmp_path / "r").state == "finished"
    assert "warning: the report was not written (RuntimeError: no ink); luthier runs report" in capsys.readouterr().out


def test_a_run_under_way_is_told_from_one_whose_process_is_gone(run):
    (run / "result.json").unlink()
    assert read(run).state == "running, step 8"  # this very process made it
    told = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps(told | {"process": {"id": 2**22 + 1, "host": told["process"]["host"]}}))
    assert read(run).state == "interrupted at step 8"


def test_what_was_asked_are_the_settings_that_are_not_the_default(asked):
    found = dict(recording.changed(asked("somewhere", "method=dora", "method.rank=4")))
    assert found["method.kind"] == "dora" and found["method.rank"] == 4 and found["optim.lr"] == 0.01
    assert not {"name", "out", "objective.kind", "optim.clip", "data.split"} & set(found)


def test_an_interval_column_is_no_measure_of_its_own(made):
    before, after = read(made).measures()
    kept = [facts.SUITE[k] for k in ("instructions", "sampled", "moved")]  # a base of random weights knows no fact
    assert list(after) == [facts.HELD_OUT, facts.GENERAL, "exact_match", *kept] == list(before)
    lines = facts._flat({"event": "evaluation", "step": 3, "loss": 2.0, "bleu": 3.0, "bleu_low": 2.0, "bleu_high": 4.0})
    assert list(lines) == [facts.HELD_OUT, "bleu"] and (lines["bleu"].low, lines["bleu"].high) == (2.0, 4.0)


def test_the_prediction_of_memory_stands_beside_the_measurement(run):
    from luthier.planning.foresight import add_memory
    from luthier.report import page
    from luthier.settings.config import load_run

    add_memory(run, load_run(str(run / "run.yaml"), ["place.on=cpu"]))
    told = json.loads((run / "facts.json").read_text())["memory"]
    longest = json.loads((run / "environment.json").read_text())["data"]["longest"]
    assert told["total"] > sum(n for k, n in told["parts"].items() if k.startswith("frozen")) > 0 and f"{longest}, packed" in told["batch"]
    peak = json.loads((run / "result.json").read_text())["peak_bytes"]
    high = "high" if told["total"] > peak else "low"
    assert f"the prediction is {abs(told['total'] - peak) / peak:.0%} too {high}" in page.html(read(run))
