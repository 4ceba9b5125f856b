"""Runs on a tiny base that is made for them: its folder with data, their settings, a reporter that keeps what is said."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tiny
from luthier.running.progress import Reporter
from luthier.settings.config import load_run

QUIET = Reporter(quiet=True)


def home_in(folder: Path) -> Path:
    """A tiny base and a data file."""
    tiny.folder(folder / "base")
    rng = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three"]
    with (folder / "data.jsonl").open("w") as f:
        for _ in range(60):
            prompt = " ".join(rng.choices(words, k=rng.randint(1, 5)))
            f.write(json.dumps({"prompt": prompt, "completion": prompt.upper()}) + "\n")
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(f"A short story, number {i}, about nothing at all." for i in range(40)))
    return folder


def settings(home, out, *more, data="data.jsonl"):
    return load_run(
        None,
        [
            f"model={home / 'base'}",
            f"data.train={home / data}",
            f"out={out}",
            "name=r",
            "precision=float32",
            "optim.steps=8",
            "optim.batch_tokens=300",
            "optim.lr=1e-2",
            "evaluate.every_steps=4",
            "checkpoint.every_steps=2",
            "evaluate.sample_tokens=4",
            "method.dropout=0.1" if not any(m.startswith("method=") for m in more) else "seed=0",
            *more,
        ],
    )


class Said(Reporter):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(quiet=True)
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)
