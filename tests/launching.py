"""Several processes as a launcher starts them, without its seconds: the environment of torchrun, and a port for them to meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TESTS = Path(__file__).parent


def port() -> int:
    """A port that nobody uses just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(n: int, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> list[subprocess.Popen[str]]:
    """``python argv`` n times, each knowing its rank."""
    meet, shared = str(port()), {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1"}
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    shared |= {"MASTER_PORT": meet, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(env or {})}
    own = [os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(n)]
    return [subprocess.Popen([sys.executable, *argv], env=e, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for e in own]


def finish(started: Sequence[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each, in the order of ranks. Whoever is not done in time is killed, with code -9."""
    end, out = time.monotonic() + timeout, []
    for p in started:
        try:
            said = p.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            p.kill()
            said = p.communicate()
        out.append((p.returncode, *said))
    return out
