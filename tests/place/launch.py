"""Several processes of one launch, forked from one that has loaded the libraries: a rank costs no import.

    python tests/place/launch.py MODULE FOLDER SIZE [SIZE ...]

runs ``MODULE.ranks(folder, size, turn)`` on every rank of each size in turn and writes what rank 0 returned to FOLDER/TURN.json. A rank that fails ends it.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

TIMEOUT = 1200  # seconds: what the suite runs takes half a minute, all combinations several


def launch(module: str, folder: Path, *sizes: int) -> list[dict]:
    """What rank 0 returned in each turn."""
    here = Path(__file__).parent
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(Path(__file__)), module, str(folder), *map(str, sizes)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads((folder / f"{turn}.json").read_text()) for turn in range(len(sizes))]


def _rank(module, folder: Path, rank: int, size: int, turn: int, port: int) -> None:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local)}
    import torch

    torch.set_num_threads(1)
    try:
        out = module.ranks(folder, size, turn)
        if rank == 0:
            (folder / f"{turn}.json").write_text(json.dumps(out))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others would be waited for
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    module, folder = importlib.import_module(sys.argv[1]), Path(sys.argv[2])
    fork = multiprocessing.get_context("fork")
    for turn, size in enumerate(map(int, sys.argv[3:])):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        ranks = [fork.Process(target=_rank, args=(module, folder, rank, size, turn, port)) for rank in range(size)]
        for p in ranks:
            p.start()
        waiting = list(ranks)
        while waiting:
            waiting[0].join(0.2)
            bad = [p for p in ranks if p.exitcode]
            if bad:
                for p in ranks:
                    p.kill()
                sys.exit(1)
            waiting = [p for p in waiting if p.exitcode is None]


if __name__ == "__main__":
    main()
