"""What `luthier data preview` shows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from luthier.data.prepare import prepare
from luthier.data.preview import show, shown, spans
from luthier.data.render import render_chat
from luthier.data.shapes import Chat

CHAT = Chat([{"role": "user", "content": "Is it cheap?"}, {"role": "assistant", "content": "No, café."}], where="f:1")


@pytest.mark.parametrize("fixture", ["tokenizer", "chatml", "llama_like", "slow"])
def test_trained_text_is_bracketed_and_nothing_is_lost(fixture: str, request: pytest.FixtureRequest) -> None:
    tok = request.getfixturevalue(fixture)
    row: Any = render_chat(CHAT, tok, "plain", max_tokens=500)
    text = shown(row, tok, colour=False).plain
    assert text.count("⟦") == text.count("⟧") == 1
    assert text.replace("⟦", "").replace("⟧", "") == tok.decode(row.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert [on for _, on in spans(row, tok)] == [False, True]


def test_colours_replace_the_brackets_on_a_terminal(tokenizer: Any) -> None:
    row: Any = render_chat(CHAT, tokenizer, max_tokens=500)
    text = shown(row, tokenizer, colour=True)
    assert "⟦" not in text.plain
    assert [s.style for s in text.spans] == ["dim", "bold green"]


def test_the_middle_of_a_long_row_is_left_out_and_counted(tokenizer: Any) -> None:
    long = Chat([{"role": "user", "content": "the river " * 300}, {"role": "assistant", "content": "No."}])
    row: Any = render_chat(long, tokenizer, max_tokens=5000)
    text = shown(row, tokenizer, colour=False).plain
    assert f"... {len(row) - 400:,} tokens ..." in text and "No." in text


@pytest.mark.parametrize(("terminal", "no_color"), [(False, False), (True, True), (True, False)])
def test_the_counts_and_the_rows_are_shown(terminal: bool, no_color: bool, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"q{i} [bold]", "completion": "the river " * i} for i in range(1, 60)]
    path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "", "completion": ""}])))
    prepared = prepare([str(path)], tokenizer, renders="chat", max_tokens=64, on_bad_row="skip", say=lambda _: None)
    out = io.StringIO()
    show(prepared.train[:2], tokenizer, prepared.facts, Console(file=out, force_terminal=terminal, no_color=no_color, width=200))
    text = out.getvalue()
    assert ("⟦" in text) == (not terminal or no_color)
    for part in (
        "prompt (prompt, completion)",
        "trained tokens",
        "over length (truncate)",
        "bad rows",
        ":60: column 'completion' is empty",
        "[bold]",
        "held out",
    ):
        assert part in text


def test_the_command_shows_a_file_with_settings(tmp_path: Path, chatml: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from luthier.cli import main

    model = tmp_path / "model"
    chatml.save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 512}))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"q": f"why {i}?", "a": "She said so."}) for i in range(10)))
    code = main(["data", "preview", str(tmp_path / "a.jsonl"), "data.columns={prompt: q, completion: a}", "--model", str(model), "--rows", "1"])
    out = capsys.readouterr().out
    assert code == 0
    assert "<|im_start|>assistant\n⟦She said so.<|im_end|>⟧" in out and "prompt = column 'q'" in out

    code = main(["data", "preview", str(tmp_path / "b.jsonl"), "--model", str(model)])
    assert code == 2
    assert "Did you mean" in capsys.readouterr().err
