"""AdamW over flat fp32 buffers, the optimizer's default learning rate, and weight decay on matrices only.

Everything trained lies end to end in one master buffer per group, gradients likewise, so a step is one fused call and a norm is one
reduction. A parameter that is float32 becomes a view into the master. One in 16 bits (full fine-tuning under bfloat16) keeps its own storage:
its gradient is added to the fp32 buffer as it appears, so accumulation loses nothing, and the new value is rounded from the master.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .core import LuthierError, Method


@dataclass
class _Group:
    names: list[str]
    params: list[nn.Parameter]
    master: Tensor
    grad: Tensor
    slices: list[slice]
    lr_factor: float


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
    ):
        """``patterns``: regular expression over a parameter's name -> {"lr": factor, "decay": factor}; the first that is found counts.

        {"rate": r} instead of "lr": a peak of r whatever ``lr`` is; it follows the same schedule.
        """
        if not params:
            raise LuthierError("nothing to train: the method marked no parameter")
        self.lr = lr
        self.seen: set[str] = set()  # names that have received a gradient
        sorted_out: dict[tuple[float, float], list[str]] = {}
        for name, p in params.items():
            rule = next((r for pattern, r in (patterns or {}).items() if re.search(pattern, name)), {})
            decay = weight_decay * rule.get("decay", 1.0) if p.ndim >= 2 else 0.0
            factor = rule["rate"] / lr if "rate" in rule else rule.get("lr", 1.0)
            sorted_out.setdefault((factor, decay), []).append(name)
        self.groups = [self._group(names, [params[n] for n in names], factor) for (factor, _), names in sorted_out.items()]
        device = self.groups[0].master.device.type
        settings = [{"params": [g.master], "weight_decay": decay} for g, (_, decay) in zip(self.groups, sorted_out, strict=True)]
        self.adam = torch.optim.AdamW(settings, lr=lr, betas=betas, eps=eps, fused=device in ("cpu", "cuda"))

    def _group(self, names: list[str], params: list[nn.Parameter], lr_factor: float) -> _Group:
        ends = torch.tensor([p.numel() for p in params]).cumsum(0).tolist()
        slices = [slice(e - p.numel(), e) for e, p in zip(ends, params, strict=True)]
        device = params[0].device
        master = torch.empty(ends[-1], dtype=torch.float32, device=device)
        grad = torch.zeros_like(master)
        for name, p, s in zip(names, params, slices, strict=True):
            master[s] = p.detach().flatten()
            if p.dtype == torch.float32:
                p.data = master[s].view(p.shape)
                p.grad = grad[s].view(p.shape)
                p.register_post_accumulate_grad_hook(lambda _, name=name: self.seen.add(name))
            else:
                p.register_post_accumulate_grad_hook(lambda p, name=name, into=grad[s]: self._collect(p, name, into))
        master.grad = grad
        return _Group(names, params, master, grad, slices, lr_factor)

    def _collect(self, p: Tensor, name: str, into: Tensor) -> None:
        assert p.grad is not None
        into += p.grad.flatten()
        p.grad = None
        self.seen.add(name)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step, before the groups' factors."""
        for group, settings in zip(self.groups, self.adam.param_groups, strict=True):
            settings["lr"] = lr * group.lr_factor

    def grad_norm(self) -> Tensor:
        """Euclidean norm over all gradients, a scalar tensor."""
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.grad) for g in self.groups]))

    def scale_grads(self, by: Tensor | float) -> None:
        """Multiply all gradients."""
        for g in self.groups:
            g.grad.mul_(by)

    def step(self) -> None:
        """Move the masters, then round what is kept in 16 bits."""
        self.adam.step()
        for g in self.groups:
            for p, s in zip(g.params, g.slices, strict=True):
                if p.dtype != torch.float32:
                    p.data.copy_(g.master[s].view(p.shape))

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for g in self.groups:
            g.grad.zero_()

    @property
    def state_bytes(self) -> int:
        """Bytes of what `state_dict` holds."""
        return sum(3 * 4 * g.master.numel() for g in self.groups)

    def masters(self) -> dict[str, Tensor]:
        """fp32 values by name, as views in the parameters' shapes."""
        return {n: g.master[s].view(p.shape) for g in self.groups for n, p, s in zip(g.names, g.params, g.slices, strict=True)}

    def load_masters(self, values: Mapping[str, Tensor]) -> None:
        """Set what is trained, the 16-bit copies included."""
        for g in self.groups:
            for name, p, s in zip(g.names, g.params, g.slices, strict=True):
                g.master[s] = values[name].to(g.master.device).flatten()
                if p.dtype != torch.float32:
                    p.data.copy_(g.master[s].view(p.shape))

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (masters and both moments by name) and the step count: everything to go on from."""
        tensors, step = {}, 0.0
        for g, settings in zip(self.groups, self.adam.param_groups, strict=True):
            state = self.adam.state.get(settings["params"][0], {})
            step = float(state["step"]) if state else 0.0
            for name, p, s in zip(g.names, g.params, g.slices, strict=True):
                tensors[f"master|{name}"] = g.master[s].view(p.shape)
                for key in ("exp_avg", "exp_avg_sq"):
                    tensors[f"{key}|{name}"] = state[key][s].view(p.shape) if state else torch.zeros(p.shape)
        return tensors, {"step": step}

    def load_state_dict(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises LuthierError where the trained parameters are not the same."""
        want, have = {n for g in self.groups for n in g.names}, {k.partition("|")[2] for k in tensors}
        if want != have:
            odd = sorted(want ^ have)
            raise LuthierError(f"this checkpoint trains other parameters: {len(odd)} differ, for example {odd[0]!r}")
        self.load_masters({n: tensors[f"master|{n}"] for n in want})
        for g, settings in zip(self.groups, self.adam.param_groups, strict=True):
            flat = {k: torch.cat([tensors[f"{k}|{n}"].flatten() for n in g.names]).to(g.master.device) for k in ("exp_avg", "exp_avg_sq")}
            # The fused kernel keeps its step count beside the moments, as a tensor.
            step = torch.tensor(scalars["step"], device=g.master.device if g.master.device.type == "cuda" else "cpu")
            self.adam.state[settings["params"][0]] = {"step": step, **flat}


def default_lr(method: Method, width: int) -> tuple[float, str]:
    """Peak learning rate for a method on a base of this hidden width, and the sentence that explains it.

    Full fine-tuning: 5e-5 x (768 / width), at least 1e-5, from width 768 up (about 100 M parameters); below, 5e-5 x (768 / width)^2, since
    small models train well at far higher rates. A method's factor comes on top: about ten for LoRA ("LoRA Without Regret", 2025).
    """
    full = max(1e-5, 5e-5 * (768 / width) ** (1 if width >= 768 else 2))
    full = min(full, 2e-3)
    factor: float = getattr(method, "lr_factor", 1.0)
    lr = float(f"{full * factor:.1e}")
    return lr, f"{lr:g}: {full:.1e} for full fine-tuning at width {width}, times {factor:g} for this method"
