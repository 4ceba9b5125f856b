"""A tiny run from end to end, made once; each test that changes its folder changes a copy."""

import json
import random
import shutil

import pytest

import tiny
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.settings.config import load_run

NASTY = "<script>alert('x')</script> & <b>"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny base, and rows some of which look like HTML."""
    folder = tmp_path_factory.mktemp("report")
    tiny.folder(folder / "base")
    rng, words = random.Random(0), ["red", "green", "blue", "one", "two", NASTY]
    rows = [{"prompt": f"{NASTY} {i}", "completion": " ".join(rng.choices(words, k=3))} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture(scope="session")
def asked(base):
    """The settings of the run, with more of them."""

    def settings(out, *more):
        shape = "name=r precision=float32 optim.steps=8 optim.batch_tokens=600 optim.lr=1e-2 evaluate.every_steps=2 checkpoint.every_steps=2"
        own = [f"model={base / 'base'}", f"data.train={base / 'data.jsonl'}", "evaluate.sample_tokens=4", "evaluate.samples=2", f"out={out}"]
        return load_run(None, [*own, *shape.split(), *more])

    return settings


@pytest.fixture(scope="session")
def made(base, asked):
    """The folder of a finished run."""
    execute(asked(base / "runs", "evaluate.tasks=[exact_match]"), reporter=Reporter(quiet=True))
    return base / "runs" / "r"


@pytest.fixture
def run(made, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(made, tmp_path / "r")
