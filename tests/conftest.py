"""Shared by all tests: one thread, real data where LUTHIER_DATA names it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tiny.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network
os.environ.setdefault("LUTHIER_DATA_CACHE_GB", "0")  # tests leave nothing in the user's cache
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread costs more than it does, and beside other work many times more


@pytest.fixture(autouse=True)
def denormal_numbers() -> None:
    """As a fresh process has them: a run flushes them to zero for good."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; the test is skipped where there is none."""
    where = os.environ.get("LUTHIER_DATA")
    if not where or not Path(where).is_dir():
        pytest.skip("LUTHIER_DATA names no folder of real data")
    return Path(where)


@pytest.fixture
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forecast of time runs every operation as ever, but once and in small parts: for tests that ask what is said, not how near it is.

    How near it is: test_pace.py and test_forecast.py.
    """
    from luthier.planning import forecast, pace

    monkeypatch.setattr(pace, "TIMES", 1)
    monkeypatch.setattr(pace, "COPIES", 1)
    monkeypatch.setattr(pace, "PRODUCT", 1e7)
    monkeypatch.setattr(pace, "NUMBERS", 1 << 16)
    monkeypatch.setattr(forecast, "UPDATED", 1 << 16)
