"""AdamW over flat fp32 buffers, its moments in float32 or in 8 bits; the default learning rate; weight decay on matrices only.

Everything trained lies end to end in one master buffer per group, gradients likewise, so a step is one fused call and a norm is one
reduction. A parameter that is float32 becomes a view into the master. One in 16 bits (full fine-tuning under bfloat16) keeps its own storage:
its gradient is added to the fp32 buffer as it appears, so accumulation loses nothing, and the new value is rounded from the master.

Moments in 8 bits (Dettmers et al., 2022, arXiv 2110.02861) take 2 bytes a trained number instead of 8: in blocks of 256 of one tensor, by bitsandbytes' kernel.
Small tensors, and those that are named (the paper's choice is embeddings), keep theirs in float32.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .core import LuthierError, Method
from .modelling.shards import cut, here, is_sharded, like, part_of, summed

State = Literal["float32", "8bit", "paged-8bit"]
FASTEST = 0.3  # of default learning rates
ALIGNED = 64  # numbers: where a group's gradients begin in the one buffer, for kernels that read several at once
PART = 1 << 19  # numbers that are added at a time
SMALL = 4096  # a tensor of fewer numbers keeps its moments in float32, as in bitsandbytes


def state_for(asked: State, device: torch.device) -> tuple[State, str | None]:
    """The state of the moments that this machine can keep, and where it is not the one that was asked for, what to say of it."""
    if asked == "float32":
        return asked, None
    missing = None if find_spec("bitsandbytes") else "bitsandbytes is not installed (pip install 'luthier[quant]')"
    missing = missing if device.type == "cuda" else "its kernels want a CUDA device, and this run is on " + device.type
    return (asked, None) if missing is None else ("float32", f"optim.state: {asked} was asked for, and moments are kept in float32: {missing}")


@dataclass
class _Group:
    names: list[str]
    params: list[nn.Parameter]
    master: Tensor
    grad: Tensor
    slices: list[slice]
    lr_factor: float
    settings: dict[str, Any]  # of the optimizer that moves it
    pieces: list[Tensor] | None  # the masters one by one, where moments are in 8 bits or the weights are sharded
    coded: bool  # moments in 8 bits
    cut: bool  # this rank holds a part of each: the masters are the parts themselves, and there is no flat one

    def master_of(self, i: int) -> Tensor:
        """What is moved of a tensor, flat."""
        return self.master[self.slices[i]] if self.pieces is None else self.pieces[i]

    def shaped(self, i: int, flat: Tensor) -> Tensor:
        """Flat numbers in a tensor's shape; of one that is sharded, as its parts lie."""
        p = self.params[i]
        return like(flat.view(here(p).shape), p)


def _collect(p: Tensor, name: str, into: Tensor | None, seen: set[str], fresh: set[str], void: set[str]) -> None:
    """Note a gradient; with ``into``, add it to its place among the masters', or put it there where that is void. No hook holds the optimizer: Python's
    collector does not see through a hook, and would never free it."""
    if into is not None:
        assert p.grad is not None
        new = p.grad.flatten()
        if name in void:
            into.copy_(new)
            void.discard(name)
        else:  # in parts: torch makes a float32 copy of what it adds
            for a, b in zip(into.split(PART), new.split(PART), strict=True):
                a += b
        p.grad = None
    seen.add(name)
    fresh.add(name)


