"""A task in a process of its own: its numbers, its sentence where it fails, and its end when nobody waits any more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from luthier.comparing.apart import numbers_of
from luthier.errors import Interrupted, LuthierError


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of a few lines."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))

    def made(text):
        (tmp_path / "one_task.py").write_text("import json, os, sys\ntask = json.loads(sys.argv[2])\n" + text)
        return "one_task"

    return made


def test_the_last_line_is_the_numbers_and_waiting_is_told(module):
    ticks = []
    name = module("import time\ntime.sleep(0.7)\nprint('much else')\nprint(json.dumps({'twice': 2 * task['n'], 'threads': os.environ['OMP_NUM_THREADS']}))")
    assert numbers_of(name, {"n": 4}, "x", threads=3, wait=ticks.append) == {"twice": 8, "threads": "3"}
    assert ticks and ticks[0] > 0


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("print('noise', file=sys.stderr)\nprint('error: no such file', file=sys.stderr)\nsys.exit(2)", LuthierError, "^no such file$"),
        ("1 / 0", LuthierError, "the job: failed: .*ZeroDivisionError"),
        ("os.kill(os.getpid(), 9)", LuthierError, "ended by signal 9"),
        ("sys.exit(130)", Interrupted, "the job: interrupted"),
    ],
)
def test_a_task_that_fails_says_why(module, text, error, said):
    with pytest.raises(error, match=f"(?s){said}"):
        numbers_of(module(text), {}, "the job")


@pytest.mark.parametrize("early", [False, True])
def test_a_task_ends_when_the_process_that_started_it_is_killed(tmp_path, early):
    # the story: a task whose parent was killed while torch was still being read took init for its parent, and went on beside the one that took its place
    wait = "import os, time\nwhile os.path.exists(sys.argv[1] + '.wait'): time.sleep(0.05)\n" if early else ""
    child = f"import sys, time\nopen(sys.argv[1], 'w').close()\n{wait}from luthier.comparing.apart import end_with_parent\nend_with_parent()\ntime.sleep(60)"
    parent = (
        "import os, subprocess, sys\nfrom luthier.comparing.apart import PARENT\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}, sys.argv[1]], env=os.environ | {{PARENT: str(os.getpid())}})\n"
        "print(p.pid, flush=True)\np.wait()"
    )
    (tmp_path / "started.wait").touch()
    started = tmp_path / "started"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", parent, str(started)], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    number = int(process.stdout.readline())
    until = time.monotonic() + 60
    while not started.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "started.wait").unlink()
    while time.monotonic() < until:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.1)
                continue
        return
    pytest.fail("it is still there")
