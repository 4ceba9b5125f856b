"""The reference's log-probabilities of a run's answers: computed once, before training, and kept on disk by what they depend on.

The reference is the policy before training: the base with the delta off, or, where training starts from a saved delta, that delta. A value depends on
the base's hash, how it is stored, its added tokens, the delta that is started from, and the tokens of one answer with its prompt; so other runs on the same
base, with other methods, other splits of the data and other objectives, find it again. Where the base itself is trained this is the only way: after the
first step there is no reference left to ask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import atomic
from .core import Delta, Incompatible, Row, example_logps, examples_of, next_token_batch, spread
from .data.prepare import Prepared
from .measuring.measure import group
from .modelling.site import members
from .policy import Policy

FILE = "logps.safetensors"
Tick = Callable[[int, int], None]  # answers done, of how many


def bring(
    policy: Policy, objective: Any, prepared: Prepared, *, folder: Path, tokens: int, packed: bool, started: bool = False, tick: Tick | None = None
) -> str:
    """Give every row of the data the reference's log-probabilities of its examples, ``extras["reference"]`` (K,), where the objective wants them cached.

    Called before the first step, while the delta is as it starts. ``folder``: where they are kept, and looked for; ``tokens``: of one forward;
    ``started``: training starts from a saved delta. Returns what to say, "" where there is nothing to do. Raises Incompatible where the objective wants
    them live and the reference will not be there any more.
    """
    if "reference" not in objective.needs:
        return ""
    gone = trains_base(policy)
    if objective.reference == "live":
        if gone or started:
            what = "starts from a saved delta, which it then changes" if started else "trains the base's own weights"
            raise Incompatible(f"objective.reference=live: this run {what}, so its reference is gone after the first step; set objective.reference=cached")
        return ""
    rows = [*prepared.train, *prepared.validation]
    known, said = known_logps(policy, [e for r in rows for e in examples_of(r)], folder=folder, tokens=tokens, packed=packed, started=started, tick=tick)
    fill = lambda r: replace(r, extras={**r.extras, "reference": np.array([known[digest(e)] for e in examples_of(r)], dtype=np.float32)})  # noqa: E731
    prepared.train[:], prepared.validation[:] = [fill(r) for r in prepared.train], [fill(r) for r in prepared.validation]
    return f"reference log-probabilities of {said}"


def known_logps(
    policy: Policy, examples: Sequence[Row], *, folder: Path, tokens: int, packed: bool, started: bool, tick: Tick | None = None
) -> tuple[dict[bytes, float], str]:
    """Log-probability of each example's trained tokens before training, by `digest`, from disk where it is known; and how many were, in words."""
    which = identity(policy, started)
    where = None if which is None else folder / which
    known = policy.place.share(_read(where), "what is known of the reference")  # one look at the disk, so that all ranks agree on what is missing
    wanted = {digest(e): e for e in examples}
    missing = {k: e for k, e in wanted.items() if k not in known}
    if missing:
        with as_it_was(policy, started):
            known |= dict(zip(missing, logps(policy, list(missing.values()), tokens=tokens, packed=packed, tick=tick), strict=True))
        if where is not None and policy.place.leads:
            _write(where, known)
    kept = f", kept in {where}" if where is not None else ""
    return known, f"{len(wanted):,} answers: {len(wanted) - len(missing):,} known, {len(missing):,} computed{kept}"


def trains_base(policy: Policy) -> bool:
    """Whether training changes the base itself, so that what it was is gone after the first step."""
    return policy.method is not None and policy.method.edits == "weights" and not getattr(policy.method, "reversible", False)


def digest(example: Row) -> bytes:
    """16 bytes of what the log-probability of an example depends on: its tokens, which of them are its answer, and its source."""
    h = hashlib.blake2b(digest_size=16)
    source = example.extras.get("source")
    for part in (example.ids.astype(np.int32), example.train, source.astype(np.int32) if isinstance(source, np.ndarray) else np.zeros(0, dtype=np.int32)):
        h.update(len(part).to_bytes(4, "little") + part.tobytes())
    return h.digest()


@torch.no_grad()
def logps(policy: Policy, examples: Sequence[Row], *, tokens: int, packed: bool, tick: Tick | None = None) -> list[float]:
    """Log-probability of each example's answer under what serves now, in their order; in forwards of about ``tokens`` positions."""
    place = {id(e): i for i, e in enumerate(examples)}
    out = [0.0] * len(examples)
    groups, size = group(examples, tokens, packed, together=True), policy.place.size

    def work(some: Sequence[list[Row]]) -> list[list[float]]:
        done, got = 0, []
        for g in some:
            batch = next_token_batch(g, pad=policy.pad, packed=packed).to(policy.device)
            got.append(example_logps(policy, batch)[0].tolist())
            done += len(g)
            if tick is not None:
                tick(min(done * size, len(examples)), len(examples))
        return got

    for g, found in zip(groups, spread(policy, groups, work, "reference log-probabilities"), strict=True):
        for e, logp in zip(g, found, strict=True):
            out[place[id(e)]] = logp
    return out


@contextmanager
def as_it_was(policy: Policy, started: bool) -> Iterator[None]:
    """What the policy is before the first step: as it stands where training ``started`` from a delta or is of the base itself, else the base, the delta off."""
    if not (started or trains_base(policy)):
        with policy.reference():
            yield
        return
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)


# --- on disk ---------------------------------------------------------------------------------------------------------


def identity(policy: Policy, started: bool) -> str | None:
    """A name for what the policy is before training: base, storage, added tokens, the delta it starts from. None for a base that has no hash."""
    if not policy.base.hash:
        return None
    if started:
        assert policy.delta is not None
    return _hash(policy, [policy.delta] if started and policy.delta is not None else [])


def fingerprint(policy: Policy) -> str:
    """A hash of what answers: the base, how it is stored, and the deltas in use with their values; "" for a base that has no hash."""
    return _hash(policy, [policy.deltas[n] for n in members(policy.active)]) if policy.base.hash else ""


def _hash(policy: Policy, deltas: Sequence[Delta]) -> str:
    base = policy.base
    h = hashlib.blake2b(digest_size=8)
    h.update(repr((base.hash, getattr(base, "precision", None), str(next(policy.lm.parameters()).dtype), base.tokens)).encode())
    for delta in deltas:
        for name, tensor in sorted({**delta.params, **delta.buffers}.items()):
            h.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def _read(where: Path | None) -> dict[bytes, float]:
    """Known values by digest; none where there is no file, or a damaged one, which is written anew."""
    if where is None or not (where / FILE).is_file():
        return {}
    try:
        found = load_file(where / FILE)
        return dict(zip((bytes(k) for k in found["digests"].numpy()), found["logps"].tolist(), strict=True))
    except (SafetensorError, KeyError, ValueError):
        return {}


def _write(where: Path, known: dict[bytes, float]) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    digests = torch.from_numpy(np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, 16).copy())
    with atomic.folder(where) as new:
        save_file({"digests": digests, "logps": torch.tensor(list(known.values()), dtype=torch.float32)}, new / FILE)
