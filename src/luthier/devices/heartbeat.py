"""Which rank is missing, and in which operation.

Every rank has a thread that tells the launch's store now and then that it lives, what it waits in or where it computes: one small message a second, none for
an operation. Where an operation lasts longer than the timeout, the ranks that wait look at what the others have told: one that is silent (stopped,
gone, its machine lost) and one that is alive but elsewhere (a slow disk, an endless loop) are told apart. The thread can do this while the main thread hangs
in a collective, on gloo and on NCCL alike, and then ends the process, so that torchrun starts all again or stops.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import LuthierError

NAMED = 8  # ranks, at most
CODE = 1  # exit code of a rank that has waited too long


class Lost(LuthierError):
    """A rank does not answer any more."""


class Heart:
    """The heartbeat of one rank, and its watch over its own waiting."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float, hosts: bool):
        """``hosts``: this rank holds the store."""
        self.rank, self.size, self.timeout, self.hosts = rank, size, timeout, hosts
        self.every = min(timeout / 4, max(1.0, size / 200))  # at most some 200 messages a second at the meeting point
        self.store = dist.PrefixStore("heart", store.clone())
        self.store.set_timeout(timedelta(seconds=max(1.0, self.every)))
        self.lock, self.stuck = threading.Lock(), threading.Thread()  # one question at a time; the one that was not answered
        self.patience = max(5.0, 2 * self.every)
        self.beats = self.count = 0
        self.what, self.since, self.inside = "start", time.monotonic(), False
        self.main = threading.get_ident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self.thread.start()

    def stop(self) -> None:
        """No more beats."""
        self.done.set()
        if self.thread.is_alive():
            self.thread.join(timeout=2)

    def enter(self, what: str) -> None:
        """The others are waited for from now on."""
        self.count, self.what, self.since, self.inside = self.count + 1, what, time.monotonic(), True

    def leave(self) -> None:
        """They were there."""
        self.inside, self.since = False, time.monotonic()

    def all_here(self) -> None:
        """Wait until every rank has come. Raises Lost with those that have not."""
        self._beat()
        end = time.monotonic() + self.timeout
        while not self.store.check([f"beat/{r}" for r in range(self.size)]):
            if time.monotonic() > end:
                absent = [r for r in range(self.size) if not self.store.check([f"beat/{r}"])]
                named = ", ".join(str(r) for r in absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
                raise Lost(f"rank {named} of {self.size} did not start within {self.timeout:g} s; look at its machine, or give it longer (place.timeout)")
            time.sleep(0.05)

    def wait_for(self, rank: int, key: str, what: str) -> None:
        """Until another rank has come to this too, which it says by ``key``; it may take as long as it lives. Raises Lost where it has been silent too long."""
        if self.rank == rank:
            self._ask(lambda: self.store.set(key, ""))
            return
        told, heard = None, time.monotonic()
        self.what, self.since = what, heard
        while True:
            with suppress(ConnectionError):
                if self._ask(lambda: self.store.check([key])):
                    break
            if (now := self._heard([rank]).get(rank)) != told:
                told, heard = now, time.monotonic()
            if time.monotonic() - heard > self.timeout:
                raise self.lost("")
            time.sleep(0.1)

    def first_to_say(self, sentence: str) -> bool:
        """Whether nobody has told of a failure before; what is told ends the others too."""
        mine = f"{self.rank}: {sentence}"
        try:
            return bool(self._ask(lambda: self.store.compare_set("ended", "", mine)).decode() == mine)
        except ConnectionError:
            return True

    def lost(self, why: str) -> Lost:
        """What is known where an operation failed or lasted too long."""
        waited, what = time.monotonic() - self.since, self.what
        missing = [told] if (told := self._told()) else self._missing()
        said = "; ".join(missing) or f"all ranks still answer, and torch says: {why.splitlines()[0][:200] if why else 'nothing'}"
        return Lost(f"{said}. Rank {self.rank} of {self.size} waited for it {waited:.0f} s in '{what}'. Go on from the last checkpoint with --resume FOLDER")

    def _told(self) -> str:
        """What a rank that failed has said."""
        time.sleep(0.2)
        try:
            said = self._ask(lambda: self.store.get("ended").decode() if self.store.check(["ended"]) else "")
        except ConnectionError:
            return ""
        rank, _, sentence = said.partition(": ")
        return f"rank {rank} failed: {sentence}" if said and rank != str(self.rank) else ""

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        heard = time.monotonic()
        while not self.done.wait(self.every):
            ended = False
            try:
                self._beat()
                ended = self._ask(lambda: self.store.check(["ended"]))
                heard = time.monotonic()
            except ConnectionError:
                if time.monotonic() - heard > self.timeout:
                    self._end(f"rank {self.rank} has not reached the meeting point (rank 0, or torchrun) for {self.timeout:g} s")
            if self.inside and time.monotonic() - self.since > self.timeout:
                self._end(str(self.lost("")))
            if ended and not self.done.wait(2 * self.every):  # who failed has said why; this rank would wait for it for ever
                self._end(None)

    def _end(self, sentence: str | None) -> None:
        if sentence is not None and self.first_to_say(sentence):
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if self.hosts:
            time.sleep(4 * self.every)  # the others hear of it here
        os._exit(CODE)

    def _beat(self) -> None:
        self.beats += 1
        told = {"beat": self.beats, "count": self.count, "what": self.what, "inside": self.inside, "for": time.monotonic() - self.since}
        told |= {"host": socket.gethostname(), "at": "" if self.inside else self._where()}
        self._ask(lambda: self.store.set(f"beat/{self.rank}", json.dumps(told)))

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The store's answer. Raises ConnectionError where it gives none: its process is gone, or stopped, when a question would never come back."""
        answer: list[Any] = []

        def ask() -> None:
            with suppress(Exception):
                answer.append(question())

        if not self.lock.acquire(timeout=self.patience):
            raise ConnectionError
        try:
            if not self.stuck.is_alive():
                self.stuck = threading.Thread(target=ask, daemon=True)
                self.stuck.start()
                self.stuck.join(self.patience)
            if not answer:
                raise ConnectionError
            return answer[0]
        finally:
            self.lock.release()

    def _where(self) -> str:
        """The line of ours that the main thread is in."""
        frame: Any = sys._current_frames().get(self.main)
        ours = lambda name: f"{os.sep}luthier{os.sep}" in name and name != __file__  # noqa: E731
        while frame is not None and not ours(frame.f_code.co_filename):
            frame = frame.f_back
        return "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}, line {frame.f_lineno} ({frame.f_code.co_name})"

    def _heard(self, ranks: Sequence[int] | None = None) -> dict[int, dict[str, Any]]:
        """What these ranks, or all, told last."""
        out: dict[int, dict[str, Any]] = {}
        for r in range(self.size) if ranks is None else ranks:
            try:
                told = self._ask(lambda r=r: self.store.get(f"beat/{r}") if self.store.check([f"beat/{r}"]) else None)  # type: ignore[misc]
            except ConnectionError:
                return out
            if told is not None:
                out[r] = json.loads(told)
        return out

    def _missing(self) -> list[str]:
        """The ranks that are not where this one waits, each with what is known of it."""
        before = self._heard()
        for _ in range(4):  # while this rank looks at the others they look at it
            time.sleep(self.every / 2)
            with suppress(ConnectionError):
                self._beat()
        out, now = [], self._heard()
        if not now:
            return ["the meeting point (rank 0, or torchrun) does not answer any more"]
        for r in (r for r in range(self.size) if r != self.rank):
            told, name = now.get(r), f"rank {r}"
            if told is None:
                out.append(f"{name} never told anything")
                continue
            name, where = f"{name} on {told['host']}", f", in {told['at']}" if told["at"] else ""
            if before.get(r, {}).get("beat") == told["beat"]:
                did = f"was waiting in '{told['what']}'" if told["inside"] else f"was computing after '{told['what']}'{where}"
                out.append(f"{name} does not answer any more; when last heard of it {did}")
            elif told["count"] < self.count or (not told["inside"] and told["count"] == self.count):
                out.append(f"{name} is alive and elsewhere: for {told['for']:.0f} s after '{told['what']}'{where}")
        return [*out[:NAMED], f"and {len(out) - NAMED} ranks more"] if len(out) > NAMED else out
