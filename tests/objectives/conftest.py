"""Tiny bases with tokenizers, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

import small
import tiny
from luthier.build import load
from luthier.core import Base
from luthier.precision.float32 import Precision


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind: "encoder", "encoder_decoder", "decoder"."""
    folder = tmp_path_factory.mktemp("bases")
    tiny.folder(folder / "llama")
    return {"encoder": small.bert(folder / "bert"), "encoder_decoder": small.t5(folder / "t5"), "decoder": folder / "llama"}


@pytest.fixture
def base(bases: dict[str, Path]):
    """kind -> an opened base."""

    def opened(kind: str) -> Base:
        return load(str(bases[kind]), precision=Precision())

    return opened