class Optimizer:
    """AdamW (Loshchilov & Hutter, 2017, arXiv 1711.05101) with fp32 masters."""

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        patterns: Mapping[str, Mapping[str, float]] | None = None,
        state: State = "float32",
        precise: Collection[str] = (),
    ):
        """``patterns``: regular expression over a parameter's name -> {"lr": factor, "decay": factor}; the first that is found counts.

        {"rate": r} instead of "lr": a peak of r whatever ``lr`` is; it follows the same schedule. ``state``: of the moments, see `state_for`; on the CPU
        8 bits work and are slow. ``precise``: names whose moments stay in float32. Raises LuthierError where bitsandbytes is needed and missing.
        """
        if not params:
            raise LuthierError("nothing to train: the method marked no parameter")
        self.lr = lr
        self.seen: set[str] = set()  # names that have ever received a gradient
        self.fresh: set[str] = set()  # those that have since the last step
        self._divisor = 1.0  # of gradients, in the next step
        self._void: set[str] = set()  # those whose gradient is 0, whatever stands in the buffer: the next is put there, and nothing has to be cleared
        sorted_out: dict[tuple[float, float, bool, bool], list[str]] = {}
        for name, p in params.items():
            rule = next((r for pattern, r in (patterns or {}).items() if re.search(pattern, name)), {})
            decay = weight_decay * rule.get("decay", 1.0) if p.ndim >= 2 else 0.0
            factor = rule["rate"] / lr if "rate" in rule else rule.get("lr", 1.0)
            small = state == "float32" or p.numel() < SMALL or name in precise
            if is_sharded(p) and state != "float32":
                raise LuthierError(f"optim.state: {state} keeps moments by blocks of whole tensors, and this base is sharded over ranks; use float32")
            sorted_out.setdefault((factor, decay, not small, is_sharded(p)), []).append(name)
        self.names = frozenset(params)
        sizes = {kind: -(-sum(here(params[n]).numel() for n in names) // ALIGNED) * ALIGNED for kind, names in sorted_out.items()}
        self.groups = []
        self._grads: list[Tensor] = []
        for sharded in (False, True):
            kinds = [kind for kind in sorted_out if kind[3] == sharded]
            if not kinds:
                continue
            device = params[sorted_out[kinds[0]][0]].device
            flat = torch.zeros(sum(sizes[k] for k in kinds), dtype=torch.float32, device=device)
            self._grads += [] if sharded else [flat]
            for kind, grad in zip(kinds, flat.split([sizes[k] for k in kinds]), strict=True):
                self.groups.append(self._group(sorted_out[kind], [params[n] for n in sorted_out[kind]], grad, *kind))
        device = self.groups[0].grad.device
        exact = [g.settings for g in self.groups if not g.coded]
        coded = [g.settings for g in self.groups if g.coded]
        self.adam = torch.optim.AdamW(exact, lr=lr, betas=betas, eps=eps, fused=device.type in ("cpu", "cuda")) if exact else None
        self.adam8 = _adam8(coded, paged=state == "paged-8bit", lr=lr, betas=betas, eps=eps) if coded else None

    def _group(self, names: list[str], params: list[nn.Parameter], grad: Tensor, lr_factor: float, decay: float, coded: bool, sharded: bool) -> _Group:
        ends = torch.tensor([here(p).numel() for p in params]).cumsum(0).tolist()
        slices = [slice(e - here(p).numel(), e) for e, p in zip(ends, params, strict=True)]
        master, grad = torch.empty(0 if sharded else ends[-1], dtype=torch.float32, device=grad.device), grad[: ends[-1]]
        for name, p, s in zip(names, params, slices, strict=True):
            if sharded:
                p.grad = like(grad[s].view(here(p).shape), p)
            else:
                master[s] = p.detach().flatten()
                if p.dtype == torch.float32:
                    p.data = master[s].view(p.shape)
                    p.grad = grad[s].view(p.shape)
            p.register_post_accumulate_grad_hook(
                partial(_collect, name=name, into=None if p.dtype == torch.float32 else grad[s], seen=self.seen, fresh=self.fresh, void=self._void)
            )
        master.grad = None if sharded else grad
        pieces = [here(p).view(-1) for p in params] if sharded else [master[s] for s in slices] if coded else None
        for piece, s in zip(pieces or (), slices, strict=False):
            piece.grad = grad[s]
        return _Group(names, params, master, grad, slices, lr_factor, {"params": pieces or [master], "weight_decay": decay}, pieces, coded, sharded)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step, before the groups' factors."""
        for group in self.groups:
            group.settings["lr"] = lr * group.lr_factor

    @property
    def grads(self) -> list[Tensor]:
        """Gradients of the groups that every rank has whole, end to end: what ranks average. FSDP2 averages the others."""
        self._clear()
        return self._grads

    def _clear(self) -> None:
        """Write the zeros of what is void."""
        for g in self.groups if self._void else ():
            for name, s in zip(g.names, g.slices, strict=True):
                if name in self._void:
                    g.grad[s].zero_()
        self._void.clear()

    def grad_norm(self) -> Tensor:
        """Euclidean norm over all gradients, a scalar tensor."""
        self._clear()
        norms = [torch.linalg.vector_norm(g.grad) for g in self.groups]
        norms = [summed(n.square(), g.params[0]).sqrt() if g.cut else n for n, g in zip(norms, self.groups, strict=True)]
        return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))

    def scale_grads(self, by: float) -> None:
        """Multiply all gradients; where one fused call moves everything, as it reads them."""
        if self.adam is not None and self.adam8 is None and self.adam.defaults["fused"]:
            self._divisor /= by
            return
        for g in self.groups:
            g.grad.mul_(by)

    def step(self) -> None:
        """Move the masters, then round what is kept in 16 bits.

        What got no gradient since the last step stays as it is, moments and all, as torch leaves a parameter whose gradient is None: it is neither
        decayed nor carried on by its momentum (the policy while only its value learns).
        """
        self._clear()
        still = {k: t.clone() for k, t in self._resting().items()}
        if self.adam is not None:
            divisor = None if self._divisor == 1.0 else torch.full((), self._divisor, device=self.groups[0].grad.device)
            self.adam.grad_scale = divisor  # type: ignore[attr-defined]  # torch's name for what its fused kernel divides gradients by
            self.adam.step()
        if self.adam8 is not None:
            self.adam8.step()
        self._divisor = 1.0
        now = self._resting()
        for key, before in still.items():
            now[key].copy_(before)
        self.fresh.clear()
        for g in self.groups:
            for p, s in zip(g.params, g.slices, strict=True):
                if p.dtype != torch.float32:
                    p.data.copy_(g.master[s].view(p.shape))

    def _resting(self) -> dict[str, Tensor]:
        """What a step must not move: the masters and moments of tensors without a gradient. Moments that are not there yet are zeros, and stay zeros."""
        out: dict[str, Tensor] = {}
        for g in self.groups:
            if self.fresh.issuperset(g.names):
                continue
            states = self._states(g)
            for i, name in enumerate(g.names):
                if name not in self.fresh:
                    out[f"master|{name}"] = g.master_of(i)
                    moments = {k: states[i][k] for k in _CODED if states[i]} if g.coded else self._exact(g, i)
                    out |= {f"{k}|{name}": t for k, t in moments.items()}
        return out

    def learned_elsewhere(self, names: Iterable[Iterable[str]]) -> None:
        """Names of tensors that got a gradient on some rank: they got one here too, once gradients are averaged."""
        for some in names:
            self.fresh.update(some)
        self.seen |= self.fresh

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.fresh.clear()
        self._divisor = 1.0
        for g in self.groups:
            put = {n for n, p in zip(g.names, g.params, strict=True) if p.dtype != torch.float32 and not g.cut}
            self._void |= put
            if not put:
                g.grad.zero_()
            for name, s in zip(g.names, g.slices, strict=True) if put else ():
                if name not in put:
                    g.grad[s].zero_()

    @property
    def cut(self) -> bool:
        """Whether this rank holds only a part of something that trains."""
        return any(g.cut for g in self.groups)

    @property
    def master_bytes(self) -> int:
        """Bytes of the masters, of all ranks together where they are sharded."""
        return sum(4 * p.numel() for g in self.groups for p in g.params)

    @property
    def state_bytes(self) -> int:
        """Bytes of what `state_dict` holds."""
        exact = sum(8 * p.numel() for g in self.groups if not g.coded for p in g.params)
        return self.master_bytes + exact + sum(2 * p.numel() + 8 * -(-p.numel() // 256) for g in self.groups if g.coded for p in g.pieces or ())

    def masters(self) -> dict[str, Tensor]:
        """fp32 values by name, as views in the parameters' shapes; sharded ones as they lie over the ranks."""
        return {n: g.shaped(i, g.master_of(i)) for g in self.groups for i, n in enumerate(g.names)}

    def load_masters(self, values: Mapping[str, Tensor]) -> None:
        """Set what is trained, the 16-bit copies included. Of what is sharded: from tensors that lie over the ranks as `masters` do, or whole ones."""
        for g in self.groups:
            for i, (name, p, s) in enumerate(zip(g.names, g.params, g.slices, strict=True)):
                g.master_of(i).copy_(self._part(values[name], p).flatten())
                if p.dtype != torch.float32:
                    p.data.copy_(g.master[s].view(p.shape))

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (masters and both moments by name) and the step count: everything to go on from."""
        tensors = {}
        for g in self.groups:
            states = self._states(g)
            for i, name in enumerate(g.names):
                tensors[f"master|{name}"] = g.shaped(i, g.master_of(i))
                if g.coded:  # codes are only there after a step
                    tensors |= {f"{k}|{name}": states[i][k] for k in _CODED if states[i]}
                else:
                    there = self._exact(g, i) or dict.fromkeys(_EXACT, torch.zeros_like(g.master_of(i)))
                    tensors |= {f"{k}|{name}": g.shaped(i, t) for k, t in there.items()}
        first = self._states(self.groups[0])[0]
        return tensors, {"step": float(first["step"]) if first else 0.0}

    def _exact(self, g: _Group, i: int) -> dict[str, Tensor]:
        """The moments of one tensor, flat; {} before the first step."""
        states = self._states(g)
        if g.cut:
            return {k: states[i][k] for k in _EXACT} if states[i] else {}
        return {k: states[0][k][g.slices[i]] for k in _EXACT} if states[0] else {}

    @staticmethod
    def _part(value: Tensor, p: Tensor) -> Tensor:
        """What this rank holds of a value for ``p``."""
        if is_sharded(p) and not is_sharded(value):
            value = cut(value, *part_of(p))
        return here(value).to(here(p).device)

    def _states(self, g: _Group) -> list[dict[str, Any]]:
        """What the optimizer keeps for each tensor it moves: one for a whole master, or one for each piece; {} before the first step."""
        adam: Any = self.adam8 if g.coded else self.adam
        return [adam.state.get(t, {}) for t in g.settings["params"]]

    def load_state_dict(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises LuthierError where the trained parameters, or how their moments are kept, are not the same."""
        want, have = {n for g in self.groups for n in g.names}, {k.partition("|")[2] for k in tensors}
        if want != have:
            odd = sorted(want ^ have)
            raise LuthierError(f"this checkpoint trains other parameters: {len(odd)} differ, for example {odd[0]!r}")
        self._same_state(tensors, scalars)
        self.load_masters({n: tensors[f"master|{n}"] for n in want})
        for g in self.groups:
            if g.coded:
                self._load_coded(g, tensors, scalars)
                continue
            parts = [{k: self._part(tensors[f"{k}|{n}"], p).flatten() for k in _EXACT} for n, p in zip(g.names, g.params, strict=True)]
            moments = parts if g.cut else [{k: torch.cat([part[k] for part in parts]) for k in _EXACT}]
            for moved, both in zip(g.settings["params"], moments, strict=True):
                # The fused kernel keeps its step count beside the moments, as a tensor.
                step = torch.tensor(scalars["step"], device=moved.device if moved.device.type == "cuda" else "cpu")
                assert self.adam is not None
                self.adam.state[moved] = {"step": step, **both}

    def _same_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        for g in self.groups:
            keys = _EXACT if not g.coded else _CODED if scalars["step"] else ()
            for name in g.names:
                if any(f"{k}|{name}" not in tensors for k in keys):
                    there, now = ("8 bits", "float32") if not g.coded else ("float32", "8 bits")
                    raise LuthierError(
                        f"this checkpoint keeps the moments of {name!r} in {there}, and this run keeps them in {now}; resume it with the optim.state it was "
                        "trained with, on a machine that can keep that (CUDA and bitsandbytes for 8 bits)"
                    )

    def _load_coded(self, g: _Group, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        assert self.adam8 is not None and g.pieces is not None
        at = next(i for i, settings in enumerate(self.adam8.param_groups) if settings is g.settings)
        for i, (name, piece) in enumerate(zip(g.names, g.pieces, strict=True)):
            self.adam8.state.pop(piece, None)
            if scalars["step"]:
                self.adam8.init_state(g.settings, piece, at, i)  # makes the buffers, paged ones too
                state = self.adam8.state[piece]
                state["step"] = int(scalars["step"])
                for key in _CODED:
                    state[key].copy_(tensors[f"{key}|{name}"])


_EXACT = ("exp_avg", "exp_avg_sq")  # torch's names of the moments
_CODED = ("state1", "state2", "absmax1", "absmax2")  # bitsandbytes': codes, and the largest of each block


def _adam8(groups: list[dict[str, Any]], *, paged: bool, **how: Any) -> Any:
    """bitsandbytes' AdamW with moments in 8 bits. ``paged``: in CUDA's managed memory, which moves to the CPU's where it must."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional package on import
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise LuthierError("optim.state: moments in 8 bits need bitsandbytes; pip install 'luthier[quant]', or use optim.state=float32") from None
    return AdamW8bit(groups, is_paged=paged, min_8bit_size=SMALL, **how)


def default_lr(method: Method, width: int) -> tuple[float, str]:
    """Peak learning rate for a method on a base of this hidden width, and the sentence that explains it.

    Full fine-tuning: 5e-5 x (768 / width), at least 1e-5, from width 768 up (about 100 M parameters); below, 5e-5 x (768 / width)^2, since
    small models train well at far higher rates. A method's factor comes on top: about ten for LoRA ("LoRA Without Regret", 2025).
    """
    full = max(1e-5, 5e-5 * (768 / width) ** (1 if width >= 768 else 2))
    full = min(full, 2e-3)
    factor: float = getattr(method, "lr_factor", 1.0)
    lr = float(f"{min(full * factor, FASTEST):.1e}")
    most = f", at most {FASTEST:g}" if full * factor > FASTEST else ""
    return lr, f"{lr:g}: {full:.1e} for full fine-tuning at width {width}, times {factor:g} for this method{most}"
