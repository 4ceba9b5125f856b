"""Files are written whole or not at all, and a disk that refuses is one sentence."""

import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from luthier import atomic
from luthier.errors import LuthierError


@contextmanager
def no_room():
    """No file of this process may grow beyond 4 kB: what a full disk does, without filling one. Only around the write: pytest writes to a file as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_refused_write_of_tensors_is_a_sentence_and_leaves_what_was_there(tmp_path):
    with atomic.folder(tmp_path / "best") as new:
        save_file({"a": torch.zeros(4)}, new / "masters.safetensors")
    with (
        pytest.raises(LuthierError, match=r"best: cannot be written: File too large.*; free space or choose another folder"),
        no_room(),
        atomic.folder(tmp_path / "best") as new,
    ):
        save_file({"a": torch.zeros(4000)}, new / "masters.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "masters.safetensors").stat().st_size < 4096


def test_a_refused_write_of_text_is_a_sentence_and_leaves_what_was_there(tmp_path):
    atomic.text(tmp_path / "run.yaml", "old")
    with pytest.raises(LuthierError, match=r"run.yaml: cannot be written: File too large"), no_room():
        atomic.text(tmp_path / "run.yaml", "new" * 4000)
    assert (tmp_path / "run.yaml").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_another_error_stays_itself(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic.folder(tmp_path / "best"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
