"""The demo, cut short: its table, its side-by-side answers, its next commands."""

from luthier.cli import main
from luthier.errors import LuthierError
from luthier.running import starting


def test_the_demo_runs_and_says_what_was_gained_and_what_to_try(tmp_path, capsys, monkeypatch):
    code = main(["demo", "--steps", "1", "--rows", "2", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert code == 0
    for words in (
        "held-out loss",
        "loss on general text",
        "facts",
        "bleu",
        "parameters trained",
        "peak memory",
        "luthier chat",
        "luthier merge",
        "tuned",
        "base",
    ):
        assert words in out, words
    assert (tmp_path / "demo" / "adapter" / "adapter_model.safetensors").exists()
    before = (tmp_path / "demo-data" / "train.jsonl").read_bytes()
    asked = []

    def execute(run, **_):  # a second one does not collide; what it would do was just seen
        asked.append(run)
        raise LuthierError("far enough")

    monkeypatch.setattr(starting, "execute", execute)
    assert main(["demo", "--steps", "1", "--rows", "2", "--out", str(tmp_path)]) == 2
    assert [run.name for run in asked] == ["demo-2"] and (tmp_path / "demo-data" / "train.jsonl").read_bytes() == before
