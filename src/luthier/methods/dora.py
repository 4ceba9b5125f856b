"""DoRA: y = m / ||W + s B A|| * (W + s B A) x, with a length m for every row trained beside A and B.

Liu et al., 2024, arXiv 2402.09353, eq. 5; the norm takes no gradient (section 4.3). m starts at the norms of W's rows, so the start is the base, bit for bit.

How it differs from the paper:
1. The paper writes W (in, out) and takes norms of columns; torch keeps (out, in), so they are of rows here. It is the same vector.
2. W + s B A is never made. By row, ||W + s B A||^2 = ||W||^2 + 2 s <B, W A^T> + s^2 <B (A A^T), B>, and W A^T is the base applied to the rows of A,
   however its weight is stored.
3. With dropout, the base's part of the change sees the dropped input too, as in PEFT. That costs a second product with W in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Base, Incompatible
from ..deltas.lowrank import Pair
from ..deltas.lowrank import from_peft as pairs_of
from ..modelling.packed import PackedLinear
from ..modelling.shards import gathered
from . import lora


class DoraEdit(lora.LoraEdit):
    """LoRA's term with a length for every row: magnitude (out,), fp32."""

    squares: Tensor  # (out,) squared norms of W's rows

    def __init__(self, module: nn.Module, rank: int, scale: float, dropout: float, dtype: torch.dtype):
        super().__init__(module, rank, scale, dropout)
        self.module, self.dtype = (module,), dtype  # in a tuple: the base is not a part of its edit
        self.register_buffer("squares", row_norms(module, dtype).square(), persistent=False)
        self.magnitude = nn.Parameter(self.norms())

    def plain(self, x: Tensor) -> Tensor:
        """W x, without the base's bias."""
        return self.less_bias(self.module[0](x))

    def less_bias(self, y: Tensor) -> Tensor:
        """The base's output (..., out) without its bias."""
        bias = getattr(self.module[0], "bias", None)
        return y if bias is None else y - bias

    @torch.no_grad()
    def norms(self) -> Tensor:
        """(out,) norms of the rows of W + s B A, fp32."""
        a, b = self.factors()
        wa = self.plain(a.to(self.dtype)).float().t()  # (out, rank): W A^T
        squares = self.squares + 2 * self.scale * (b * wa).sum(1) + self.scale**2 * ((b @ (a @ a.t())) * b).sum(1)
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    def pair(self) -> Pair:
        return Pair(*self.factors(), self.scale, magnitude=self.magnitude)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        ratio = self.magnitude / self.norms()  # exactly 1 at the start, so that what is added is exactly 0
        h = self.dropped(x)
        a, b = self.factors()
        low = nn.functional.linear(nn.functional.linear(h, a.to(x.dtype)), b.to(x.dtype))
        return y + (ratio - 1).to(x.dtype) * (self.less_bias(y) if h is x else self.plain(h)) + (self.scale * ratio).to(x.dtype) * low

    def term(self) -> None:
        return None  # the lengths multiply the base's output too

    def fold(self, weight: Tensor) -> Tensor:
        return (self.magnitude / self.norms())[:, None] * super().fold(weight)


@dataclass(frozen=True, kw_only=True)
class Method(lora.Method):
    """Weight-decomposed low-rank adaptation of linear layers; LoRA's settings."""

    def _linear(self, base: Base, path: str, module: nn.Module, rank: int, scale: float) -> DoraEdit:
        with gathered(module):
            edit = DoraEdit(module, rank, scale, self.dropout, base.model.dtype)  # type: ignore[arg-type]
        self._start(edit, path, module)
        return edit

    def _embedding(self, base: Base, path: str, rank: int, scale: float) -> Any:
        raise Incompatible(f"method.targets: dora takes linears, and {path} is the embedding (or a head that shares its matrix); method lora takes it")

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Method, dict[str, Tensor]]:
        """A PEFT directory with use_dora as this method and its params. Raises Incompatible, naming the feature, for what plain DoRA is not."""
        pairs = pairs_of(config, tensors)
        odd = next((path for path, p in pairs.items() if p.magnitude is None or p.embedding), None)
        if odd is not None:
            raise Incompatible(f"adapter_model.safetensors: {odd} has no lora_magnitude_vector of a linear layer, so it is not DoRA as `dora` reads it")
        params: dict[str, Tensor] = {}
        for path, p in pairs.items():
            assert p.magnitude is not None
            params |= {f"{path}:lora_A": p.a, f"{path}:lora_B": p.b, f"{path}:magnitude": p.magnitude}
        return cls(**lora.fields_of(config, pairs)), params


@torch.no_grad()
def row_norms(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """(out,) fp32 norms of the rows of a linear's weight; of codes, of the values they are computed with."""
    weight: Any = module.dense(dtype) if isinstance(module, PackedLinear) else module.weight
    return torch.linalg.vector_norm(weight, dim=0 if type(module).__name__ == "Conv1D" else 1, dtype=torch.float32)
