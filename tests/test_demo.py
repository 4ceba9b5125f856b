"""The demo, cut short: its table, its side-by-side answers, its next commands."""

from luthier.cli import main


def test_the_demo_runs_and_says_what_was_gained_and_what_to_try(tmp_path, capsys):
    code = main(["demo", "--steps", "2", "--rows", "6", "--out", str(tmp_path)])
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
    assert main(["demo", "--steps", "1", "--rows", "2", "--out", str(tmp_path)]) == 0  # a second one does not collide
    assert (tmp_path / "demo-2").exists()
