"""A stream gives every row once an epoch, in an order that depends on the seed and the buffer, and goes on from any step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.core import LuthierError, Row, next_token_batch
from luthier.data import sources
from luthier.data.feed import Batches
from luthier.data.mixing import Mixture, Rows
from luthier.data.prepare import Prepared, prepare
from luthier.data.streaming import Streamed


def file(folder: Path, n: int, suffix: str = "jsonl") -> Path:
    path = folder / f"many.{suffix}"
    rows = [{"prompt": f"question {i}", "completion": f"answer {i} " + "so " * (i % 7)} for i in range(n)]
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def opened(path: Path, tokenizer: Any, **how: Any) -> Prepared:
    say: list[str] = []
    got = prepare([str(path)], tokenizer, renders="chat", max_tokens=64, say=say.append, stream=how.pop("buffer", 40), template="plain", **how)
    assert any("a stream" in line for line in say)
    return got


def streamed(got: Prepared, buffer: int = 40, seed: int = 0, **how: Any) -> Streamed:
    assert got.stream is not None
    return Streamed("s", got.stream, seed, buffer=buffer, rows=how.pop("rows", None), tokens=10.0, **how)


def wheres(source: Streamed, first: int, n: int) -> list[str]:
    chunk = source.draw(first, n)
    return [chunk.row(i).where for i in range(n)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_epoch_of_a_stream_holds_every_row_once_but_what_is_held_out(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    got = opened(file(tmp_path, 150, suffix), tokenizer)
    held = {r.where for r in got.validation}
    assert not got.train and len(held) == 2
    source = streamed(got)
    epochs = [wheres(source, e * 148, 148) for e in range(3)]
    for seen in epochs:
        assert len(set(seen)) == 148 and not set(seen) & held
    assert epochs[0] != epochs[1] != epochs[2]
    numbers = [int(re.findall(r"\d+", w)[-1]) for w in epochs[0]]
    assert numbers != sorted(numbers) and max(numbers[:38]) <= 40  # shuffled within a buffer, not over the file


def test_what_is_held_out_is_left_out_wherever_it_comes_again(tmp_path: Path, tokenizer: Any) -> None:
    path = file(tmp_path, 60)
    path.write_text(path.read_text() * 2)
    got = opened(path, tokenizer)
    held = {json.loads(path.read_text().splitlines()[int(r.where.rpartition(":")[2]) - 1])["prompt"] for r in got.validation}
    lines = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    seen = [lines[int(w.rpartition(":")[2]) - 1] for w in wheres(streamed(got), 0, 116)]
    assert held and not held & set(seen) and len(set(seen)) == 58


@pytest.mark.parametrize("stop", [0, 1, 5, 11, 18])
def test_a_mixture_with_a_stream_goes_on_from_any_step(tmp_path: Path, tokenizer: Any, stop: int) -> None:
    path = file(tmp_path, 150)
    rows = [Row(np.arange(1, 6, dtype=np.int32), np.arange(5) > 0, f"m:{i}") for i in range(30)]

    def feed(**how: Any) -> Batches:
        order = Mixture([Rows("m", rows, 0), streamed(opened(path, tokenizer))], np.array([0.3, 0.7]), 0)
        return Batches([], next_token_batch, pad=0, order=order, batch_examples=80, micro_tokens=300, steps=20, **how)

    names = lambda f: [sorted(w for b in step for w in b.where if "fewer" not in w) for step in f]  # noqa: E731
    whole = names(feed())
    f = feed()
    for _ in range(stop):
        next(f)
    again = feed()
    again.load_state_dict(json.loads(json.dumps(f.state_dict())))
    assert names(again) == whole[stop:]
    ranks = [names(feed(rank=r, size=2)) for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == whole


def test_a_stream_has_no_epochs_of_its_own_so_steps_must_be_given(tmp_path: Path, tokenizer: Any) -> None:
    order = Mixture([streamed(opened(file(tmp_path, 50), tokenizer))], np.array([1.0]), 0)
    with pytest.raises(LuthierError, match=r"optim\.steps: must be given"):
        Batches([], next_token_batch, pad=0, order=order, epochs=2.0)


def test_draws_out_of_turn_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    source = streamed(opened(file(tmp_path, 50), tokenizer))
    source.draw(0, 5)
    with pytest.raises(LuthierError, match="draw 5 comes next"):
        source.draw(9, 1)


def test_a_stream_of_nothing_but_held_out_rows_says_so() -> None:
    class Nothing:
        def items(self) -> Any:
            return iter(range(100))

        def rows(self, items: list[Any]) -> list[Row]:
            return []

    with pytest.raises(LuthierError, match="no row of this stream is left"):
        Streamed("s", Nothing(), 0, buffer=40, rows=None, tokens=1.0).draw(0, 1)


def test_a_hub_data_set_is_streamed_and_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **how: asked.update(how) or iter([{"text": "one"}, {"text": "two"}]))
    assert [r.fields["text"] for r in sources.read("owner/name", bad=sources.Bad("stop"), stream=True)] == ["one", "two"]
    assert asked == {"split": "train", "streaming": True}
