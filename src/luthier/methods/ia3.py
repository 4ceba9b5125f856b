"""(IA)3: learned vectors that rescale keys, values and the feed-forward's inner activations.

Liu et al., 2022, arXiv 2205.05638, section 3.3: l_k * K, l_v * V and W2 (l_ff * gamma(W1 x)), each vector starting at one, so the start is the base.

How it differs from the paper:
1. AdamW instead of Adafactor, and the task's own loss instead of the three of section 3.2.
2. Where query, key and value are rows of one matrix (GPT-2, GPT-NeoX, Phi-3), the vector covers all its rows, as in PEFT; a rescaled query does little
   that a rescaled key does not.
3. In a mixture of experts, which are no linears, only keys and values are rescaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core import Base, Delta, Incompatible
from ..deltas.layout import TOP, common, exactly, without
from ..deltas.outputs import at_sites
from ..modelling.anatomy import device_of, features
from ..modelling.site import Edit, site_at


class Rescale(Edit):
    """One vector (n,), fp32, over a linear's input or its output."""

    def __init__(self, module: nn.Module, on_input: bool):
        super().__init__()
        self.on_input = on_input
        n_in, n_out = features(module)
        self.vector = nn.Parameter(torch.ones(n_in if on_input else n_out, device=device_of(module)))

    def before(self, x: Tensor) -> Tensor:
        return x * self.vector.to(x.dtype) if self.on_input else x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.on_input else y * self.vector.to(y.dtype)

    def fold(self, weight: Tensor) -> Tensor:
        return weight * (self.vector if self.on_input else self.vector[:, None])

    def fold_bias(self, bias: Tensor) -> Tensor:
        return bias if self.on_input else bias * self.vector


@dataclass(frozen=True, kw_only=True)
class Method:
    """Learned rescaling."""

    edits: ClassVar[Literal["outputs"]] = "outputs"
    lr_factor: ClassVar[float] = 300.0  # thirty times LoRA's, as searched on E2E; 3e-3 on a 7B shape, which is the paper's

    targets: tuple[str, ...] = ("key", "value")
    """Linears whose output is rescaled; names as in lora's targets."""
    feedforward: tuple[str, ...] = ("down",)
    """Linears whose input is rescaled."""
    from_: str | None = None
    """Start from the delta saved in this adapter's or run's folder, instead of from ones."""

    def attach(self, base: Base, name: str) -> Delta:
        """Put a vector at every target. Raises Incompatible where a name means nothing, or both a target and a feed-forward."""
        inner = () if base.anatomy.experts and "down" not in base.anatomy.linears and self.feedforward == ("down",) else self.feedforward
        outputs, inputs = (base.anatomy.targets(base.model, names) if names else [] for names in (self.targets, inner))
        if both := set(outputs) & set(inputs):
            raise Incompatible(f"method.feedforward: {sorted(both)[0]} is also one of method.targets; rescale its input or its output")
        edits = {path: Rescale(site_at(base.model, path).base, path in inputs) for path in [*outputs, *inputs]}
        return at_sites(base, name, edits, export=lambda: _peft(base, edits))

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Method, dict[str, Tensor]]:
        """A PEFT IA3 directory as this method and its params: (1, n) vectors rescale an input, (n, 1) an output."""
        params = {key.removeprefix(TOP).removesuffix(".ia3_l"): v for key, v in tensors.items() if key.endswith(".ia3_l")}
        without({"tensors": sorted(set(tensors) - {f"{TOP}{p}.ia3_l" for p in params})}, ["tensors"], "IA3")
        inner = {path for path, v in params.items() if v.shape[0] == 1}
        targets, feedforward = (tuple(exactly(p) for p in sorted(paths)) for paths in (set(params) - inner, inner))
        return cls(targets=targets, feedforward=feedforward), {f"{path}:vector": v.flatten() for path, v in params.items()}


def _peft(base: Base, edits: dict[str, Rescale]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    inner = sorted(path for path, e in edits.items() if e.on_input)
    transposed = any(type(site_at(base.model, path).base).__name__ == "Conv1D" for path in edits)
    config = common(base, "IA3") | {"target_modules": sorted(edits), "feedforward_modules": inner, "fan_in_fan_out": transposed, "init_ia3_weights": True}
    return config, {f"{TOP}{p}.ia3_l": e.vector.detach()[None, :] if e.on_input else e.vector.detach()[:, None] for p, e in edits.items()}
