"""Hidden states that enter the lowest block a run changes, kept: where only the top of a model trains they are the same in every epoch.

Of L blocks of which the last m train, a step is a forward through L and a backward through m; from kept states, a forward and a backward through m:
(L + m) / 2m times less. States are kept by what they are a function of, the tokens of one example, in a file of the run's folder that is mapped into memory and
has no name any more once it is open: it goes with the process, and no other run can find it, so nothing stale is ever read. What a first pass sees is
written; later passes read it. The blocks below are then not run, and the states are put in place of what they would have given.

Kept are the states as they were computed, in the model's own dtype, so a batch of the same layout gives the same bits; another layout differs by the rounding
that layouts differ by; padding is given any state. Not valid, and not used: dropout below, prompts and prefixes, text that changes from pass to pass, something
that trains or is edited below.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Batch, Incompatible, LuthierError, Row, Segments
from .anatomy import modules
from .site import clean_name, sites

PAYS = 1.1  # auto: how many times less work a run has to come to
LARGER = 1.25  # room for more than the run's own rows: what is read beside them at evaluations
CHANGING = ("masked", "prompts")  # what renders text anew at every pass


class TrunkCache:
    """Hidden states that enter block ``first``, by example."""

    def __init__(self, policy: Any, first: int, folder: Path, tokens: int):
        """``tokens``: how many states there is room for; what comes when they are taken is not kept."""
        self.first, self.capacity, self.used = first, tokens, 0
        self.blocks: list[nn.Module] = list(policy.lm.get_submodule(_stack(policy)))[:first]
        self.width, dtype = policy.base.width, next(policy.lm.parameters()).dtype
        path = folder / "trunk.states"
        path.touch()
        self.states = torch.from_file(str(path), shared=True, size=tokens * self.width, dtype=dtype).view(tokens, self.width)
        path.unlink()
        self.place: dict[bytes, int] = {}
        self.returned = 0  # how many things a block returns: 0: hidden states alone, not in a tuple
        self.reused = 0  # positions that were read back

    @contextmanager
    def around(self, batch: Batch, shorter: Any) -> Iterator[None]:
        """One forward of a batch (or of its shorter form): from kept states where all of its examples have them, else what enters ``first`` is kept."""
        keys = _keys(batch)
        if all(k in self.place for k in keys):
            with self._instead(self._read(batch, keys, shorter)):
                yield
            self.reused += batch.segments.length.sum().item()  # type: ignore[assignment]
            return
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, out: Any) -> None:
            self.returned = len(out) if isinstance(out, tuple) else 0
            seen[:] = [(out[0] if isinstance(out, tuple) else out).detach()]

        hook = self.blocks[-1].register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()
        states = seen[0].flatten(0, 1)
        self._write(batch, keys, states if shorter is None else states.index_select(0, shorter.back))

    def _read(self, batch: Batch, keys: Sequence[bytes], shorter: Any) -> Tensor:
        """(B, T, D) of the stream that is run."""
        at = torch.zeros(batch.shape[0] * batch.shape[1], dtype=torch.long)
        for k, t, n in zip(keys, batch.segments.first(batch.shape[1]).tolist(), batch.segments.length.tolist(), strict=True):
            at[t : t + n] = torch.arange(self.place[k], self.place[k] + n)
        shape = batch.shape if shorter is None else shorter.stream.shape
        at = at if shorter is None else at.index_select(0, shorter.take.cpu())
        return self.states.index_select(0, at).view(*shape, self.width).to(batch.ids.device)

    def _write(self, batch: Batch, keys: Sequence[bytes], states: Tensor) -> None:
        for k, t, n in zip(keys, batch.segments.first(batch.shape[1]).tolist(), batch.segments.length.tolist(), strict=True):
            if k not in self.place and self.used + n <= self.capacity:
                self.states[self.used : self.used + n] = states[t : t + n]
                self.place[k] = self.used
                self.used += n

    @contextmanager
    def _instead(self, states_BTD: Tensor) -> Iterator[None]:
        """The blocks below give back what they get, and the last of them these states."""
        whole = (states_BTD, *[None] * (self.returned - 1)) if self.returned else states_BTD

        def passing(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *[None] * (self.returned - 1)) if self.returned else hidden

        with ExitStack() as back:
            for block in self.blocks:
                block.forward = (lambda *_, **__: whole) if block is self.blocks[-1] else passing  # type: ignore[method-assign]
                back.callback(block.__dict__.pop, "forward")
            yield


def of(
    policy: Any, objective: Any, rows: Sequence[Row], *, how: str, ceiling: float, passes: float, folder: Path, say: Callable[[str], None]
) -> TrunkCache | None:
    """A cache for a run over these rows so many times; None where it is not valid or, with ``how="auto"``, does not pay.

    ``ceiling``: bytes that it may take on disk. Raises LuthierError where it was asked for (``how="on"``) and cannot be had.
    """
    if how == "off":
        return None
    tokens = round(LARGER * sum(len(r) for r in rows))
    need = tokens * policy.base.width * next(policy.lm.parameters()).element_size()
    why, first = _why_not(policy, objective)
    depth = 0 if why else len(policy.lm.get_submodule(_stack(policy)))
    trained = depth - first
    gain = 1.0 if why else passes * (depth + trained) / ((depth + trained) + max(0.0, passes - 1) * 2 * trained) if trained else passes
    if not why and need > ceiling:
        why = f"it would take {need / 1e9:.1f} GB, more than speed.trunk_cache_gb={ceiling / 1e9:g}"
    if not why and how == "auto" and gain < PAYS:
        return None
    cache = None
    if not why:
        folder.mkdir(parents=True, exist_ok=True)
        cache = TrunkCache(policy, first, folder, max(tokens, 64))
        why = "" if _agrees(policy, cache) else "this model gives other hidden states from kept ones"
    if why and how == "on":
        raise LuthierError(f"speed.trunk_cache=on: {why}; set speed.trunk_cache=auto")
    if why:
        return None
    which = f"of {depth} blocks only the last {trained} train" if trained else f"none of the {depth} blocks trains"
    said = f"{need / 1e6:,.0f} MB of disk until the run ends; speed.trunk_cache=off: not"
    say(f"{which}: what comes out of those below is kept from the first pass on ({said}), {gain:.1f} times less work")
    return cache


def _why_not(policy: Any, objective: Any) -> tuple[str, int]:
    """Why states cannot be kept, "" where they can; and the lowest block that a delta changes."""
    base, delta = policy.base, policy.delta
    if base.anatomy.kind == "encoder_decoder":
        return "an encoder-decoder's two sides are not kept", 0
    if objective.renders in CHANGING:
        return "the text is another at every pass", 0
    if any(d.prompt is not None or d.prefix is not None for d in policy.deltas.values()) or delta is None:
        return f"prompts and prefixes change every block ({type(policy.method).__module__.rpartition('.')[2]})", 0
    stack, everything = _stack(policy), dict(modules(base.model))
    depth = len(base.model.get_submodule(stack))
    changed = [k.partition(":")[0] for k in delta.params] + [clean_name(p) for p, s in sites(base.model).items() if len(s.edits)]
    first = depth
    for path in changed:
        inside = re.match(rf"{re.escape(stack)}\.(\d+)(\.|$)", path)
        first = min(first, int(inside[1]) if inside else 0 if isinstance(everything.get(path), nn.Embedding) else depth)
    if not first:
        return "the lowest block or the embeddings train", 0
    below = [m for p, m in everything.items() if not (inside := re.match(rf"{re.escape(stack)}\.(\d+)\.", p)) or int(inside[1]) < first]
    config = base.model.config.get_text_config().to_dict().items()
    dropped = any(isinstance(m, nn.Dropout) and m.p for m in below) or any(
        isinstance(v, float) and v and ("attn_pdrop" in k or ("attention" in k and "dropout" in k)) for k, v in config
    )
    return ("there is dropout below the lowest block that trains", 0) if dropped else ("", first)


def _stack(policy: Any) -> str:
    return list(policy.base.anatomy.stacks.values())[-1]


@torch.no_grad()
def _agrees(policy: Any, cache: TrunkCache) -> bool:
    """Whether a small batch gives the same bits from kept states; they are forgotten after it."""
    length = torch.tensor([5, 7])
    ids = torch.arange(3, 15)[None] % policy.base.model.config.get_text_config().vocab_size
    stream = Batch(ids=ids.to(policy.device), segments=Segments(torch.zeros(2).long(), torch.tensor([0, 5]), length))
    if not policy.base.packs:
        stream = Batch(ids=ids[:, :7].to(policy.device), segments=Segments(torch.zeros(1).long(), torch.zeros(1).long(), length[1:]))
    training, kept = policy.training, policy.trunk_cache
    policy.eval()
    try:
        plain = policy.hidden(stream)
        policy.trunk_cache = cache
        first, again = policy.hidden(stream), policy.hidden(stream)
    except (Incompatible, RuntimeError, TypeError, KeyError, AttributeError):  # blocks that are called in a way of their own
        return False
    finally:
        policy.trunk_cache = kept
        policy.train(training)
    found = bool(cache.reused) and torch.equal(plain, first) and torch.equal(plain, again)
    cache.place, cache.used, cache.reused = {}, 0, 0
    return found


def _keys(batch: Batch) -> list[bytes]:
    """What the states of each example depend on: its tokens, and what else the model reads beside them."""
    read = [x.cpu() for x in (batch.ids, *(batch.inputs[k] for k in sorted(batch.inputs)))]
    out = []
    for b, t, n in zip(batch.segments.row.tolist(), batch.segments.start.tolist(), batch.segments.length.tolist(), strict=True):
        out.append(hashlib.blake2b(b"".join(x[b, t : t + n].numpy().tobytes() for x in read), digest_size=16).digest())
    return out
